"""results.md and its figures: the curve of each arm, and the paired differences of neighbouring values."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from eval.significance import LEAST_P, bootstrap_interval, bootstrap_test, holm
from retriever.charts import Curve, line_chart, standalone
from retriever.files import write_text
from scripts.study.config import ArmConfig, StudyConfig
from scripts.study.record import Record, scores

Runs = Sequence[Mapping[str, Any]]


def write_page(folder: Path, config: StudyConfig, record: Record) -> None:
    """Writes results.md and a figure of each arm and collection into `folder`."""
    start = record.run("start")
    names = list(record.queries)[1:] if start is None else list(start["scores"])
    facts = "; ".join(f"{name} {value}" for name, value in record.facts.items() if name != "data")
    lines = [facts, ""]
    if start is not None:
        said = ", ".join(f"{name} {scores(start, name).mean():.4f}" for name in names)
        lines += [f"Before training: dev {start['dev']:.4f}, {said}.", ""]
    for arm in config.arms:
        points = _points(arm, record)
        if not points:
            continue
        lines += [f"## {arm.name}", ""]
        for name in names:
            file, said = f"{arm.name}-{name}.svg", f"{config.metric} on {name} by {arm.setting}"
            write_text(folder / file, _figure(said, points, name))
            lines += [f"{said}: means over seeds, and bars from the lowest seed to the highest.", ""]
            lines += [f"![{said}]({file})", ""]
        lines += [*_table(points, names), "", *_differences(points, names, record), ""]
    write_text(folder / "results.md", "\n".join(lines))


def _points(arm: ArmConfig, record: Record) -> dict[int, Runs]:
    """Value -> its runs with the arm's seeds at the rate that was chosen, one of each seed."""
    rates = record.rates.get(arm.name, {})
    found: dict[int, list[Mapping[str, Any]]] = {}
    for run in record.runs:
        if arm.name in run.get("arms", ()) and run["seed"] in arm.seeds and "scores" in run:
            if rates.get(str(run["x"]), run["lr"]) != run["lr"]:
                continue  # of an earlier grid
            found.setdefault(run["x"], []).append(run)
    return {x: sorted(found[x], key=lambda run: run["seed"]) for x in sorted(found)}


def _figure(label: str, points: Mapping[int, Runs], name: str) -> str:
    """The mean of each value, and a bar from the lowest to the highest seed."""
    places = {x: math.log2(x) for x in points}
    means = {x: [float(scores(run, name).mean()) for run in runs] for x, runs in points.items()}
    curves = [Curve([(places[x], statistics.fmean(found)) for x, found in means.items()])]
    curves += [Curve([(places[x], min(found)), (places[x], max(found))], faint=True) for x, found in means.items()]
    return standalone(line_chart(label, curves, {place: f"{x:,}" for x, place in places.items()}))


def _table(points: Mapping[int, Runs], names: Sequence[str]) -> list[str]:
    """A row of each value: how it was trained, and mean and standard deviation over seeds."""
    head = ["value", "learning rate", "seeds", "updates", "queries an update", "clipped", "pairs/s", "training, s"]
    lines = [_row([*head, "dev", *names]), _row(["---"] * (len(head) + 1 + len(names)))]
    for x, runs in points.items():
        first = runs[0]
        batch = [min(run["batch"][0] for run in runs), max(run["batch"][1] for run in runs)]
        cells = [f"{x:,}", f"{first['lr']:.3g}", f"{len(runs)}", f"{first['updates']:,}"]
        cells.append(f"{batch[0]:,}–{batch[1]:,}")
        cells.append(f"{statistics.fmean(run['clipped'] for run in runs):.0%}")
        cells.append(f"{statistics.median(run['pairs_per_s'] for run in runs):,.0f}")
        cells.append(f"{statistics.median(run['train_s'] for run in runs):.1f}")
        of = [[run["dev"] for run in runs], *([scores(run, name).mean() for run in runs] for name in names)]
        lines.append(_row([*cells, *map(_with_deviation, of)]))
    return lines


def _with_deviation(values: Sequence[float]) -> str:
    deviation = f" ± {statistics.stdev(map(float, values)):.4f}" if len(values) > 1 else ""
    return f"{statistics.fmean(map(float, values)):.4f}{deviation}"


def _differences(points: Mapping[int, Runs], names: Sequence[str], record: Record) -> list[str]:
    """Neighbouring values, paired by query and seed. The p-values are those of the first collection."""
    pairs = [*zip(points, list(points)[1:], strict=False)]
    if len(pairs) > 1:
        pairs.append((next(iter(points)), list(points)[-1]))
    found = [(low, high, _paired(points[low], points[high], names[0])) for low, high in pairs]
    clusters = record.queries[names[0]]["clusters"]
    if not found or any(len(d) == 0 for *_, d in found):
        return []
    p_values = [bootstrap_test(d, clusters) for *_, d in found]
    corrected = holm(p_values[: len(points) - 1])
    lines = [_row(["from", "to", *(f"{name}, 95% interval" for name in names), "p", "p (Holm)"])]
    lines.append(_row(["---"] * (4 + len(names))))
    for place, (low, high, _) in enumerate(found):
        cells = [f"{low:,}", f"{high:,}"]
        for name in names:
            d = _paired(points[low], points[high], name)
            interval = bootstrap_interval(d, record.queries[name]["clusters"])
            cells.append(f"{d.mean():+.4f} [{interval[0]:+.4f}, {interval[1]:+.4f}]")
        least = "≤ " if p_values[place] <= LEAST_P else ""  # what so many resamples can tell
        holms = f"{least}{corrected[place]:.4f}" if place < len(corrected) else ""
        lines.append(_row([*cells, f"{least}{p_values[place]:.4f}", holms]))
    return lines


def _paired(low: Runs, high: Runs, name: str) -> np.ndarray:
    """[S, Q] differences of the runs with the same seed."""
    of_seed = {run["seed"]: scores(run, name) for run in low}
    return np.array([scores(run, name) - of_seed[run["seed"]] for run in high if run["seed"] in of_seed])


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
