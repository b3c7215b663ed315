"""A study: learning rates chosen on dev with seed 0, other seeds measured, done once, the differences paired."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from retriever.config import ConfigError
from retriever.errors import RefusedError
from scripts.study.__main__ import main
from scripts.study.config import load_study
from scripts.study.page import write_page
from scripts.study.record import Record
from tests.workplace import ROOT, make_workplace


@pytest.fixture
def study(tmp_path: Path) -> Path:
    """A study of pools and of batches over a tiny model, whose queries come from two modules."""
    work = make_workplace(tmp_path)
    file = work / "data" / "queries.jsonl"
    records = [json.loads(line) for line in file.read_text().splitlines()]
    lines = [json.dumps({**record, "metadata": {"module": f"m{i % 4}"}}) for i, record in enumerate(records)]
    file.write_text("\n".join(lines) + "\n")
    (work / "study.yaml").write_text(
        f"""
output_dir: {tmp_path}/study
train: {work}/run.yaml
metric: MRR@10
dev: {{path: {work}/data, split: dev, name: dev}}
test: [{{path: {work}/data, split: dev, name: code}}, {{path: {work}/data, split: dev, name: short, passage_max_tokens: 8}}]
arms:
  - name: negatives
    setting: batch.pool
    values: [6, 12, null]
    overrides: ["train.max_steps=2", "run.trackers=[]", "run.preflight=off", "data.negatives=0", "loss.learn_temperature=false"]
    lr: 3.0e-3
    factors: [0.1, 1]
    extensions: 1
    choose_at: [6, null]
    seeds: [1, 2]
"""
    )
    return work / "study.yaml"


def test_a_study_chooses_on_dev_and_measures_other_seeds_once(study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(study), "--seconds", "0.001"]) == 0  # the start alone
    folder = study.parent / "study"
    assert [run["digest"] for run in Record.open(folder).runs] == ["start"] and "stopped" in capsys.readouterr().out
    assert main([str(study)]) == 0
    record = Record.open(folder)
    start, *runs = record.runs
    chosen = [run for run in runs if run["seed"] == 0]
    assert {run["x"] for run in chosen} == {6, 24} and len(chosen) in (5, 6) and all("scores" not in r for r in chosen)
    measured = [run for run in runs if run["seed"]]
    assert [(run["seed"], run["x"]) for run in measured] == [(seed, x) for seed in (1, 2) for x in (6, 12, 24)]
    best = {x: max((run for run in chosen if run["x"] == x), key=lambda run: run["dev"])["lr"] for x in (6, 24)}
    for run in measured:
        between = np.exp(np.interp(np.log(run["x"]), np.log([6, 24]), np.log([best[6], best[24]])))
        assert run["lr"] == pytest.approx(between) and run["updates"] == 2 and run["batch"] == [24, 24]
        assert np.mean(run["scores"]["code"]) == pytest.approx(run["dev"], abs=1e-4)  # the same queries here
        assert run["scores"]["short"] != run["scores"]["code"] and run["dev"] != start["dev"]
    assert set(record.queries["code"]["clusters"]) == {"m0", "m1", "m2", "m3"}
    page = (folder / "results.md").read_text()
    last = [run for run in measured if run["x"] == 24]
    first = [run for run in measured if run["x"] == 6]
    gain = np.mean([r["scores"]["code"] for r in last]) - np.mean([r["scores"]["code"] for r in first])
    assert f"| 6 | 24 | {gain:+.4f} [" in page and (folder / "negatives-code.svg").read_text().startswith("<svg xmlns")
    capsys.readouterr()
    assert main([str(study)]) == 0
    assert Record.open(folder).runs == record.runs and "train" not in capsys.readouterr().err


def test_the_published_page_is_that_of_its_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    results = ROOT / "docs" / "results"
    write_page(tmp_path, load_study("configs/study_batch.yaml", []), Record.open(results))
    made, _, _ = (tmp_path / "results.md").read_text().partition("## batch")
    rows = [line for line in made.splitlines() if line.startswith("|")]
    published = (ROOT / "docs" / "results.md").read_text()
    assert len(rows) == 14 and all(f"\n{row}\n" in published for row in rows)
    for picture in results.glob("*.svg"):
        drawn = [file.read_text().partition("</style>")[2] for file in (picture, tmp_path / picture.name)]
        assert drawn[0] == drawn[1] != ""


def test_what_a_study_cannot_run_is_refused(study: Path) -> None:
    for override, message in (
        ("arms.0.values=[]", r"arms\.0\.values: expected at least one"),
        ("arms.0.choose_at=[7]", r"arms\.0\.choose_at: expected some of"),
        ("arms.0.setting=batch.pol", "batch.pol"),
        ("arms.0.seeds=[0,1]", r"arms\.0\.seeds: expected other seeds than 0, which chooses the learning rate"),
    ):
        with pytest.raises(ConfigError, match=message):
            load_study(study, [override])


def test_runs_of_an_earlier_grid_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    config, record = load_study("configs/study_batch.yaml", []), Record.open(ROOT / "docs" / "results")
    write_page(tmp_path, config, record)
    page = (tmp_path / "results.md").read_text()
    record.rates = {"negatives": {"64": 3e-4}}
    earlier = next(run for run in record.runs if run["x"] == 64 and run["seed"] == 1)
    zeros = {name: [0.0] * len(values) for name, values in earlier["scores"].items()}
    record.runs.append({**earlier, "lr": 1e-4, "scores": zeros})
    write_page(tmp_path, config, record)
    assert (tmp_path / "results.md").read_text() == page


def test_runs_of_other_data_are_not_added_to(tmp_path: Path) -> None:
    facts = {"device": "a GPU", "commit": "1", "command": "study", "data": {"every": {"content_sha256": "x"}}}
    record = Record(tmp_path)
    record.begin(facts)
    record.begin({**facts, "commit": "2", "command": "study --seconds 9"})
    assert record.facts == {**facts, "commit": "1, 2"}
    record.write()
    with pytest.raises(RefusedError, match="study.json has runs of another data; move it elsewhere, or choose another"):
        Record.open(tmp_path).begin({**facts, "data": {"every": {"content_sha256": "y"}}})
    assert Record.open(tmp_path).facts == record.facts
