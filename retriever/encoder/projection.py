"""A projection head: pooled vectors times a matrix, before truncation and normalisation.

In a model folder it is sentence-transformers' Dense module between Pooling and Normalize, without bias and activation.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from retriever.config import ConfigError
from retriever.data.tokens import Side
from retriever.encoder.model_files import file_of, one_line, read_fields
from retriever.encoder.peer_files import read_modules
from retriever.encoder.settings import own_folder
from retriever.files import read_json, write_json

_FOLDER, _WEIGHTS, _MODULE = "2_Dense", "model.safetensors", "sentence_transformers.models.Dense"
_IDENTITY = "torch.nn.modules.linear.Identity"


@dataclass(frozen=True)
class _Dense:
    """The module's config.json."""

    in_features: int
    out_features: int
    bias: bool = True
    activation_function: str = "torch.nn.modules.activation.Tanh"


def new_projection(hidden_size: int, dimension: int, name: str) -> nn.Linear:
    """A random projection [dimension, hidden_size], a function of `name`, so that ranks and devices agree."""
    draw = torch.Generator().manual_seed(int.from_bytes(hashlib.blake2b(name.encode(), digest_size=7).digest()))
    return _linear(torch.randn(dimension, hidden_size, generator=draw) / hidden_size**0.5)


def load_projection(name_or_path: str | Path, side: Side) -> nn.Linear | None:
    """The head of one side's tower in a model folder, None where it has none.

    Raises ConfigError for one with bias or activation, and for weights that cannot be read.
    """
    name, folder = str(name_or_path), own_folder(name_or_path, side)
    dense = next((module for module in read_modules(name, folder) or () if module.kind == "Dense"), None)
    if dense is None:
        return None
    path = PurePosixPath(folder) / dense.path
    described = read_fields(_Dense, name, str(path / "config.json"))
    if described is None or described.bias or described.activation_function != _IDENTITY:
        expected = f"bias false and activation_function {_IDENTITY}"
        raise ConfigError(f"{name}/{path}/config.json: expected {expected}; received {described}")
    file = file_of(name, str(path / _WEIGHTS))
    if file is None:
        raise ConfigError(f"{name}/{path}/{_WEIGHTS}: is missing")
    with one_line(f"{file}: expected the weights of a Dense module"):
        weight = load_file(file)["linear.weight"]
    shape = [described.out_features, described.in_features]
    if list(weight.shape) != shape:
        raise ConfigError(f"{file}: linear.weight: expected shape {shape}, received {list(weight.shape)}")
    return _linear(weight.float())


def write_projection(folder: Path, projection: nn.Module) -> None:
    """Adds the head to a written model folder, behind its pooling."""
    (folder / _FOLDER).mkdir()
    weight = projection.get_parameter("weight").detach().float().cpu().contiguous()
    out_features, in_features = weight.shape
    described = {"in_features": in_features, "out_features": out_features, "bias": False}
    write_json(folder / _FOLDER / "config.json", {**described, "activation_function": _IDENTITY})
    save_file({"linear.weight": weight}, folder / _FOLDER / _WEIGHTS, metadata={"format": "pt"})
    modules = read_json(folder / "modules.json")
    modules.insert(2, {"path": _FOLDER, "type": _MODULE})
    write_json(folder / "modules.json", [module | {"idx": i, "name": str(i)} for i, module in enumerate(modules)])


def _linear(weight: torch.Tensor) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight)
    return linear
