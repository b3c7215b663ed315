"""Retrieval evaluation: encode, search, measure."""
