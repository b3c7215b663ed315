"""AdaFactor with momentum, as Zhai et al. 2022 modify it (arXiv:2106.04560, section 3.4) and Inf-CL trains with it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

_DECAY_POWER = 0.8  # of the second moment's decay in the first steps: 1 − t^−0.8, at most β₂
_EPS = 1e-30


class MomentumAdafactor(torch.optim.Optimizer):
    """θ ← (1 − lr · weight_decay) θ − lr · m,    m ← β₁ m + (1 − β₁) g / √v

    v is the running mean of g² + 1e-30 with decay min(β₂, 1 − t^−0.8). For a matrix it is rank one, from the means of
    rows and columns: v_ij = r_i c_j / mean(r) (Shazeer and Stern 2018, arXiv:1804.04235). Nothing is scaled by the size
    of the parameters, and no update is clipped. The momentum m is kept in bfloat16, so the state takes half of the
    bytes of a float32 parameter.
    """

    def __init__(
        self, params: Iterable[Any], lr: float, betas: tuple[float, float] = (0.9, 0.95), weight_decay: float = 0.0
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads as torch does, but keeps the saved dtype of the state, which torch casts to that of the parameters."""
        super().load_state_dict(state_dict)
        for state in self.state.values():
            for name, value in state.items():
                state[name] = value.bfloat16() if name == "momentum" else value.float()

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        loss = None if closure is None else closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group)
        return loss

    def _update(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state, (beta1, beta2) = self.state[parameter], group["betas"]
        gradient = gradient.float()
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            state["momentum"] = torch.zeros_like(parameter, dtype=torch.bfloat16)
            for name, dims in _means(gradient).items():
                state[name] = torch.zeros_like(gradient.mean(dims, keepdim=True) if dims else gradient)
        state["step"] += 1
        decay = min(beta2, 1 - float(state["step"]) ** -_DECAY_POWER)
        squares = gradient.square() + _EPS
        for name, dims in _means(gradient).items():
            state[name].lerp_(squares.mean(dims, keepdim=True) if dims else squares, 1 - decay)
        if "rows" in state:  # [..., m, 1] and [..., 1, n]
            rows = state["rows"] / state["rows"].mean(-2, keepdim=True)
            update = gradient * rows.rsqrt() * state["columns"].rsqrt()
        else:
            update = gradient * state["squares"].rsqrt()
        momentum = state["momentum"].float().lerp_(update, 1 - beta1)
        state["momentum"].copy_(momentum)
        parameter.mul_(1 - group["lr"] * group["weight_decay"]).sub_(momentum * group["lr"])


def _means(gradient: Tensor) -> dict[str, tuple[int, ...]]:
    """The running means of a parameter's squared gradient, by name, and over which dimensions each is taken."""
    return {"rows": (-1,), "columns": (-2,)} if gradient.ndim >= 2 else {"squares": ()}
