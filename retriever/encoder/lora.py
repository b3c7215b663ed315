"""Low-rank adaptation: beside each frozen linear layer a product of two narrow matrices is trained.

y = W x + b + (α / r) · B A x, with A [r, in] random and B [out, r] zero at the start (Hu et al. 2021,
arXiv:2106.09685).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from retriever.config import ConfigError, LoraConfig
from retriever.rng import named_generator


class LoraLinear(nn.Linear):
    """A linear layer with its low-rank part; `weight` and `bias` keep their names and are frozen."""

    def __init__(self, base: nn.Linear, config: LoraConfig, generator: torch.Generator) -> None:
        super().__init__(base.in_features, base.out_features, bias=base.bias is not None, device="meta")
        self.weight, self.bias = base.weight, base.bias
        self.scale, self.dropout = config.alpha / config.r, config.dropout
        drawn = torch.empty(config.r, base.in_features).uniform_(-1, 1, generator=generator) / math.sqrt(
            base.in_features
        )
        self.lora_a = nn.Parameter(drawn.to(base.weight))  # [r, in]
        self.lora_b = nn.Parameter(base.weight.new_zeros(base.out_features, config.r))  # [out, r]

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] to [..., out]; dropout, where there is any, is on what the low-rank part sees."""
        narrow = F.linear(F.dropout(x, self.dropout, self.training), self.lora_a)  # [..., r]
        return super().forward(x) + self.scale * F.linear(narrow, self.lora_b)

    def merged(self) -> Tensor:
        """W + (α / r) · B A, [out, in]."""
        return self.weight + self.scale * self.lora_b @ self.lora_a


def adapt(towers: nn.ModuleDict, config: LoraConfig, seed: int) -> None:
    """Freezes `towers` and replaces the linear layers that `config.targets` names (all if it is empty) by LoraLinear.

    A layer's A is a function of `seed` and its name, so that ranks and devices agree. Raises ConfigError where a name
    of `targets` is no linear layer's.
    """
    towers.requires_grad_(False)
    for tower_name, tower in towers.items():
        linear = {name: module for name, module in tower.named_modules() if type(module) is nn.Linear}
        for target in config.targets:
            if not any(_is_called(name, target) for name in linear):
                known = ", ".join(sorted({name.rpartition(".")[2] for name in linear})) or "none"
                raise ConfigError(
                    f"model.lora.targets: {target!r} is no linear layer of this model; expected some of: {known}"
                )
        if not linear:
            raise ConfigError(f"model.lora: a {type(tower).__name__} has no torch.nn.Linear to adapt; set it to null")
        for name, module in linear.items():
            if not config.targets or any(_is_called(name, target) for target in config.targets):
                adapted = LoraLinear(module, config, named_generator(f"{seed} {tower_name}.{name}"))
                tower.set_submodule(name, adapted.train(module.training))


def merged_state(tower: nn.Module) -> dict[str, Tensor]:
    """The state of `tower` as a model without low-rank parts has it: merged weights under the names they always had."""
    state = {
        name: tensor
        for name, tensor in tower.state_dict().items()
        if name.rpartition(".")[2] not in ("lora_a", "lora_b")
    }
    adapted = ((name, module) for name, module in tower.named_modules() if isinstance(module, LoraLinear))
    return state | {f"{name}.weight": module.merged().detach() for name, module in adapted}


def _is_called(name: str, target: str) -> bool:
    """Whether the dotted `name` ends in `target`: `dense` or, more exactly, `attention.output.dense`."""
    return name == target or name.endswith(f".{target}")
