"""Take a development split out of a BEIR folder's training queries, or out of a file of pairs, drawn by a seed. Queries
with the same text stay together.

    python -m scripts.hold_out --data data/scifact --output data/scifact-dev --queries 160
    python -m scripts.hold_out --data data/my_pairs.csv --output data/mine --queries 160

OUTPUT is a BEIR folder with the same corpus and queries. qrels/fit.tsv is the split to train on, qrels/dev.tsv the one
to choose by; the other splits are copied. The corpus of a file of pairs is all of its passages; its negatives are
judged 0.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from contextlib import nullcontext
from pathlib import Path

from retriever.command import at_least_one, command, option, seed
from retriever.wording import counted


@command(
    "python -m scripts.hold_out",
    __doc__,
    option("--data", required=True, type=Path, help="a BEIR folder, or a file of any format with texts in it"),
    option("--columns", nargs="+", default=(), metavar="NAME", help="of a file: the query, its passage, negatives"),
    option("--output", required=True, type=Path, help="a new folder"),
    option("--split", default="train", help="that is divided"),
    option("--queries", type=at_least_one, default=160, help="that become dev"),
    option("--seed", type=seed, default=0, help="default: %(default)s"),
)
def main(args: argparse.Namespace) -> None:
    """The command `python -m scripts.hold_out`."""
    is_file = args.data.is_file()
    with tempfile.TemporaryDirectory() if is_file else nullcontext(args.data) as source:
        if is_file:
            write_pairs(args.data, args.columns, Path(source), args.split)
        fit, dev = hold_out(Path(source), args.output, args.split, args.queries, args.seed)
    print(f"{args.output}: {counted(fit, 'query')} to train on (fit), {dev:,} to choose by (dev)")


def _drawn_by_text(qrels: Collection[str], texts: Mapping[str, str], wanted: int, seed: int) -> set[str]:
    """At most `wanted` queries, drawn by the seed. Queries with the same text are drawn together; a query without a
    text is drawn alone.
    """
    from scripts.code_pairs.split import drawn, normal

    together = defaultdict[str, list[str]](list)
    for query in qrels:
        together[normal(texts[query]) if query in texts else f"\0{query}"].append(query)
    chosen: set[str] = set()
    for group in sorted(together.values(), key=lambda group: drawn(seed, group[0])):
        if len(chosen) + len(group) <= wanted:
            chosen.update(group)
    return chosen


def write_pairs(file: Path, columns: Collection[str], folder: Path, split: str) -> None:
    """Writes the texts of a training file as a BEIR folder. Equal queries are one query, equal passages one passage.

    Raises DataError where the file cannot be read, or holds what a BEIR folder cannot: scores, prompts, ids alone.
    """
    from retriever.config import SourceConfig
    from retriever.data.formats import DataError, open_source

    queries, passages = dict[str, str](), dict[tuple[str, str], str]()  # text, (title, text) -> id
    qrels = defaultdict[str, dict[str, int]](dict)
    for example in open_source(SourceConfig(path=str(file), columns=tuple(columns) or None)).examples():
        if example.positive_scores or example.negative_scores or example.prompt is not None:
            raise DataError("expected pairs without scores and prompts, which a BEIR folder does not hold", file)
        judged = qrels[queries.setdefault(example.query, f"q{len(queries)}")]
        for grade, found in ((0, example.negatives), (1, example.positives)):
            for passage in found:
                if passage.text is None:
                    raise DataError(f"passage {passage.id!r} has no text in the file; expected texts", file)
                passage_id = passages.setdefault((passage.title, passage.text), f"p{len(passages)}")
                judged[passage_id] = max(grade, judged.get(passage_id, 0))
    _write_records(folder / "queries.jsonl", ({"_id": i, "text": text} for text, i in queries.items()))
    corpus = ({"_id": i, "title": title, "text": text} for (title, text), i in passages.items())
    _write_records(folder / "corpus.jsonl", corpus)
    (folder / "qrels").mkdir()
    _write_judgments(folder / "qrels" / f"{split}.tsv", qrels)


def _write_records(file: Path, records: Iterable[Mapping[str, str]]) -> None:
    with file.open("w", encoding="utf-8") as stream:
        stream.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def _write_judgments(file: Path, qrels: Mapping[str, Mapping[str, int]]) -> None:
    rows = "".join(f"{q}\t{p}\t{grade}\n" for q, grades in qrels.items() for p, grade in grades.items())
    file.write_text("query-id\tcorpus-id\tscore\n" + rows, encoding="utf-8")


def hold_out(source: Path, target: Path, split: str, queries: int, seed: int) -> tuple[int, int]:
    """Writes the BEIR folder `target`; returns the number of queries in fit and in dev.

    Raises ConfigError if `target` exists, if `split` has too few queries or if `source` has another fit or dev, and
    DataError if `source` cannot be read.
    """
    from retriever.config import ConfigError
    from retriever.data.collection import query_tables, query_texts
    from retriever.data.folders import data_files
    from retriever.data.formats import find_qrels, read_qrels
    from retriever.files import replace_folder

    judgments = find_qrels(source, split)
    qrels = read_qrels(judgments)
    for name in ("fit", "dev"):
        if there := [file.name for file in data_files(source / "qrels", name) if file != judgments]:
            expected = f"no split of that name beside {split}, for it is written anew"
            raise ConfigError(f"--data {source}: its qrels/ holds {there[0]}; expected {expected}")
    if target.exists():
        raise ConfigError(f"--output {target}: exists already; expected a new folder")
    if not 0 < queries < len(qrels):
        raise ConfigError(
            f"--queries: expected from 1 to {len(qrels) - 1}, {split} having {len(qrels)}; received {queries}"
        )
    dev = _drawn_by_text(qrels, query_texts(query_tables(source, split), qrels), queries, seed)
    if not dev:
        raise ConfigError(f"--queries {queries}: expected at least as many as {split} has of the text of one query")
    with replace_folder(target) as aside:
        (aside / "qrels").mkdir()
        for entry in (*data_files(source), *(source / stem for stem in ("corpus", "queries"))):
            if entry.is_dir():
                shutil.copytree(entry, aside / entry.name)
            elif entry.exists():
                shutil.copyfile(entry, aside / entry.name)
        for file in data_files(source / "qrels"):
            if file != judgments:
                shutil.copyfile(file, aside / "qrels" / file.name)
        for name, chosen in (("dev", dev), ("fit", qrels.keys() - dev)):
            _write_judgments(aside / "qrels" / f"{name}.tsv", {q: qrels[q] for q in qrels if q in chosen})
    return len(qrels) - len(dev), len(dev)


if __name__ == "__main__":
    sys.exit(main())
