"""What each round of a loop brought: nDCG@10 with its interval, and the gain over the start and over the round before.

    python -m scripts.bench.ladder --loop scifact runs/loop_scifact --loop code runs/loop_code --groups code data/code/queries.jsonl

Intervals are 95% bootstrap intervals over queries; over whole modules for a loop whose queries file (`--groups`) names each query's
module. Gains are paired, query by query.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from eval.report import versions
from retriever.data.files import FileTable
from scripts.bench.tables import Table
from scripts.cluster_bootstrap import cluster_interval

MEASURE = "nDCG@10"
GAINS = ("gain over the start", "gain over the round before")


def add_loop(table: Table, name: str, folder: Path, split: str, groups: Mapping[str, str] | None) -> None:
    """Adds the rows of the loop in `folder` on one split; `groups` names the module of each query id.

    Raises ValueError where the rounds were not measured on the same queries.
    """
    places = json.loads((folder / "result.json").read_text(encoding="utf-8"))["evaluations"]
    rounds = {label: _per_query(folder / place / "results" / f"{split}.json") for label, place in places.items()}
    first = next(iter(rounds.values()))
    units = [groups[query] for query in first] if groups is not None else list(first)
    case = f"{name}, {len(first):,} {split} queries" + ("" if groups is None else f" of {len(set(units)):,} modules")
    before = None
    for label, scores in rounds.items():
        if scores.keys() != first.keys():
            raise ValueError(f"{folder}: {label} was measured on other queries than the start; expected the same for all rounds")
        values = np.array([scores[query] for query in first])  # [Q]
        chosen = Path(places[label]).parent.name
        _add(table, case, label, MEASURE, values, units, chosen if chosen.startswith("variant") else "")
        if before is not None:
            _add(table, case, label, GAINS[0], values - np.array(list(first.values())), units)
            _add(table, case, label, GAINS[1], values - before, units)
        before = values


def format_markdown(table: Table) -> str:
    """The table for `docs/bench`: a section a loop, a line a round."""
    found = ", ".join(f"{name} {version}" for name, version in table.versions.items())
    lines = ["# The ladder", "", f"`{table.command}` at {table.commit[:10]}; {table.hardware}; {found}."]
    for case in dict.fromkeys(row.case for row in table.rows):
        lines += ["", f"## {case}", "", f"| round | {MEASURE} | {GAINS[0]} | {GAINS[1]} | |", "|---|---|---|---|---|"]
        for label in dict.fromkeys(row.method for row in table.rows if row.case == case):
            cells = [_cell(table, case, label, metric) for metric in (MEASURE, *GAINS)]
            note = next(row.note for row in table.rows if (row.case, row.method, row.metric) == (case, label, MEASURE))
            lines.append(f"| {label} | {' | '.join(cells)} | {note} |")
    return "\n".join(lines) + "\n"


def _add(table: Table, case: str, label: str, metric: str, values: np.ndarray, units: Sequence[str], note: str = "") -> None:
    low, high = cluster_interval(values, units)
    table.add(case, label, metric, float(values.mean()), "", note)
    table.add(case, label, f"{metric}, from", low, "")
    table.add(case, label, f"{metric}, to", high, "")


def _cell(table: Table, case: str, label: str, metric: str) -> str:
    value, low, high = (table.get(case, label, f"{metric}{end}") for end in ("", ", from", ", to"))
    if value is None or low is None or high is None:
        return ""
    sign = "" if metric == MEASURE else "+"
    return f"{value:{sign}.4f} [{low:{sign}.4f}, {high:{sign}.4f}]"


def _per_query(path: Path) -> dict[str, float]:
    return json.loads(path.read_text(encoding="utf-8"))["per_query"][MEASURE]


def _modules(path: Path) -> dict[str, str]:
    return {record.values["_id"]: record.values["metadata"]["module"] for record in FileTable(path).records()}


def main(arguments: Sequence[str] | None = None) -> None:
    """The command `python -m scripts.bench.ladder`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    loops = "a finished loop's folder, and what the table calls it; may be repeated"
    parser.add_argument("--loop", nargs=2, action="append", required=True, metavar=("NAME", "FOLDER"), help=loops)
    groups = "the queries file of a loop whose intervals are over modules"
    parser.add_argument("--groups", nargs=2, action="append", default=[], metavar=("NAME", "QUERIES"), help=groups)
    parser.add_argument("--split", default="test", help="default: %(default)s")
    parser.add_argument("--output", type=Path, default=Path("docs/bench/ladder.json"), help="and .md beside it (default: %(default)s)")
    given = parser.parse_args(arguments)
    modules = {name: _modules(Path(path)) for name, path in given.groups}
    table = Table.begin(())
    table.versions |= versions()
    for name, folder in given.loop:
        add_loop(table, name, Path(folder), given.split, modules.get(name))
    table.save(given.output)
    given.output.with_suffix(".md").write_text(format_markdown(table), encoding="utf-8")


if __name__ == "__main__":
    main()
