"""What settings of a run change, and which are refused before its first step."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from retriever import gradcache
from retriever.config_file import load
from retriever.encoder.bundle import load_encoder
from retriever.encoder.tokenizer import ends_texts
from retriever.loss.contrastive import ContrastiveObjective
from retriever.train import main
from tests.tiny import save_plain_model
from tests.workplace import ROOT, metrics, training_arguments


def _train(workplace: Path, output: str, *overrides: str) -> int:
    return main(training_arguments(workplace, output, *overrides))


def _losses(run: Path) -> list[float]:
    return [line["train/loss"] for line in metrics(run) if "train/loss" in line]


def test_representations_in_host_memory_train_as_well(workplace: Path) -> None:
    """The losses of a few steps are the resident run's, and `run.verify` checks the offloaded gradient."""
    losses = []
    for offload in ("true", "false"):
        settings = (
            "eval=null train.eval_every=0 train.max_steps=4 train.log_every=1 loss.precision=fp32 run.verify=true"
        )
        assert _train(workplace, f"offload-{offload}", *settings.split(), f"batch.offload={offload}") == 0
        losses.append(_losses(workplace / f"offload-{offload}"))
    assert len(losses[0]) == 4 and losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_kinds_of_negatives_positives_and_a_teacher_are_checked_before_the_first_step(
    workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The model is its own guide and teacher here."""
    start = load(workplace / "run.yaml").model.name_or_path
    settings = [
        "loss.directions=[query_to_passage,passage_to_passage]",
        "loss.positives=2",
        "loss.hardness=own",
        "loss.hardness_strength=5",
        f"loss.guide={start}",
        "loss.guide_margin=0.05",
        f"loss.teacher={start}",
        "loss.embedding_weight=0.5",
        "model.query_prompt=find ",
    ]
    output = workplace / "kinds"
    common = ["eval=null", "train.eval_every=0", "train.max_steps=2", "train.log_every=1", "run.verify=true"]
    assert main(["--config", str(workplace / "run.yaml"), f"run.output_dir={output}", *common, *settings]) == 0
    said = capsys.readouterr().out
    assert "gradient equal to the whole batch's" in said and "finished 2 steps" in said
    assert len([line for line in metrics(output) if "train/loss" in line]) == 2


def test_what_is_kept_between_the_passes_changes_no_loss(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each step keeps what `batch` says of its first chunks."""
    begun = gradcache.encode_without_graph
    kinds, losses = set(), []

    def noted(*given: Any, **named: Any) -> Any:
        representations, first = begun(*given, **named)
        kinds.add(tuple(len(kept) > 0 for kept in (first.kept, first.partial, first.states)))
        return representations, first

    monkeypatch.setattr("retriever.step.encode_without_graph", noted)
    for graphs, products in ((0, 0), (150, 200)):
        settings = "eval=null train.eval_every=0 train.max_steps=3 train.log_every=1 model.fused=true"
        kept = (f"batch.retain={graphs}", f"batch.retain_products={products}", "batch.tokens_per_chunk=100")
        assert _train(workplace, f"kept-{graphs}", *settings.split(), *kept) == 0
        losses.append(_losses(workplace / f"kept-{graphs}"))
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
    assert _train(workplace, f"normalize-{normalize}", *settings) == 0
    assert "finished 1 step: model in" in capsys.readouterr().out
    assert set(largest) == {1.0 if normalize == "true" else None}


def test_a_language_model_is_trained_evaluated_and_exported_with_an_end_and_fewer_dimensions(
    workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = [
        "model.truncate_dim=12",
        "run.verify=true",
        "train.eval_every=0",
        "train.max_steps=1",
        "run.trackers=[]",
    ]
    gemma, llama = (
        f"model.name_or_path={save_plain_model(workplace / architecture, architecture)}"
        for architecture in ("gemma", "llama")  # Gemma's norms compute in float32, in the check of the gradient too
    )
    assert _train(workplace, "ended", gemma, *settings) == 0
    assert "appends nothing" not in capsys.readouterr().out
    resolved = load(workplace / "ended" / "config.yaml").model
    assert (resolved.append_eos, resolved.truncate_dim, resolved.pooling) == (True, 12, "last")
    found = load_encoder(workplace / "ended" / "export")
    assert ends_texts(found.tokenizer) and found.encode(["brain"], "query").shape == (1, 12)
    assert _train(workplace, "endless", llama, *settings, "model.append_eos=false") == 0
    assert "warning: model.pooling=last, but the tokenizer appends nothing to a text" in capsys.readouterr().out
    assert not ends_texts(load_encoder(workplace / "endless" / "export").tokenizer)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "model.query_prompt=" + "search " * 15,
            "model.query_prompt: 15 tokens and 2 special ones leave no room for a text in the 16",
        ),
        ("model.truncate_dim=0", "model.truncate_dim: expected a whole number of at least 1 | auto | null, received 0"),
        ("model.truncate_dim=true", "model.truncate_dim: expected "),
        ("model.append_eos=yes please", "model.append_eos: expected true or false | auto"),
        ("eval.path=/nowhere/collection", "/nowhere/collection"),
        ("eval.metrics=[foo@10]", "foo@10"),
        ("eval.metrics=[Recall@100]", "Recall@100 needs 100 passages per query, but k=50"),
    ],
)
def test_what_cannot_run_stops_the_run_before_its_first_step(
    workplace: Path, override: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _train(workplace, "fresh", "run.trackers=[]", override) == 2
    assert message in capsys.readouterr().err
    assert not (workplace / "fresh").exists()


@pytest.mark.parametrize("override", ["run.trackers=[foo]", "optim.lr=-1"])
def test_a_wrong_setting_is_refused_before_torch_is_imported(workplace: Path, override: str) -> None:
    code = "import sys; from retriever.train import main; status = main(sys.argv[1:]); sys.exit(8 if 'torch' in sys.modules else status)"
    started = [sys.executable, "-c", code, *training_arguments(workplace, "fresh", override)]
    ended = subprocess.run(started, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert ended.returncode == 2, ended.stderr
    assert ended.stderr.startswith(f"error: {override.partition('=')[0]}: ") and ended.stderr.count("\n") == 1
    assert not (workplace / "fresh").exists()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.name_or_path={}/modle", "model.name_or_path: there is no folder {0}/modle; did you mean {0}/model?"),
        ("loss.custom=tests.tiny:no_loss", "loss.custom: expected package.module:function, which can be imported"),
        ("optim.name=torch.optim.Adamm", "optim.name: expected the import path of an optimizer"),
        (
            "optim={{name: torch.optim.NAdam, arguments: {{beta: 1}}}}",
            "optim.arguments: torch.optim.NAdam does not take",
        ),
    ],
)
def test_what_is_named_wrongly_is_told_before_texts_are_tokenised(
    workplace: Path, override: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = [override.format(workplace), f"data.cache_dir={workplace}/untouched", "loss.learn_temperature=false"]
    assert _train(workplace, "fresh", *asked) == 2
    assert message.format(workplace) in capsys.readouterr().err
    assert not (workplace / "untouched").exists()
