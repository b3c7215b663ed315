"""Training state on disk, in folders that are whole when they have their names; resumed exactly.

A step's random numbers come from (seed, step, rank) and its batch from (seed, step, store), so weights, optimizer
state, the fp16 scaler's state and the step number are all there is to restore.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from retriever.checksums import write_checksums
from retriever.config import Config, ConfigError, from_dict, to_dict
from retriever.damage import EXPORT, FORMAT_VERSION, NAME, OPTIMIZER, STATE, WEIGHTS, DamageError, read_state
from retriever.files import remove, replace_folder
from retriever.loss.bank import Bank
from retriever.optim import Optimizer, load_state_tensors, state_tensors
from retriever.parallel.sharded import spread, whole_tensors
from retriever.run_folder import CHECKPOINTS

FOLDER, EXPORTED = CHECKPOINTS, "export.json"  # inside a run's folder; which step's export it shows
_BANK = "bank/"  # before the names of a memory bank's tensors among the weights
# Of a fingerprint: words that are summed at once, a factor whose multiples look random.
_PART, _GOLDEN = 1 << 22, 0x1E3779B97F4A7C15


@dataclass(frozen=True)
class TrainingState:
    """Everything of a run that changes with its steps."""

    encoder: nn.Module
    objective: nn.Module
    optimizer: Optimizer
    bank: Bank | None = None

    def modules(self) -> nn.ModuleDict:
        """The modules with weights, by their names in the checkpoint."""
        return nn.ModuleDict({"encoder": self.encoder, "objective": self.objective})

    def frozen(self) -> dict[str, nn.Parameter]:
        """The encoder's weights that stay as the model folder has them, which a checkpoint need not repeat."""
        named = self.encoder.named_parameters(remove_duplicate=False)
        return {f"encoder.{name}": p for name, p in named if not p.requires_grad}


@dataclass(frozen=True)
class Snapshot:
    """A copy of a TrainingState in host memory, ready to be written."""

    weights: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    scaler: dict[str, Any]
    frozen: str  # fingerprint of the weights that are not trained


def snapshot(state: TrainingState, *, keep: bool = True) -> Snapshot:
    """The state as it is now; where weights are in shards every rank calls it, and it holds nothing where `keep` is
    false.
    """
    frozen, host = state.frozen(), torch.device("cpu")
    trained = {name: tensor for name, tensor in state.modules().state_dict().items() if name not in frozen}
    if state.bank is not None:
        held = state.bank.tensors(state.optimizer.updates)
        trained |= {f"{_BANK}{name}": tensor for name, tensor in held.items()}
    return Snapshot(
        whole_tensors(trained, host, keep=keep),
        whole_tensors(state_tensors(state.optimizer), host, keep=keep),
        state.optimizer.scaler.state_dict(),
        _fingerprint(frozen),
    )


def save(
    root: Path, step: int, state: Snapshot, config: Config, store_fingerprint: str, export: Callable[[Path], None]
) -> Path:
    """Writes `root/step-<step>` after `step` finished steps; `export` fills its `export` folder. Returns the folder."""
    final = folder_of(root, step)
    manifest = {
        "format_version": FORMAT_VERSION,
        "step": step,
        "scaler": state.scaler,
        "store": store_fingerprint,
        "frozen": state.frozen,
        "torch": torch.__version__,
        "config": to_dict(config),
    }
    with replace_folder(final) as writing:
        save_file(state.weights, writing / WEIGHTS)
        save_file(state.optimizer, writing / OPTIMIZER)
        export(writing / EXPORT)
        (writing / STATE).write_text(json.dumps(manifest, indent=2))
        write_checksums(writing)
    return final


def load(folder: Path, state: TrainingState, store_fingerprint: str) -> int:
    """Restores `state`, in shards or not, in place and returns the number of finished steps.

    Raises ConfigError where the data changed since, or the weights that training leaves alone.
    """
    manifest = _manifest(folder)
    if manifest["store"] != store_fingerprint:
        raise ConfigError(
            f"{folder} was trained on other data or another tokenisation (fingerprint {manifest['store']}, now "
            f"{store_fingerprint}); set run.resume=never and another run.output_dir to start afresh"
        )
    frozen = state.frozen()
    if manifest.get("frozen", "") != _fingerprint(frozen):
        raise ConfigError(
            f"{folder} was trained over other frozen weights than model.name_or_path holds now; bring those back, or "
            "set run.resume=never and another run.output_dir to start afresh"
        )
    modules = state.modules()
    try:
        current, saved = modules.state_dict(), load_file(folder / WEIGHTS)
        held = {name.removeprefix(_BANK): saved.pop(name) for name in [*saved] if name.startswith(_BANK)}
        if state.bank is not None:
            state.bank.load(held)
        trained = {name: spread(tensor, current[name]) if name in current else tensor for name, tensor in saved.items()}
        modules.load_state_dict({**trained, **frozen})
        load_state_tensors(state.optimizer, load_file(folder / OPTIMIZER))
        state.optimizer.scaler.load_state_dict(manifest["scaler"])
    except (RuntimeError, ValueError) as error:
        found = " ".join(str(error).split())[:300]
        raise ConfigError(
            f"{folder} does not fit the model and optimizer of this run ({found}); take a checkpoint before it, or set "
            "run.resume=never and another run.output_dir to start afresh"
        ) from error
    state.optimizer.updates = int(manifest["step"])
    return int(manifest["step"])


def config_of(folder: Path) -> Config:
    """The configuration that a checkpoint was written under. Raises ConfigError where it is none."""
    return from_dict(_manifest(folder)["config"])


def newest(root: Path) -> Path | None:
    """The checkpoint of the latest step under `root`, or None."""
    return max(steps(root), key=step_of, default=None)


def steps(root: Path) -> list[Path]:
    """The checkpoints under `root`, oldest first; what a person put beside them under another name is none of ours."""
    return sorted((folder for folder in root.glob("step-*") if NAME.fullmatch(folder.name)), key=step_of)


def folder_of(root: Path, step: int) -> Path:
    """The checkpoint after `step` optimizer steps."""
    return root / f"step-{step:08d}"


def step_of(folder: Path) -> int:
    """The number of optimizer steps in the name of one of `steps`."""
    return int(folder.name.removeprefix("step-"))


def finished_steps(folder: Path) -> int:
    """The number of optimizer steps of a checkpoint of any name. Raises ConfigError if the folder is no checkpoint."""
    return int(_manifest(folder)["step"])


def keep_last(root: Path, count: int) -> None:
    """Removes all but the `count` latest checkpoints."""
    for old in steps(root)[:-count]:
        remove(old)


def publish(folder: Path, target: Path) -> None:
    """Makes `target` a copy of `folder`, replacing what stood there."""
    with replace_folder(target) as writing:
        shutil.copytree(folder, writing, dirs_exist_ok=True)


def _fingerprint(weights: Mapping[str, Tensor]) -> str:
    """A hash of names, shapes and bits, the same on every device; empty for no weights."""
    digest = hashlib.blake2b(digest_size=16)
    for name, weight in sorted(weights.items()):
        weight = weight.full_tensor() if isinstance(weight, DTensor) else weight
        # In parts, for the products are four times as large.
        parts = weight.detach().reshape(-1).view(torch.int16).split(_PART)
        factors = _factors(min(_PART, parts[0].numel()), weight.device)
        sums = [int((part * factors[: part.numel()]).sum()) for part in parts]  # modulo 2^64: exact in any order
        digest.update(f"{name} {tuple(weight.shape)} {sums}\n".encode())
    return digest.hexdigest() if weights else ""


def _factors(count: int, device: torch.device) -> Tensor:
    """Odd int64 numbers [count], mixed, so that no two words of a part may change places unseen."""
    mixed = torch.arange(1, count + 1, device=device) * _GOLDEN  # wraps
    return (mixed ^ (mixed >> 31)) * _GOLDEN | 1


def _manifest(folder: Path) -> dict[str, Any]:
    try:
        manifest = read_state(folder)
    except DamageError as error:
        raise ConfigError(f"{folder} is no checkpoint to go on from: {error}") from error
    if manifest["format_version"] != FORMAT_VERSION:
        raise ConfigError(
            f"{folder}: checkpoint format {manifest['format_version']!r}; this version reads {FORMAT_VERSION}"
        )
    return manifest
