"""Take a development split out of a BEIR folder's training queries, drawn by a seed. Queries with the same text stay
together.

    python -m scripts.hold_out --data data/scifact --output data/scifact-dev --queries 160

OUTPUT is a BEIR folder with the same corpus and queries. qrels/fit.tsv is the split to train on, qrels/dev.tsv the one
to choose by; the other splits are copied.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections import defaultdict
from collections.abc import Collection, Mapping
from pathlib import Path

from retriever.command import at_least_one, command, option, seed
from retriever.wording import counted


@command(
    "python -m scripts.hold_out",
    __doc__,
    option("--data", required=True, type=Path, help="a BEIR folder"),
    option("--output", required=True, type=Path, help="a new folder"),
    option("--split", default="train", help="that is divided"),
    option("--queries", type=at_least_one, default=160, help="that become dev"),
    option("--seed", type=seed, default=0, help="default: %(default)s"),
)
def main(args: argparse.Namespace) -> None:
    """The command `python -m scripts.hold_out`."""
    fit, dev = hold_out(args.data, args.output, args.split, args.queries, args.seed)
    print(f"{args.output}: {counted(fit, 'query')} to train on (fit), {dev:,} to choose by (dev)")


def _drawn_by_text(qrels: Collection[str], texts: Mapping[str, str], wanted: int, seed: int) -> set[str]:
    """At most `wanted` queries, drawn by the seed. Queries with the same text are drawn together; a query without a
    text is drawn alone.
    """
    from scripts.code_pairs.pairs import drawn, normal

    together = defaultdict[str, list[str]](list)
    for query in qrels:
        together[normal(texts[query]) if query in texts else f"\0{query}"].append(query)
    chosen: set[str] = set()
    for group in sorted(together.values(), key=lambda group: drawn(seed, group[0])):
        if len(chosen) + len(group) <= wanted:
            chosen.update(group)
    return chosen


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
            rows = "".join(
                f"{q}\t{p}\t{grade}\n" for q, grades in qrels.items() if q in chosen for p, grade in grades.items()
            )
            (aside / "qrels" / f"{name}.tsv").write_text("query-id\tcorpus-id\tscore\n" + rows, encoding="utf-8")
    return len(qrels) - len(dev), len(dev)


if __name__ == "__main__":
    sys.exit(main())
