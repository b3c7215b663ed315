"""The loop on a tiny model: what it leaves, that it does nothing twice, and that interruptions anywhere change
nothing.
"""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file

from retriever.config import ConfigError
from scripts import stages
from scripts.loop.config import load_loop
from scripts.loop.rounds import flags
from scripts.pipeline import main
from tests.scripts.mining.workplace import Workplace, make_workplace, read
from tests.starts import start

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    """Data and models, and loop.yaml: trained on the source, on mined negatives, and distilled from a teacher's
    scores.
    """
    found = make_workplace(tmp_path_factory.mktemp("loop"))
    mine = "ranks: [1, 40], negatives: 4"
    (found.folder / "loop.yaml").write_text(
        f"""
output_dir: {found.folder}/undisturbed
source: {{path: {found.data}, format: beir}}
train:
  run: {{trackers: [], seed: 3}}
  model: {{name_or_path: {found.folder}/model, query_max_tokens: 16, passage_max_tokens: 24}}
  data: {{negatives: 2}}
  batch: {{queries: 20, tokens_per_chunk: 256}}
  loss: {{temperature: 0.1, precision: fp32}}
  optim: {{lr: 1.0e-3, precision: fp32}}
  train: {{max_steps: 4, save_every: 2}}
rounds:
  - {{name: contrastive}}
  - {{name: mined, mine: {{{mine}, retrievers: [model, bm25]}}}}
  - name: taught
    mine: {{{mine}, teacher: {found.folder}/teacher, teacher_max_tokens: 64}}
    start: previous
    train: {{loss: {{kl_weight: 1.0, teacher_temperature: 3.0}}, train: {{max_steps: 6}}}}
evaluate: {{data: {found.data}, options: {{split: [train], metrics: ["nDCG@10", "Recall@20"], k: 50}}}}
"""
    )
    return found


@pytest.fixture(scope="module")
def undisturbed(workplace: Workplace) -> Path:
    assert main([str(workplace.folder / "loop.yaml")]) == 0
    return workplace.folder / "undisturbed"


def _manifests(root: Path) -> dict[str, dict[str, Any]]:
    """The manifests of the loop's own stages, by their names."""
    paths = (path for part in ("mine", "train", "evaluate") for path in sorted(root.glob(f"*/{part}/manifest.json")))
    return {manifest["stage"]: manifest for manifest in map(json.loads, map(Path.read_text, paths))}


def _assert_same(root: Path, other: Path) -> None:
    assert (root / "result.json").read_bytes() == (other / "result.json").read_bytes()
    for name in ("contrastive", "mined", "taught"):
        found, expected = (
            load_file(folder / name / "train" / "run" / "export" / "model.safetensors") for folder in (root, other)
        )
        assert found.keys() == expected.keys() and all(
            found[key].tobytes() == expected[key].tobytes() for key in expected
        )
    for name in ("mined", "taught"):
        data = [folder / name / "mine" / "data" / "train.jsonl" for folder in (root, other)]
        assert data[0].read_bytes() == data[1].read_bytes()
    assert _manifests(root).keys() == _manifests(other).keys()


def test_every_round_leaves_its_data_model_and_measures(undisturbed: Path) -> None:
    """Each round trains another model; mined data come from the model before; the table has the start and every
    round.
    """
    table = json.loads((undisturbed / "result.json").read_text())["metrics"]
    assert list(table) == ["start", "contrastive", "mined", "taught"]
    assert table["taught"]["nDCG@10"] > table["start"]["nDCG@10"], (
        "training on these pairs made the model no better on them"
    )
    manifests = _manifests(undisturbed)
    assert len(manifests) == 1 + 2 + 3 + 3
    mined, taught = (manifests[f"{name}: mine"]["inputs"] for name in ("mined", "taught"))
    assert mined["model"] != taught["model"] and taught["teachers"] and not mined["teachers"]
    assert manifests["taught: train"]["inputs"]["model"] == taught["model"], (
        "start: previous trains on from the model before"
    )
    assert manifests["mined: train"]["inputs"]["model"] == manifests["contrastive: train"]["inputs"]["model"]
    assert manifests["taught: train"]["inputs"]["config"]["loss"]["kl_weight"] == 1.0
    assert all("negative_scores" in record for record in read(undisturbed / "taught" / "mine" / "data"))
    weights = [
        (undisturbed / name / "train/run/export/model.safetensors").read_bytes()
        for name in ("contrastive", "mined", "taught")
    ]
    assert len(set(weights)) == 3


def test_a_finished_loop_is_reused_and_a_change_reaches_what_follows(
    workplace: Workplace, undisturbed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Started again, every stage is reused; with another seed of the last mining, that mining and what comes after it
    are done again.
    """
    before = _manifests(undisturbed)
    assert main([str(workplace.folder / "loop.yaml")]) == 0
    said = capsys.readouterr().out
    assert said.count(": reused") == len(before) and ": starts" not in said and _manifests(undisturbed) == before
    assert main([str(workplace.folder / "loop.yaml"), "rounds.2.mine.seed=5"]) == 0
    said = capsys.readouterr().out
    assert "mined: train: reused" in said and "taught: mine: starts" in said
    assert "search by model: reused" in said and "score: starts" in said
    assert "encode: " not in said, "neither the search that is reused nor a cross-encoder's scores read embeddings"
    assert "taught: train: starts" in said and "taught: evaluate: starts" in said
    assert main([str(workplace.folder / "loop.yaml")]) == 0
    assert _manifests(undisturbed) == before


def test_interrupted_at_every_stage_it_ends_the_same(
    workplace: Workplace, undisturbed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped once right before each stage's manifest, those inside the mining included: restarts end with the same
    bytes.
    """
    finish, stopped = stages.write_json, set()

    def interrupting(path: Path, values: dict[str, Any]) -> None:
        if path.name == stages.MANIFEST and (place := str(path)) not in stopped:
            stopped.add(place)
            raise KeyboardInterrupt
        finish(path, values)

    monkeypatch.setattr(stages, "write_json", interrupting)
    command, starts = [str(workplace.folder / "loop.yaml"), f"output_dir={workplace.folder}/stopped"], 0
    while (status := main(command)) == 130:
        starts += 1
        assert starts < 40
    assert status == 0
    inside = (
        5 + 6
    )  # read, encode, index for BM25, search by one retriever or two, score where there is a teacher, the mined data
    assert starts == len(stopped) == 1 + 2 + 3 + 3 + inside
    _assert_same(workplace.folder / "stopped", undisturbed)


def test_killed_at_any_moment_it_ends_the_same(
    workplace: Workplace, undisturbed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """SIGKILL while a round trains, then a second start: it goes on from the checkpoint that was written."""
    root = workplace.folder / "killed"
    arguments = [str(workplace.folder / "loop.yaml"), f"output_dir={root}"]
    started = start(workplace.folder, arguments, command="scripts.pipeline")
    started.until((root / "mined/train/run/checkpoints/step-00000002").exists)
    started.signal(signal.SIGKILL)
    started.wait()
    assert list(json.loads((root / "result.json").read_text())["metrics"]) == ["start", "contrastive"], (
        "what is done so far"
    )
    assert main(arguments) == 0
    said = capsys.readouterr().out
    assert "contrastive: train: reused" in said and "mined: train: goes on" in said
    _assert_same(root, undisturbed)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("rounds=[]", "rounds: expected at least one"),
        ("rounds.1.name=contrastive", "each with its own name"),
        ("rounds.0.name=start", "none called start"),
        ("evaluate.data=''", "evaluate.data"),
        ("train.loss.temprature=1", "loss.temprature: unknown key"),
        ("rounds.2.train.data.negatives=0", "data.negatives"),
        ("train.run.output_dir=x", "train.run.output_dir: expected nothing: the loop sets it"),
        ("rounds.0.mien=1", "rounds.0.mien: unknown key"),
        ("source.path=/nowhere", "/nowhere"),
        ("rounds.x.name=other", "override 'rounds.x.name=other'"),
    ],
)
def test_what_is_wrong_is_said_before_anything_starts(
    workplace: Workplace, override: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(workplace.folder / "loop.yaml"), f"output_dir={workplace.folder}/wrong", override]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("loop_*.yaml")), ids=lambda path: path.stem)
def test_the_projects_loops_are_valid(path: Path) -> None:
    assert load_loop(path).rounds
    with pytest.raises(ConfigError, match="expected key.sub=value"):
        load_loop(path, ["rounds"])


@pytest.mark.parametrize("prompt", ["query: ", "Represent question #1: ", "${a}"])
def test_a_prompt_on_the_command_line_is_taken_as_it_stands(prompt: str) -> None:
    loop = load_loop(ROOT / "configs" / "loop_scifact.yaml", [f"train.model.query_prompt={prompt}"])
    assert loop.training(0, "model", None, Path("out")).model.query_prompt == prompt


def test_options_become_words() -> None:
    assert flags({"first_rank": 3, "ranks": [1, 2], "on": True, "off": False, "none": None}) == [
        "--first-rank",
        "3",
        "--ranks",
        "1",
        "2",
        "--on",
    ]
