"""What settings of a run change, and which are refused before its first step."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from retriever import gradcache
from retriever.loss.contrastive import ContrastiveObjective
from retriever.train import main
from tests.workplace import ROOT, make_workplace, metrics, training_command


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_workplace(tmp_path_factory.mktemp("train"))


def test_representations_in_host_memory_train_as_well(workplace: Path) -> None:
    """The losses of a few steps are the resident run's, and `run.verify` checks the offloaded gradient."""
    losses = []
    for offload in ("true", "false"):
        output = workplace / f"offload-{offload}"
        settings = ["eval=null", "train.eval_every=0", "train.max_steps=4", "train.log_every=1", "loss.precision=fp32", "run.verify=true"]
        arguments = ["--config", str(workplace / "run.yaml"), f"run.output_dir={output}", f"batch.offload={offload}", *settings]
        assert main(arguments) == 0
        losses.append([line["train/loss"] for line in metrics(output) if "train/loss" in line])
    assert len(losses[0]) == 4 and losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_what_is_kept_between_the_passes_changes_no_loss(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each step keeps what `batch` says of its first chunks."""
    begun = gradcache.encode_without_graph
    kinds, losses = set(), []

    def noted(*given: Any, **named: Any) -> Any:
        representations, first = begun(*given, **named)
        kinds.add(tuple(len(kept) > 0 for kept in (first.kept, first.begun, first.states)))
        return representations, first

    monkeypatch.setattr("retriever.step.encode_without_graph", noted)
    for graphs, products in ((0, 0), (150, 200)):
        output = workplace / f"kept-{graphs}"
        kept = (f"batch.retain={graphs}", f"batch.retain_products={products}", "batch.tokens_per_chunk=100")
        settings = ["eval=null", "train.eval_every=0", "train.max_steps=3", "train.log_every=1", "model.fused=true", *kept]
        assert main(["--config", str(workplace / "run.yaml"), f"run.output_dir={output}", *settings]) == 0
        losses.append([line["train/loss"] for line in metrics(output) if "train/loss" in line])
    assert kinds == {(False, False, True), (True, True, True)}
    assert len(losses[0]) == 3 and losses[0] == losses[1]


@pytest.mark.parametrize("normalize", ["true", "false"])
def test_vectors_are_trusted_to_be_unit_vectors_where_they_are(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], normalize: str
) -> None:
    largest, problem = [], ContrastiveObjective._problem

    def noted(objective: ContrastiveObjective, *given: Any) -> Any:
        largest.append(problem(objective, *given).largest)
        return problem(objective, *given)

    monkeypatch.setattr(ContrastiveObjective, "_problem", noted)
    settings = ["eval=null", "train.eval_every=0", "train.max_steps=1", f"model.normalize={normalize}"]
    assert main(["--config", str(workplace / "run.yaml"), f"run.output_dir={workplace / f'normalize-{normalize}'}", *settings]) == 0
    assert "finished 1 step: model in" in capsys.readouterr().out
    assert set(largest) == {1.0 if normalize == "true" else None}


@pytest.mark.parametrize("override", ["run.trackers=[foo]", "optim.lr=-1"])
def test_a_wrong_setting_is_refused_before_torch_is_imported(workplace: Path, override: str) -> None:
    code = "import sys; from retriever.train import main; status = main(sys.argv[1:]); sys.exit(8 if 'torch' in sys.modules else status)"
    started = [sys.executable, "-c", code, *training_command(workplace, "fresh", override)[2:]]
    ended = subprocess.run(started, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 2, ended.stderr
    assert ended.stderr.startswith(f"error: {override.partition('=')[0]}: ") and ended.stderr.count("\n") == 1
    assert not (workplace / "fresh").exists()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("eval.path=/nowhere/collection", "/nowhere/collection"),
        ("eval.metrics=[foo@10]", "foo@10"),
        ("eval.metrics=[Recall@100]", "Recall@100 looks at 100 passages a query, of which k=50"),
    ],
)
def test_an_evaluation_that_cannot_run_stops_the_run_before_its_first_step(
    workplace: Path, override: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(training_command(workplace, "fresh", "run.trackers=[]", override)[2:]) == 2
    assert message in capsys.readouterr().err
    assert not (workplace / "fresh").exists()
