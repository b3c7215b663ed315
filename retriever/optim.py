"""Parameter groups, learning-rate schedules, and the update: unscale, check, clip, step."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from retriever.config import ConfigError, OptimConfig
from retriever.optimizers import make_optimizer
from retriever.parallel.sharded import spread

_AVERAGE = "average"  # what the running mean of a parameter is called beside its optimizer's state
_NUMBER, _GROUP = ":number", ":group"  # mark a plain number among the tensors of a state; what belongs to a group
_SMALLEST_SCALE = 2.0**-4  # of fp16: gradients that overflow below it are no matter of range


def learning_rate(config: OptimConfig, step: int, total_steps: int) -> float:
    """The rate of step `step` of `total_steps`, counted from 0: linear warm-up to `lr`, then what `schedule` says.

    `warmup` and `decay` are shares of all steps, or numbers of steps where they are at least 1.
    """
    warmup_steps, decay_steps = (x if x >= 1 else x * total_steps for x in (config.warmup, config.decay))
    if step + 1 < warmup_steps:
        return config.lr * (step + 1) / warmup_steps
    if config.schedule == "constant":
        return config.lr
    if config.schedule == "wsd":
        return config.lr * min(1.0, (total_steps - step) / max(1.0, decay_steps))
    progress = (step - max(0.0, warmup_steps - 1)) / max(1.0, total_steps - max(0.0, warmup_steps - 1))
    decay = 1.0 - progress if config.schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
    return config.lr * max(0.0, decay)


def freeze(towers: nn.ModuleDict, names: Sequence[str]) -> None:
    """Leaves the parameters of each tower whose dotted name is one of `names`, or inside it, untrained.

    Raises ConfigError where a name is none of a tower's, or where nothing is left to train.
    """
    for tower in towers.values():
        parameters = dict(tower.named_parameters())
        for frozen in names:
            inside = [p for name, p in parameters.items() if name == frozen or name.startswith(f"{frozen}.")]
            if not inside:
                known = ", ".join(name for name, _ in tower.named_children())
                raise ConfigError(f"optim.freeze: {frozen!r} is no module or parameter of this model; it has {known}")
            for parameter in inside:
                parameter.requires_grad_(False)
        if not any(p.requires_grad for p in parameters.values()):
            raise ConfigError(f"optim.freeze: {', '.join(names)} leaves no parameter to train")


class Optimizer:
    """The optimizer of `config` over the trainable parameters of `modules`; biases, norms and the log-scale do not
    decay.

    With `config.ema` it keeps a running mean of each parameter beside the optimizer's own state. In fp16 the gradients
    at the representations are scaled (`gradient_scale`) and unscaled after the sum over ranks.
    """

    def __init__(
        self, config: OptimConfig, modules: Sequence[nn.Module], total_steps: int, device: torch.device
    ) -> None:
        self._config, self._total_steps = config, total_steps
        self.names: dict[str, nn.Parameter] = {}  # tied towers hold a parameter once
        for module in modules:
            self.names |= {name: p for name, p in module.named_parameters() if p.requires_grad}
        groups: list[dict[str, Any]] = []
        for parameters in self._alike():
            decayed = [p for p in parameters if p.ndim >= 2]
            plain = [p for p in parameters if p.ndim < 2]
            groups += [{"params": decayed, "weight_decay": config.weight_decay}, {"params": plain, "weight_decay": 0.0}]
        self.torch = make_optimizer(config, groups, device)
        self._groups = deepcopy(self.torch.state_dict()["param_groups"])
        # Where the device can leave an update out by itself, the host need not ask before it.
        self._skips = config.name == "adamw" and device.type == "cuda" and config.precision != "fp16"
        self._skips = self._skips and not any(isinstance(p, DTensor) for p in self.parameters)
        self.updates = 0  # updates made, or left out by fp16's scaler
        self.updating = threading.Lock()  # held while parameters change
        self.scaler = torch.amp.GradScaler(device.type, enabled=config.precision == "fp16")
        if self.scaler.is_enabled():
            self.scaler.scale(torch.zeros((), device=device))  # the scaler makes its scale at the first use

    @property
    def parameters(self) -> list[nn.Parameter]:
        """Every trainable parameter once, in a fixed order."""
        return list(self.names.values())

    @property
    def gradient_scale(self) -> float:
        """The factor of the gradients at the representations before backward; 1 outside fp16."""
        return self.scaler.get_scale() if self.scaler.is_enabled() else 1.0

    @property
    def averages(self) -> dict[str, Tensor]:
        """The running means by parameter; empty without `ema` and before the first update."""
        state = self.torch.state
        return {name: state[p][_AVERAGE] for name, p in self.names.items() if _AVERAGE in state.get(p, {})}

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Inside, the parameters are their running means, if there are any."""
        with self.updating:
            self._exchange_averages()
            try:
                yield
            finally:
                self._exchange_averages()

    @torch.no_grad()
    def _exchange_averages(self) -> None:
        for name, average in self.averages.items():
            present = self.names[name].clone()
            self.names[name].copy_(average)
            average.copy_(present)

    def _average(self, decay: float) -> None:
        averages = self.averages
        for name, p in self.names.items():
            if name in averages:
                averages[name].lerp_(p.detach(), 1 - decay)
            else:
                self.torch.state[p][_AVERAGE] = p.detach().clone()

    def kept_in_groups(self) -> Iterator[tuple[nn.Parameter, str, Tensor | float]]:
        """Entries of the parameter groups that updates have changed, by parameter: Prodigy's distance, for example.

        Raises ConfigError where it is neither a tensor nor a number.
        """
        for group, begun in zip(self.torch.param_groups, self._groups, strict=True):
            for key in sorted(group.keys() - {"params", "lr"}):
                value, was = group[key], begun.get(key)
                if isinstance(value, Tensor) and isinstance(was, Tensor):
                    same = torch.equal(value.cpu(), was.cpu())
                else:
                    same = type(value) is type(was) and value == was
                if same:
                    continue
                if not isinstance(value, (Tensor, int, float)):
                    held = f"{self._config.name} changes {key!r} of its groups to a {type(value).__name__}"
                    raise ConfigError(f"optim.name: expected state of tensors and numbers; {held}")
                yield from ((p, key, value) for p in group["params"])

    def set_learning_rate(self, step: int) -> float:
        """Sets and returns the rate of `step`, counted from 0."""
        rate = learning_rate(self._config, step, self._total_steps)
        for group in self.torch.param_groups:
            group["lr"] = rate
        return rate

    def clip_and_step(self, step: int) -> float:
        """Clips to `max_grad_norm`, updates, clears the gradients; returns the norm before clipping.

        Holds `updating`, so that another thread can read the parameters and `updates` as the last update left them.
        In fp16 a non-finite gradient skips the update and lowers the scale. Otherwise it raises FloatingPointError, no
        update being made.
        """
        with self.updating:
            norm = self._clip_and_step(step)
            self.updates = step + 1
        return norm

    def _clip_and_step(self, step: int) -> float:
        self.scaler.unscale_(self.torch)
        norm = clipped = _total_norm(
            [[p.grad for p in parameters if p.grad is not None] for parameters in self._alike()]
        )
        if self._skips:
            self.torch.found_inf = norm.isfinite().logical_not_().float()  # type: ignore[attr-defined]
            clipped = norm.nan_to_num(0.0, 0.0, 0.0)  # gradients that are not used stay what they were, to be named
        elif not self.scaler.is_enabled():
            self._check(norm.item(), step)
        for parameters in self._alike():
            nn.utils.clip_grads_with_norm_(parameters, self._config.max_grad_norm, clipped)
        self.scaler.step(self.torch)
        self.scaler.update()
        value = norm.item()  # where the device skips, the update's first wait for it: all is queued
        if self._skips:
            self._check(value, step)
        if self._config.ema is not None and math.isfinite(value):  # fp16 leaves the others out
            self._average(self._config.ema)
        if self.scaler.is_enabled() and self.scaler.get_scale() < _SMALLEST_SCALE:
            raise FloatingPointError(
                f"step {step + 1}: gradients are not finite at a loss scale of {self.scaler.get_scale():g} either; "
                "optim.precision=bf16 has the range of fp32"
            )
        self.torch.zero_grad(set_to_none=True)
        return value

    def _alike(self) -> list[list[nn.Parameter]]:
        """The parameters that every rank holds whole, and those in shards: torch computes with one kind at a time."""
        kinds = ([p for p in self.parameters if isinstance(p, DTensor) == sharded] for sharded in (False, True))
        return [parameters for parameters in kinds if parameters]

    def _check(self, norm: float, step: int) -> None:
        if not math.isfinite(norm):
            raise FloatingPointError(
                f"step {step + 1}: the gradient of {self._first_non_finite()} is not finite; no update was made"
            )

    def _first_non_finite(self) -> str:
        bad = (name for name, p in self.names.items() if p.grad is not None and not bool(torch.isfinite(p.grad).all()))
        return next(bad, "all parameters together")


def _total_norm(gradients: Sequence[Sequence[Tensor]]) -> Tensor:
    """The norm of all of them together, each counted whole."""
    norms = (nn.utils.get_total_norm(part) for part in gradients)
    return reduce(torch.hypot, (norm.full_tensor() if isinstance(norm, DTensor) else norm for norm in norms))


def state_tensors(optimizer: Optimizer) -> dict[str, Tensor]:
    """The optimizer's state as `<parameter>/<quantity>` tensors. Raises ConfigError where some cannot be saved."""
    state, found = {p: dict(optimizer.torch.state.get(p, {})) for p in optimizer.parameters}, {}
    for p, key, value in optimizer.kept_in_groups():
        state[p][f"{key}{_GROUP}"] = value
    for name, p in optimizer.names.items():
        for key, value in state[p].items():
            if isinstance(value, (int, float)):  # of optimizers by import path
                dtype = torch.float64 if isinstance(value, float) else None
                key, value = f"{key}{_NUMBER}", torch.tensor(value, dtype=dtype)
            if value is not None:
                found[f"{name}/{key}"] = value
    return found


def load_state_tensors(optimizer: Optimizer, tensors: dict[str, Tensor]) -> None:
    """Restores what `state_tensors` gave. Raises ValueError where a tensor belongs to no parameter."""
    parameters = [(p, group) for group in optimizer.torch.param_groups for p in group["params"]]
    places = {id(p): (i, group) for i, (p, group) in enumerate(parameters)}
    state: dict[int, dict[str, Tensor | float]] = {}
    for key, value in tensors.items():
        name, _, quantity = key.rpartition("/")
        if name not in optimizer.names:
            raise ValueError(f"the checkpoint holds optimizer state of {name!r}, which this run does not train")
        parameter = optimizer.names[name]
        index, group = places[id(parameter)]
        is_number, quantity = quantity.endswith(_NUMBER), quantity.removesuffix(_NUMBER)
        if quantity.endswith(_GROUP):
            group[quantity.removesuffix(_GROUP)] = value.item() if is_number else value.to(parameter.device)
        else:
            state.setdefault(index, {})[quantity] = value.item() if is_number else spread(value, parameter)
    optimizer.torch.load_state_dict({"state": state, "param_groups": optimizer.torch.state_dict()["param_groups"]})
