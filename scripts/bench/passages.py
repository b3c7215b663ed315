"""Random passages of MS MARCO's lengths, as token ids and as text, and the tokenizer that converts between the two."""

from __future__ import annotations

from string import ascii_lowercase

import numpy as np
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

VOCABULARY = 30_522  # BERT's
_SPECIALS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
_LETTERS = 5


def passage_lengths(n: int, generator: np.random.Generator) -> np.ndarray:
    """Tokens [n] int64 of passages, special tokens included: lognormal(ln 70, 0.42), clipped to 16 … 256."""
    return np.clip(generator.lognormal(np.log(70), 0.42, n), 16, 256).astype(np.int64)


def word_tokenizer(max_tokens: int = 256, vocabulary: int = VOCABULARY) -> PreTrainedTokenizerFast:
    """BERT's tokenizer with a made-up vocabulary: every token but the special ones is a word of five letters."""
    ids = {token: row for row, token in enumerate((*_SPECIALS, *_words(vocabulary - len(_SPECIALS))))}
    backend = Tokenizer(models.WordPiece(ids, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    ends = [(token, ids[token]) for token in ("[CLS]", "[SEP]")]
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=ends
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        model_max_length=max_tokens,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
    )


def random_passages(n: int, seed: int = 0, vocabulary: int = VOCABULARY) -> tuple[list[str], np.ndarray]:
    """n texts, and the number of tokens [n] that `word_tokenizer` makes of each, special tokens included."""
    generator = np.random.default_rng(seed)
    lengths = passage_lengths(n, generator)
    words = np.array(_words(vocabulary - len(_SPECIALS)), dtype=object)
    drawn = words[generator.integers(len(words), size=int(lengths.sum()) - 2 * n)]
    return [" ".join(part) for part in np.split(drawn, np.cumsum(lengths - 2)[:-1])], lengths


def _words(count: int) -> list[str]:
    """Distinct words, spread over the alphabet."""
    base = len(ascii_lowercase)
    step = base**_LETTERS // count
    places = [base**place for place in reversed(range(_LETTERS))]
    return ["".join(ascii_lowercase[n * step // place % base] for place in places) for n in range(count)]
