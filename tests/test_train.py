"""The training command as a user runs it: it trains, resumes after a kill as if nothing had happened, and says what is
wrong.
"""

from __future__ import annotations

import json
import random
import re
import shutil
import signal
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file

from retriever import files
from retriever.optim import Optimizer
from retriever.train import main
from tests.starts import Ended, start
from tests.tiny import save_tiny_model
from tests.workplace import assert_trained_alike, metrics, training_arguments


@pytest.fixture(scope="module")
def undisturbed(workplace: Path) -> Path:
    finished = start(workplace, training_arguments(workplace, "undisturbed", "run.verify=true")).wait()
    assert finished.finished, finished.said
    error = float(finished.said.split("gradient equal to the whole batch's to ")[1].split(",")[0])
    assert error < 1e-9
    scores = {line["step"]: line["eval/MRR@10"] for line in metrics(workplace / "undisturbed") if "eval/MRR@10" in line}
    for step, score in scores.items():
        best = max(((value, at) for at, value in scores.items() if at <= step), key=lambda found: found[0])
        assert f"eval    step {step}: MRR@10 {score:.4f}, Recall@20 " in finished.said
        assert f"; best MRR@10 {best[0]:.4f} at step {best[1]}\n" in finished.said
    assert f"best    MRR@10 {best[0]:.4f} at step {best[1]}: model in {workplace}/undisturbed/best\n" in finished.said
    return workplace / "undisturbed"


def test_training_lowers_the_loss_and_fills_the_run_folder(undisturbed: Path) -> None:
    lines = metrics(undisturbed)
    losses = [line["train/loss"] for line in lines if "train/loss" in line]
    assert losses[-1] < 0.9 * losses[0]
    evaluated = [line["step"] for line in lines if "eval/MRR@10" in line]
    assert evaluated == [10, 20]
    assert sorted(p.name for p in (undisturbed / "checkpoints").iterdir()) == ["step-00000018", "step-00000020"]
    for folder in ("export", "best", "checkpoints/step-00000018/export"):
        assert (undisturbed / folder / "model.safetensors").exists()
    report = (undisturbed / "report.html").read_text()
    assert "<svg" in report and str(undisturbed.parent) not in report and "name_or_path: model" in report
    assert "120 passages; batches of 24 queries, no hard negatives; tiled loss" in report
    for name in ("export", "best"):
        card = (undisturbed / name / "README.md").read_text()
        step = json.loads((undisturbed / f"{name}.json").read_text())["step"]
        assert (
            f"from `model`: {step} steps on `data` (120 queries) and 120 passages; batches of 24 queries, no hard"
            in card
        )
        (value,) = [line["eval/MRR@10"] for line in lines if line["step"] == step and "eval/MRR@10" in line]
        assert f"After step {step} on the split `dev` of `data`" in card and f"| `MRR@10` | {value:.4f} |" in card
        assert str(undisturbed.parent) not in card
    assert "tokens_per_chunk: 192" in (undisturbed / "config.yaml").read_text()


def _train(workplace: Path, output: str, *overrides: str) -> int:
    """The training command in this process, and its exit status."""
    return main(training_arguments(workplace, output, *overrides))


def _disturb(update: int, moment: Callable[[], object]) -> None:
    """Calls `moment` once in this process, when the optimizer begins its update after `update` of them."""
    as_ever = Optimizer._clip_and_step

    def disturbed(optimizer: Optimizer, step: int) -> Any:
        if optimizer.updates == update:
            moment()
        return as_ever(optimizer, step)

    Optimizer._clip_and_step = disturbed  # type: ignore[assignment, method-assign]


def _kill_within(seconds: float) -> None:
    threading.Timer(seconds, signal.raise_signal, (signal.SIGKILL,)).start()


def _kill_while_writing() -> None:
    def end(operation: str, path: Path) -> None:
        if operation == "sync" and path.parent.name.startswith(".writing-step"):
            signal.raise_signal(signal.SIGKILL)

    files.before = end


def _disturbed(workplace: Path, output: str, update: int, moment: Callable[[], object], *overrides: str) -> Ended:
    """How the training command ends in a process that is disturbed."""
    before = partial(_disturb, update, moment)
    return start(workplace, training_arguments(workplace, output, *overrides), before=before).wait()


def test_a_run_killed_at_random_moments_ends_with_the_same_bits(
    workplace: Path, undisturbed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """SIGKILL at two random moments, then while a checkpoint is being written, then a last start: nothing may
    differ.
    """
    run, draw = workplace / "killed", random.Random(11)
    early, late = draw.randrange(2, 7), draw.randrange(7, 13)
    for update, moment in (
        (early, partial(_kill_within, draw.random() * 0.1)),
        (late, partial(_kill_within, draw.random() * 0.1)),
        (15, _kill_while_writing),
    ):
        ended = _disturbed(workplace, "killed", update, moment)
        assert ended.statuses == [-signal.SIGKILL], ended.said
    assert list((run / "checkpoints").glob(".writing-step-*/optimizer.safetensors"))
    assert _train(workplace, "killed") == 0
    assert "resuming at step" in capsys.readouterr().out
    _assert_same_run(run, undisturbed)


def _assert_same_run(run: Path, other: Path) -> None:
    for name in (
        "checkpoints/step-00000020/model.safetensors",
        "checkpoints/step-00000020/optimizer.safetensors",
        "export/model.safetensors",
    ):
        found, expected = load_file(run / name), load_file(other / name)
        assert found.keys() == expected.keys()
        for key in expected:
            assert found[key].tobytes() == expected[key].tobytes(), f"{name}: {key} differs"
    assert [p.name for p in [*run.iterdir(), *(run / "checkpoints").iterdir()] if p.name.startswith(".")] == [
        ".bigbatch"
    ]
    timed = {"train/pairs_per_s", "train/tokens_per_s", "train/waited_share", "time"}
    timeless = lambda lines: [{k: v for k, v in line.items() if k not in timed} for line in lines]  # noqa: E731
    assert timeless(metrics(run)) == timeless(metrics(other))


def test_a_finished_run_says_so(workplace: Path, undisturbed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _train(workplace, "undisturbed") == 0
    assert "already finished at step 20 of 20" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["optim.lr=5e-4"], "optim.lr: 0.001 -> 0.0005"),
        (["run.resume=never"], "already holds a run"),
        (["model.name_or_path=/nowhere/model", "run.output_dir=fresh"], "/nowhere/model"),
    ],
)
def test_what_is_wrong_is_said_in_one_message_without_a_traceback(
    workplace: Path, undisturbed: Path, overrides: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _train(workplace, "undisturbed", *overrides) == 2
    said = capsys.readouterr().err.strip()
    assert said.startswith("error: ")
    assert message in said


def test_a_resume_may_change_how_it_logs_and_saves(workplace: Path, undisturbed: Path) -> None:
    overrides = ["train.log_every=1", "train.save_every=100", "train.eval_every=7", "run.trackers=[]"]
    assert _train(workplace, "undisturbed", *overrides) == 0


def test_a_last_line_that_was_cut_short_is_written_again(
    workplace: Path, undisturbed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(undisturbed, workplace / "torn")
    shutil.rmtree(workplace / "torn" / "checkpoints" / "step-00000020")
    whole = (workplace / "torn" / "metrics.jsonl").read_bytes()
    for cut in (whole[:-5], whole[:-1]):
        (workplace / "torn" / "metrics.jsonl").write_bytes(cut)
        assert _train(workplace, "torn") == 0
        assert [line["step"] for line in metrics(workplace / "torn")] == [line["step"] for line in metrics(undisturbed)]
    (workplace / "torn" / "metrics.jsonl").write_bytes(b"{\n" + whole)
    assert _train(workplace, "torn") == 2
    assert "metrics.jsonl:1 is damaged" in capsys.readouterr().err


def test_what_is_saved_again_is_published_again(workplace: Path, undisturbed: Path) -> None:
    """`export/` and `best/` are the newest checkpoint's, also where the same step's stood there before."""
    run = workplace / "again"
    shutil.copytree(undisturbed, run)
    shutil.rmtree(run / "checkpoints" / "step-00000020")
    for name in ("export", "best"):
        assert json.loads((run / f"{name}.json").read_text())["step"] == 20
        (run / name / "model.safetensors").write_bytes(b"another run's")
    assert _train(workplace, "again") == 0
    expected = (run / "checkpoints" / "step-00000020" / "export" / "model.safetensors").read_bytes()
    assert all((run / name / "model.safetensors").read_bytes() == expected for name in ("export", "best"))


@pytest.mark.parametrize("damage", ["cut weights", "other weights", "lost file", "cut card", "cut record"])
def test_an_export_that_was_damaged_is_repaired_by_the_same_command(
    workplace: Path, undisturbed: Path, damage: str
) -> None:
    run = shutil.copytree(undisturbed, workplace / "repaired", dirs_exist_ok=True)
    source = run / "checkpoints" / "step-00000020" / "export"
    for name in ("export", "best"):
        weights = (run / name / "model.safetensors").read_bytes()
        match damage:
            case "cut weights":
                (run / name / "model.safetensors").write_bytes(weights[:-100])
            case "other weights":
                (run / name / "model.safetensors").write_bytes(weights[:-1] + bytes([weights[-1] ^ 1]))
            case "lost file":
                (run / name / "1_Pooling" / "config.json").unlink()
            case "cut card":
                (run / name / "README.md").write_text("# ")
            case _:
                (run / f"{name}.json").write_text('{"step"')
    assert _train(workplace, "repaired", "run.trackers=[]") == 0
    for name in ("export", "best"):
        files = {f.relative_to(source): f.read_bytes() for f in source.rglob("*") if f.is_file()}
        found = {f.relative_to(run / name): f.read_bytes() for f in (run / name).rglob("*") if f.is_file()}
        card, scored = files.pop(Path("README.md")).decode(), found.pop(Path("README.md")).decode()
        assert found == files and scored.startswith(
            f"{card}\n## Evaluation\n\nAfter step 20 on the split `dev` of `data`:"
        )
        assert json.loads((run / f"{name}.json").read_text())["step"] == 20


def test_a_run_goes_on_from_a_checkpoint_of_any_name(
    workplace: Path, undisturbed: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(undisturbed / "checkpoints" / "step-00000020", workplace / "kept")
    monkeypatch.chdir(workplace)
    assert _train(workplace, "elsewhere", "run.resume=kept") == 0
    assert "already finished at step 20 of 20: kept" in capsys.readouterr().out
    weights = [run / "export" / "model.safetensors" for run in (workplace / "elsewhere", undisturbed)]
    assert weights[0].read_bytes() == weights[1].read_bytes(), "the last line says that the model is there"


def test_a_damaged_checkpoint_is_refused_in_one_line(
    workplace: Path, undisturbed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = shutil.copytree(undisturbed, workplace / "damaged")
    weights = run / "checkpoints" / "step-00000020" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert _train(workplace, "damaged") == 2
    said = capsys.readouterr().err.strip()
    assert said.startswith(f"error: {weights} is damaged") and said.endswith("step-00000018") and "\n" not in said
    shutil.rmtree(weights.parent)
    assert _train(workplace, "damaged") == 0


def test_two_ranks_train_as_one(workplace: Path) -> None:
    """With dropout off, a run that goes on from one rank to two differs by rounding alone, in its losses and in its
    weights.
    """
    save_tiny_model(workplace / "still", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    overrides = (
        f"model.name_or_path={workplace}/still",
        "train.max_steps=12",
        "train.save_every=6",
        "train.log_every=1",
        "train.eval_every=0",
        "eval=null",
        "run.trackers=[]",
    )
    assert _train(workplace, "one-rank", *overrides) == 0
    shutil.copytree(workplace / "one-rank", workplace / "two-ranks")
    shutil.rmtree(workplace / "two-ranks" / "checkpoints" / "step-00000012")  # one rank's first half, resumed on two
    together = start(workplace, training_arguments(workplace, "two-ranks", *overrides), ranks=2).wait()
    assert together.finished, together.said
    assert "on 2 × CPU" in together.said and "resuming at step 6 of 12" in together.said
    losses = [
        [line["train/loss"] for line in metrics(workplace / run) if "train/loss" in line]
        for run in ("one-rank", "two-ranks")
    ]
    assert len(losses[0]) == 12
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
    two, one = (workplace / run / "export" for run in ("two-ranks", "one-rank"))
    assert_trained_alike(two, one, workplace / "still")


def test_a_finished_run_can_be_made_longer(
    workplace: Path, undisturbed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It goes on by the schedule of its new length; a shorter one is refused."""
    run = shutil.copytree(undisturbed, workplace / "longer")
    assert _train(workplace, "longer", "train.max_steps=25") == 0
    said = capsys.readouterr().out
    assert "resuming at step 20 of 25" in said
    assert "from here on the learning rate follows the schedule of 25 steps" in said
    rates = {line["step"]: line["train/lr"] for line in metrics(run) if "train/lr" in line}
    assert rates[25] < rates[5] and (run / "checkpoints" / "step-00000025").exists()
    assert _train(workplace, "longer", "train.max_steps=24") == 2
    refused = capsys.readouterr().err
    assert "train.max_steps: 25 -> 24" in refused and "(train.max_steps and train.epochs may only grow)" in refused


def test_an_evaluation_that_fails_costs_no_training(
    workplace: Path, undisturbed: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What was trained is saved before; the same command makes up the evaluation and ends as an undisturbed run
    does.
    """

    def fail(*_: object, **__: object) -> None:
        raise OSError(5, "Input/output error", "corpus.jsonl")

    with monkeypatch.context() as patch:
        patch.setattr("retriever.evaluation.evaluate_all", fail)
        assert _train(workplace, "unevaluated") == 2
    run = workplace / "unevaluated"
    assert max(folder.name for folder in (run / "checkpoints").iterdir()) == "step-00000010"
    assert _train(workplace, "unevaluated") == 0
    assert "resuming at step 10 of 20" in capsys.readouterr().out
    _assert_same_run(run, undisturbed)
    assert (run / "best.json").read_text() == (undisturbed / "best.json").read_text()


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_and_the_same_command_goes_on_to_the_same_bits(
    workplace: Path, undisturbed: Path, number: signal.Signals, status: int, capsys: pytest.CaptureFixture[str]
) -> None:
    run = workplace / f"stopped-{status}"
    moment = partial(signal.raise_signal, number)
    stopped = _disturbed(workplace, run.name, 6, moment, "train.save_every=100")
    assert stopped.statuses == [status], stopped.said
    (line,) = re.findall("^.*: stopped after .*", stopped.said, re.MULTILINE)
    said = f"{number.name}: stopped after step ([78]), which is saved. The same command goes on from there"
    step = re.fullmatch(said, line)  # 8 where the thread that reads signals had no time during step 7
    assert step is not None, line
    assert "error: " not in stopped.said and "Traceback" not in stopped.said
    assert _train(workplace, run.name) == 0
    assert f"resuming at step {step[1]} of 20" in capsys.readouterr().out
    for name in ("model", "optimizer"):
        saved = (folder / "checkpoints/step-00000020" / f"{name}.safetensors" for folder in (run, undisturbed))
        assert len({file.read_bytes() for file in saved}) == 1, name


def test_the_real_batch_is_said(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """120 queries of a source make batches of 24 where 24 are asked for, and of 120 where 5,000 are."""
    overrides = ["batch.queries=5000", "train.max_steps=1", "eval=null", "train.eval_every=0", "run.trackers=[]"]
    assert _train(workplace, "one-batch", *overrides) == 0
    assert "batch   120 queries, all there are (batch.queries=5000) in chunks" in capsys.readouterr().out


def test_a_run_without_an_update_is_no_finished_run(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As in fp16, whose scaler leaves out every update whose gradient overflows."""
    monkeypatch.setattr("retriever.optim.Optimizer._clip_and_step", lambda self, step: float("inf"))
    overrides = ["train.max_steps=2", "eval=null", "train.eval_every=0", "run.trackers=[]"]
    assert _train(workplace, "overflowing", *overrides) == 2
    said = capsys.readouterr()
    assert "no update was made in 2 steps" in said.err and "finished" not in said.out
