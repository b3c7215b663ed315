"""Hard negatives for training data: candidates from retrievers, scores from a teacher, filters, and the file that is
trained on.
"""
