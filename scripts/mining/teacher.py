"""Scores of query–passage pairs by a cross-encoder of Hugging Face."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedTokenizerBase

from retriever.config import ConfigError
from retriever.data.chunks import plan_chunks
from retriever.data.layout import pad_rows
from retriever.encoder.bundle import AUTOCAST_DTYPES, Precision
from scripts.stages import model_fingerprint


class CrossEncoder:
    """Reads a query and a passage together and gives their relevance as one number, unbounded, higher for the more relevant."""

    def __init__(
        self, model: Any, tokenizer: PreTrainedTokenizerBase, max_tokens: int, precision: Precision, device: torch.device, name: str = ""
    ) -> None:
        """`name` stands for the weights in `description`."""
        self.description = f"{name}, {precision}, {max_tokens} tokens"
        self._model, self._tokenizer, self._max_tokens = model.to(device).eval(), tokenizer, max_tokens
        self._device, self._dtype = device, AUTOCAST_DTYPES[precision]

    @classmethod
    def load(cls, name_or_path: str | Path, *, max_tokens: int = 512, precision: Precision = "fp32", device: torch.device) -> CrossEncoder:
        """A sequence classifier with one label, or two: then the score is the second's logit less the first's.

        `max_tokens` cuts longer pairs, the longer text first. Raises ConfigError where there is no such model or it does not fit.
        """
        name = str(name_or_path)
        try:
            model = AutoModelForSequenceClassification.from_pretrained(name, dtype=torch.float32, trust_remote_code=False)
            tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        except (OSError, ValueError) as error:
            raise ConfigError(f"--teacher {name}: expected a sequence classification model with its tokenizer: {error}") from error
        if model.config.num_labels not in (1, 2):
            raise ConfigError(f"--teacher {name}: expected 1 or 2 labels, found {model.config.num_labels}")
        if max_tokens > tokenizer.model_max_length:
            raise ConfigError(
                f"--teacher-max-tokens: expected at most {tokenizer.model_max_length}, the model's length; received {max_tokens}"
            )
        return cls(model, tokenizer, max_tokens, precision, device, model_fingerprint(name))

    @torch.no_grad()
    def score(self, queries: Sequence[str], passages: Sequence[str], tokens_per_batch: int) -> np.ndarray:
        """The scores [n] float32 of the pairs (queries[i], passages[i]), sorted by length into batches of at most `tokens_per_batch`.

        The same call gives the same bits on the same machine with the same number of threads.
        """
        scores = np.empty(len(queries), dtype=np.float32)
        if not len(queries):
            return scores
        pairs = self._tokenizer(list(queries), list(passages), truncation=True, max_length=self._max_tokens)
        lengths = np.array([len(row) for row in pairs["input_ids"]], dtype=np.int64)
        pad_id = self._tokenizer.pad_token_id or 0
        for rows in plan_chunks(lengths, max(tokens_per_batch, int(lengths.max()))):
            tokens = pad_rows([np.asarray(pairs["input_ids"][i], dtype=np.int64) for i in rows], pad_id)
            inputs = {"input_ids": tokens.input_ids, "attention_mask": tokens.attention_mask}
            if "token_type_ids" in pairs:
                inputs["token_type_ids"] = pad_rows([np.asarray(pairs["token_type_ids"][i], dtype=np.int64) for i in rows], 0).input_ids
            with torch.autocast(self._device.type, self._dtype) if self._dtype is not None else nullcontext():
                logits = self._model(**{key: value.to(self._device) for key, value in inputs.items()}).logits.float()  # [n, labels]
            scores[rows] = (logits[:, -1] - (logits[:, 0] if logits.shape[1] == 2 else 0)).cpu().numpy()
        return scores
