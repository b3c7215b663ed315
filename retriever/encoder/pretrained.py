"""Models of Hugging Face, from safetensors and JSON alone; weights that do not fit are refused in one line."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from safetensors import safe_open
from transformers import AutoConfig
from transformers.utils import logging as transformers_logging

from retriever.config import ConfigError
from retriever.encoder.model_files import one_line, read_fields, read_json

WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
_UNREAD = ("quantization_config", "transformers_weights")
_ALWAYS_BUILT = 1000  # layers


@dataclass(frozen=True)
class _Index:
    """model.safetensors.index.json."""

    weight_map: dict[str, Any]


def read_config(name: str, folder: str = "", **overrides: Any) -> Any:
    """The transformers configuration in a sub-folder of a model's folder or Hugging Face name, with `overrides`.

    Raises ConfigError where there is none, it is malformed, or it would load code of the hub or weights of another
    kind.
    """
    file = str(PurePosixPath(folder) / "config.json")
    found = read_json(name, file)
    if not isinstance(found, dict):
        raise ConfigError(
            f"{name}/{file}: expected an object, received {'no file' if found is None else type(found).__name__}"
        )
    for key in _UNREAD:
        if found.get(key) is not None:
            raise ConfigError(
                f"{name}/{file}: {key}: expected none, for weights are read from {WEIGHTS} and in full precision"
            )
    for key in ("attn_implementation", "_attn_implementation"):
        if "/" in str(found.get(key)):
            raise ConfigError(
                f"{name}/{file}: {key}: expected transformers' own attention, received code of the hub, {found[key]!r}"
            )
    with one_line(f"{name}/{file}: no configuration of a model that transformers knows"), quiet_transformers():
        return AutoConfig.from_pretrained(name, subfolder=folder, trust_remote_code=False, **overrides)


def load_model(auto_class: Any, config: Any, name: str, folder: str) -> tuple[Any, list[str]]:
    """A model of `config` in fp32 with the weights in a sub-folder of `name`, and the names of missing weights.

    Raises ConfigError, which names the file and the weight, where the weights are no safetensors, cut short, not finite
    or of other shapes.
    """
    where = "/".join(part for part in (name, folder) if part)
    found = (
        _stored_shapes(Path(name) / folder) if Path(name).exists() else {}
    )  # those of the hub were checked as they were fetched
    with one_line(f"{where}/config.json: no {config.model_type} model can be built from it"), torch.device("meta"):
        layers = getattr(config, "num_hidden_layers", 0)
        if found and layers > max(_ALWAYS_BUILT, len(found)):
            raise ConfigError(
                f"{where}/config.json: num_hidden_layers: {layers} layers, but the weights are {len(found)} tensors"
            )
        built = auto_class.from_config(config)
    prefix = f"{built.base_model_prefix}."  # which the files of a body and of a model with a head have or have not
    expected = {key.removeprefix(prefix): tuple(weight.shape) for key, weight in built.state_dict().items()}
    for key, (file, shape) in found.items():
        if shape != (wanted := expected.get(key.removeprefix(prefix), shape)):
            raise ConfigError(f"{file}: {key} has shape {list(shape)}; expected {list(wanted)}, by {where}/config.json")
    settings = {
        "dtype": torch.float32,
        "trust_remote_code": False,
        "use_safetensors": True,
        "output_loading_info": True,
    }
    with quiet_transformers(), one_line(f"{where}: expected weights in safetensors (pickled ones are not read)"):
        # What has another shape is refused below, by name.
        model, report = auto_class.from_pretrained(
            name, config=config, subfolder=folder, ignore_mismatched_sizes=True, **settings
        )
    if report["mismatched_keys"]:
        key, stored, fitting = min(report["mismatched_keys"])
        raise ConfigError(
            f"{where}/{WEIGHTS}: {key} has shape {list(stored)}; expected {list(fitting)}, by config.json"
        )
    missing = sorted(str(key) for key in report["missing_keys"])
    if wrong := [
        key for key, weight in model.named_parameters() if key not in missing and not torch.isfinite(weight).all()
    ]:
        raise ConfigError(f"{where}/{WEIGHTS}: {wrong[0]} holds numbers that are not finite")
    return model, missing


def _stored_shapes(folder: Path) -> dict[str, tuple[Path, tuple[int, ...]]]:
    """The file and the shape of every tensor of a folder's weights. Raises ConfigError where they cannot be read."""
    if (folder / "adapter_config.json").exists():
        expected = "expected weights that they are merged into"
        raise ConfigError(f"{folder}/adapter_config.json: adapters beside a model are not read; {expected}")
    files = [WEIGHTS]
    if not (folder / WEIGHTS).exists():
        index = read_fields(_Index, str(folder), _INDEX)
        if index is None:
            pickled = next((f"; {f.name} is pickled, which is not read" for f in sorted(folder.glob("*.bin"))), "")
            raise ConfigError(f"{folder}: there is no {WEIGHTS}{pickled}")
        files = sorted({str(file) for file in index.weight_map.values()})
    shapes: dict[str, tuple[Path, tuple[int, ...]]] = {}
    for file in files:
        if Path(file).name != file or not file.endswith(".safetensors"):
            raise ConfigError(
                f"{folder}/{_INDEX}: weight_map: expected files .safetensors of the same folder, received {file!r}"
            )
        path = folder / file
        with one_line(f"{path}: no complete safetensors file"), safe_open(path, framework="pt") as stored:
            for key in stored.keys():  # noqa: SIM118
                shapes[key] = path, tuple(stored.get_slice(key).get_shape())
    return shapes


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silences transformers' bars and its report of unused and missing weights, which are judged here."""
    level, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()
