"""Indexes over passage embeddings, by name. `flat` is exact: FAISS's IndexFlatIP in float32."""

from __future__ import annotations

from collections.abc import Callable

import faiss

from retriever.config import ConfigError

_INDEXES: dict[str, Callable[[int], faiss.Index]] = {"flat": faiss.IndexFlatIP}


def build_index(name: str, dimension: int) -> faiss.Index:
    """An empty inner-product index for float32 vectors [n, dimension].

    Raises ConfigError where `name` is not `flat` (no approximate index is available in this version).
    """
    if name not in _INDEXES:
        raise ConfigError(f"eval.index (--index): expected one of {', '.join(_INDEXES)}; received {name!r}, not available in this version")
    return _INDEXES[name](dimension)
