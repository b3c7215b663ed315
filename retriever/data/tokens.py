"""Texts to token ids, and the special tokens that go around them.

Texts are tokenised once, bare; the template adds special tokens and truncates when a chunk is built, so the
stored tokens serve any length limit. The result equals what the tokenizer gives at inference.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Literal

import numpy as np
import numpy.typing as npt
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from retriever.config import ConfigError

Side = Literal["query", "passage"]
SIDES: tuple[Side, Side] = ("query", "passage")

_PROBES = ("retrieval", "a dense passage")


def tokenize_batch(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], prompt: str = "") -> list[list[int]]:
    """Token ids of `prompt + text` for each text, without special tokens and untruncated."""
    if not texts:
        return []
    encoded = tokenizer(
        [prompt + text for text in texts],
        add_special_tokens=False,
        truncation=False,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )
    return encoded["input_ids"]


def tokenize_flat(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], dtype: npt.DTypeLike = np.uint32
) -> tuple[np.ndarray, np.ndarray]:
    """Token ids of many texts one behind another [sum of counts] in `dtype`, and how many each has [n] int64; as
    `tokenize_batch`.

    A fast tokenizer uses all cores and lets go of the interpreter's lock meanwhile, so that a second thread can read
    its previous result.
    """
    if not is_plain(tokenizer):
        rows = tokenize_batch(tokenizer, texts)
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


@dataclass(frozen=True)
class TokenTemplate:
    """What a tokenizer puts before and after a single text: `prefix + tokens + suffix`."""

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
                raise ConfigError(
                    f"model {name} changes a text's tokens when it adds special tokens: {bare} is not inside {full}"
                )
            found.add((tuple(full[:start]), tuple(full[start + len(bare) :])))
        if len(found) != 1:
            raise ConfigError(f"model {name} adds different special tokens to different texts: {sorted(found)}")
        prefix, suffix = found.pop()
        pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        if pad_id is None:
            raise ConfigError(
                f"model {name} has neither a padding nor an end-of-text token; set pad_token in its tokenizer_config.json"
            )
        return cls(prefix, suffix, int(pad_id), keep_end=tokenizer.truncation_side == "left")

    @property
    def special_tokens(self) -> int:
        """How many tokens the template adds to a text."""
        return len(self.prefix) + len(self.suffix)

    def lengths(self, bare_lengths: np.ndarray, max_tokens: int) -> np.ndarray:
        """Lengths [n] int64 that texts of `bare_lengths` tokens have once wrapped."""
        return np.minimum(bare_lengths, max_tokens - self.special_tokens) + self.special_tokens

    def wrap(self, tokens: np.ndarray, max_tokens: int) -> np.ndarray:
        """`prefix + tokens + suffix` [at most max_tokens] int64; tokens are cut where they do not fit."""
        room = max_tokens - self.special_tokens
        kept = tokens[max(0, len(tokens) - room) :] if self.keep_end else tokens[:room]
        return np.concatenate([self.prefix, kept, self.suffix]).astype(np.int64)

    def wrap_rows(self, tokens: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """input_ids and attention mask [n, longest] int64, padded on the right: as `wrap`, for many texts at once.

        tokens [sum of counts]: the texts' tokens one after the other, already cut; counts [n].
        """
        start, end = len(self.prefix), len(self.prefix) + counts  # of the text's own tokens in each row
        column = np.arange((end + len(self.suffix)).max(initial=0))[None, :]
        input_ids = np.full((len(counts), column.shape[1]), self.pad_id, dtype=np.int64)
        input_ids[:, :start] = self.prefix
        input_ids[(column >= start) & (column < end[:, None])] = tokens
        for place, token in enumerate(self.suffix):
            input_ids[np.arange(len(counts)), end + place] = token
        return input_ids, (column < (end + len(self.suffix))[:, None]).astype(np.int64)

    def pack_rows(self, tokens: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """input_ids [T] int64, starts [n + 1] int32, positions [T] int64: as `wrap`, for many texts at once, one behind
        another.

        tokens [sum of counts]: the texts' tokens one after the other, already cut; counts [n]. Text i is
        input_ids[starts[i] : starts[i + 1]], and its positions count from 0.
        """
        lengths = counts + self.special_tokens  # [n]
        starts = np.zeros(len(counts) + 1, dtype=np.int32)
        np.cumsum(lengths, out=starts[1:])
        positions = np.arange(starts[-1]) - np.repeat(starts[:-1], lengths)  # [T]
        input_ids = np.empty(len(positions), dtype=np.int64)
        own = np.ones(len(positions), dtype=bool)  # where a text's own tokens go
        for place, token in enumerate(self.prefix):
            own[starts[:-1] + place] = False
            input_ids[starts[:-1] + place] = token
        for place, token in enumerate(reversed(self.suffix), start=1):
            own[starts[1:] - place] = False
            input_ids[starts[1:] - place] = token
        input_ids[own] = tokens
        return input_ids, starts, positions
