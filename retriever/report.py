"""The run's report: one HTML page that stands alone, from the lines of `metrics.jsonl`."""

from __future__ import annotations

import html
import platform
import shutil
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

import torch
import yaml

from retriever.charts import COLOURS, STYLE, Curve, heat_map, line_chart, smoothed
from retriever.config import Config, EvalConfig, LoraConfig, ModelConfig, flat, to_dict
from retriever.config_tree import flatten
from retriever.environment import versions
from retriever.files import write_text
from retriever.history import ABOVE_CHANCE, LoggedRun
from retriever.model_card import TrainingFacts
from retriever.plan.report import duration
from retriever.report_examples import STYLE as EXAMPLES_STYLE
from retriever.report_examples import won_and_lost
from retriever.wording import without_folders

# Settings that may be paths.
_PATHS = {"output_dir", "resume", "name_or_path", "cache_dir", "path", "corpus", "queries"}
_TITLES = {
    "train/loss": "Loss",
    ABOVE_CHANCE: "Loss − log(candidates); at chance it is 0",
    "train/accuracy": "Accuracy among 100 passages",
    "train/grad_norm": "Gradient norm, before clipping",
    "train/temperature": "Temperature",
    "train/lr": "Learning rate",
    "train/pairs_per_s": "Pairs a second",
    "train/tokens_per_s": "Tokens a second, of the first rank",
    "train/waited_share": "Share of time spent waiting for data",
    "train/peak_gib": "Peak memory, GiB",
}
_SMOOTHED = {"train/loss", ABOVE_CHANCE, "train/grad_norm", "train/accuracy"}
_PEAK, _PLANNED, _TEMPERATURE = "train/peak_gib", "train/planned_gib", "train/temperature"
_NO_CHART = {"train/candidates", _PLANNED}
PAGE = "<!doctype html><html lang=en><meta charset=utf-8>"  # how each page begins
_PACKAGES = ("bigbatch", "torch", "transformers", "accelerate", "numpy")

_STYLE = """
:root { color-scheme: light dark; --ink: #1a1a1a; --paper: #fff; --line: #ddd; --soft: #f5f5f5; }
@media screen and (prefers-color-scheme: dark) {
  :root { --ink: #e6e6e6; --paper: #15181c; --line: #3a3f46; --soft: #1f242a; }
}
body { font: 16px/1.5 system-ui, sans-serif; max-width: 68rem; margin: 2rem auto; padding: 0 1rem;
  color: var(--ink); background: var(--paper); overflow-wrap: anywhere; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr)); gap: 1rem 2rem; }
.charts + .charts { margin-top: 1rem; }
figure { margin: 0; break-inside: avoid; } figcaption { font-weight: 600; }
.wide { overflow-x: auto; } table { border-collapse: collapse; overflow-wrap: normal; }
pre { background: var(--soft); padding: 1rem; overflow: auto; font-size: 13px; overflow-wrap: normal; }
th, td { text-align: left; padding: .2rem .8rem .2rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
td.n, th.n { text-align: right; padding-left: .8rem; font-variant-numeric: tabular-nums; white-space: nowrap; }
summary { cursor: pointer; font-weight: 600; margin: 1.5rem 0 .5rem; }
.legend span { display: inline-block; width: 1.2rem; border-top: 3px solid; margin: 0 .4rem .25rem 0; }
.legend li { display: inline-block; margin-right: 1.2rem; } .legend { padding: 0; }
@media print {
  body { max-width: none; margin: 0; font-size: 10pt; } details { display: none; }
  .charts { grid-template-columns: 1fr 1fr; }
}
"""


def write_report(
    path: Path, config: Config, facts: TrainingFacts, run: LoggedRun, examples: Mapping[str, Any] | None = None
) -> None:
    """Curves, evaluations, data, environment and settings of a run. Of absolute paths only the last part is shown.

    `examples`: queries won and lost, as `eval.examples` keeps them.
    """
    title = ": ".join(map(without_folders, (config.run.output_dir, config.model.name_or_path)))
    said = [f"{facts}", f"{config.loss.title}, temperature {config.loss.temperature:g}"]
    if run.best is not None:
        said.insert(0, f"best {run.best}")
    if losses := run.curves.get("train/loss"):
        said.insert(0, f"step {losses[-1][0]:,}, loss {losses[-1][1]:.4f}")
    parts = [f"<p>{html.escape('; '.join(said))}</p>", *charts([run]), *_heat_maps(run)]
    if run.evaluations:
        parts.append(f"<h2>Evaluations</h2>{_evaluations(run)}")
    parts.append(won_and_lost(examples or {}))
    sources = [(name, f"{queries:,}") for name, queries in facts.sources]
    parts.append(f"<h2>Data</h2>{table(sources, ('source', 'queries'), numbers=1)}")
    parts.append(f"<h2>Environment</h2>{table(_environment(run.lines))}")
    tree = _without_folders(to_dict(config))
    defaults, settings = flat(_defaults(config)), flatten(tree)
    changed = [
        (key, spelled(defaults.get(key)), spelled(value))
        for key, value in settings.items()
        if value != defaults.get(key) and key != "data.train"
    ]
    parts.append("<h2>Settings that differ from the defaults</h2>")
    parts.append(table(changed, ("setting", "default", "this run")))
    every = yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)
    parts.append(f"<details><summary>All settings</summary><pre>{html.escape(every)}</pre></details>")
    write_text(path, page(title, parts))


def _defaults(config: Config) -> Config:
    """The default settings; of a section that is null by default, those of the section."""
    model = ModelConfig(lora=None if config.model.lora is None else LoraConfig())
    return Config(model=model, eval=None if config.eval is None else EvalConfig())


def page(title: str, parts: Iterable[str]) -> str:
    """A whole page with a title and its parts, which are HTML."""
    head = f"{PAGE}<meta name=viewport content='width=device-width'>"
    heading = html.escape(title)
    body = "\n".join(parts)
    styles = f"<style>{STYLE}{EXAMPLES_STYLE}{_STYLE}</style>"
    return f"{head}<title>{heading}</title>{styles}<h1>{heading}</h1>\n{body}\n</html>\n"


def charts(runs: Sequence[LoggedRun]) -> list[str]:
    """A chart of each quantity that any of the runs logged, and a legend where there are several runs."""
    logged = dict.fromkeys(key for run in runs for key in run.curves)
    measures = [key for key in logged if key.startswith("eval/")]
    ordered = dict.fromkeys([*measures, *(key for key in _TITLES if key in logged), *logged])
    told = {_TEMPERATURE} if len({value for run in runs for _, value in run.curves.get(_TEMPERATURE, ())}) < 2 else ()
    figures = (_figure(key, runs) for key in ordered if key not in _NO_CHART and key not in told)
    names = "".join(_legend(run.name, colour) for colour, run in enumerate(runs))
    legend = [f"<ul class=legend>{names}</ul>"] if len(runs) > 1 else []
    return [*legend, f"<div class=charts>{''.join(figures)}</div>"] if logged else []


def table(rows: Iterable[Sequence[str]], head: Sequence[str] = (), numbers: int = 0) -> str:
    """An HTML table of texts; the last `numbers` columns are numbers."""

    def cells(kind: str, row: Sequence[str]) -> str:
        texts = len(row) - numbers
        found = (f"<{kind}{' class=n' if i >= texts else ''}>{html.escape(cell)}" for i, cell in enumerate(row))
        return f"<tr>{''.join(found)}"

    first = cells("th", head) if head else ""
    return f"<div class=wide><table>{first}{''.join(cells('td', row) for row in rows)}</table></div>"


def _legend(name: str, colour: int) -> str:
    return f"<li><span style='color: var(--c{colour % COLOURS})'></span>{html.escape(name)}</li>"


def _figure(key: str, runs: Sequence[LoggedRun]) -> str:
    """The chart of one quantity. Measures have their best step ringed, and a dashed line where training began."""
    curves, said = list[Curve](), _TITLES.get(key, key.removeprefix("eval/"))
    for colour, run in enumerate(runs):
        points = run.curves.get(key)
        if points is None:
            continue
        if key.startswith("eval/"):
            best = next((point for point in points if run.best and point[0] == run.best.step), None)
            curves.append(Curve(points, colour, marked=best))
            if points[0][0] == 0:
                curves.append(Curve([points[0], (points[-1][0], points[0][1])], colour, dashed=True))
            if best is not None and len(runs) == 1:
                chooses = run.best is not None and key.removeprefix("eval/") == run.best.measure
                said += f": {'best ' if chooses else ''}{best[1]:.4f} at step {best[0]:,}"
                said += f", {points[0][1]:.4f} before" if points[0][0] == 0 else ""
        elif key == _PEAK and _PLANNED in run.curves:
            curves += [Curve(points, colour), Curve(run.curves[_PLANNED], colour, dashed=True)]
            said += "; dashed: as planned" if len(runs) == 1 else ""
        elif key in _SMOOTHED:
            curves += [Curve(points, colour, faint=True), Curve(smoothed(points), colour)]
        else:
            curves.append(Curve(points, colour))
    label = html.escape(said)
    return f"<figure><figcaption>{label}</figcaption>{line_chart(f'{said} by step', curves)}</figure>"


def _heat_maps(run: LoggedRun) -> list[str]:
    """Histograms of similarities over the step, all over the same bins."""
    counts = [counts for columns in run.histograms.values() for _, counts in columns]
    if not counts:
        return []
    filled = [i for i, column in enumerate(zip(*counts, strict=True)) if any(column)]
    shown = range(filled[0], filled[-1] + 1)
    figures = "".join(
        f"<figure><figcaption>{name.capitalize()}</figcaption>{heat_map(f'{name} by step', columns, shown, colour)}"
        "</figure>"
        for colour, (name, columns) in enumerate(run.histograms.items())
    )
    return [f"<div class=charts>{figures}</div>"]


def _evaluations(run: LoggedRun) -> str:
    """Every evaluation's measures; the best step is named."""
    best, measured = run.best, run.evaluations
    names = list(dict.fromkeys(name for measures in measured.values() for name in measures))
    rows = [
        [f"{step:,}{' (best)' if best is not None and step == best.step else ''}"]
        + [f"{measures[name]:.4f}" if name in measures else "" for name in names]
        for step, measures in measured.items()
    ]
    return table(rows, ["step", *names], numbers=len(names))


def _environment(lines: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """When the run was logged, on what device, with which versions."""
    times = [datetime.fromtimestamp(line["time"], UTC) for line in lines if "time" in line]
    found = []
    if times:
        took = duration((times[-1] - times[0]).total_seconds())
        found.append(("logged", f"{times[0]:%Y-%m-%d %H:%M} to {times[-1]:%Y-%m-%d %H:%M} UTC ({took})"))
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    found += [("device", gpu), ("system", f"{platform.system()}, Python {platform.python_version()}")]
    found += versions(_PACKAGES).items()
    if (made_by := commit()) is not None:
        found.append(("commit", made_by))
    return found


@cache
def commit() -> str | None:
    """The commit of this code, where it lies in its own checkout."""
    folder = Path(__file__).parents[1]
    if not (folder / ".git").exists() or shutil.which("git") is None:
        return None
    asked = ["git", "-C", str(folder), "rev-parse", "--short", "HEAD"]
    return subprocess.run(asked, capture_output=True, text=True, check=False).stdout.strip() or None


def spelled(value: Any) -> str:
    """A setting as it is written in YAML."""
    return "" if value is None else str(yaml.safe_dump(value, default_flow_style=True)).removesuffix("...\n").strip()


def _without_folders(tree: Any, key: str = "") -> Any:
    if isinstance(tree, dict):
        return {name: _without_folders(value, name) for name, value in tree.items()}
    if isinstance(tree, list):
        return [_without_folders(value, key) for value in tree]
    return without_folders(tree) if key in _PATHS and isinstance(tree, str) else tree
