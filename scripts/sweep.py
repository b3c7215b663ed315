"""Train a grid of settings and seeds, one run after the other in one process, and choose by the evaluation's split.

    python -m scripts.sweep --config x.yaml --output sweeps/a --grid optim.lr=1e-5,3e-5 loss.temperature=0.02,0.05
    python -m scripts.sweep --config x.yaml --output sweeps/b --grid optim.lr=1e-5,3e-5 --seeds 0 1 2 --test test

Every run is an ordinary one, in a folder of OUTPUT that is named after its settings. Runs share the process, the
tokenised data and what torch compiled. After an interruption the same command goes on; finished runs are not repeated,
and a larger grid adds to them. A run counts as finished by its settings: for other data name another OUTPUT.

OUTPUT/sweep.md has a row for each setting: mean and standard deviation over the seeds of the best evaluation.
sweep.json has every run, those of another grid as `others`; sweep.png is drawn at the end. The setting with the best
mean is chosen. With --test its best models alone are measured on that split of eval.path.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import os
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from retriever.command import command, option, seed
from retriever.config import Config, ConfigError, to_dict
from retriever.config_file import load
from retriever.config_tree import require
from retriever.errors import RefusedError
from retriever.files import read_json, read_object, replace_file, write_json, write_text
from retriever.lock import working_in
from retriever.wording import counted

_SUMMARY = "sweep.json"
_WRITTEN = (_SUMMARY, "sweep.md", "sweep.png")
_OURS = {"measure", "runs", "test"}  # what a sweep's summary says


@command(
    "python -m scripts.sweep",
    __doc__,
    option("--config", required=True, help="a YAML file with a section eval, whose first measure chooses"),
    option("--output", required=True, type=Path, help="folder of the runs and of the summary"),
    option("--grid", nargs="+", default=[], metavar="key.sub=a,b", help="settings and the values each may have"),
    option("--seeds", nargs="+", type=seed, default=[0], help="of every setting (default: 0)"),
    option("--test", metavar="SPLIT", help="measure the chosen models on this split of eval.path"),
    option("--set", nargs="+", default=[], metavar="key.sub=value", help="settings of all runs"),
    resumes="the same command goes on where it stopped",
)
def main(args: argparse.Namespace) -> None:
    """The command `python -m scripts.sweep`."""
    ranks = os.environ.get("WORLD_SIZE", "1")
    require(ranks == "1", "WORLD_SIZE", "1: a sweep is one process, whose runs follow one another", ranks)
    settings = grid(args.grid)
    configs = {
        (i, number): _config(args, values, number) for i, values in enumerate(settings) for number in args.seeds
    }  # all are read before the first one is trained
    started, trained_s = time.perf_counter(), 0.0
    with working_in(args.output):
        results, earlier = list[dict[str, Any]](), _finished(args.output)
        for (i, number), config in configs.items():
            done = earlier.get(config.run.output_dir)
            if done is None or done["config"] != digest(config):
                done = _trained(config)
                trained_s += done["seconds"]
            results.append({**done, "settings": settings[i], "seed": number})
            write_summary(args.output, results, earlier)
        chosen = best_setting(results)
        _plot(args.output / "sweep.png", rows_of(results))
        beside_s = time.perf_counter() - started - trained_s
        print(f"sweep   {trained_s:.1f} s in runs, {beside_s:.1f} s beside them", flush=True)
        print(f"chosen  {label(chosen)}: {args.output / 'sweep.md'}", flush=True)
        if args.test is not None:
            folders = [Path(result["folder"]) for result in results if result["settings"] == chosen]
            tested = _tested(next(iter(configs.values())), folders, args.test)
            write_summary(args.output, results, earlier, {args.test: tested})


def grid(asked: Sequence[str]) -> list[dict[str, str]]:
    """Every combination of `key=a,b` entries; commas inside brackets, braces and quotation marks do not divide."""
    axes = []
    for entry in asked:
        key, separator, values = entry.partition("=")
        if not separator or not values:
            raise ConfigError(f"--grid {entry}: expected key.sub=value,value")
        axes.append([(key, value) for value in _divided(values)])
    keys = [axis[0][0] for axis in axes]
    require(len(set(keys)) == len(keys), "--grid", "each setting once", keys)
    return [dict(combination) for combination in itertools.product(*axes)]


def _divided(text: str) -> list[str]:
    parts, depth, quote = [""], 0, ""
    for character in text:
        if quote:
            quote = "" if character == quote else quote
        elif character in "'\"":
            quote = character
        depth += (character in "[{") - (character in "]}")
        if character == "," and not depth and not quote:
            parts.append("")
        else:
            parts[-1] += character
    return parts


def label(settings: Mapping[str, str]) -> str:
    """The settings in words."""
    return ", ".join(f"{key}={value}" for key, value in settings.items()) or "the configuration itself"


def _config(args: argparse.Namespace, settings: Mapping[str, str], number: int) -> Config:
    named = [f"{key.rpartition('.')[2]}={value}" for key, value in settings.items()] + [f"seed={number}"]
    name = "".join(c if c.isalnum() or c in "=.-_" else "-" for c in "_".join(named))
    folder = args.output / name
    chosen = [f"{key}={value}" for key, value in settings.items()]
    config = load(args.config, [*args.set, *chosen, f"run.seed={number}", f"run.output_dir={folder}"])
    if config.eval is None:
        raise ConfigError("eval: expected a section, whose first measure chooses; received null")
    return config


def _finished(folder: Path) -> dict[str, dict[str, Any]]:
    """The runs that sweeps in `folder` finished, by their folders.

    Raises RefusedError where a file that no sweep wrote is in the summary's way.
    """
    try:
        summary = read_object(folder / _SUMMARY)
    except ValueError:
        summary = {}
    ours = summary is not None and summary.keys() >= _OURS
    for entry in (folder / name for name in _WRITTEN):
        if entry.is_symlink() or (entry.exists() and not ours):
            raise RefusedError(f"{entry} was not written by a sweep; move it elsewhere, or choose another --output")
    return {run["folder"]: run for run in [*summary.get("others", []), *summary["runs"]]} if summary else {}


def digest(config: Config) -> str:
    """A hash of everything that the configuration says."""
    return hashlib.sha256(json.dumps(to_dict(config), sort_keys=True).encode()).hexdigest()


def _trained(config: Config) -> dict[str, Any]:
    """Trains the run, or what is left of it; returns its folder, seconds, best step and measures, or why it failed."""
    folder, started = Path(config.run.output_dir), time.perf_counter()  # with what the first run imports
    from retriever.history import read_metrics
    from retriever.run import Run

    print(f"run     {folder}", flush=True)
    done: dict[str, Any] = {"folder": str(folder), "config": digest(config)}
    try:
        Run(config).train()
    except FloatingPointError as error:  # it diverged, as some of a grid may
        print(f"failed  {folder}: {error}", flush=True)
        return {**done, "seconds": time.perf_counter() - started, "failed": str(error)}
    best = read_json(folder / "best.json")["step"]
    lines = (line for line in read_metrics(folder / "metrics.jsonl") if line["step"] == best)
    measures = {name.removeprefix("eval/"): v for line in lines for name, v in line.items() if name.startswith("eval/")}
    return {**done, "seconds": time.perf_counter() - started, "step": best, "measures": measures}


def best_setting(results: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """The setting whose first measure has the best mean over its seeds; of equal ones the first. Raises
    FloatingPointError where every setting has a run that failed.
    """
    rows = rows_of(results)
    if not rows:
        raise FloatingPointError(f"every setting has a run that failed, the last one: {results[-1]['failed']}")
    return max(rows, key=lambda row: row["mean"])["settings"]


def rows_of(results: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Mean and standard deviation of the first measure, and seconds, of each setting whose runs all succeeded."""
    rows = []
    for settings in [dict(pairs) for pairs in dict.fromkeys(tuple(r["settings"].items()) for r in results)]:
        runs = [result for result in results if result["settings"] == settings]
        if any("failed" in result for result in runs):
            continue
        measure = next(iter(runs[0]["measures"]))
        values = [result["measures"][measure] for result in runs]
        row = {"settings": settings, "measure": measure, "mean": statistics.fmean(values), "runs": len(runs)}
        row["deviation"] = statistics.stdev(values) if len(values) > 1 else None  # one seed has none
        row["seconds"] = statistics.fmean(result["seconds"] for result in runs)
        rows.append(row)
    return rows


def write_summary(
    folder: Path,
    results: Sequence[Mapping[str, Any]],
    earlier: Mapping[str, Mapping[str, Any]],
    tested: Mapping[str, Mapping[str, float]] | None = None,
) -> None:
    """sweep.json and sweep.md of the runs so far; sweep.json keeps `earlier` ones too, by their folders."""
    known = {result["folder"] for result in results}
    others = [run for name, run in earlier.items() if name not in known]
    rows = rows_of(results)
    measure = rows[0]["measure"] if rows else ""
    summary = {"measure": measure, "runs": list(results), "test": dict(tested or {}), "others": others}
    write_json(folder / _SUMMARY, summary)
    lines = [f"| settings | {measure} | ± | runs | seconds a run |", "|---|---|---|---|---|"]
    for row in sorted(rows, key=lambda row: -row["mean"]):
        deviation = "–" if row["deviation"] is None else f"{row['deviation']:.4f}"
        figures = f"{row['mean']:.4f} | {deviation} | {row['runs']} | {row['seconds']:.1f}"
        lines.append(f"| `{label(row['settings'])}` | {figures} |")
    failed = [result for result in results if "failed" in result]
    lines += ["" for _ in failed[:1]]
    lines += [f"- `{label(one['settings'])}`, seed {one['seed']}, failed: {one['failed']}" for one in failed]
    for split, means in (tested or {}).items():
        figures = ", ".join(f"{name} {value:.4f}" for name, value in means.items())
        lines += ["", f"The first row on {split}, mean over its seeds: {figures}"]
    write_text(folder / "sweep.md", "\n".join([*lines, ""]))


def _plot(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 1 + 0.35 * len(rows)), layout="constrained")
    axes = figure.subplots()
    means, deviations = [row["mean"] for row in rows], [row["deviation"] or 0.0 for row in rows]
    axes.errorbar(means, range(len(rows)), xerr=deviations, fmt="o", color="#1f5fbf", capsize=3)
    axes.set_yticks(range(len(rows)), [label(row["settings"]) for row in rows])
    axes.invert_yaxis()
    axes.set_xlabel(f"{rows[0]['measure']}, mean and standard deviation over {counted(rows[0]['runs'], 'seed')}")
    axes.spines[["top", "right"]].set_visible(False)
    with replace_file(path) as aside:
        figure.savefig(aside, format="png", dpi=150)


def _tested(config: Config, folders: Sequence[Path], split: str) -> dict[str, float]:
    """The measures of the runs' best models on a split, means over the runs."""
    from eval.evaluate import EvalOptions, evaluate
    from retriever.encoder.bundle import load_encoder

    assert config.eval is not None
    asked, found = config.eval, []
    for folder in folders:
        options = EvalOptions(index=asked.index, k=asked.k, progress=True)
        result = evaluate(load_encoder(folder / "best"), asked.path, split, asked.metrics, options)
        assert result is not None
        found.append(result.means)
    means = {name: statistics.fmean(one[name] for one in found) for name in found[0]}
    print(f"{split}    " + ", ".join(f"{name} {value:.4f}" for name, value in means.items()), flush=True)
    return means


if __name__ == "__main__":
    sys.exit(main())
