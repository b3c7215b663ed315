"""Scores of query–passage pairs by a cross-encoder of Hugging Face."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerBase

from retriever.config import ConfigError
from retriever.data.chunks import plan_chunks
from retriever.data.layout import pad_rows
from retriever.encoder.architectures import longest_input
from retriever.encoder.bundle import AUTOCAST_DTYPES, Precision
from retriever.encoder.pretrained import load_model, read_config
from retriever.encoder.tokenizer import pretrained_tokenizer
from scripts.stages import model_fingerprint


class CrossEncoder:
    """Reads a query and a passage together and gives their relevance as one number, unbounded, higher for the more
    relevant.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: PreTrainedTokenizerBase,
        max_tokens: int,
        precision: Precision,
        device: torch.device,
        name: str = "",
    ) -> None:
        """`name` stands for the weights in `description`."""
        self.description = f"{name}, {precision}, {max_tokens} tokens"
        self._model, self._tokenizer, self._max_tokens = model.to(device).eval(), tokenizer, max_tokens
        self._device, self._dtype = device, AUTOCAST_DTYPES[precision]

    @classmethod
    def load(
        cls, name_or_path: str | Path, *, max_tokens: int = 512, precision: Precision = "fp32", device: torch.device
    ) -> CrossEncoder:
        """A sequence classifier with one label, or two: then the score is the second's logit less the first's.

        `max_tokens` cuts longer pairs, the longer text first. Raises ConfigError where there is no such model, it lacks
        a weight or it does not fit.
        """
        name = str(name_or_path)
        model, tokenizer = load_classifier(name, "--teacher")
        if model.config.num_labels not in (1, 2):
            raise ConfigError(f"--teacher {name}: expected 1 or 2 labels, found {model.config.num_labels}")
        check_pair_length("--teacher-max-tokens", max_tokens, model, tokenizer)
        return cls(model, tokenizer, max_tokens, precision, device, model_fingerprint(name))

    @torch.no_grad()
    def score(self, queries: Sequence[str], passages: Sequence[str], tokens_per_batch: int) -> np.ndarray:
        """The scores [n] float32 of the pairs (queries[i], passages[i]), sorted by length into batches of at most
        `tokens_per_batch`.

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
                inputs["token_type_ids"] = pad_rows(
                    [np.asarray(pairs["token_type_ids"][i], dtype=np.int64) for i in rows], 0
                ).input_ids
            with torch.autocast(self._device.type, self._dtype) if self._dtype is not None else nullcontext():
                logits = self._model(
                    **{key: value.to(self._device) for key, value in inputs.items()}
                ).logits.float()  # [n, labels]
            scores[rows] = (logits[:, -1] - (logits[:, 0] if logits.shape[1] == 2 else 0)).cpu().numpy()
        return scores


def load_classifier(
    name: str, option: str, *, new_head: bool = False, **config: Any
) -> tuple[Any, PreTrainedTokenizerBase]:
    """A sequence classifier in fp32 with its tokenizer, from safetensors alone; `config` overrides entries of its
    configuration.

    With `new_head` the head and the pooler may be missing and are drawn from torch's generator. Raises ConfigError,
    which names `option` or the file, where there is no such model or tokenizer, or any other weight is missing or of
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
    if tokenizer.pad_token_id is not None:  # a decoder's head is read where the model's own begins
        model.config.pad_token_id = tokenizer.pad_token_id
    return model, tokenizer


def check_pair_length(option: str, max_tokens: int, model: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises ConfigError, which names `option`, where a pair may be longer than the model's positions or its
    tokenizer's length.
    """
    positions = longest_input(model.config) or tokenizer.model_max_length
    longest = min(positions, tokenizer.model_max_length)  # a huge number where the tokenizer names none
    if max_tokens > longest:
        raise ConfigError(f"{option}: expected at most {longest}, the model's length; received {max_tokens}")
