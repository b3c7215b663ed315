"""An encoder as ONNX, checked in onnxruntime: `<model folder>/onnx/model.onnx`, where other programs look for it.

Inputs are `input_ids` and `attention_mask`, both [texts, tokens] int64. Outputs are `last_hidden_state` [texts, tokens,
H], which sentence-transformers and text-embeddings-inference pool themselves, and `sentence_embedding` [texts, D], the
finished embedding. The prompt is a part of the text.
"""

from __future__ import annotations

import re
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from retriever.data.layout import Padded, pad_rows
from retriever.data.tokens import SIDES, Side
from retriever.encoder.bundle import EncoderBundle
from retriever.errors import RefusedError
from retriever.files import replace_folder

FOLDER, _FILE = "onnx", "model.onnx"
_PARITY = 1e-4  # how far an embedding may be from torch's, in units of the largest entry or of 1
_LONGEST = 512  # tokens of a text that is compared: attention's memory grows with their square
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")
_TEXTS = ("a", "What causes the aurora?", "Charged particles from the sun excite oxygen and nitrogen, which glow. " * 9)


class OnnxError(RefusedError):
    """An encoder that torch cannot write as ONNX, or whose embeddings are others in onnxruntime."""


def export_onnx(bundle: EncoderBundle, folder: Path) -> dict[Path, float]:
    """Writes the encoder, which must be unpacked and in fp32, below `folder`; of untied towers below its `query` and
    `passage`. Returns each file with the largest difference of an embedding from torch's.

    A file gets its name after it was compared. Raises OnnxError where torch cannot export the architecture, onnxruntime
    cannot run it, or an embedding differs by more than 1e-4.
    """
    settings = bundle.settings
    tied = settings.tied
    query, passage = (min(settings.max_tokens(side), _LONGEST) for side in SIDES)
    bundle = replace(bundle, settings=replace(settings, query_max_tokens=query, passage_max_tokens=passage))
    places: dict[Path, tuple[Side, ...]]
    places = {folder: SIDES} if tied else {folder / side: (side,) for side in SIDES}
    differences = {}
    for place, sides in places.items():
        with replace_folder(place / FOLDER) as writing:
            _write(bundle, sides[-1], writing / _FILE)
            difference = max(_difference(bundle, side, writing / _FILE) for side in sides)
            if not difference <= _PARITY:  # NaN is no parity either
                raise OnnxError(
                    f"{place / FOLDER}: in onnxruntime an embedding differs from torch's by {difference:.2e}; "
                    f"expected at most {_PARITY:.0e}. No file was written"
                )
        differences[place / FOLDER / _FILE] = difference
    return differences


class _Tower(nn.Module):
    def __init__(self, bundle: EncoderBundle, side: Side) -> None:
        super().__init__()
        self._encoder, self._side = bundle.encoder, side
        self._tower = bundle.encoder.query_tower if side == "query" else bundle.encoder.passage_tower

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        hidden: list[Tensor] = []
        with self._tower.register_forward_hook(lambda _, __, output: hidden.append(output.last_hidden_state)):
            embeddings = self._encoder(self._side, Padded(input_ids, attention_mask))  # [n, D]
        return hidden[0], embeddings


def _write(bundle: EncoderBundle, side: Side, file: Path) -> None:
    tokens = _tokens(bundle, side)
    kind = type(bundle.encoder.passage_tower).__name__
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # of the exporter, about its own parts
            program = torch.onnx.export(
                _Tower(bundle, side).eval(),
                (tokens.input_ids, tokens.attention_mask),
                input_names=["input_ids", "attention_mask"],
                output_names=["last_hidden_state", "sentence_embedding"],
                dynamic_shapes=({0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC},) * 2,
                dynamo=True,
                verbose=False,
            )
    except torch.onnx.errors.OnnxExporterError as error:
        raise OnnxError(f"onnx: torch {torch.__version__} cannot export {kind}: {_line(error)}") from error
    assert program is not None
    program.save(file)


def _difference(bundle: EncoderBundle, side: Side, file: Path) -> float:
    """The largest difference of an embedding in onnxruntime, in units of the largest entry or of 1."""
    import onnxruntime

    tokens, expected = _tokens(bundle, side), bundle.encode(_texts(bundle, side), side)
    inputs = {"input_ids": tokens.input_ids.numpy(), "attention_mask": tokens.attention_mask.long().numpy()}
    try:
        session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
        (whole,) = session.run(["sentence_embedding"], inputs)
        width = inputs["attention_mask"][0].sum()
        (alone,) = session.run(["sentence_embedding"], {name: rows[:1, :width] for name, rows in inputs.items()})
    except Exception as error:  # onnxruntime's own have no other base
        raise OnnxError(f"{file}: onnxruntime {onnxruntime.__version__} cannot run it: {_line(error)}") from error
    found = np.concatenate([whole, alone])
    return float(np.abs(found - np.concatenate([expected, expected[:1]])).max() / max(1.0, np.abs(expected).max()))


def _texts(bundle: EncoderBundle, side: Side) -> list[str]:
    return [*_TEXTS, "retrieval " * bundle.settings.max_tokens(side)]


def _tokens(bundle: EncoderBundle, side: Side) -> Padded:
    """The texts that are compared, as the tokenizer of the folder cuts them."""
    settings = bundle.settings
    rows = [
        bundle.tokenizer(settings.prompt(side) + text, truncation=True, max_length=settings.max_tokens(side))
        for text in _texts(bundle, side)
    ]
    tokens = pad_rows([np.array(row["input_ids"]) for row in rows], 0)
    return Padded(tokens.input_ids.long(), tokens.attention_mask.long())


def _line(error: BaseException) -> str:
    """The first line of an error, or of what caused it: torch's own begins with advice."""
    while error.__cause__ is not None:
        error = error.__cause__
    return _COLOURS.sub("", str(error)).strip().partition("\n")[0][:300]
