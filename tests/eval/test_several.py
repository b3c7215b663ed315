"""What a run measures while it trains: several collections, held-out pairs, cuts, and the figure that chooses."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy, normalize

from eval.evaluate import EvalOptions, evaluate
from eval.several import check_evaluation, evaluate_all
from retriever.config import ConfigError, EvalCollectionConfig, EvalConfig
from retriever.data.formats import DataError
from retriever.encoder.bundle import EncoderBundle, load_encoder
from retriever.errors import RefusedError
from retriever.parallel.world import World
from tests.eval.texts import Texts, help_texts, write_beir, write_msmarco
from tests.tiny import random_texts, save_tiny_model

CPU = World(torch.device("cpu"))


@pytest.fixture(scope="module")
def texts() -> Texts:
    return help_texts()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, texts: Texts) -> Path:
    root = tmp_path_factory.mktemp("several")
    save_tiny_model(root / "model")
    write_beir(root / "help", texts)
    write_msmarco(root / "marco", texts)
    lines = [
        {"query": f"{a} a", "pos": [b], "neg": [a]}
        for a, b in zip(random_texts(40), random_texts(40, seed=1), strict=True)
    ]
    lines[3]["pos"] = lines[4]["pos"]
    (root / "pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return root


@pytest.fixture(scope="module")
def bundle(folder: Path) -> EncoderBundle:
    return load_encoder(folder / "model", device="cpu")


@pytest.fixture
def config(folder: Path) -> EvalConfig:
    also = (
        EvalCollectionConfig(str(folder / "marco"), format="msmarco"),
        EvalCollectionConfig(str(folder / "pairs.jsonl"), "held-out", "pairs"),
    )
    return EvalConfig(str(folder / "help"), "test", also, candidates=32, metrics=("nDCG@10", "MRR@10"), k=100)


def test_the_mean_of_collections_comes_first(
    folder: Path, bundle: EncoderBundle, config: EvalConfig, tmp_path: Path
) -> None:
    """Each collection's figures are those of its own evaluation; pairs are measured over a fixed number of candidates."""
    check_evaluation(config)
    found = evaluate_all(bundle, config, 0.05, tmp_path, EvalOptions(k=100), CPU)
    alone = evaluate(bundle, folder / "help", "test", config.metrics, EvalOptions(k=100))
    assert alone is not None and 0 < alone.means["nDCG@10"] < 1
    assert list(found)[:2] == ["nDCG@10", "MRR@10"]
    assert {name: found[f"help/{name}"] for name in config.metrics} == alone.means
    for name in config.metrics:
        assert found[name] == pytest.approx((found[f"help/{name}"] + found[f"marco/{name}"]) / 2)
    lines = [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()][:32]
    q = torch.from_numpy(bundle.encode([line["query"] for line in lines], "query")).double()
    p = torch.from_numpy(bundle.encode([line["pos"][0] for line in lines], "passage")).double()
    logits = normalize(q, dim=1) @ normalize(p, dim=1).T / 0.05
    logits[3, 4] = logits[4, 3] = -torch.inf
    assert found["held-out/loss"] == pytest.approx(float(cross_entropy(logits, torch.arange(32))), rel=1e-5)
    assert found["held-out/accuracy"] == float((logits.argmax(dim=1) == torch.arange(32)).double().mean())
    chosen = evaluate_all(bundle, replace(config, best="held-out"), 0.05, tmp_path, EvalOptions(k=100), CPU)
    assert next(iter(chosen.items())) == ("accuracy", found["held-out/accuracy"])


@pytest.mark.parametrize(("title", "separator"), [("join", " # "), ("drop", " ")])
def test_titles_of_pairs_are_the_model_s(
    folder: Path, bundle: EncoderBundle, config: EvalConfig, tmp_path: Path, title: str, separator: str
) -> None:
    """As of passages in training: figures are those of texts that are joined already."""
    settings = replace(bundle.settings, title=title, title_separator=separator)  # type: ignore[arg-type]
    found = []
    for name in ("apart", "joined"):
        lines = []
        for query, head, text in zip(*(random_texts(32, seed=seed) for seed in range(3)), strict=True):
            joined = f"{head}{separator}{text}" if title == "join" else text
            passage = {"title": head, "text": text} if name == "apart" else {"title": "", "text": joined}
            lines.append(json.dumps({"question": query, "positive_ctxs": [passage]}))
        (tmp_path / f"{name}.json").write_text(f"[{','.join(lines)}]")
        pairs = replace(config.also[1], path=str(tmp_path / f"{name}.json"))
        measured = replace(config, also=(pairs,), metrics=("MRR@10",))
        options = EvalOptions(k=100)
        found.append(evaluate_all(replace(bundle, settings=settings), measured, 0.05, tmp_path / name, options, CPU))
    assert found[0] == found[1] and found[0]["held-out/loss"] > 0


def test_cut_embeddings_are_those_of_an_encoder_that_cuts(
    folder: Path, bundle: EncoderBundle, config: EvalConfig, tmp_path: Path
) -> None:
    one = replace(config, also=())
    found = evaluate_all(bundle, one, 0.05, tmp_path, EvalOptions(k=100, dims=(8, 32)), CPU)
    bundle = load_encoder(folder / "model", device="cpu")
    assert found["32/nDCG@10"] == pytest.approx(found["nDCG@10"], abs=1e-6)
    bundle.encoder.truncate_dim = 8
    expected = evaluate(bundle, folder / "help", "test", config.metrics, EvalOptions(k=100))
    assert expected is not None and expected.means["nDCG@10"] != found["nDCG@10"]
    assert found["8/nDCG@10"] == pytest.approx(expected.means["nDCG@10"], abs=1e-3)


def test_what_cannot_be_evaluated_is_refused(
    folder: Path, bundle: EncoderBundle, config: EvalConfig, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="eval.best: expected mean or one of help, marco, held-out; received 'x'"):
        check_evaluation(replace(config, best="x"))
    with pytest.raises(ConfigError, match="eval.also: expected collections of different names"):
        check_evaluation(replace(config, also=(replace(config.also[0], name="help"),)))
    with pytest.raises(DataError, match="expected 41 queries .*found 40"):
        check_evaluation(replace(config, candidates=41))
    with pytest.raises(ConfigError, match="split: expected one of dev, dl19, dl20; received 'test'"):
        check_evaluation(replace(config, also=(replace(config.also[0], split="test"),)))
    with pytest.raises(RefusedError, match="--dims 33: expected at most the 32"):
        evaluate_all(bundle, replace(config, also=()), 0.05, tmp_path, EvalOptions(k=100, dims=(33,)), CPU)
