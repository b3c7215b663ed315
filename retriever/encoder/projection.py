"""Projection heads: pooled vectors through one linear layer or several, before truncation and normalisation.

In a model folder they are sentence-transformers' Dense modules between Pooling and Normalize.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import cast

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from retriever.config import ConfigError
from retriever.data.tokens import Side
from retriever.encoder.model_files import file_of, one_line, read_fields
from retriever.encoder.peer_files import read_modules
from retriever.encoder.settings import own_folder
from retriever.files import read_json, write_json
from retriever.rng import named_generator

_WEIGHTS, _MODULE = "model.safetensors", "sentence_transformers.models.Dense"
_ACTIVATIONS = {
    f"{kind.__module__}.{kind.__name__}": kind for kind in (nn.Identity, nn.Tanh, nn.ReLU, nn.GELU, nn.SiLU, nn.Sigmoid)
}


@dataclass(frozen=True)
class _Dense:
    """The module's config.json."""

    in_features: int
    out_features: int
    bias: bool = True
    activation_function: str = "torch.nn.modules.activation.Tanh"
    use_residual: bool = False
    module_input_name: str = "sentence_embedding"

    def __post_init__(self) -> None:
        if self.activation_function not in _ACTIVATIONS:
            known = ", ".join(_ACTIVATIONS)
            raise ConfigError(f"activation_function: expected one of {known}; received {self.activation_function!r}")
        if self.use_residual or self.module_input_name != "sentence_embedding":
            raise ConfigError(
                "expected use_residual false and module_input_name 'sentence_embedding'; received "
                f"{self.use_residual} and {self.module_input_name!r}"
            )


class Dense(nn.Linear):
    """A linear layer with an activation behind it."""

    def __init__(self, weight: Tensor, bias: Tensor | None, activation: nn.Module) -> None:
        out_features, in_features = weight.shape
        super().__init__(in_features, out_features, bias=bias is not None, device="meta")
        self.weight = nn.Parameter(weight)
        if bias is not None:
            self.bias = nn.Parameter(bias)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        """x [n, in] to [n, out]."""
        return cast(Tensor, self.activation(super().forward(x)))


def new_projection(hidden_size: int, dimension: int, name: str) -> nn.Sequential:
    """A random matrix [dimension, hidden_size], a function of `name`, so that ranks and devices agree."""
    weight = torch.randn(dimension, hidden_size, generator=named_generator(name)) / hidden_size**0.5
    return nn.Sequential(Dense(weight, None, nn.Identity()))


def load_projections(name_or_path: str | Path, towers: nn.ModuleDict) -> dict[str, nn.Sequential]:
    """The heads of a model folder for `towers`, none where it has none. Raises ConfigError where one of two towers has
    none, for an unknown kind of module, weights that cannot be read, and sizes that do not follow each other.
    """
    found = {}
    for name, tower in towers.items():
        side: Side = "query" if name == "query" else "passage"
        width = cast(PreTrainedModel, tower).config.hidden_size
        found[name] = _load_projection(str(name_or_path), side, width)
    heads = {tower: nn.Sequential(*layers) for tower, layers in found.items() if layers}
    if heads and len(heads) < len(found):
        raise ConfigError(f"model {name_or_path}: expected Dense modules in both towers or in none")
    return heads


def projected_size(head: nn.Module) -> int:
    """The length of the vectors that a head returns."""
    return cast(Dense, cast(nn.Sequential, head)[-1]).out_features


def write_projection(folder: Path, projection: nn.Module) -> None:
    """Adds the head to a written model folder, behind its pooling."""
    modules = read_json(folder / "modules.json")
    for i, layer in enumerate(cast(nn.Sequential, projection), start=2):
        assert isinstance(layer, Dense)
        path = folder / f"{i}_Dense"
        path.mkdir()
        activation = f"{type(layer.activation).__module__}.{type(layer.activation).__name__}"
        sizes = {"in_features": layer.in_features, "out_features": layer.out_features, "bias": layer.bias is not None}
        write_json(path / "config.json", {**sizes, "activation_function": activation})
        state = {f"linear.{name}": p.detach().float().cpu().contiguous() for name, p in layer.state_dict().items()}
        save_file(state, path / _WEIGHTS, metadata={"format": "pt"})
        modules.insert(i, {"path": path.name, "type": _MODULE})
    write_json(folder / "modules.json", [module | {"idx": i, "name": str(i)} for i, module in enumerate(modules)])


def _load_projection(name: str, side: Side, width: int) -> list[Dense]:
    """The Dense modules of a side, the first of which takes vectors of `width`."""
    folder = own_folder(name, side)
    paths = [module.path for module in read_modules(name, folder) or () if module.kind == "Dense"]
    layers = []
    for path in paths:
        layer = _load_dense(name, PurePosixPath(folder) / path)
        if layer.in_features != width:
            file, found = f"{name}/{PurePosixPath(folder) / path}/config.json", layer.in_features
            raise ConfigError(
                f"{file}: in_features: expected {width}, the size of the vectors before it; received {found}"
            )
        width = layer.out_features
        layers.append(layer)
    return layers


def _load_dense(name: str, path: PurePosixPath) -> Dense:
    described = read_fields(_Dense, name, str(path / "config.json"))
    if described is None:
        raise ConfigError(f"{name}/{path}/config.json: is missing; expected the sizes of a Dense module")
    file = file_of(name, str(path / _WEIGHTS))
    if file is None:
        raise ConfigError(f"{name}/{path}/{_WEIGHTS}: is missing")
    expected = {"linear.weight": [described.out_features, described.in_features]}
    if described.bias:
        expected["linear.bias"] = [described.out_features]
    with one_line(f"{file}: expected the weights of a Dense module"):
        found = load_file(file)
        tensors = {key: found[key].float() for key in expected}
    for key, shape in expected.items():
        if list(tensors[key].shape) != shape:
            raise ConfigError(f"{file}: {key}: expected shape {shape}, received {list(tensors[key].shape)}")
    activation = _ACTIVATIONS[described.activation_function]()
    return Dense(tensors["linear.weight"], tensors.get("linear.bias"), activation)
