"""`Run` from Python: what is handed to it, a loop of one's own as the documentation shows it, and what it leaves."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from accelerate import PartialState
from datasets import Dataset
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer
from tqdm import TMonitor

import bigbatch
from bigbatch import Callback, Run
from eval import several
from eval.evaluate import evaluate
from retriever.config import Config, ConfigError, EvalConfig, ModelConfig, SourceConfig
from retriever.config_file import load
from retriever.encoder.bundle import EncoderBundle, load_encoder
from retriever.errors import Stopped
from retriever.inputs import configuration
from retriever.loss.custom import CustomLoss
from tests.tiny import random_texts
from tests.workplace import ROOT, metrics


def _records(workplace: Path) -> list[dict[str, str]]:
    texts = random_texts(96, shortest=6, longest=20, seed=5)
    return [{"anchor": " ".join(text.split()[:3]), "positive": text} for text in texts]


def _state() -> dict[str, Any]:
    """Of this process, what a run could leave changed."""
    return {
        "environment": dict(os.environ),
        "signals": [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)],
        "group": dist.is_initialized(),
        "accelerate": dict(PartialState._shared_state),
        "threads": [thread.name for thread in threading.enumerate() if not isinstance(thread, TMonitor)],  # tqdm's own
        "draws": torch.get_rng_state().tolist(),
        "torch": (torch.get_default_dtype(), torch.is_grad_enabled(), torch.get_num_threads()),
    }


def test_objects_in_memory_train_evaluate_and_come_back(workplace: Path) -> None:
    """A model, texts and an evaluation that Python code holds, trained in two parts; nothing of the process changes."""
    before = _state()
    start = SentenceTransformer(str(workplace / "model"), device="cpu")
    records = _records(workplace)
    corpus = {f"p{i}": record["positive"] for i, record in enumerate(records)}
    queries = {f"q{i}": record["anchor"] for i, record in enumerate(records[:20])}
    judgments = {f"q{i}": {f"p{i}"} for i in range(20)}
    collections = {"held out": (queries, corpus, judgments), "few": ({"q0": queries["q0"]}, corpus, {"q0": {"p0"}})}
    settings = [
        *(f"run.output_dir={workplace / 'memory'}", f"data.cache_dir={workplace / 'cache'}", "run.trackers=[]"),
        *("model.query_max_tokens=16", "model.passage_max_tokens=32", "batch.queries=24", "optim.precision=fp32"),
        *("data.negatives=0", "loss.temperature=0.05", "optim.lr=1e-3", "eval.metrics=[nDCG@10]"),
    ]
    losses = []
    for steps, train in ((4, Dataset.from_list(records)), (8, (dict(record) for record in records))):
        run = Run(None, [*settings, f"train.max_steps={steps}"], model=start, train=train, eval=collections)
        run.train()
        losses += [line["train/loss"] for line in metrics(workplace / "memory") if "train/loss" in line]
        assert run.done == steps
    with pytest.raises(ConfigError, match="run.resume: never, but"):
        run.train(resume=False)
    measured = run.evaluate()
    after = measured["eval/nDCG@10"]
    assert {"eval/held out/nDCG@10", "eval/few/nDCG@10"} <= measured.keys()
    recorded = [line["eval/nDCG@10"] for line in metrics(workplace / "memory") if "eval/nDCG@10" in line]
    assert len(recorded) == 2 and after == pytest.approx(recorded[-1])
    model = run.to_sentence_transformer(device="cpu")
    found = model.encode(list(corpus.values())[:4])
    run.save(workplace / "saved")
    run.save(workplace / "saved")
    np.testing.assert_allclose(
        bigbatch.load_encoder(workplace / "saved", device="cpu").encode(list(corpus.values())[:4], "passage"),
        found,
        atol=1e-5,
    )
    assert np.abs(start.encode(list(corpus.values())[:4], normalize_embeddings=True) - found).max() > 1e-3
    with pytest.raises(ConfigError, match="holds no export"):
        run.save(workplace / "data")
    assert _state() == before


def test_what_is_handed_over_becomes_files_by_content(tmp_path: Path) -> None:
    """Equal texts have one path, whoever holds them; a Config and its overrides are read as a file's would be."""
    base = [f"data.cache_dir={tmp_path}", "model.name_or_path=m", "train.max_steps=1"]
    records = [{"anchor": "a", "positive": "b"}, {"anchor": "c", "positive": "d"}]
    given: list[Any] = [records, iter(records), Dataset.from_list(records)]
    (path,) = {configuration(None, base, train=train).data.train[0].path for train in given}
    assert path is not None and [json.loads(line) for line in Path(path).read_text().splitlines()] == records
    several = configuration(None, base, train=["x.csv", SourceConfig(name="y"), Dataset.from_list(records)])
    assert [source.path or source.name for source in several.data.train] == ["x.csv", "y", path]
    config = Config(model=ModelConfig(name_or_path="m"), data=several.data)
    asked = configuration(config, ["train.epochs=2", "loss.temperature=0.5"], model=Path("other"))
    assert (asked.train.epochs, asked.loss.temperature, asked.model.name_or_path) == (2, 0.5, "other")
    passages: dict[str, Any] = {"p": {"title": "t", "text": "x"}, "r": "y"}
    evaluated = configuration(
        config, ["train.epochs=2"], evaluation={"d": ({"q": "x"}, passages, {"q": {"p": 2}})}
    ).eval
    assert evaluated is not None and (Path(evaluated.path) / "qrels" / "dev.tsv").read_text().endswith("q\tp\t2\n")
    corpus = [json.loads(line) for line in (Path(evaluated.path) / "corpus.jsonl").read_text().splitlines()]
    assert corpus == [{"_id": "p", "title": "t", "text": "x"}, {"_id": "r", "title": "", "text": "y"}]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"train": {"train": [], "test": []}}, "received a mapping of train, test"),
        ({"train": [{"anchor": "a"}, "b"]}, "train: expected dicts, received as number 2 str"),
        ({"train": [{"anchor": torch}]}, "train: record 1 is no JSON"),
        ({"model": torch.nn.Linear(1, 1)}, "expected a name, a folder or a SentenceTransformer; received Linear"),
        ({"evaluation": {}}, "eval: expected at least one collection, received none"),
        ({"evaluation": {"a/b": ({}, {}, {})}}, "eval: expected names that a folder can have, received 'a/b'"),
    ],
)
def test_what_cannot_be_used_is_refused(tmp_path: Path, given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        configuration(None, [f"data.cache_dir={tmp_path}"], **given)


def test_a_loop_that_ends_early_leaves_a_run_that_goes_on(workplace: Path) -> None:
    """Leaving the loop closes what is open: the lock is free, and the saved steps are not done again."""
    config = load(workplace / "run.yaml", [f"run.output_dir={workplace / 'early'}", "eval=null", "train.eval_every=0"])
    run = Run(config)
    with pytest.raises(AttributeError, match="before it is entered, by train"):
        run.to_sentence_transformer()
    for first, last in ((0, 2), (2, 4)):
        with run:
            assert run.done == first
            for batch in run.batches():
                loss = run.forward_backward(batch).loss
                with pytest.raises(ValueError, match="resume: expected True inside"):
                    run.train(resume=False)
                assert run.optimizer_step().loss == float(loss)
                if run.done == last:
                    run.should_stop = last == 2  # leaving saves
                    if last == 4:
                        run.save()
                        break
            with pytest.raises(ValueError, match="expected forward_backward before"):
                run.optimizer_step()
        assert not (workplace / "early" / ".lock").exists()
        assert (workplace / "early" / "checkpoints" / f"step-{last:08d}").is_dir()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_loop_is_saved(workplace: Path, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a signal, also where the loop leaves itself; SIGINT as in a notebook."""
    if number == signal.SIGINT:
        monkeypatch.setattr(sys, "ps1", "In : ", raising=False)
    folder = workplace / f"stopped-{number}"
    config = load(workplace / "run.yaml", [f"run.output_dir={folder}", "train.save_every=100"])
    with pytest.raises(Stopped, match="stopped after step 3, which is saved"), Run(config) as run:
        for batch in run.batches():
            run.forward_backward(batch)
            if run.done == 2:
                os.kill(os.getpid(), number)
                time.sleep(0.5)  # a thread reads it
            run.optimizer_step()
            with pytest.raises(ValueError, match="expected the batch of step"):
                run.forward_backward(batch)
            if run.done == 3:
                break
        for name in ("step", "eval/ndcg@10"):
            with pytest.raises(ValueError, match=f"other names than {name}, which the run writes itself"):
                run.record({name: 1.0})
    saved = sorted(path.name for path in (folder / "checkpoints").glob("step-*"))
    assert saved == ["step-00000003"]


def test_a_second_interrupt_in_a_notebook_stops_at_once(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGTERM is left to the kernel of the notebook."""
    monkeypatch.setattr(sys, "ps1", "In : ", raising=False)
    before, config = _state(), load(workplace / "run.yaml", [f"run.output_dir={workplace / 'twice'}"])
    with pytest.raises(KeyboardInterrupt), Run(config) as run:
        assert signal.getsignal(signal.SIGTERM) == before["signals"][1]
        for _ in run.batches():
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
    assert _state() == before and not (workplace / "twice" / ".lock").exists()


class _Recorder(Callback):
    """Writes every event down; marks what is logged, and stops the run after the evaluation of step 4."""

    def __init__(self) -> None:
        self.events = list[tuple[str, int]]()

    def on_train_begin(self, run: Any) -> None:
        self.events.append(("begin", run.done))

    def on_step_end(self, run: Any, report: Any) -> None:
        self.events.append(("step", report.step + 1))

    def on_log(self, run: Any, values: dict[str, Any]) -> None:
        self.events.append((next(iter(values)), run.done))
        values["own"] = 1

    def on_evaluate(self, run: Any, measures: Mapping[str, float]) -> None:
        assert (Path(run.config.run.output_dir) / "best" / "model.safetensors").exists() and measures["eval/MRR@10"] > 0
        self.events.append(("evaluate", run.done))
        run.should_stop = run.done == 4

    def on_save(self, run: Any) -> None:
        self.events.append(("save", run.done))

    def on_train_end(self, run: Any) -> None:
        assert (Path(run.config.run.output_dir) / "report.html").exists()
        self.events.append(("end", run.done))


def test_a_callback_hears_events_in_transformers_order_and_stops_the_run(workplace: Path) -> None:
    settings = ["train.log_every=2", "train.save_every=3", "train.eval_every=2", "run.trackers=[]"]
    recorder, folder = _Recorder(), workplace / "callbacks"
    run = Run(workplace / "run.yaml", [*settings, f"run.output_dir={folder}"], callbacks=[recorder])
    run.train()
    evaluated = [("train/loss", 2), ("eval/MRR@10", 2), ("evaluate", 2), ("save", 2)]
    first = [("begin", 0), ("step", 1), ("step", 2), *evaluated, ("step", 3), ("save", 3)]
    assert recorder.events == [*first, ("step", 4), *((name, 4) for name, _ in evaluated), ("end", 4)]
    assert (folder / "checkpoints" / "step-00000004").is_dir()
    assert all(line["own"] == 1 for line in metrics(folder))


def test_averaged_weights_are_evaluated_and_exported_and_frozen_ones_stay(
    workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Training goes on from the weights themselves, which the checkpoint holds. The temperature is one of them."""
    temperatures = list[float]()

    def evaluate_all(bundle: EncoderBundle, asked: EvalConfig, temperature: float, *others: Any) -> dict[str, float]:
        temperatures.append(temperature)
        return several.evaluate_all(bundle, asked, temperature, *others)

    monkeypatch.setattr("retriever.evaluation.evaluate_all", evaluate_all)
    settings = [
        "optim.ema=0.6",
        "optim.freeze=[embeddings]",
        "train.max_steps=4",
        "train.eval_every=0",
        "optim.warmup=0",
    ]
    config = load(workplace / "run.yaml", [f"run.output_dir={workplace / 'averaged'}", "run.trackers=[]", *settings])
    with Run(config) as run:
        name = "encoder.layer.0.output.dense.weight"
        expected = None
        for batch in run.batches():
            run.forward_backward(batch)
            run.optimizer_step()
            present = run.encoder.query_tower.get_parameter(name).detach().clone()
            expected = present if expected is None else 0.6 * expected + 0.4 * present
        (values,) = (line for line in metrics(workplace / "averaged") if "eval/MRR@10" in line)
        assert torch.equal(run.encoder.query_tower.get_parameter(name), present)
        mean = math.exp(-run.optimizer.averages["log_scale"].item())
        assert temperatures == [pytest.approx(mean)] and mean not in (0.05, run.objective.temperature)
    start, exported = (load_file(workplace / f / "model.safetensors") for f in ("model", "averaged/export"))
    saved = load_file(workplace / "averaged" / "checkpoints" / "step-00000004" / "model.safetensors")
    torch.testing.assert_close(exported[name], expected)
    assert torch.equal(saved[f"encoder.towers.shared.{name}"], present) and not torch.equal(present, exported[name])
    embeddings = "embeddings.word_embeddings.weight"
    assert torch.equal(exported[embeddings], start[embeddings]) and not any("embeddings" in key for key in saved)
    beir = evaluate(load_encoder(workplace / "averaged" / "export"), workplace / "data", "dev", ["MRR@10"])
    assert beir is not None and beir.means["MRR@10"] == pytest.approx(values["eval/MRR@10"], abs=1e-3)


def _margin_loss(workplace: Path) -> Any:
    """The class of docs/run.md."""
    page = (ROOT / "docs" / "run.md").read_text(encoding="utf-8")
    code = re.search(r"```python\n(import torch\n.*?)\n\n\nbigbatch.Run", page, re.DOTALL)
    assert code is not None
    names: dict[str, Any] = {"__name__": "own"}
    exec(code[1], names)
    return names["AdditiveMargin"]


def test_a_loss_of_ones_own_is_verified_trained_and_resumed(
    workplace: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a parameter, which starts as on the first rank and goes on from where it was; a run without the loss is
    another run.
    """
    monkeypatch.setattr(CustomLoss, "start_from_first", lambda loss, _: loss.function.margin.data.fill_(0.3))
    kind, folder = _margin_loss(workplace), workplace / "own_loss"
    settings = [f"run.output_dir={folder}", "eval=null", "train.eval_every=0", "loss.learn_temperature=false"]
    settings += ["run.trackers=[]", "run.verify=true"]
    margins = [0.3]
    for steps in (3, 6):
        loss = kind()
        run = Run(workplace / "run.yaml", [*settings, f"train.max_steps={steps}"], loss=loss)
        run.train()
        assert "gradient equal to the whole batch's to" in capsys.readouterr().out
        margins.append(loss.margin.item())
    assert run.config.loss.custom == "own:AdditiveMargin"
    assert margins[0] != margins[1] != margins[2] and margins == pytest.approx([margins[1]] * 3, abs=0.05)
    saved = load_file(folder / "checkpoints" / "step-00000006" / "model.safetensors")
    assert float(saved["objective.custom.function.margin"]) == margins[2]
    with pytest.raises(ConfigError, match="loss.custom: 'own:AdditiveMargin' -> None"):
        Run(workplace / "run.yaml", [*settings, "train.max_steps=9"]).train()


def test_the_notebook_runs_from_its_first_cell_to_its_last(
    workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one namespace, as at a prompt, with a tiny model and in fewer and smaller steps."""
    cells = json.loads((ROOT / "docs" / "notebook.ipynb").read_text(encoding="utf-8"))["cells"]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "ps1", "In : ", raising=False)
    before, names = _state(), dict[str, Any]()
    for cell in cells:
        if cell["cell_type"] == "code":
            source = "".join(cell["source"])
            for shown, tried in (("=20", "=4"), ("every=10", "every=2"), ("queries=64", "queries=16")):
                source = source.replace(shown, tried)
            exec(source, names)
            if "MODEL" in names:
                names["MODEL"] = str(workplace / "model")
    assert names["run"].done == 4 and (tmp_path / "runs" / "notebook" / "best" / "model.safetensors").exists()
    assert len(names["losses"].seen) == names["second"].done == 4
    assert _state() == before


def test_a_run_evaluates_at_the_start_and_ends_where_patience_does(
    workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Weights that stay never get better: the second evaluation after the best one ends the run, also when the same
    command comes again. The evaluation of step 0 is recorded once and chooses no model.
    """
    settings = ["optim.lr=1e-30", "train.eval_every=2", "eval.at_start=true", "eval.patience=1", "run.trackers=[]"]
    config = load(workplace / "run.yaml", [f"run.output_dir={workplace / 'patient'}", *settings])
    for start in (0, 4):
        with Run(config) as run:
            assert run.done == start
            for batch in run.batches():
                run.forward_backward(batch)
                run.optimizer_step()
        assert "ended after step 4 of 20: the last 1 evaluation brought" in capsys.readouterr().out
    lines = [line for line in metrics(workplace / "patient") if "eval/MRR@10" in line]
    assert [line["step"] for line in lines] == [0, 2, 4]
    assert json.loads((workplace / "patient" / "best.json").read_text())["step"] == 2, "the first of equal ones"


def test_an_error_in_the_loop_ends_the_run_and_is_raised(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also then nothing of the process changes, and the report shows what was done."""
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "2")  # joining the ranks removes it
    config = load(workplace / "run.yaml", [f"run.output_dir={workplace / 'failed'}", "run.trackers=[]"])
    before = _state()
    with pytest.raises(ZeroDivisionError), Run(config) as run:
        for batch in run.batches():
            run.forward_backward(batch)
            run.optimizer_step()
            run.save()
            raise ZeroDivisionError
    assert not (workplace / "failed" / ".lock").exists()
    assert (workplace / "failed" / "report.html").exists()
    assert _state() == before
