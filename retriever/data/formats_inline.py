"""Examples from records that carry a query with its passages: Tevatron, DPR, FlagEmbedding, columns, texts."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from retriever.data.files import kind_of
from retriever.data.records import Example, Passage, Record

# A table of text that has a header names one of these; a pair of texts does not.
HEADER_NAMES = {
    *[
        "anchor",
        "query",
        "question",
        "prompt",
        "instruction",
        "input",
        "source",
        "premise",
        "query_id",
        "title",
        "summary",
        "docstring",
    ],
    *["positive", "passage", "document", "text", "body", "context", "abstract", "description", "code"],
    *["answer", "response", "completion", "output", "target", "hypothesis"],
    *(f"{noun}{number}" for noun in ("sentence", "sentence_", "text", "text_", "question") for number in (0, 1)),
}
TEXT = "text"  # the column of the format texts
_ID_COLUMN = re.compile(
    r"(.*[-_ ])?(id|idx|index|qid|pid|docid|uuid)|unnamed: \d+|"
)  # the last two: a table's row numbers


def tevatron_examples(records: Iterable[Record]) -> Iterator[Example]:
    """Tevatron's version 1 (positive_passages with their texts) and version 2 (positive_document_ids, to be looked up).

    Beside Tevatron's own fields, `positive_scores`, `negative_scores` and `prompt` are read as FlagEmbedding's are.
    """
    for record in records:
        if "positive_document_ids" in record.values:
            positives = _by_id(record.identifiers("positive_document_ids"))
            negatives = _by_id(record.identifiers("negative_document_ids"))
        else:
            positives = tuple(map(_tevatron_passage, record.children("positive_passages", required=True)))
            negatives = tuple(map(_tevatron_passage, record.children("negative_passages")))
        yield Example(
            record.identifier("query_id"),
            record.text("query_text", "query", empty=False),
            positives,
            negatives,
            record.numbers("positive_scores", len(positives)),
            record.numbers("negative_scores", len(negatives)),
            prompt=record.text("prompt") if record.has("prompt") else None,
        )


def dpr_examples(records: Iterable[Record]) -> Iterator[Example]:
    """DPR's records; `negative_ctxs` serve where a record has no `hard_negative_ctxs`. A query's id is its number."""
    for number, record in enumerate(records):
        positives = tuple(map(_dpr_passage, record.children("positive_ctxs", required=True)))
        hard, easy = (
            tuple(map(_dpr_passage, record.children(f"{kind}_ctxs"))) for kind in ("hard_negative", "negative")
        )
        yield Example(str(number), record.text("question", empty=False), positives, hard or easy)


def flagembedding_examples(records: Iterable[Record]) -> Iterator[Example]:
    """FlagEmbedding's records with their teacher scores and prompt, where there are any. A query's id is its number."""
    for number, record in enumerate(records):
        positives, negatives = record.texts("pos", required=True), record.texts("neg")
        yield Example(
            str(number),
            record.text("query", empty=False),
            _with_text(positives),
            _with_text(negatives),
            record.numbers("pos_scores", len(positives)),
            record.numbers("neg_scores", len(negatives)),
            prompt=record.text("prompt") if record.has("prompt") else None,
        )


def text_examples(records: Iterable[Record], column: str = TEXT) -> Iterator[Example]:
    """Records of one text, which is both the query and its positive: two encodings of it differ by dropout alone.

    A query's id is its number. A blank text makes a blank passage, which is left out. (SimCSE: Gao et al. 2021,
    arXiv:2104.08821)
    """
    for number, record in enumerate(records):
        if column not in record.values:
            columns = f"the columns are {', '.join(record.values)}; name the text's in data.train.<n>.columns"
            raise record.refusal(f"no column {column!r}: {columns}")
        text = record.text(column)
        yield Example(str(number), text, _with_text([text]))


class ColumnRoles(NamedTuple):
    """The roles of a table's columns; see `column_roles`."""

    anchor: str
    positive: str
    negatives: tuple[str, ...]
    query_id: str | None
    prompt: str | None  # the query's own


def column_roles(record: Record, asked: Sequence[str] | None, by_id: bool = False) -> ColumnRoles:
    """The roles of a record's columns, as in sentence-transformers: anchor, positive, then any number of negatives.

    `asked` (data.train.<n>.columns) decides if it is not None; else columns named anchor, positive, negative*; else
    their order. A `query_id` column merges rows of one query; beside anchor and positive, a `prompt` column holds the
    queries' prompts. Raises DataError for columns that are missing or hold
    labels, or by their names ids, unless they are asked for or texts are looked up `by_id`; and for CSV and TSV whose
    first line is no header.
    """
    there = list(record.values)
    query_id = "query_id" if "query_id" in there and "query_id" not in (asked or ()) else None
    names, prompt = list(asked or [name for name in there if name != query_id]), None
    if asked is None and {"anchor", "positive"} <= set(names):
        prompt = "prompt" if "prompt" in there else None
        names = ["anchor", "positive", *(name for name in names if name.startswith("negative"))]
    elif asked is None and not {"anchor", "positive"}.isdisjoint(names):
        names = ["anchor", "positive"]  # one of them is missing, which is told
    if problem := _problem_of_columns(record, names, asked is None, by_id):
        columns = f"the columns are {', '.join(there)}; name those to use in data.train.<n>.columns"
        raise record.refusal(f"{problem}: {columns}")
    return ColumnRoles(names[0], names[1], tuple(names[2:]), query_id, prompt)


def _problem_of_columns(record: Record, names: Sequence[str], guessed: bool, by_id: bool) -> str | None:
    """Why the columns `names` cannot be a query and its passages; None where they can. `guessed`: nobody named them."""
    if missing := [name for name in names if name not in record.values]:
        return f"no column {missing[0]!r}"
    lower = {name: name.lower() for name in names}
    if guessed and kind_of(Path(record.file)) in (".csv", ".tsv", ".txt") and not HEADER_NAMES & {*lower.values()}:
        return "expected a header with anchor and positive on the first line"
    if len(names) < 2:
        return "expected an anchor and a positive column"
    no_texts = [name for name in names if lower[name] in ("label", "labels", "score", "scores")]
    if guessed and not by_id:
        no_texts += [name for name in names if _ID_COLUMN.fullmatch(lower[name])]
    return f"column {no_texts[0]!r} is no passage" if no_texts else None


def column_examples(
    records: Iterable[Record],
    asked: Sequence[str] | None,
    queries: Mapping[str, str] | None = None,
    by_id: bool = False,
) -> Iterator[Example]:
    """Rows of anchor, positive[, negatives...]; a cell is a text or a list of texts, and a null negative is none.

    With `queries`, anchors are query ids; with `by_id`, the other cells are passage ids. Otherwise every row is a query
    of its own and its number the id, unless a query_id column says which. JSON rows may differ in their columns.
    """
    known: dict[tuple[str, ...], ColumnRoles] = {}
    for number, record in enumerate(records):
        there = tuple(record.values)
        roles = known.get(there) or known.setdefault(there, column_roles(record, asked, by_id or queries is not None))
        if queries is None:
            query_id = record.identifier(roles.query_id) if roles.query_id else str(number)
            query = record.text(roles.anchor, empty=False)
        else:
            query_id = record.identifier(roles.anchor)
            if query_id not in queries:
                raise record.error(roles.anchor, f"an id among the {len(queries):,} queries", query_id)
            query = queries[query_id]
        positive = record.values.get(roles.positive)
        if positive is None or (by_id and positive == ""):
            raise record.error(roles.positive, "text or a list of texts", positive)
        negatives = chain.from_iterable(_cell(record, name, by_id) for name in roles.negatives)
        prompt = record.text(roles.prompt) if roles.prompt and record.has(roles.prompt) else None
        yield Example(query_id, query, _cell(record, roles.positive, by_id), tuple(negatives), prompt=prompt)


def _cell(record: Record, name: str, by_id: bool) -> tuple[Passage, ...]:
    value: Any = record.values.get(name)
    if value is None or (by_id and value == ""):
        return ()
    if by_id:
        return _by_id(record.identifiers(name) if isinstance(value, list) else [record.identifier(name)])
    return _with_text(record.texts(name) if isinstance(value, list) else [record.text(name)])


def _by_id(ids: Iterable[str]) -> tuple[Passage, ...]:
    return tuple(map(Passage, ids))


def _with_text(texts: Iterable[str]) -> tuple[Passage, ...]:
    return tuple(Passage(None, text) for text in texts)


def _tevatron_passage(record: Record) -> Passage:
    """Its text may be missing, to be looked up in a corpus by docid."""
    docid = record.identifier("docid") if record.has("docid") else None
    text = record.text("text") if docid is None or record.has("text") else None
    return Passage(docid, text, record.optional_text("title"))


def _dpr_passage(record: Record) -> Passage:
    name = next((name for name in ("passage_id", "psg_id") if record.has(name)), None)
    return Passage(record.identifier(name) if name else None, record.text("text"), record.optional_text("title"))
