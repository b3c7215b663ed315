"""Retrieval evaluation: encode, search, measure."""

import retriever  # noqa: F401 (before any module of `kernels`, so that these are ours)
