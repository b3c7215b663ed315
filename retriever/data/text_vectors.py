"""Another model's vectors of the training texts: which negatives a guide rules out, and a teacher's embeddings."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from kernels.infonce.rules import Guide
from retriever.config import LossConfig
from retriever.data.records import DataError
from retriever.data.text_table import load_array

FILES = "queries.npy", "passages.npy"


class TeacherVectors(NamedTuple):
    """A teacher's embeddings of a batch's texts."""

    queries: Tensor  # [B, D] float16
    passages: Tensor  # [N, D] float16


class TextVectors:
    """Vectors [rows, G] float16 of every query and passage of a store, memory-mapped."""

    def __init__(self, folder: Path) -> None:
        self.queries, self.passages = (load_array(folder / name) for name in FILES)

    def of(self, query_rows: np.ndarray, passage_rows: np.ndarray) -> TeacherVectors:
        """The vectors of query rows [B] and passage rows [N]."""
        return TeacherVectors(*map(torch.from_numpy, (self.queries[query_rows], self.passages[passage_rows])))

    def guide(self, query_rows: np.ndarray, passage_rows: np.ndarray, positives: np.ndarray, loss: LossConfig) -> Guide:
        """The vectors of query rows [B] and passage rows [N], made by `guide_vectors`, and each query's limit.

        The limit is the similarity of the query's positive, row positives [B] of the passages, less
        `loss.guide_margin` or less this share of it. Raises DataError for a share of a similarity that is not above 0.
        """
        queries, passages = self.of(query_rows, passage_rows)
        targets = (queries.float() * passages[torch.from_numpy(positives)].float()).sum(dim=1)  # [B], exact
        if loss.guide_margin_kind == "absolute":
            return Guide(queries, passages, targets - loss.guide_margin)
        least = float(targets.min()) if len(targets) else 1.0
        if loss.guide_margin > 0 and least <= 0:
            row = int(query_rows[int(targets.argmin())])
            raise DataError(
                f"by loss.guide, query {row} of the store and its positive have a similarity of {least:.3f}; expected "
                "one above 0 with loss.guide_margin_kind=relative: use absolute, or leave the pair out"
            )
        return Guide(queries, passages, targets * (1.0 - loss.guide_margin))
