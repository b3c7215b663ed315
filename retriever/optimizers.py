"""The torch optimizer that a configuration names: one of ours by a short name, any other by its import path."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch

from retriever.adafactor import MomentumAdafactor
from retriever.config import ConfigError, OptimConfig


def make_optimizer(config: OptimConfig, groups: list[dict[str, Any]], device: torch.device) -> torch.optim.Optimizer:
    """The torch optimizer that `config.name` names, over parameter groups with a weight_decay each.

    Raises ConfigError where an import path is none of an optimizer's, or the optimizer does not take its arguments.
    """
    if config.name == "adamw":
        return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, fused=device.type == "cuda")
    if config.name == "adafactor_momentum":
        return MomentumAdafactor(groups, config.lr, config.betas)
    if config.name == "adafactor":
        return torch.optim.Adafactor(groups, lr=config.lr)
    module, _, name = config.name.rpartition(".")
    try:
        kind = getattr(import_module(module), name)
        made = kind(groups, lr=config.lr, **(config.arguments or {}))
    except (ImportError, AttributeError) as error:
        expected = f"expected the import path of an optimizer, received {config.name!r}"
        raise ConfigError(f"optim.name: {expected}: {error}") from error
    except (TypeError, ValueError) as error:
        raise ConfigError(f"optim.arguments: {config.name} does not take {config.arguments}: {error}") from error
    if not isinstance(made, torch.optim.Optimizer):
        raise ConfigError(f"optim.name: expected an optimizer of torch, received {config.name!r}")
    if config.weight_decay and "weight_decay" not in made.defaults:
        expected = f"expected 0 with {config.name}, which has none"
        raise ConfigError(f"optim.weight_decay: {expected}; received {config.weight_decay}")
    return made
