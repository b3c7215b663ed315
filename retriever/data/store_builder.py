"""Builds a token store: reads each source's examples once, then its corpus for the passages that they name.

Texts stream through; what stays in memory is one 16-byte digest a passage, the ids that are referred to, and the pairs.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from retriever.checksums import write_checksums
from retriever.config import Config
from retriever.config_sources import kind_numbers, text_kinds
from retriever.data.formats import DataError, Example, Passage, Source, final_text
from retriever.data.records import is_blank, shortened_note
from retriever.data.relations import (
    PASSAGE_BITS,
    REFERENCE,
    PairBuffer,
    Pairs,
    absent,
    join_pairs,
    with_equal_passages,
    write_relations,
)
from retriever.data.source_reading import SourceReading
from retriever.data.text_table import TextTableWriter
from retriever.data.tokens import SIDES
from retriever.files import write_json
from retriever.screen import Bar, say
from retriever.wording import counted

QUERIES, PASSAGES, MANIFEST = "queries", "passages", "manifest.json"
KINDS = "kinds.npy"  # of passages, where sources have theirs in several prompts or lengths
BLANK, _MISSING = -1, -2  # instead of a passage's row
_SHOWN_EVERY = 1000  # examples


class StoreBuilder:
    """Builds one store; `build` is called once."""

    def __init__(self, folder: Path, config: Config, tokenizer: PreTrainedTokenizerBase, progress: bool) -> None:
        self._folder, self._config, self._tokenizer, self._progress = folder, config, tokenizer, progress
        self._kinds = kind_numbers(text_kinds(config, "passage"))  # of each source's passages
        self._several_kinds = max(self._kinds) > 0
        self._passage_rows: dict[bytes, int] = {}  # digest of the final text, and of its kind -> row
        self._kind_of = array("H")  # by row of a passage, if there are several
        self._first_of = array("q")  # by row: the first row with the same text in any kind
        self._query_digests: list[bytes] = []  # by row
        self._positives: list[Pairs] = []
        self._negatives: list[Pairs] = []
        self._statistics: list[dict[str, Any]] = []  # of each source

    def build(self, sources: Sequence[Source], manifest: dict[str, Any]) -> None:
        """Writes the whole store, its manifest (`manifest` and what was found) and checksums last. Raises DataError."""
        with ExitStack() as stack:
            self._queries = stack.enter_context(TextTableWriter(self._folder / QUERIES, self._tokenizer))
            self._passages = stack.enter_context(TextTableWriter(self._folder / PASSAGES, self._tokenizer))
            described = [self._add_source(source, number) for number, source in enumerate(sources)]
        self._write_relations()
        if self._several_kinds:
            np.save(self._folder / PASSAGES / KINDS, np.array(self._kind_of, np.int64), allow_pickle=False)
        if note := shortened_note():
            say(note)
        written = sorted(path for path in self._folder.rglob("*") if path.is_file())
        files = {path.relative_to(self._folder).as_posix(): path.stat().st_size for path in written}
        write_json(
            self._folder / MANIFEST, manifest | {"sources": described, "statistics": self._statistics, "files": files}
        )
        write_checksums(self._folder)

    def _add_source(self, source: Source, number: int) -> dict[str, Any]:
        query, passage = (text_kinds(self._config, side)[number] for side in SIDES)
        lengths = self._queries.counted_from_now(query.max_tokens), self._passages.counted_from_now(passage.max_tokens)
        reading = SourceReading(source, query.prompt, passage.prompt, self._kinds[number], *lengths)
        first = len(self._query_digests)
        spool = self._folder / "queries.spool"  # a query's row is known once it is known to have a positive
        with spool.open("w", encoding="utf-8") as stream:
            bar = self._bar(source.examples(), f"{source.name}: examples")
            for count, example in enumerate(bar, start=1):
                if count % _SHOWN_EVERY == 0:
                    bar.set_postfix_str(reading.so_far(), refresh=False)
                if self._read_example(reading, example):
                    stream.write(json.dumps([example.query_id, example.prompt, example.query]) + "\n")
        passage_rows = self._look_up(reading)
        query_rows = self._write_queries(reading, spool, passage_rows)
        spool.unlink()
        if reading.blank:
            say(f"{source.name}: {counted(reading.blank, 'passage')} left out, without a text")
        self._positives.append(reading.positives.resolved(query_rows, passage_rows))
        self._negatives.append(reading.negatives.resolved(query_rows, passage_rows))
        self._add_statistics(reading, len(self._positives[-1].keys), len(self._negatives[-1].keys))
        last = len(self._query_digests)
        rows = {"first": first, "last": last, "left_out": len(query_rows) - (last - first)}
        return {"name": source.name, "format": source.format, **rows}

    def _add_statistics(self, reading: SourceReading, positives: int, negatives: int) -> None:
        self._queries.finish()
        self._passages.finish()
        self._statistics.append(reading.statistics(positives, negatives))
        if self._progress:
            say(reading.described(self._statistics[-1]))

    def _read_example(self, reading: SourceReading, example: Example) -> bool:
        """Adds the example's pairs; returns whether its query is new."""
        name, digest = reading.source.name, _digest(example.query)
        number = reading.queries.setdefault(example.query_id, len(reading.queries))
        new = number == len(reading.query_digests)
        if new:
            reading.query_digests.append(digest)
        elif reading.query_digests[number] != digest:
            second = f"the second {example.query[:60]!r}"
            raise DataError(f"source {name!r}: query id {example.query_id!r} stands for two texts, {second}")
        self._add_pairs(reading, reading.positives, number, example.positives, example.positive_scores)
        self._add_pairs(reading, reading.negatives, number, example.negatives, example.negative_scores)
        return new

    def _add_pairs(
        self,
        reading: SourceReading,
        pairs: PairBuffer,
        number: int,
        passages: Sequence[Passage],
        scores: Sequence[float],
    ) -> None:
        rows = [self._passage(reading, passage) for passage in passages]
        if BLANK in rows:
            scores = [score for row, score in zip(rows, scores, strict=True) if row != BLANK] if scores else ()
            rows = [row for row in rows if row != BLANK]
        pairs.extend(number, rows, scores)

    def _passage(self, reading: SourceReading, passage: Passage) -> int:
        """The passage's row where its text is at hand, else a reference to be looked up."""
        if passage.text is not None:
            return self._row(reading, passage)
        assert passage.id is not None  # every reader gives a text or an id
        return REFERENCE | reading.references.setdefault(passage.id, len(reading.references))

    def _row(self, reading: SourceReading, passage: Passage) -> int:
        """The row of the passage's final text, which is written to the store the first time; BLANK for a blank text."""
        data = self._config.data
        text = final_text(passage, data.title, data.title_separator)
        if is_blank(text):
            reading.blank += 1
            return BLANK
        digest = _digest(text)
        key = _of_kind(digest, reading.kind)
        row = self._passage_rows.get(key)
        reading.passages += 1
        reading.repeated_passages += row is not None
        if row is None:
            row = self._passage_rows[key] = len(self._passage_rows)
            self._passages.add(passage.id, reading.passage_prompt + text)
            if self._several_kinds:
                self._kind_of.append(reading.kind)
                self._first_of.append(min(self._rows_of(digest)))
        return row

    def _rows_of(self, digest: bytes) -> list[int]:
        """The rows with the text of this digest, in any kind."""
        keys = (_of_kind(digest, kind) for kind in range(max(self._kinds) + 1))
        return [self._passage_rows[key] for key in keys if key in self._passage_rows]

    def _look_up(self, reading: SourceReading) -> np.ndarray:
        """The rows [references] int64 of the passages named by id. Raises DataError for an id that the corpus lacks."""
        source, references = reading.source, reading.references
        rows = np.full(len(references), _MISSING, np.int64)
        if not references:
            return rows
        with self._bar(None, f"{source.name}: passages", len(references)) as bar:
            for passage in source.corpus():
                number = references.get(passage.id) if passage.id is not None else None
                if number is None:
                    continue
                row = self._row(reading, passage)
                if rows[number] not in (_MISSING, row):
                    raise DataError(
                        f"source {source.name!r}: passage id {passage.id!r} stands for two texts in the corpus"
                    )
                rows[number] = row
                bar.update()
        missing = np.flatnonzero(rows == _MISSING)
        if len(missing):
            raise DataError(self._missing_message(reading, missing))
        return rows

    def _missing_message(self, reading: SourceReading, missing: np.ndarray) -> str:
        name, passage_ids, query_ids = reading.source.name, list(reading.references), list(reading.queries)
        for kind, pairs in (("positive", reading.positives), ("negative", reading.negatives)):
            keys = pairs.references()
            found = np.flatnonzero(np.isin(keys & (REFERENCE - 1), missing))
            if len(found):
                key = int(keys[found[0]])
                first = f"{passage_ids[key & (REFERENCE - 1)]!r}, a {kind} of query {query_ids[key >> PASSAGE_BITS]!r}"
                break
        where = "its corpus" if reading.source.corpus_tables else "no corpus: data.train.<n>.corpus names one"
        return f"source {name!r}: {len(missing):,} passage ids are not in {where}; the first is {first}"

    def _write_queries(self, reading: SourceReading, spool: Path, passage_rows: np.ndarray) -> np.ndarray:
        """Writes the queries with a positive. Returns the row of every query [queries] int64, -1 for the others."""
        source, count, before = reading.source, len(reading.queries), len(self._query_digests)
        kept = reading.positives.queries(count, passage_rows)
        if not kept.any():
            raise DataError(f"source {source.name!r}: none of its queries ({count:,}) has a positive passage")
        if not kept.all():
            left_out = f"{count - int(kept.sum()):,} of {counted(count, 'query')}"
            say(f"{source.name}: {left_out} left out, without a positive passage")
        with spool.open(encoding="utf-8") as stream:
            for number, line in enumerate(self._bar(stream, f"{source.name}: queries", count)):
                if kept[number]:
                    id_, prompt, text = json.loads(line)
                    self._queries.add(id_, (reading.query_prompt if prompt is None else prompt) + text)
                    self._query_digests.append(reading.query_digests[number])
        return np.where(kept, before + np.cumsum(kept) - 1, -1)

    def _write_relations(self) -> None:
        """Writes positives, known positives (passages of the query's own text among them) and the other negatives."""
        positives, negatives = join_pairs(self._positives), join_pairs(self._negatives)
        rows = ((query, row) for query, digest in enumerate(self._query_digests) for row in self._rows_of(digest))
        own = np.array([query << PASSAGE_BITS | row for query, row in rows], np.int64)
        known = np.union1d(positives.keys, own)
        if self._several_kinds:
            known = np.unique(with_equal_passages(known, np.array(self._first_of, np.int64)))
        negatives = negatives.kept(absent(negatives.keys, known))
        write_relations(self._folder, len(self._query_digests), positives, Pairs(known, None), negatives)

    def _bar(self, items: Iterable[Any] | None, description: str, total: int | None = None) -> Bar:
        unit = f" {description.rpartition(' ')[2]}"
        return Bar(items, desc=description, total=total, unit=unit, disable=not self._progress, unit_scale=True)


def _of_kind(digest: bytes, kind: int) -> bytes:
    """The key of a text of one kind."""
    return digest + kind.to_bytes(2, "big") if kind else digest


def _digest(text: str) -> bytes:
    try:
        return hashlib.blake2b(text.encode(), digest_size=16).digest()
    except UnicodeEncodeError as error:  # no reader lets it pass: it is of the configured separator
        wrong = f"a lone surrogate {text[error.start]!r} at {error.start}"
        raise DataError(f"text {text[:60]!r}: expected Unicode text, received {wrong}") from error
