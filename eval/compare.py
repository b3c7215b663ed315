"""The command that compares runs: what differs, whether by more than chance, and on which queries.

python -m eval.compare base.trec tuned.trec --data datasets/scifact
python -m eval.compare base.trec tuned.trec longer.trec --qrels qrels.dev.small.tsv --metrics MRR@10
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from eval.collections.collection import Collection, read_beir, read_judgments
from eval.collections.msmarco import SPLITS, read_msmarco
from eval.measures import Scores, measure_run
from eval.outputs import is_result, refuse_foreign
from eval.significance import bootstrap_interval, holm, paired_t_test, randomisation_test
from eval.trec import read_run
from retriever.command import at_least_one, command, one_of, option, seed, whole, zero_or_more
from retriever.data.records import DataError
from retriever.errors import RefusedError
from retriever.files import write_text
from retriever.wording import counted

METRICS = ("nDCG@10", "MRR@10", "Recall@100", "MAP")


@dataclass(frozen=True)
class Comparison:
    """One run against the baseline by one measure, over the same judged queries."""

    run: str
    measure: str
    baseline_mean: float
    mean: float
    interval: tuple[float, float]  # 95%, of mean - baseline_mean
    t_p: float
    randomisation_p: float
    randomisation_p_holm: float  # corrected for the number of runs compared with the baseline
    better: int  # queries
    equal: int
    worse: int
    moved: tuple[
        tuple[str, float, float], ...
    ]  # (query id, baseline's value, run's value), the largest differences first

    @property
    def difference(self) -> float:
        """Mean of the run minus the baseline's."""
        return self.mean - self.baseline_mean


def compare(
    runs: Mapping[str, Scores], *, permutations: int = 10_000, seed: int = 0, n_moved: int = 10
) -> list[Comparison]:
    """Every run but the first against the first, by every measure; all scored on the same queries by the same measures.

    Raises RefusedError for fewer than two runs, fewer than two queries, or runs scored on different queries.
    """
    if len(runs) < 2:
        raise RefusedError(f"{len(runs)} run: expected at least two, the baseline first")
    (_, base), *others = runs.items()
    if any(
        scores.query_ids != base.query_ids or scores.per_query.keys() != base.per_query.keys() for _, scores in others
    ):
        raise RefusedError("the runs are scored on different queries or measures: expected the same for all")
    found = []
    for measure, before in base.per_query.items():
        differences = [scores.per_query[measure] - before for _, scores in others]  # each [Q]
        chances = [randomisation_test(d, permutations, seed) for d in differences]
        for (name, scores), d, chance, corrected in zip(others, differences, chances, holm(chances), strict=True):
            by_size = [q for q in (-abs(d)).argsort(kind="stable")[:n_moved] if d[q] != 0]
            after = scores.per_query[measure]
            comparison = Comparison(
                run=name,
                measure=measure,
                baseline_mean=float(before.mean()),
                mean=float(after.mean()),
                interval=bootstrap_interval(d, seed=seed),
                t_p=paired_t_test(d)[1],
                randomisation_p=chance,
                randomisation_p_holm=corrected,
                better=int((d > 0).sum()),
                equal=int((d == 0).sum()),
                worse=int((d < 0).sum()),
                moved=tuple((base.query_ids[q], float(before[q]), float(after[q])) for q in by_size),
            )
            found.append(comparison)
    return found


def format_comparisons(baseline: str, comparisons: Sequence[Comparison], texts: Mapping[str, str]) -> str:
    """A table a measure, then the queries that moved most by the first measure, with their texts where `texts` has
    them.
    """
    width = max(len(name) for name in (baseline, *(c.run for c in comparisons)))
    lines = []
    for measure in dict.fromkeys(c.measure for c in comparisons):
        rows = [c for c in comparisons if c.measure == measure]
        lines += [
            "",
            f"{measure:<{width}}    mean     diff  95% interval         t test  random.    Holm  better/equal/worse",
        ]
        lines.append(f"{baseline:<{width}}  {rows[0].baseline_mean:.4f}")
        for c in rows:
            interval = f"[{c.interval[0]:+.4f}, {c.interval[1]:+.4f}]"
            chances = f"{c.t_p:>7.4f}  {c.randomisation_p:>7.4f} {c.randomisation_p_holm:>7.4f}"
            lines.append(
                f"{c.run:<{width}}  {c.mean:.4f}  {c.difference:+.4f}  {interval}  {chances}  "
                f"{c.better}/{c.equal}/{c.worse}"
            )
    for c in (c for c in comparisons if c.measure == comparisons[0].measure and c.moved):
        lines += ["", f"{c.run}: queries that moved most by {c.measure}"]
        lines += [
            f"  {before:.4f} -> {after:.4f}  {query}  {texts.get(query, '')}".rstrip()
            for query, before, after in c.moved
        ]
    return "\n".join(lines[1:])


@command(
    "python -m eval.compare",
    "compare runs query by query, the first being the baseline",
    option("runs", nargs="+", type=Path, metavar="RUN", help="TREC or MS MARCO run files, the baseline first"),
    one_of(
        option(
            "--data",
            type=Path,
            help="folder of the collection, BEIR's layout or MS MARCO's files; shows queries' texts",
        ),
        option("--qrels", type=Path, help="judgments file alone"),
    ),
    option("--split", help="of --data: qrels/<split>.tsv (default: test), or MS MARCO's dev, dl19, dl20"),
    option("--metrics", nargs="+", metavar="NAME", default=list(METRICS), help=f"default: {' '.join(METRICS)}"),
    option(
        "--relevance",
        type=at_least_one,
        help="lowest grade that is relevant for binary measures (default: 1; dl19, dl20: 2)",
    ),
    option("--permutations", type=whole(1, 10_000_000), default=10_000, help="of the randomisation test"),
    option("--seed", type=seed, default=0, help="of the randomisation test and the bootstrap"),
    option("--moved", type=zero_or_more, default=10, help="queries to show"),
    option("--output", type=Path, help="write the comparison as JSON"),
)
def main(args: argparse.Namespace) -> None:
    """The command `python -m eval.compare`."""
    if len(args.runs) < 2 or len(set(args.runs)) != len(args.runs):
        raise RefusedError(
            f"expected at least two different runs, the baseline first; received {' '.join(map(str, args.runs))}"
        )
    if args.output is not None:
        refuse_foreign(args.output, is_result("command", "baseline", "comparisons"))
    collection = _collection(args)
    names = _names(args.runs)
    relevance = collection.relevance if args.relevance is None else args.relevance
    runs, notes = {}, []
    for name, path in zip(names, args.runs, strict=True):
        rankings = read_run(path)
        if collection.qrels.keys().isdisjoint(rankings):
            raise DataError(
                f"none of the run's queries is judged in {args.qrels or args.data}"
                f"{f' (--split {collection.split})' if collection.split else ''}; expected a run of the judged queries",
                path,
            )
        runs[name] = measure_run(collection.qrels, rankings, args.metrics, relevance)
        if without := len(collection.qrels.keys() - rankings.keys()):
            notes.append(
                f"{name}: {without:,} of {counted(len(collection.qrels), 'judged query')} not in the run, which count 0"
            )
    comparisons = compare(runs, permutations=args.permutations, seed=args.seed, n_moved=args.moved)
    print(
        f"{collection.name} {collection.split}: {counted(len(collection.qrels), 'judged query')}; baseline {names[0]}"
    )
    print(
        "".join(f"note: {note}\n" for note in notes) + format_comparisons(names[0], comparisons, collection.queries),
        flush=True,
    )
    if args.output is not None:
        _write(args, names[0], collection, comparisons, notes)


def _collection(args: argparse.Namespace) -> Collection:
    if args.qrels is not None:
        return Collection(args.qrels.name, args.split or "", {}, read_judgments(args.qrels), ())
    if (args.data / "qrels").is_dir() or not args.data.is_dir():
        return read_beir(args.data, args.split or "test")
    if args.split not in SPLITS:
        raise DataError(
            f"--split {args.split}: expected one of {', '.join(SPLITS)} for a folder without qrels/", args.data
        )
    return read_msmarco(args.data, args.split)


def _names(paths: Sequence[Path]) -> list[str]:
    """The shortest endings of the paths that tell all of them apart: file names, else with folders in front."""
    parts = [path.resolve().parts for path in paths]
    for n in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-n:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    return [str(path) for path in paths]


def _write(
    args: argparse.Namespace, baseline: str, collection: Collection, found: Sequence[Comparison], notes: Sequence[str]
) -> None:
    content = {
        "command": args.command,
        "baseline": baseline,
        "queries": len(collection.qrels),
        "permutations": args.permutations,
        "seed": args.seed,
        "notes": list(notes),
        "fingerprints": collection.fingerprints(),
        "comparisons": [asdict(c) | {"difference": c.difference} for c in found],
    }
    write_text(args.output, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    sys.exit(main())
