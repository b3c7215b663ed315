"""docs/models.md: what each architecture can do. `python -m tests.models_page` tries everything and writes the table.

Tests try everything but ONNX again. The column of transformers 4.57 is what `python -m tests.check_transformers4`
compares.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from sentence_transformers import SentenceTransformer

from retriever.config import Config, ConfigError, LoraConfig, ModelConfig
from retriever.data.layout import pack_rows, pad_rows
from retriever.encoder.architectures import DECODERS, ENCODERS
from retriever.encoder.bundle import load_encoder
from retriever.encoder.dual_encoder import DualEncoder
from retriever.encoder.lora import adapt
from retriever.encoder.tokenizer import training_tokenizer
from retriever.export import Probe, export
from tests.check_transformers4 import CASES
from tests.tiny import random_texts, save_tiny_model
from tests.workplace import ROOT

PAGE = ROOT / "docs" / "models.md"
COLUMNS = (
    "padded",
    "packed",
    "fused",
    "whole text",
    "LoRA",
    "export",
    "sentence-transformers",
    "transformers 4.57",
    "ONNX",
)
TEXTS = random_texts(6, shortest=3, longest=40)
_BEGIN, _END = "<!-- the table -->\n\n", "\n<!-- until here -->"
_NO_DROPOUT: dict[str, dict[str, Any]] = {
    "modernbert": {"mlp_dropout": 0.0}
}  # which fused layers lack, and no published ModernBERT has


def row(architecture: str, folder: Path, *, onnx: bool = False) -> tuple[list[str], list[str]]:
    """The architecture's cells, and a line for each refusal. What is not refused is compared, or raises."""
    cells, refusals = {"padded": "yes"}, []
    model = ModelConfig(str(save_tiny_model(folder / "start", architecture, **_NO_DROPOUT.get(architecture, {}))))
    for column, fused in (("packed", False), ("fused", True)):
        try:
            _compare_packed(model, fused=fused)
            cells[column] = "yes"
        except ConfigError as refusal:
            cells[column] = "no"
            refusals.append(f"- {architecture}, {column}: {refusal}")
    cells["whole text"] = "always" if architecture in ENCODERS else "`bidirectional`"
    encoder = DualEncoder.from_pretrained(model)
    try:
        _train_adapters(encoder)
        cells["LoRA"] = "yes"
    except ConfigError as refusal:
        cells["LoRA"] = "no"
        refusals.append(f"- {architecture}, LoRA: {refusal}")
    written = _compare_export(encoder, model, folder / "export")
    cells |= dict.fromkeys(("export", "sentence-transformers"), "yes")
    cells["transformers 4.57"] = "yes" if architecture in CASES else "no"
    if architecture not in CASES:
        refusals.append(f"- {architecture}, transformers 4.57: it has this architecture as code of the hub alone")
    cells["ONNX"] = present(architecture)[COLUMNS.index("ONNX")]
    if onnx:
        found = [f"- {architecture}, ONNX: {line}" for line in _onnx_refusals(written)]
        cells["ONNX"] = "no" if found else "yes"
        refusals += found
    return [cells[column] for column in COLUMNS], refusals


def present(architecture: str) -> list[str]:
    """The cells of the architecture in the page as it is."""
    lines = (line.strip(" |").split(" | ") for line in PAGE.read_text(encoding="utf-8").splitlines())
    return next((cells for name, *cells in lines if name == f"`{architecture}`"), [""] * len(COLUMNS))


def table(rows: dict[str, tuple[list[str], list[str]]]) -> str:
    """Markdown of all rows, and of the refusals below them."""
    head = [f"| architecture | {' | '.join(COLUMNS)} |", "|---" * (len(COLUMNS) + 1) + "|"]
    lines = [f"| `{name}` | {' | '.join(cells)} |" for name, (cells, _) in rows.items()]
    refusals = [line for _, found in rows.values() for line in found]
    return "\n".join([*head, *lines, "", "What is refused, and in which words:", "", *refusals]) + "\n"


def _compare_packed(model: ModelConfig, *, fused: bool) -> None:
    encoder = DualEncoder.from_pretrained(model).eval()
    rows = [np.random.default_rng(n).integers(5, 150, n) for n in (3, 40, 17)]
    with torch.no_grad():
        expected = encoder("passage", pad_rows(rows, encoder.passage_tower.config.pad_token_id))
        encoder.pack()
        if fused:
            encoder.fuse_layers()
        torch.testing.assert_close(encoder("passage", pack_rows(rows)), expected, rtol=0, atol=1e-5)


def _train_adapters(encoder: DualEncoder) -> None:
    """Adapters everywhere, moved by a gradient."""
    adapt(encoder.towers, LoraConfig(r=2), seed=0)
    tokens = pad_rows([np.array([5, 50, 60, 7]), np.array([9, 70])], encoder.passage_tower.config.pad_token_id)
    for _ in range(2):  # A has no gradient before B is moved
        encoder("passage", tokens).pow(3).sum().backward()
        with torch.no_grad():
            for name, parameter in encoder.named_parameters():
                if parameter.requires_grad:
                    assert parameter.grad is not None, name
                    parameter.add_(parameter.grad, alpha=0.1)
    trained = {name: p for name, p in encoder.named_parameters() if name.endswith("lora_b")}
    assert trained and all(p.abs().max() > 0 for p in trained.values()), "an adapter was not moved"
    encoder.zero_grad()


def _compare_export(encoder: DualEncoder, model: ModelConfig, folder: Path) -> Path:
    """Its embeddings by us (the export's own check) and in sentence-transformers; adapters are merged."""
    tokenizer, config = training_tokenizer(model), Config(model=model)
    written = export(encoder.eval(), tokenizer, config, folder, Probe.of(encoder, tokenizer, config, TEXTS))
    expected = load_encoder(written, device="cpu").encode(TEXTS, "passage")
    found = SentenceTransformer(str(written), device="cpu").encode(TEXTS)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
    return written


def _onnx_refusals(written: Path) -> list[str]:
    from retriever.onnx_export import OnnxError, export_onnx

    try:
        export_onnx(load_encoder(written, device="cpu"), written)
    except OnnxError as refusal:
        return [": ".join(str(refusal).split(": ")[:2])]  # without the exporter's own page of advice
    return []


def main() -> None:
    """Writes the table between its marks."""
    onnx = importlib.util.find_spec("onnxruntime") is not None
    with TemporaryDirectory() as folder:
        rows = {name: row(name, Path(folder) / name, onnx=onnx) for name in sorted(ENCODERS | DECODERS)}
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(_BEGIN)
    PAGE.write_text(before + _BEGIN + table(rows) + _END + rest.partition(_END)[2], encoding="utf-8")


if __name__ == "__main__":
    main()
