"""Texts to token ids, and the special tokens that go around them.

Texts are tokenised once, bare; the template adds special tokens and truncates when a chunk is built, so the
stored tokens serve any length limit. The result equals what the tokenizer gives at inference.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from retriever.config import ConfigError

Side = Literal["query", "passage"]
SIDES: tuple[Side, Side] = ("query", "passage")

_PROBES = ("retrieval", "a dense passage")


def tokenize_flat(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], dtype: npt.DTypeLike = np.uint32
) -> tuple[np.ndarray, np.ndarray]:
    """Token ids of texts, one text behind another [sum of counts] in `dtype`, and how many each has [n] int64.

    They are without special tokens and untruncated.

    A fast tokenizer uses all cores and lets go of the interpreter's lock meanwhile, so that a second thread can read
    its previous result.
    """
    if not is_plain(tokenizer):
        unread = {"return_attention_mask": False, "return_token_type_ids": False}
        whole = {"add_special_tokens": False, "truncation": False, "verbose": False}
        rows = tokenizer(list(texts), **whole, **unread)["input_ids"] if texts else []
        counts = np.fromiter(map(len, rows), np.int64, len(rows))
        return np.fromiter(chain.from_iterable(rows), dtype, int(counts.sum())), counts
    backend = tokenizer.backend_tokenizer
    if backend.truncation is not None:
        backend.no_truncation()
    if backend.padding is not None:
        backend.no_padding()
    if backend.encode_special_tokens != tokenizer.split_special_tokens:
        backend.encode_special_tokens = tokenizer.split_special_tokens
    encodings = backend.encode_batch_fast(list(texts), add_special_tokens=False)
    counts = np.fromiter(map(len, encodings), np.int64, len(encodings))  # [n]
    tokens = array(np.dtype(dtype).char)
    for encoding in encodings:
        tokens.fromlist(encoding.ids)
    return np.frombuffer(tokens, dtype), counts


def is_plain(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer is a fast one whose call does no more than its backend's."""
    kind = type(tokenizer)
    own = [
        method
        for method in ("__call__", "_encode_plus")
        if getattr(kind, method) is not getattr(PreTrainedTokenizerFast, method)
    ]
    return tokenizer.is_fast and not own


def described_tokenizer(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """The tokenizer's definition, without the padding and truncation that its last call left."""
    if tokenizer.is_fast:
        return json.loads(tokenizer.backend_tokenizer.to_str()) | {"truncation": None, "padding": None}
    special = str(tokenizer.special_tokens_map)
    return {"class": type(tokenizer).__name__, "vocabulary": tokenizer.get_vocab(), "special": special}


@dataclass(frozen=True)
class TokenTemplate:
    """The special tokens around a single text: `prefix + tokens + suffix`."""

    prefix: tuple[int, ...]
    suffix: tuple[int, ...]
    pad_id: int
    keep_end: bool = False  # the tokenizer truncates on the left

    @classmethod
    def from_tokenizer(cls, tokenizer: PreTrainedTokenizerBase) -> TokenTemplate:
        """Reads the template off two probe texts. Raises ConfigError where the tokenizer follows no such template."""
        name, found = type(tokenizer).__name__, set()
        for probe in _PROBES:
            bare = tokenizer(probe, add_special_tokens=False)["input_ids"]
            full = tokenizer(probe)["input_ids"]
            start = next((i for i in range(len(full) - len(bare) + 1) if full[i : i + len(bare)] == bare), None)
            if start is None:
                changed = f"{bare} is not inside {full}"
                raise ConfigError(f"model {name} changes a text's tokens when it adds special tokens: {changed}")
            found.add((tuple(full[:start]), tuple(full[start + len(bare) :])))
        if len(found) != 1:
            raise ConfigError(f"model {name} adds different special tokens to different texts: {sorted(found)}")
        prefix, suffix = found.pop()
        pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        if pad_id is None:
            raise ConfigError(
                f"model {name} has neither a padding nor an end-of-text token; "
                "set pad_token in its tokenizer_config.json"
            )
        return cls(prefix, suffix, int(pad_id), keep_end=tokenizer.truncation_side == "left")

    @property
    def special_tokens(self) -> int:
        """The number of tokens that the template adds to a text."""
        return len(self.prefix) + len(self.suffix)

    def lengths(self, bare_lengths: np.ndarray, max_tokens: int | np.ndarray) -> np.ndarray:
        """Lengths [n] int64 that texts of `bare_lengths` tokens have once wrapped; `max_tokens`: of all, or of each."""
        return np.minimum(bare_lengths, max_tokens - self.special_tokens) + self.special_tokens

    def wrap(self, tokens: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """`prefix + text + suffix` of many texts, one behind another [T] int64, and their lengths [n].

        tokens [sum of counts]: the texts' tokens, one text behind another, already cut; counts [n].
        """
        lengths = counts + self.special_tokens
        ends = np.cumsum(lengths)
        places = [ends - lengths + i for i in range(len(self.prefix))]
        places += [ends - len(self.suffix) + i for i in range(len(self.suffix))]
        wrapped = np.empty(lengths.sum(), dtype=np.int64)
        own = np.ones(len(wrapped), dtype=bool)  # where a text's own tokens go
        for place, token in zip(places, (*self.prefix, *self.suffix), strict=True):
            own[place], wrapped[place] = False, token
        wrapped[own] = tokens
        return wrapped, lengths
