"""Special tokens and truncation: what is stored and wrapped is what the tokenizer gives at inference."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from tokenizers import processors
from transformers import PreTrainedTokenizerFast

from retriever.data.tokens import TokenTemplate, tokenize_batch, tokenize_flat
from tests.tiny import ARCHITECTURES, DECODERS, random_texts, tiny_tokenizer

TEXTS = ["", "river", *random_texts(20, longest=24, seed=1), "unknown çharacters & punctuation!?"]
PROMPTS = ["", "query: ", "find the passage that answers: "]


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
@pytest.mark.parametrize("side", ["left", "right"])
def test_wrapped_tokens_equal_the_tokenizers_own(architecture: str, side: str) -> None:
    """wrap(tokenize(prompt + text)) == tokenizer(prompt + text, truncation=True, max_length), of the length that
    `lengths` foretells.
    """
    tokenizer = tiny_tokenizer(architecture)
    tokenizer.truncation_side = side
    template = TokenTemplate.from_tokenizer(tokenizer)
    assert template.special_tokens == (1 if architecture in DECODERS else 2)
    assert template.pad_id == tokenizer.pad_token_id
    cut = 0
    for prompt in PROMPTS:
        bare = [np.array(row, dtype=np.uint16) for row in tokenize_batch(tokenizer, TEXTS, prompt)]
        for limit in (4, 5, 12, 256):
            wrapped = [template.wrap(row, limit).tolist() for row in bare]
            assert (
                wrapped == tokenizer([prompt + text for text in TEXTS], truncation=True, max_length=limit)["input_ids"]
            )
            lengths = template.lengths(np.array([len(row) for row in bare]), limit)
            assert lengths.tolist() == [len(row) for row in wrapped]
            assert _wrapped_together(template, bare, limit) == _packed_together(template, bare, limit) == wrapped
            cut += sum(len(row) + template.special_tokens > limit for row in bare)
    assert cut > 50, "the limits cut nothing: this proves nothing"


def _wrapped_together(template: TokenTemplate, bare: list[np.ndarray], limit: int) -> list[list[int]]:
    """The rows of `wrap_rows`, which a chunk is built by, without their padding."""
    room = limit - template.special_tokens
    cut = [row[max(0, len(row) - room) :] if template.keep_end else row[:room] for row in bare]
    ids, mask = template.wrap_rows(np.concatenate(cut), np.array([len(row) for row in cut]))
    assert ids.dtype == mask.dtype == np.int64 and ids.shape == mask.shape and mask.sum(axis=1).max() == ids.shape[1]
    assert np.all(ids[mask == 0] == template.pad_id)
    assert np.all(np.diff(mask, axis=1) <= 0), "padding stands on the right"
    return [row[m.astype(bool)].tolist() for row, m in zip(ids, mask, strict=True)]


def _packed_together(template: TokenTemplate, bare: list[np.ndarray], limit: int) -> list[list[int]]:
    """The texts of `pack_rows`, cut at its starts."""
    room = limit - template.special_tokens
    cut = [row[max(0, len(row) - room) :] if template.keep_end else row[:room] for row in bare]
    ids, starts, positions = template.pack_rows(np.concatenate(cut), np.array([len(row) for row in cut]))
    assert (ids.dtype, starts.dtype, positions.dtype) == (np.int64, np.int32, np.int64)
    assert len(starts) == len(bare) + 1 and starts[0] == 0 and starts[-1] == len(ids) == len(positions)
    texts = [slice(first, last) for first, last in pairwise(starts.tolist())]
    assert [positions[text].tolist() for text in texts] == [list(range(text.stop - text.start)) for text in texts]
    return [ids[text].tolist() for text in texts]


def test_tokenising_does_not_depend_on_what_the_tokenizer_did_last() -> None:
    """A tokenizer that was last called with truncation and padding still gives whole texts."""
    tokenizer = tiny_tokenizer()
    fresh, flat = tokenize_batch(tokenizer, TEXTS), _flat(tokenizer, TEXTS)
    assert flat == fresh
    tokenizer(TEXTS, truncation=True, max_length=4, padding=True)
    assert _flat(tokenizer, TEXTS) == fresh
    tokenizer(TEXTS, truncation=True, max_length=4, padding=True)
    assert tokenize_batch(tokenizer, TEXTS) == fresh
    assert tokenize_batch(tokenizer, []) == _flat(tokenizer, []) == []


def _flat(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    """The rows of `tokenize_flat`."""
    tokens, counts = tokenize_flat(tokenizer, texts, np.uint16)
    assert (tokens.dtype, counts.dtype, len(tokens)) == (np.uint16, np.int64, counts.sum())
    return [row.tolist() for row in np.split(tokens, np.cumsum(counts)[:-1])] if texts else []


class _Shouting(PreTrainedTokenizerFast):
    """A fast tokenizer whose call does more than its backend's."""

    def __call__(self, text: Any, *args: Any, **kwargs: Any) -> Any:
        return super().__call__([f"{t} river" for t in text], *args, **kwargs)


def test_flat_tokens_are_those_of_the_tokenizers_own_call() -> None:
    """Whatever its class does around its backend, and where a text writes a special token out: both ways of splitting
    it.
    """
    plain = tiny_tokenizer()
    shouting = _Shouting(
        tokenizer_object=plain.backend_tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
    )
    assert _flat(shouting, TEXTS) == plain([f"{text} river" for text in TEXTS], add_special_tokens=False)["input_ids"]
    texts, found = ["a river [SEP] storm", "", "[CLS]"], []
    for split in (True, False):
        plain.split_special_tokens = split
        found.append(_flat(plain, texts))
        assert found[-1] == plain(texts, add_special_tokens=False)["input_ids"]
    assert found[0] != found[1]
    assert _flat(plain, ["", ""]) == [[], []]


class _Changed:
    """A tokenizer whose special tokens depend on the text, or that changes a text when it adds them."""

    truncation_side = "right"
    pad_token_id: int | None = 0
    eos_token_id: int | None = None

    def __init__(self, full: Any) -> None:
        self._full = full

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        bare = [ord(c) for c in text]
        return {"input_ids": self._full(bare) if add_special_tokens else bare}


def test_tokenizers_without_a_template_are_refused() -> None:
    """A guessed template would train on other tokens than inference uses: each case is an error that says why."""
    with pytest.raises(ValueError, match="different special tokens"):
        TokenTemplate.from_tokenizer(_Changed(lambda bare: [len(bare), *bare]))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="changes a text's tokens"):
        TokenTemplate.from_tokenizer(_Changed(lambda bare: [1, *reversed(bare)]))  # type: ignore[arg-type]
    without_padding = _Changed(lambda bare: bare)
    without_padding.pad_token_id = None
    with pytest.raises(ValueError, match="pad_token"):
        TokenTemplate.from_tokenizer(without_padding)  # type: ignore[arg-type]


def test_a_tokenizer_without_special_tokens_has_an_empty_template() -> None:
    """GPT-2 adds nothing to a text; its end-of-text token pads where it has no padding token."""
    tokenizer = tiny_tokenizer("gpt2")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A", pair="$A $B", special_tokens=[]
    )
    tokenizer.pad_token = None
    template = TokenTemplate.from_tokenizer(tokenizer)
    assert (template.prefix, template.suffix, template.pad_id) == ((), (), tokenizer.eos_token_id)
    wrapped = template.wrap(np.array([7, 65535], dtype=np.uint16), 4)
    assert wrapped.dtype == np.int64 and wrapped.tolist() == [7, 65535]
    ids, mask = template.wrap_rows(np.array([7, 65535, 9], dtype=np.uint16), np.array([2, 1]))
    assert ids.tolist() == [[7, 65535], [9, template.pad_id]] and mask.tolist() == [[1, 1], [1, 0]]
    ids, starts, positions = template.pack_rows(np.array([7, 65535, 9], dtype=np.uint16), np.array([2, 0, 1]))
    assert (ids.tolist(), starts.tolist(), positions.tolist()) == ([7, 65535, 9], [0, 2, 2, 3], [0, 1, 0])


def test_special_tokens_of_a_longer_template_stand_in_their_order() -> None:
    """Two before and two after each text; no text at all packs to nothing."""
    template = TokenTemplate((101, 5), (7, 102), pad_id=0)
    ids, starts, positions = template.pack_rows(np.array([30, 31, 40], np.uint16), np.array([2, 0, 1]))
    assert ids.tolist() == [101, 5, 30, 31, 7, 102, 101, 5, 7, 102, 101, 5, 40, 7, 102]
    assert starts.tolist() == [0, 6, 10, 15] and positions.tolist() == [*range(6), *range(4), *range(5)]
    ids, starts, positions = template.pack_rows(np.empty(0, np.uint16), np.empty(0, np.int64))
    assert (ids.tolist(), starts.tolist(), positions.tolist()) == ([], [0], [])
