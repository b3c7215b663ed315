"""Special tokens and truncation: what is stored and wrapped is what the tokenizer gives at inference."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from tokenizers import processors
from transformers import PreTrainedTokenizerFast

from retriever.data.tokens import TokenTemplate, tokenize_flat
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
        bare = [np.array(row, dtype=np.uint16) for row in _flat(tokenizer, [prompt + text for text in TEXTS])]
        for limit in (4, 5, 12, 256):
            wrapped = tokenizer([prompt + text for text in TEXTS], truncation=True, max_length=limit)["input_ids"]
            lengths = template.lengths(np.array([len(row) for row in bare]), limit)
            assert lengths.tolist() == [len(row) for row in wrapped]
            assert _wrapped(template, bare, limit) == wrapped
            cut += sum(len(row) + template.special_tokens > limit for row in bare)
    assert cut > 50, "the limits cut nothing: this proves nothing"


def _wrapped(template: TokenTemplate, bare: list[np.ndarray], limit: int) -> list[list[int]]:
    """Each text that `wrap` gives, of tokens cut as the tokenizer cuts them."""
    room = limit - template.special_tokens
    cut = [row[max(0, len(row) - room) :] if template.keep_end else row[:room] for row in bare]
    tokens, lengths = template.wrap(np.concatenate(cut), np.array([len(row) for row in cut]))
    assert tokens.dtype == np.int64 and len(tokens) == lengths.sum() and len(lengths) == len(bare)
    return [text.tolist() for text in np.split(tokens, lengths.cumsum()[:-1])]


def test_tokenising_does_not_depend_on_what_the_tokenizer_did_last() -> None:
    """A tokenizer that was last called with truncation and padding still gives whole texts."""
    tokenizer = tiny_tokenizer()
    fresh = tokenizer(TEXTS, add_special_tokens=False)["input_ids"]
    assert _flat(tokenizer, TEXTS) == fresh
    tokenizer(TEXTS, truncation=True, max_length=4, padding=True)
    assert _flat(tokenizer, TEXTS) == fresh
    assert _flat(tokenizer, []) == []


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


@pytest.mark.parametrize(
    ("full", "pad_id", "message"),
    [
        (lambda bare: [len(bare), *bare], 0, "different special tokens"),
        (lambda bare: [1, *reversed(bare)], 0, "changes a text's tokens"),
        (lambda bare: bare, None, "pad_token"),
    ],
)
def test_tokenizers_without_a_template_are_refused(full: Any, pad_id: int | None, message: str) -> None:
    """A guessed template would train on other tokens than inference uses: each case is an error that says why."""
    tokenizer: Any = _Changed(full)
    tokenizer.pad_token_id = pad_id
    with pytest.raises(ValueError, match=message):
        TokenTemplate.from_tokenizer(tokenizer)


def test_a_tokenizer_without_special_tokens_has_an_empty_template() -> None:
    """GPT-2 adds nothing to a text; its end-of-text token pads where it has no padding token."""
    tokenizer = tiny_tokenizer("gpt2")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A", pair="$A $B", special_tokens=[]
    )
    tokenizer.pad_token = None
    template = TokenTemplate.from_tokenizer(tokenizer)
    assert (template.prefix, template.suffix, template.pad_id) == ((), (), tokenizer.eos_token_id)
    tokens, lengths = template.wrap(np.array([7, 65535, 9], dtype=np.uint16), np.array([2, 0, 1]))
    assert tokens.dtype == np.int64 and (tokens.tolist(), lengths.tolist()) == ([7, 65535, 9], [2, 0, 1])


def test_special_tokens_of_a_longer_template_stand_in_their_order() -> None:
    """Two before and two after each text; of no text at all there is nothing."""
    template = TokenTemplate((101, 5), (7, 102), pad_id=0)
    tokens, lengths = template.wrap(np.array([30, 31, 40], np.uint16), np.array([2, 0, 1]))
    assert tokens.tolist() == [101, 5, 30, 31, 7, 102, 101, 5, 7, 102, 101, 5, 40, 7, 102]
    assert lengths.tolist() == [6, 4, 5]
    tokens, lengths = template.wrap(np.empty(0, np.uint16), np.empty(0, np.int64))
    assert (tokens.tolist(), lengths.tolist()) == ([], [])
