"""Mining of hard negatives: candidates from retrievers, scores from teachers, filters, and the training file."""
