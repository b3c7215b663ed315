"""The run's report: one HTML page that stands alone."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from retriever.config import Config, to_dict
from retriever.files import write_text
from retriever.model_card import TrainingFacts
from retriever.wording import counted, without_folders

_PATHS = {
    "output_dir",
    "resume",
    "name_or_path",
    "cache_dir",
    "path",
    "corpus",
    "queries",
}  # settings that may be paths

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 52rem; margin: 2rem auto; padding: 0 1rem; color: #1a1a1a; }
img { width: 100%; } table { border-collapse: collapse; }
pre { background: #f5f5f5; padding: 1rem; overflow: auto; font-size: 13px; }
th, td { text-align: right; padding: .2rem .8rem; border-bottom: 1px solid #ddd; font-variant-numeric: tabular-nums; }
"""


def write_report(path: Path, config: Config, facts: TrainingFacts, lines: Sequence[dict[str, Any]]) -> None:
    """Curves, evaluations and the configuration of a run, from the lines of its `metrics.jsonl`.

    Of absolute paths only the last part is shown.
    """
    training = [line for line in lines if "train/loss" in line]
    evaluations = [line for line in lines if any(key.startswith("eval/") for key in line)]
    title = html.escape(": ".join(map(without_folders, (config.run.output_dir, config.model.name_or_path))))
    parts = [f"<!doctype html><meta charset=utf-8><title>{title}</title><style>{_STYLE}</style><h1>{title}</h1>"]
    if training:
        last = training[-1]
        sources = ", ".join(f"{name} ({counted(queries, 'query')})" for name, queries in facts.sources)
        parts.append(
            f"<p>Step {last['step']:,}, loss {last['train/loss']:.4f}, {last['train/pairs_per_s']:,.0f} pairs/s; "
            f"{html.escape(f'{sources} and {facts}; {config.loss.title}')}.</p>"
        )
        parts.append(f"<img alt='loss and learning rate by step' src='data:image/png;base64,{_curves(training)}'>")
    if evaluations:
        parts.append(f"<h2>Evaluations</h2>{_table(evaluations)}")
    settings = yaml.safe_dump(_without_folders(to_dict(config)), sort_keys=False, allow_unicode=True)
    parts.append(f"<h2>Configuration</h2><pre>{html.escape(settings)}</pre>")
    write_text(path, "\n".join(parts))


def _without_folders(tree: Any, key: str = "") -> Any:
    if isinstance(tree, dict):
        return {name: _without_folders(value, name) for name, value in tree.items()}
    if isinstance(tree, list):
        return [_without_folders(value, key) for value in tree]
    return without_folders(tree) if key in _PATHS and isinstance(tree, str) else tree


def _curves(training: Sequence[dict[str, Any]]) -> str:
    from matplotlib.figure import Figure  # drawn once a run: not worth its import time at every start

    figure = Figure(figsize=(9, 3.4), layout="constrained")
    steps = [line["step"] for line in training]
    for axes, key, label in zip(
        figure.subplots(1, 2), ("train/loss", "train/lr"), ("loss", "learning rate"), strict=True
    ):
        axes.plot(steps, [line[key] for line in training], color="#1f5fbf", linewidth=1.5)
        axes.set_xlabel("step")
        axes.set_title(label, loc="left")
        axes.spines[["top", "right"]].set_visible(False)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=150)
    return base64.b64encode(picture.getvalue()).decode()


def _table(evaluations: Sequence[dict[str, Any]]) -> str:
    names = [key for key in evaluations[0] if key.startswith("eval/")]
    head = "".join(f"<th>{html.escape(name.removeprefix('eval/'))}</th>" for name in names)
    rows = "".join(
        f"<tr><td>{line['step']:,}</td>" + "".join(f"<td>{line[name]:.4f}</td>" for name in names) + "</tr>"
        for line in evaluations
    )
    return f"<table><tr><th>step</th>{head}</tr>{rows}</table>"
