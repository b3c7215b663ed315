"""mteb's figures of our encoder on local data are those of `eval.beir`; no hub is asked."""

from __future__ import annotations

import json
from copy import copy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mteb as package
import numpy as np
import pytest
import torch
from mteb.types import PromptType

from eval import beir, mteb
from eval.mteb_adapter import MtebEncoder
from retriever.encoder.bundle import EncoderBundle, load_encoder
from tests.commands import assert_refused
from tests.eval.texts import help_texts, write_beir
from tests.tiny import save_tiny_model

OPTIONS = ["--query-max-tokens", "24", "--passage-max-tokens", "48", "--query-prompt", "query: "]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(model, BEIR folder)."""
    root = tmp_path_factory.mktemp("mteb")
    return save_tiny_model(root / "model"), write_beir(root / "help", help_texts())


@pytest.mark.parametrize("title", ["join", "drop"])
def test_a_retrieval_task_gives_the_figures_of_eval_beir(
    folders: tuple[Path, Path], tmp_path: Path, title: str, capsys: pytest.CaptureFixture[str]
) -> None:
    model, data = folders
    asked = ["--model", str(model), "--data", str(data), *OPTIONS, "--title", title]
    metrics = {"nDCG@10": "ndcg_at_10", "Recall@100": "recall_at_100", "MRR@10": "mrr_at_10"}
    assert beir.main([*asked, "--output-dir", str(tmp_path / "ours"), "--metrics", *metrics]) == 0
    assert mteb.main([*asked, "--output-dir", str(tmp_path / "theirs"), "--name", "us/tiny"]) == 0
    ours = json.loads((tmp_path / "ours" / "test.json").read_text(encoding="utf-8"))["metrics"]
    [file] = (tmp_path / "theirs" / "results" / "us__tiny").glob("*/help.json")
    (theirs,) = json.loads(file.read_text(encoding="utf-8"))["scores"]["test"]
    for name, key in metrics.items():
        assert theirs[key] == pytest.approx(ours[name], abs=1e-4), name
    assert 0.05 < theirs["main_score"] < 0.95 and f"{theirs['main_score']:.4f}" in capsys.readouterr().out
    meta = json.loads((file.parent / "model_meta.json").read_text(encoding="utf-8"))
    assert (meta["name"], meta["revision"], meta["embed_dim"]) == ("us/tiny", file.parent.name, 32)


@pytest.fixture(scope="module")
def bundle(folders: tuple[Path, Path]) -> EncoderBundle:
    more: Any = {"query_prompt": "query: ", "passage_prompt": "find ", "query_max_tokens": 9, "passage_max_tokens": 12}
    return load_encoder(folders[0], device="cpu", **more)


def test_results_of_other_settings_are_not_taken_for_these(bundle: EncoderBundle) -> None:
    def revision(one: EncoderBundle) -> str | None:
        return MtebEncoder(one, "us/tiny").mteb_model_meta.revision

    changes: list[dict[str, Any]] = [{"query_prompt": "ask "}, {"passage_max_tokens": 8}, {"title": "drop"}]
    others = [replace(bundle, settings=replace(bundle.settings, **change)) for change in changes]
    for name, value in (("autocast_dtype", torch.bfloat16), ("packed", True)):
        encoder = copy(bundle.encoder)
        setattr(encoder, name, value)
        others.append(replace(bundle, encoder=encoder))
    assert len({revision(one) for one in (bundle, *others)}) == 1 + len(others)
    assert revision(replace(bundle)) == revision(bundle)


def test_sides_and_titles_are_encoded_as_the_model_does(bundle: EncoderBundle) -> None:
    """Texts without a side have no prompt; mteb's own join of title and text is not every model's."""
    body, title = ["the brain and the heart of a river"] * 2, ["ocean", ""]
    batch = {"text": [f"{t} {b}".strip() for t, b in zip(title, body, strict=True)], "title": title, "body": body}
    encoder = MtebEncoder(bundle, "us/tiny")
    np.testing.assert_array_equal(
        encoder.encode([batch, batch], prompt_type=PromptType.query), bundle.encode(batch["text"] * 2, "query")
    )
    found = encoder.encode([batch], prompt_type=PromptType.document)
    np.testing.assert_array_equal(found, bundle.encode(batch["text"], "passage"))
    plain = encoder.encode([batch])
    assert np.abs(plain - found).max() > 0.01
    other = replace(bundle, settings=replace(bundle.settings, title_separator=" river "))
    found = MtebEncoder(other, "us/tiny").encode([batch], prompt_type=PromptType.document)
    np.testing.assert_array_equal(found, bundle.encode([f"ocean river {body[0]}", body[1]], "passage"))
    np.testing.assert_allclose(encoder.similarity(found, found).numpy(), found @ found.T, atol=1e-6)
    np.testing.assert_allclose(
        encoder.similarity_pairwise(found, plain).numpy(), (found * plain).sum(axis=1), atol=1e-6
    )


@pytest.mark.parametrize(
    ("asked", "names"),
    [
        (["--benchmark", "NanoBEIR"], {"NanoSciFactRetrieval", "NanoArguAnaRetrieval", "NanoNQRetrieval"}),
        (["--tasks", "SciFact", "STSBenchmark"], {"SciFact", "STSBenchmark"}),
    ],
)
def test_benchmarks_and_tasks_go_by_mtebs_names(
    folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: list[str], names: set[str]
) -> None:
    seen: list[str] = []

    def evaluate(model: Any, tasks: Any, **_: Any) -> Any:
        seen.extend(task.metadata.name for task in tasks)
        return SimpleNamespace(task_results=[])

    monkeypatch.setattr(package, "evaluate", evaluate)
    assert mteb.main(["--model", str(folders[0]), *asked, "--output-dir", str(tmp_path)]) == 0
    assert names <= set(seen) and len(seen) == (13 if "NanoBEIR" in asked else 2)


def test_what_mteb_does_not_know_is_refused(folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    assert_refused(mteb.main, ["--model", str(folders[0]), "--tasks", "SciFactt"], "mteb 2.*SciFactt")
    assert_refused(mteb.main, ["--model", str(folders[0]), "--benchmark", "NanoBIER"], "mteb 2.*NanoBIER")
    asked = ["--model", str(folders[0]), "--tasks", "SciFact"]
    assert_refused(mteb.main, [*asked, "--name", "tiny"], "--name tiny: expected organisation/model")
    with monkeypatch.context() as patched:
        patched.setenv("WORLD_SIZE", "2")
        assert_refused(mteb.main, asked, "WORLD_SIZE 2: expected 1")
    monkeypatch.setattr("retriever.environment._is_installed", lambda name: name != "mteb")
    expected = r"mteb not installed: run `pip install '.\[mteb\]'`"
    assert_refused(mteb.main, ["--model", str(folders[0]), "--tasks", "SciFact"], expected)
