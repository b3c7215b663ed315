"""Scores of query–passage pairs by a Hugging Face cross-encoder."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerBase
from transformers.data.data_collator import pad_without_fast_tokenizer_warning

from retriever.config import ConfigError
from retriever.data.chunks import plan_chunks
from retriever.encoder.architectures import longest_input
from retriever.encoder.bundle import AUTOCAST_DTYPES, Precision
from retriever.encoder.pretrained import load_model, read_config
from retriever.encoder.tokenizer import pretrained_tokenizer
from scripts.stages import model_fingerprint


class CrossEncoder:
    """Scores the relevance of a passage to a query by reading both together. Scores are unbounded; higher is more
    relevant.
    """

    def __init__(
        self, name_or_path: str | Path, *, max_tokens: int = 512, precision: Precision = "fp32", device: torch.device
    ) -> None:
        """Loads a sequence classifier with one label, or with two; then the score is the second logit minus the first.

        Pairs longer than `max_tokens` are cut, the longer text first. Raises ConfigError if there is no such model, if
        it lacks a weight or if it takes shorter pairs only.
        """
        name = str(name_or_path)
        model, self._tokenizer = load_classifier(name, "--teacher")
        if model.config.num_labels not in (1, 2):
            raise ConfigError(f"--teacher {name}: expected 1 or 2 labels, found {model.config.num_labels}")
        check_pair_length("--teacher-max-tokens", max_tokens, model, self._tokenizer)
        self.description = f"{model_fingerprint(name)}, {precision}, {max_tokens} tokens"
        self._model, self._max_tokens = model.to(device).eval(), max_tokens
        self._device, self._dtype = device, AUTOCAST_DTYPES[precision]

    @torch.no_grad()
    def score(self, queries: Sequence[str], passages: Sequence[str], tokens_per_batch: int) -> np.ndarray:
        """Scores [n] float32 of the pairs (queries[i], passages[i]), which are sorted by length into batches of at most
        `tokens_per_batch` tokens.

        The same call gives the same bits on the same machine with the same number of threads.
        """
        scores = np.empty(len(queries), dtype=np.float32)
        if not len(queries):
            return scores
        pairs = self._tokenizer(list(queries), list(passages), truncation=True, max_length=self._max_tokens)
        lengths = np.array([len(row) for row in pairs["input_ids"]], dtype=np.int64)
        for rows in plan_chunks(lengths, max(tokens_per_batch, int(lengths.max()))):
            chosen = {key: [values[i] for i in rows] for key, values in pairs.items()}
            inputs = pad_without_fast_tokenizer_warning(self._tokenizer, chosen, return_tensors="pt").to(self._device)
            with torch.autocast(self._device.type, self._dtype) if self._dtype is not None else nullcontext():
                logits = self._model(**inputs).logits.float()  # [n, labels]
            scores[rows] = (logits[:, -1] - (logits[:, 0] if logits.shape[1] == 2 else 0)).cpu().numpy()
        return scores


def load_classifier(
    name: str, option: str, *, new_head: bool = False, **config: Any
) -> tuple[Any, PreTrainedTokenizerBase]:
    """A sequence classifier in fp32 and its tokenizer, from safetensors only. `config` overrides entries of the
    configuration.

    With `new_head` the head and the pooler may be missing; they are drawn from torch's generator. Raises ConfigError,
    which names `option` or the file, if there is no such model or tokenizer, or if another weight is missing or has
    another shape.
    """
    settings = read_config(name, **config)
    tokenizer = pretrained_tokenizer(settings, name)
    model, missing = load_model(AutoModelForSequenceClassification, settings, name, "")
    body = f"{model.base_model_prefix}."
    drawn = {key for key in missing if new_head and (not key.startswith(body) or key.startswith(f"{body}pooler."))}
    if lacking := sorted({*missing} - drawn):
        expected = "all but those of the head and the pooler" if new_head else "all, those of a trained head too"
        raise ConfigError(f"{option} {name}: lacks {len(lacking)} weights, {lacking[0]} first; expected {expected}")
    if model.config.pad_token_id is None and tokenizer.pad_token_id is None:
        raise ConfigError(f"{option} {name}: expected a padding token; set pad_token in its tokenizer_config.json")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(model.config.pad_token_id)
    tokenizer.padding_side = "right"
    model.config.pad_token_id = tokenizer.pad_token_id  # a decoder's head is read where the padding begins
    return model, tokenizer


def check_pair_length(option: str, max_tokens: int, model: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises ConfigError, which names `option`, if `max_tokens` exceeds the model's positions or the tokenizer's
    length.
    """
    positions = longest_input(model.config) or tokenizer.model_max_length
    longest = min(positions, tokenizer.model_max_length)  # a huge number where the tokenizer names none
    if max_tokens > longest:
        raise ConfigError(f"{option}: expected at most {longest}, the model's length; received {max_tokens}")
