"""ONNX files give torch's embeddings in onnxruntime, or are not written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from transformers import AutoTokenizer

from retriever.config import Config, ModelConfig
from retriever.encoder.bundle import load_encoder
from retriever.encoder.dual_encoder import DualEncoder
from retriever.encoder.tokenizer import training_tokenizer
from retriever.export import Probe, export
from retriever.onnx_export import OnnxError, export_onnx
from scripts.export_onnx import main
from tests.commands import assert_refused
from tests.tiny import random_texts, save_tiny_model

TEXTS = random_texts(6, longest=40)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two towers of different weights, with a projection and a cut."""
    root = tmp_path_factory.mktemp("onnx")
    model = ModelConfig(
        str(save_tiny_model(root / "start")),
        tied=False,
        truncate_dim=12,
        projection=16,
        query_prompt="query: ",
        query_max_tokens=9,
        passage_max_tokens=24,
    )
    encoder, tokenizer, config = DualEncoder.from_pretrained(model), training_tokenizer(model), Config(model=model)
    encoder.project(16, seed=3)
    with torch.no_grad():
        for parameter in encoder.query_tower.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.02)
    return export(encoder, tokenizer, config, root / "export", Probe.of(encoder, tokenizer, config, TEXTS))


def test_both_towers_are_theirs_in_onnxruntime(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As another program reads them: tokenizer and file of a tower's folder, the prompt in front."""
    assert main(["--model", str(folder)]) == 0
    assert capsys.readouterr().out.count("embeddings equal torch's to ") == 2
    ours = load_encoder(folder, device="cpu")
    for side, prompt in (("query", "query: "), ("passage", "")):
        session = onnxruntime.InferenceSession(folder / side / "onnx" / "model.onnx")
        tokens = AutoTokenizer.from_pretrained(folder / side)(
            [prompt + text for text in TEXTS], padding=True, truncation=True, return_tensors="np"
        )
        named = {name: tokens[name].astype(np.int64) for name in ("input_ids", "attention_mask")}
        hidden, embeddings = session.run(["last_hidden_state", "sentence_embedding"], named)
        expected = ours.encode(TEXTS, side)  # type: ignore[arg-type]
        np.testing.assert_allclose(embeddings, expected, rtol=0, atol=1e-5)
        tower = ours.encoder.query_tower if side == "query" else ours.encoder.passage_tower
        with torch.no_grad():
            theirs = tower(**{name: torch.from_numpy(rows) for name, rows in named.items()}).last_hidden_state
        real = named["attention_mask"].astype(bool)
        np.testing.assert_allclose(hidden[real], theirs.numpy()[real], rtol=0, atol=1e-5)
    assert_refused(main, ["--model", str(folder)], r"query/onnx exists; .*--overwrite")


def test_what_differs_or_cannot_be_exported_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = save_tiny_model(tmp_path / "model", max_position_embeddings=1024)
    shapes: list[tuple[int, int]] = []

    class Other:
        def __init__(self, *_: Any, **__: Any) -> None: ...

        def run(self, _: Any, inputs: Any) -> list[np.ndarray]:
            shapes.append(inputs["input_ids"].shape)
            return [np.full((len(inputs["input_ids"]), 32), np.nan)]

    class Written:
        def save(self, file: Path) -> None:
            file.write_bytes(b"")

    with monkeypatch.context() as patched:
        patched.setattr(torch.onnx, "export", lambda *_, **__: Written())
        assert_refused(main, ["--model", str(model)], r"onnxruntime 1.* cannot run it")
        patched.setattr(onnxruntime, "InferenceSession", Other)
        assert_refused(
            main, ["--model", str(model)], "an embedding differs from torch's by nan; expected at most 1e-04"
        )
        shapes.clear()
        with pytest.raises(OnnxError, match="differs from torch's by nan"):
            export_onnx(load_encoder(model, device="cpu", query_max_tokens=1024, passage_max_tokens=1024), model)
        assert shapes == [(4, 512), (1, 3)] * 2

    def refusing(*_: Any, **__: Any) -> None:
        heading = "Failed to export. \x1b[96mThis is step 1/3\x1b[0m\n"
        cause = RuntimeError("\x1b[31mno such operator\x1b[0m\nand more")
        raise torch.onnx.errors.OnnxExporterError(heading) from cause

    with monkeypatch.context() as patched:
        patched.setattr(torch.onnx, "export", refusing)
        assert_refused(main, ["--model", str(model)], r"onnx: torch 2.* cannot export BertModel: no such operator$")
        patched.setattr("retriever.environment._is_installed", lambda name: name != "onnxscript")
        assert_refused(main, ["--model", str(model)], r"onnxscript not installed: run `pip install '.\[onnx\]'`")
    assert not (model / "onnx").exists()
    assert_refused(main, ["--model", "nobody/nothing"], "nobody/nothing is no folder; expected --output")
