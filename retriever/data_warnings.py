"""What is probably wrong with the training data, found on samples of the store before step 1."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from transformers import PreTrainedTokenizerBase

from retriever.config import Config
from retriever.config_sources import text_kinds
from retriever.data.encoded import row_hashes
from retriever.data.planner import Planner
from retriever.data.relations import PASSAGE_BITS
from retriever.data.store import Store
from retriever.data.text_table import TokenRows
from retriever.data.tokens import SIDES, tokenize_flat
from retriever.summary import prompt_tokens
from retriever.wording import counted

_PAIRS = 1 << 21  # that are compared with one another, about
_QUERIES = 1 << 21  # that evaluation queries are compared with
_TEXTS = 20_000  # of a side whose tokens are counted
_TOKENS = 64  # of a text that are looked at, behind its prompt
_BATCHES = 3
_REPEATED, _SHARED, _UNKNOWN, _LEAKED = 0.01, 0.2, 0.01, 0.01  # shares that are told


def data_warnings(
    config: Config,
    tokenizer: PreTrainedTokenizerBase,
    store: Store,
    planner: Planner,
    eval_queries: Mapping[str, Sequence[str]],
) -> list[str]:
    """What each warning says to change. `eval_queries`: the texts of each evaluation's queries, under its name."""
    return [
        *_repeated_pairs(store),
        *_shared_texts(config, store, planner),
        *_unknown_tokens(config, tokenizer, store),
        *_leaked_queries(config, tokenizer, store, eval_queries),
    ]


def _repeated_pairs(store: Store) -> Iterator[str]:
    """Pairs of equal texts: those of a part of the passages are compared."""
    ptr, ids = store.positives
    places = np.flatnonzero(ids % (1 + len(ids) // _PAIRS) == 0)
    queries = store.same_text[np.searchsorted(ptr, places, side="right") - 1]
    share = 1 - len(np.unique(queries << PASSAGE_BITS | ids[places])) / max(1, len(places))
    if share >= _REPEATED:
        yield f"data.train: {share:.1%} of the pairs repeat an earlier pair; remove them, or an epoch repeats them too"


def _shared_texts(config: Config, store: Store, planner: Planner) -> Iterator[str]:
    """Queries of the first batches that bring no passage, or no text, of their own."""
    shared = unmasked = total = 0
    for step in range(min(_BATCHES, planner.steps_per_epoch)):
        batch = planner.plan(step)
        rows, first = np.unique(batch.queries, return_index=True)
        texts, targets = store.same_text[rows], batch.targets[first]
        shared += int((_is_repeated(texts) | _is_repeated(targets)).sum())
        different = np.unique(texts << PASSAGE_BITS | targets) >> PASSAGE_BITS  # a text for each of its positives
        unmasked += int(np.isin(texts, different[_is_repeated(different)]).sum())
        total += len(rows)
    of_batch = "of the queries of a batch share their text"
    if unmasked and not config.loss.mask_known_positives:
        found = f"{unmasked / total:.1%} {of_batch} with another query of it"
        yield f"loss.mask_known_positives=false: {found}, whose positive is a negative of theirs then; set it to true"
    elif shared >= _SHARED * total:
        found = f"{shared / total:.1%} {of_batch} or positive with another query of it"
        yield f"data.train: {found}, and bring it no negative; remove repeated texts, or lower batch.queries"


def _is_repeated(values: np.ndarray) -> np.ndarray:
    """Which of `values` [n] occur more than once: bool [n]."""
    _, places, counts = np.unique(values, return_inverse=True, return_counts=True)
    return counts[places] > 1


def _unknown_tokens(config: Config, tokenizer: PreTrainedTokenizerBase, store: Store) -> Iterator[str]:
    if tokenizer.unk_token_id is None:
        return
    for side in SIDES:
        texts = store.queries if side == "query" else store.passages
        tokens, _ = texts.gather(_sampled(len(texts), _TEXTS), _TOKENS)
        share = float(np.mean(tokens == tokenizer.unk_token_id)) if len(tokens) else 0.0
        if share >= _UNKNOWN:
            what = "queries" if side == "query" else "passages"
            yield (
                f"model.name_or_path={config.model.name_or_path}: {share:.1%} of the tokens of the {what} are unknown "
                f"to its tokenizer ({tokenizer.unk_token}); choose a model that was trained on their language"
            )


def _leaked_queries(
    config: Config,
    tokenizer: PreTrainedTokenizerBase,
    store: Store,
    eval_queries: Mapping[str, Sequence[str]],
) -> Iterator[str]:
    """Evaluation queries with the tokens of a training query, behind the prompt of any source."""
    if not eval_queries:
        return
    prompts = {kind.prompt for kind in text_kinds(config, "query")}
    most = _TOKENS + max(prompt_tokens(tokenizer, prompt) for prompt in prompts)
    trained = row_hashes(store.queries, _sampled(len(store.queries), _QUERIES), most)
    least = "at least " if len(store.queries) > _QUERIES else ""
    for name, texts in eval_queries.items():
        found = np.zeros(len(texts), bool)
        for prompt in prompts:
            tokens, counts = tokenize_flat(tokenizer, [prompt + text for text in texts])
            rows = TokenRows(tokens, np.concatenate([[0], np.cumsum(counts)]))
            found |= np.isin(row_hashes(rows, np.arange(len(rows)), most), trained)
        if found.mean() >= _LEAKED:
            first, count = texts[int(found.argmax())][:60], f"{least}{found.sum():,}"
            yield (
                f"eval: {count} of {counted(len(texts), 'query')} of {name} are training queries too, first "
                f"{first!r}: their scores say nothing about new queries; take them out of data.train"
            )


def _sampled(rows: int, most: int) -> np.ndarray:
    """At most `most` of `rows` rows, evenly spread: int64."""
    return np.arange(rows) if rows <= most else np.linspace(0, rows - 1, most).astype(np.int64)
