"""Parameter groups, learning-rate schedules, and the update: unscale, check, clip, step."""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from retriever.adafactor import MomentumAdafactor
from retriever.config import OptimConfig
from retriever.parallel.sharded import spread

_SMALLEST_SCALE = 2.0**-4  # of fp16: gradients that overflow below it are no matter of range


def learning_rate(config: OptimConfig, step: int, total_steps: int) -> float:
    """The rate of step `step` of `total_steps`, counted from 0: linear warm-up to `lr`, then linear or cosine decay to
    0.

    `warmup` is a share of all steps, or a number of steps where it is at least 1.
    """
    warmup_steps = config.warmup if config.warmup >= 1 else config.warmup * total_steps
    if step + 1 < warmup_steps:
        return config.lr * (step + 1) / warmup_steps
    progress = (step - max(0.0, warmup_steps - 1)) / max(1.0, total_steps - max(0.0, warmup_steps - 1))
    decay = 1.0 - progress if config.schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
    return config.lr * max(0.0, decay)


class Optimizer:
    """AdamW or a form of Adafactor over the trainable parameters of `modules`; biases, norms and the log-scale do not
    decay.

    In fp16 the gradients at the representations are scaled (`gradient_scale`) and unscaled after the sum over ranks.
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
        if config.name == "adamw":
            self.torch: torch.optim.Optimizer = torch.optim.AdamW(
                groups, lr=config.lr, betas=config.betas, fused=device.type == "cuda"
            )
        elif config.name == "adafactor_momentum":
            self.torch = MomentumAdafactor(groups, config.lr, config.betas)
        else:
            self.torch = torch.optim.Adafactor(groups, lr=config.lr)
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
        """What gradients at the representations are multiplied by before backward; 1 outside fp16."""
        return self.scaler.get_scale() if self.scaler.is_enabled() else 1.0

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
            self._check(norm, step)
        for parameters in self._alike():
            nn.utils.clip_grads_with_norm_(parameters, self._config.max_grad_norm, clipped)
        self.scaler.step(self.torch)
        self.scaler.update()
        if self._skips:
            self._check(norm, step)  # the update's first wait for the device: all is queued
        if self.scaler.is_enabled() and self.scaler.get_scale() < _SMALLEST_SCALE:
            raise FloatingPointError(
                f"step {step + 1}: gradients are not finite at a loss scale of {self.scaler.get_scale():g} either; "
                "optim.precision=bf16 has the range of fp32"
            )
        self.torch.zero_grad(set_to_none=True)
        return norm.item()

    def _alike(self) -> list[list[nn.Parameter]]:
        """The parameters that every rank holds whole, and those in shards: torch computes with one kind at a time."""
        kinds = ([p for p in self.parameters if isinstance(p, DTensor) == sharded] for sharded in (False, True))
        return [parameters for parameters in kinds if parameters]

    def _check(self, norm: Tensor, step: int) -> None:
        if not torch.isfinite(norm):
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
    """The optimizer's state as `<parameter>/<quantity>` tensors."""
    state = optimizer.torch.state
    return {f"{name}/{key}": value for name, p in optimizer.names.items() for key, value in state.get(p, {}).items()}


def load_state_tensors(optimizer: Optimizer, tensors: dict[str, Tensor]) -> None:
    """Restores what `state_tensors` gave. Raises ValueError where a tensor belongs to no parameter."""
    order = {id(p): i for i, p in enumerate(p for group in optimizer.torch.param_groups for p in group["params"])}
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        name, _, quantity = key.rpartition("/")
        if name not in optimizer.names:
            raise ValueError(f"the checkpoint holds optimizer state of {name!r}, which this run does not train")
        parameter = optimizer.names[name]
        state.setdefault(order[id(parameter)], {})[quantity] = spread(value, parameter)
    optimizer.torch.load_state_dict({"state": state, "param_groups": optimizer.torch.state_dict()["param_groups"]})
