"""Rounds that try several settings, and rounds that train their own teacher."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from scripts.pipeline import main
from tests.scripts.mining.workplace import make_workplace, read


@pytest.fixture(scope="module")
def loop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """loop.yaml: the second variant of the first round cannot but be the best, since the others learn nothing."""
    found = make_workplace(tmp_path_factory.mktemp("variants"))
    shutil.copyfile(found.data / "qrels" / "train.tsv", found.data / "qrels" / "dev.tsv")
    (found.folder / "loop.yaml").write_text(
        f"""
output_dir: {found.folder}/run
source: {{path: {found.data}, format: beir}}
train:
  run: {{trackers: [], seed: 3}}
  model: {{name_or_path: {found.folder}/model, query_max_tokens: 16, passage_max_tokens: 24}}
  data: {{negatives: 2}}
  batch: {{queries: 20, tokens_per_chunk: 256}}
  loss: {{temperature: 0.1, precision: fp32}}
  optim: {{lr: 1.0e-12, precision: fp32}}
  train: {{max_steps: 2, save_every: 100}}
rounds:
  - name: mined
    mine: {{ranks: [1, 40], negatives: 4}}
    variants: [{{}}, {{optim: {{lr: 3.0e-3}}, train: {{max_steps: 6}}}}, {{loss: {{temperature: 0.2}}}}]
  - name: taught
    teacher: {{negatives: 3, max_tokens: 40}}
    mine: {{ranks: [1, 40], negatives: 4, teacher: bm25, teacher_max_tokens: 40}}
    train: {{loss: {{kl_weight: 1.0}}}}
evaluate: {{data: {found.data}, choose: dev, options: {{split: [train, dev], metrics: ["nDCG@10", "Recall@20"], k: 50}}}}
"""
    )
    return found.folder


def test_the_best_variant_goes_on_and_the_teacher_is_trained(loop: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """result.json names the best variant's evaluation, and the next mining is done with its model; a second start does
    nothing.
    """
    assert main([str(loop / "loop.yaml")]) == 0
    assert "mined/variant-2: the best of nDCG@10" in capsys.readouterr().out
    result = json.loads((loop / "run" / "result.json").read_text())
    assert result["evaluations"] == {
        "start": "start/evaluate",
        "mined": "mined/variant-2/evaluate",
        "taught": "taught/evaluate",
    }
    table = result["metrics"]
    assert list(table) == [f"{name} {split}" for name in ("start", "mined", "taught") for split in ("dev", "train")]
    measured = json.loads((loop / "run/mined/variant-2/evaluate/results/dev.json").read_text())["metrics"]
    assert table["mined dev"] == measured and measured["nDCG@10"] > table["start dev"]["nDCG@10"]
    manifests = {
        path: json.loads((loop / "run" / path / "manifest.json").read_text())["inputs"]
        for path in ("taught/mine", "taught/teacher")
    }
    evaluated = json.loads((loop / "run/mined/variant-2/evaluate/manifest.json").read_text())["inputs"]["model"]
    assert manifests["taught/mine"]["model"] == evaluated and len(manifests["taught/mine"]["teachers"]) == 2
    assert manifests["taught/teacher"]["options"] == {"negatives": 3, "max_tokens": 40}
    records = read(loop / "run" / "taught" / "mine" / "data")
    for record in records:
        assert record["positive_scores"] and len(record["negative_scores"]) == len(record["negative_passages"])
    assert main([str(loop / "loop.yaml")]) == 0
    said = capsys.readouterr().out
    assert ": starts" not in said and said.count(": reused") == 1 + 1 + 2 * 3 + 1 + 1 + 2


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("evaluate.choose=test", "rounds.0.variants: expected evaluate.choose to be one of"),
        ("rounds.0.variants.2.loss.tau=1", "loss.tau: unknown key"),
        ("rounds.0.mine=null", "rounds.1.teacher: expected a round that mines, after one that does"),
    ],
)
def test_what_is_wrong_is_said_before_anything_starts(
    loop: Path, override: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(loop / "loop.yaml"), f"output_dir={loop}/wrong", override]) == 2
    assert message in capsys.readouterr().err
    assert not (loop / "wrong").exists()
