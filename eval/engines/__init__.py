"""Search engines: exact (FAISS or torch), approximate (FAISS indexes), BM25."""
