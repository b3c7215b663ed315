"""Before step 1: how towers compute, what is printed of the plan, and `run.preflight=only`, which stops there."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from retriever import preflight, summary
from retriever.config import (
    BatchConfig,
    Config,
    ConfigError,
    DataConfig,
    EvalConfig,
    LoraConfig,
    LossConfig,
    ModelConfig,
    OptimConfig,
    SourceConfig,
)
from retriever.encoder.bundle import load_tokenizer
from retriever.encoder.dual_encoder import DualEncoder
from retriever.encoder.lora import adapt
from retriever.parallel.world import World
from retriever.plan.forecast import Forecast, Memory, Workload
from retriever.plan.measure import COST_FIELDS, ChunkCost, Cost
from retriever.plan.report import plan_lines, plan_table
from retriever.retention import Retention
from retriever.train import main
from tests.eval.texts import help_texts, write_beir
from tests.tiny import random_texts, save_tiny_model

GIB = 2**30
_BATCH = BatchConfig(16, retain=100, retain_products=64)
CONFIG = Config(model=ModelConfig("m", attention="packed", fused=True, compile=False), batch=_BATCH)


def _forecast(activations: float = 2.0 * GIB) -> Forecast:
    workload = Workload(16, {"query": np.full(16, 4), "passage": np.full(16, 8)}, 64, packed=True)
    cost = ChunkCost(64, 1.0, 1.5, 1.25, 3.0, activations / 8, *[activations] * 4)
    costs = np.rec.fromrecords([cost] * 3, dtype=COST_FIELDS)
    memory = Memory(weights=GIB / 2, gradients=GIB, optimizer=2 * GIB, representations=GIB / 4)
    return Forecast(workload, costs, Cost(0.25, GIB / 8), 0.75, memory, Retention(100, 64))


def test_the_plan_in_two_lines() -> None:
    lines = plan_lines(_forecast(), 1000).splitlines()
    assert lines == [
        "plan    a step of 192 tokens a rank in 3 chunks, 33% encoded once, 33% again in part; at most 7.00 GiB a GPU",
        "        first pass, loss, second pass, update 3.5 + 0.25 + 11.8 + 0.75 s: 1 pairs/s, 4 h 30 min for 1,000 steps",
    ]
    assert "GiB" not in plan_lines(_forecast(0.0), 1000)


def test_the_plan_as_a_table() -> None:
    table = plan_table(_forecast(), CONFIG, 10, 20.0 * GIB)
    rows = {line.split("  ")[0]: line.split() for line in table.splitlines() if line}
    assert rows["queries"][1:4] == ["16", "64", "tokens"] and rows["passages"][1:4] == ["16", "128", "tokens"]
    assert rows["first pass"][2] == "3.500" and rows["second pass"][2] == "11.750" and rows["a step"][2] == "16.250"
    assert (
        rows["the run"][2:6] == ["2", "min", "42", "s"] and rows["encoded once"][2] == rows["again in part"][3] == "33%"
    )
    assert (
        rows["weights"][1:3] == ["512.0", "MiB"]
        and rows["kept between passes"][3] == "2.25"
        and rows["peak"][1] == "7.00"
    )
    assert "packed, fused layers" in table and "of 20.00 GiB that can be used" in table
    assert rows["representations"][1:3] == ["256.0", "MiB"] and "host memory" not in table
    offloaded = replace(_forecast(), memory=replace(_forecast().memory, representations=0.0, host=3.0 * GIB))
    assert re.search(
        r"^host memory +3.00 GiB  representations", plan_table(offloaded, CONFIG, 10, 20.0 * GIB), re.MULTILINE
    )
    on_cpu = plan_table(_forecast(0.0), CONFIG, 10, None)
    assert "measured on a GPU only" in on_cpu and "peak" not in on_cpu


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, and pairs in two columns."""
    folder = tmp_path_factory.mktemp("preflight")
    save_tiny_model(folder / "model", num_hidden_layers=1)
    texts = random_texts(60, shortest=6, longest=20)
    (folder / "pairs.jsonl").write_text(
        "".join(json.dumps({"anchor": t.split()[0], "positive": t}) + "\n" for t in texts)
    )
    return folder


@pytest.mark.parametrize(
    ("device", "given", "expected"),
    [
        ("cpu", {}, ("padded", False, False)),
        ("cpu", {"fused": True}, ("packed", True, False)),
        ("cuda", {}, ("packed", True, False)),
        ("cuda", {"fused": False}, ("packed", False, True)),
        ("cuda", {"attention": "padded"}, ("padded", False, True)),
        ("cuda", {"compile": True}, ("packed", False, True)),
        ("cuda", {"gradient_checkpointing": True}, ("packed", False, False)),
    ],
)
def test_how_towers_compute(folder: Path, device: str, given: dict[str, Any], expected: tuple[str, bool, bool]) -> None:
    encoder = DualEncoder.from_pretrained(ModelConfig(str(folder / "model")))
    model = preflight._modes(ModelConfig("m", **given), encoder, World(torch.device(device)))
    assert (model.attention, model.fused, model.compile) == expected


def test_what_needs_no_measuring_is_resolved(folder: Path) -> None:
    encoder = DualEncoder.from_pretrained(ModelConfig(str(folder / "model")))
    config = preflight.resolve(replace(CONFIG, loss=LossConfig()), encoder, World(torch.device("cpu")))
    assert (config.model.pooling, config.loss.exchange, config.batch) == ("mean", "gather", CONFIG.batch)
    assert isinstance(config.loss.workspace_mib, int)
    with pytest.raises(ConfigError, match="loss.dims: 64 is more than the 32 dimensions"):
        preflight.resolve(replace(CONFIG, loss=LossConfig(dims=(64,))), encoder, World(torch.device("cpu")))
    cut = EvalConfig("data", dims=(16, 64))
    with pytest.raises(ConfigError, match="eval.dims: 64 is more than the 32 dimensions"):
        preflight.resolve(replace(CONFIG, eval=cut), encoder, World(torch.device("cpu")))


def _store(negatives: int = 1, query_tokens: tuple[int, ...] = (4, 9), passage_tokens: tuple[int, ...] = (9,)) -> Any:
    """As much of a store as warnings look at."""
    lengths, negatives_of = SimpleNamespace(lengths=np.array(query_tokens)), SimpleNamespace(ids=np.arange(negatives))
    limits = lambda config, side: getattr(config.model, f"{side}_max_tokens")  # noqa: E731
    passages = SimpleNamespace(lengths=np.array(passage_tokens))
    return SimpleNamespace(queries=lengths, passages=passages, negatives=negatives_of, limits=limits)


def test_what_is_probably_not_meant_is_said(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer, encoder = (
        load_tokenizer(str(folder / "model")),
        DualEncoder.from_pretrained(ModelConfig(f"{folder}/model")),
    )

    def found(config: Config, store: Any, total: int = 1000, queries: int = 1024) -> list[str]:
        return preflight.warnings(config, encoder, tokenizer, store, total, queries)

    data = DataConfig(train=(SourceConfig("pairs"),))
    assert found(Config(data=data), _store()) == []
    assert found(Config(data=data, batch=BatchConfig(9000)), _store(), queries=120) == [], "the real batch"
    (text,) = found(Config(data=data), _store(negatives=0))
    assert text.startswith("data.negatives=7, but no query of data.train has a hard negative")
    assert found(Config(data=replace(data, negatives=0)), _store(negatives=0)) == []
    mined = replace(data, negatives=0, train=(SourceConfig("pairs", hard_negatives=2),))
    assert len(found(Config(data=mined), _store(negatives=0))) == 1
    own = SourceConfig(path="x", query_prompt="a b c d e f g h", query_max_tokens=12)
    (text,) = found(Config(data=DataConfig(train=(SourceConfig(path="y"), own))), _store())
    assert text.startswith("data.train.1.query_prompt takes 8 of the 12 tokens of query_max_tokens")
    assert found(Config(data=data), _store(passage_tokens=(40, 600))) == []
    (text,) = found(Config(data=data), _store(passage_tokens=(40, 600, 600)))
    assert text.startswith("model.passage_max_tokens=") and text.endswith("cuts 67% of the passages: raise it")
    odd = Config(
        model=ModelConfig("m", normalize=False, query_prompt="a b c d e", query_max_tokens=8),
        batch=BatchConfig(9000),
        optim=OptimConfig(warmup=20),
        eval=EvalConfig("x", split="test"),
    )
    starts = [
        "optim.warmup=20",
        "optim.lr=2e-05",
        "model.normalize=false",
        "eval.split=test",
        "model.query_max_tokens=8 cuts 67% of the queries: raise it",
        "model.query_prompt takes 5 of the 8",
        "run.output_dir: 0.1 MiB are free, and 3 checkpoints of ",
    ]
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda path: SimpleNamespace(free=2**17))
    said = found(odd, _store(query_tokens=(6, 7, 8)), total=20, queries=9000)
    assert [line[: len(start)] for line, start in zip(said, starts, strict=True)] == starts


def test_only_prints_the_plan_and_leaves_nothing(
    folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    arguments = [
        *(
            f"model.name_or_path={folder}/model",
            f"data.train=[{{path: {folder}/pairs.jsonl}}]",
            f"data.cache_dir={folder}/cache",
        ),
        *("model.query_max_tokens=16", "model.passage_max_tokens=32", "batch.queries=20", "batch.tokens_per_chunk=100"),
        *(
            "batch.retain=150",
            "train.max_steps=30",
            "optim.precision=fp32",
            f"run.output_dir={tmp_path}/run",
        ),
        "--dry-run",
        *(f"eval.path={tmp_path}/help", "eval.split=test", "eval.at_start=true", "eval.patience=1"),  # comes later
    ]
    write_beir(tmp_path / "help", help_texts())
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert "\nmodel   " in out and "warning: eval.split=test: " in out
    assert "a step" in out and "30 steps" in out and "20  " in out and "encoded once" in out
    assert not (tmp_path / "run").exists()


def test_what_keeps_layers_from_being_fused_is_named(tmp_path: Path) -> None:
    packed = ModelConfig("m", attention="packed", fused=False, compile=True)
    plain, adapted, other = (
        DualEncoder.from_pretrained(ModelConfig(str(save_tiny_model(tmp_path / str(i), architecture))))
        for i, architecture in enumerate(("qwen3", "qwen3", "gpt2"))
    )
    adapt(adapted.towers, LoraConfig(dropout=0.1), seed=0)
    assert summary.modes(packed, plain) == "packed texts, compiled layers"
    because = "packed texts, compiled layers (not fused: "
    assert summary.modes(packed, adapted) == because + "its LoRA adapters have dropout)"
    assert summary.modes(packed, other) == because + "the layers of a 'gpt2' model are not known)"
    assert summary.modes(replace(packed, attention="padded"), other) == "padded texts, compiled layers"
