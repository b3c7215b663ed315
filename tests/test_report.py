"""The report of one run and the page of several: what they show of the lines of `metrics.jsonl`."""

from __future__ import annotations

import html
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from retriever.charts import Curve, line_chart, smoothed
from retriever.config import Config, EvalConfig, ModelConfig, OptimConfig, RunConfig, to_yaml
from retriever.history import HISTOGRAMS, LoggedRun
from retriever.model_card import TrainingFacts
from retriever.report import write_report
from scripts.report import main
from tests.commands import assert_refused

HOSTILE = "<script>alert('x')</script>&\"'>"


def _lines(best: float = 0.5) -> list[dict[str, Any]]:
    """Of a run of 8 steps, evaluated before it and after every fourth step."""
    lines: list[dict[str, Any]] = [{"step": 0, "epoch": 0.0, "time": 1e9, "eval/nDCG@10": 0.25}]
    for step in range(1, 9):
        values = {"train/loss": 2.0 / step, "train/grad_norm": None if step == 3 else 1.5, "train/pairs_per_s": 4321.0}
        values["train/temperature"] = math.nan if step == 3 else 0.02
        lines.append({"step": step, "epoch": step / 4, "time": 1e9 + 60 * step, **values, "own/drift": 0.5 * step})
    lines.insert(5, {"step": 4, "epoch": 1.0, "time": 1e9 + 245, "eval/nDCG@10": best})
    return [*lines, {"step": 8, "epoch": 2.0, "time": 1e9 + 490, "eval/nDCG@10": 0.375}]


def _run(folder: Path, name: str, lr: float, best: float) -> str:
    """A run's folder with what the page of several runs reads."""
    run = folder / name
    run.mkdir()
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in _lines(best)))
    (run / "config.yaml").write_text(to_yaml(Config(optim=OptimConfig(lr=lr))))
    return str(run)


def test_a_report_shows_the_run(tmp_path: Path) -> None:
    config = Config(
        run=RunConfig("r"), model=ModelConfig(HOSTILE), optim=OptimConfig(lr=3e-4), eval=EvalConfig("c", "test")
    )
    facts = TrainingFacts(((HOSTILE, 120),), 1700, (60, 61), 3)
    write_report(tmp_path / "report.html", config, facts, LoggedRun("", _lines()))
    page = (tmp_path / "report.html").read_text()
    assert "<script" not in page and page.count(html.escape(HOSTILE)) >= 3
    assert not re.search(r"(src|href)=|url\(|@import|https?:", page), "it needs a network"
    shown = re.findall("<figcaption>(.*?)</figcaption>", page)
    assert shown[0] == "nDCG@10: best 0.5000 at step 4, 0.2500 before"
    assert shown[1:] == ["Loss", "Gradient norm, before clipping", "Pairs a second", "own/drift"]
    assert "step 8, loss 0.2500; best nDCG@10 0.5000 at step 4; 1,700 passages" in page
    assert "<td>4 (best)<td class=n>0.5000" in page and "2001-09-09 01:46 to 2001-09-09 01:54 UTC (8 min 10 s)" in page
    changed, _, folded = page.partition("<details>")
    assert "<td>optim.lr<td>2.0e-05<td>0.0003" in changed and "optim.warmup" not in changed and "warmup: 0.1" in folded
    assert "<td>eval.split<td>dev<td>test" in changed and "eval.metrics" not in changed
    assert "nan" not in "".join(re.findall("<svg.*?</svg>", page))


def test_a_report_shows_similarities_memory_and_examples(tmp_path: Path) -> None:
    """Heat maps over the same bins; of one run, what memory was planned; hostile texts."""
    lines = _lines()
    for line in lines[1:]:
        counts = [[0] * 40 for _ in HISTOGRAMS]
        counts[0][30], counts[1][24], counts[0][31] = 5, 6, line["step"]
        line |= dict(zip(HISTOGRAMS, counts, strict=True)) | {"train/candidates": 100.0}
        line |= {"train/peak_gib": 10.0 + line["step"], "train/planned_gib": 12.0}
    query = {"query": HOSTILE, "before": None, "after": 3, "relevant": f"one {HOSTILE}", "first": "another"}
    examples = {"collection": HOSTILE, "before": 0, "after": 8, "won": [query], "lost": []}
    facts = TrainingFacts((("pairs", 120),), 1700, (60, 61), 3)
    write_report(tmp_path / "report.html", Config(), facts, LoggedRun("", lines), examples)
    page = (tmp_path / "report.html").read_text()
    shown = re.findall("<figcaption>(.*?)</figcaption>", page)
    assert shown[-2:] == ["Similarity of positives", "Similarity of hardest negatives"] and len(shown) == 9
    assert "Peak memory, GiB; dashed: as planned" in shown and shown[2].startswith("Loss − log(candidates); ")
    maps = [re.findall("<rect class='cell c(.)' x='(.*?)' y='(.*?)'", svg) for svg in page.split("<figure>")[-2:]]
    assert [len(cells) for cells in maps] == [2 * len(lines[1:]), len(lines[1:])]
    assert {colour for cells in maps for colour, _, _ in cells} == {"0", "1"}
    assert min(float(y) for _, _, y in maps[0]) == 12.0 and max(float(y) for _, _, y in maps[1]) < 200
    assert "<script" not in page and page.count(html.escape(HOSTILE)) == 3
    assert "not found → 3" in page and "<i>now first:</i> another" in page and "<p>none</p>" in page


def test_smoothing_keeps_a_mean_and_a_straight_line() -> None:
    noise = np.random.default_rng(0).normal(size=2000)
    flat = [y for _, y in smoothed(list(enumerate(noise.tolist())))]
    assert np.std(flat) < 0.2 * np.std(noise) and np.mean(flat) == pytest.approx(np.mean(noise), abs=0.02)
    straight = smoothed([(x, 3.0 * x) for x in range(200)])
    assert [y for _, y in straight[5:-5]] == pytest.approx([3.0 * x for x in range(5, 195)])
    assert smoothed([(7, 2.0)]) == [(7, 2.0)]


@pytest.mark.parametrize("values", [[5.0], [0.0, 0.0], [-1e-9, 1e-9], [1e9, 3e9], [0.02, 0.020001], list(range(5000))])
def test_a_chart_of_any_range_stays_in_its_frame(values: list[float]) -> None:
    svg = line_chart("x", [Curve(list(enumerate(values)))])
    (path,) = re.findall("curve[^>]* d='M(.*?)'", svg)
    places = np.array([[float(number) for number in place.split()] for place in path.split("L")])
    assert (places >= 0).all() and (places <= [460, 230]).all() and len(places) <= 602
    labels = re.findall("text-anchor='end'>(.*?)</text>", svg)
    assert 2 <= len(labels) <= 7 and len({*labels}) == len(labels)
    steps = re.findall("text-anchor='middle'>(.*?)</text>", svg)
    assert steps and all(float(step.replace(",", "")).is_integer() for step in steps)


def test_the_first_of_equal_evaluations_after_training_is_the_best() -> None:
    lines = [{"step": step, "eval/MRR@10": value} for step, value in ((0, 0.9), (1, 0.5), (2, 0.75), (3, 0.75))]
    assert str(LoggedRun("", lines).best) == "MRR@10 0.7500 at step 2" and LoggedRun("", lines).since_best == 1
    assert LoggedRun("", lines[:1]).best is LoggedRun("", []).best is None and LoggedRun("", []).since_best == 0


def test_several_runs_on_one_page(tmp_path: Path) -> None:
    folders = [_run(tmp_path, "a", 1e-4, 0.5), _run(tmp_path, "b&b", 2e-4, 0.625)]
    output = tmp_path / "page.html"
    for _ in range(2):  # its own page may be replaced
        assert main([*folders, "--output", str(output)]) == 0
    page = output.read_text()
    names = [html.escape(folder) for folder in folders]
    assert f"<td>{names[1]}<td>8<td>0.2500<td>nDCG@10 0.6250 at step 4" in page
    assert f"<tr><th>setting<th>{names[0]}<th>{names[1]}<tr><td>optim.lr<td>0.0001<td>0.0002</table>" in page
    assert len(re.findall("class='curve faint c1'", page)) == 2, "loss and gradient norm of the second run"
    assert_refused(main, [str(tmp_path), "--output", str(output)], "holds no training run: expected config.yaml")
    (tmp_path / "mine.html").write_text("<html>")
    assert_refused(main, [folders[0], "--output", str(tmp_path / "mine.html")], "mine.html was not written by")
