"""Joining the other ranks: what accelerate set up, and where our own settings win."""

from __future__ import annotations

import hashlib
import os
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, ProjectConfiguration

from retriever.config import Config, ConfigError, flat
from retriever.config_rules import check_sharded
from retriever.parallel.world import World


def join(config: Config) -> tuple[Accelerator, World]:
    """The accelerator (devices, trackers) and the world of ranks; a collective that waits longer than `run.timeout_s`
    fails.

    Raises ConfigError where accelerate was set up for something that this version does not do, or the ranks do not
    meet.
    """
    if _is_on("ACCELERATE_USE_DEEPSPEED"):
        raise ConfigError(
            "accelerate's configuration asks for DeepSpeed; only FSDP is available, as in configs/accelerate/fsdp.yaml"
        )
    sharded = _is_on("ACCELERATE_USE_FSDP")
    # With this variable transformers would load no weights on ranks other than the first.
    os.environ.pop("ACCELERATE_USE_FSDP", None)
    if sharded:
        _check_fsdp()
        check_sharded(config)
    asked = os.environ.pop("ACCELERATE_MIXED_PRECISION", "no")  # Accelerator reads it over its own argument
    accumulation = os.environ.pop("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    try:
        accelerator = Accelerator(
            cpu=not torch.cuda.is_available(),  # without it, processes launched on a CPU do not join one another
            mixed_precision="no",
            log_with=list(config.run.trackers) or None,
            project_config=ProjectConfiguration(
                project_dir=config.run.output_dir, logging_dir=str(Path(config.run.output_dir) / "logs")
            ),
            kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(seconds=config.run.timeout_s))],
        )
    except dist.DistError as error:
        raise ConfigError(
            f"rank {os.environ.get('RANK')} of {os.environ.get('WORLD_SIZE')} did not meet the others within "
            f"run.timeout_s={config.run.timeout_s}: {error} All nodes must be started and reach "
            f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        ) from error
    if asked not in ("no", config.optim.precision):
        accelerator.print(f"note: accelerate asks for {asked}; optim.precision={config.optim.precision} is used")
    if accelerator.device.type == "cpu" and config.optim.precision != "fp32":
        accelerator.print(f"note: on most CPUs {config.optim.precision} is slower than fp32 (optim.precision=fp32)")
    if accumulation != "1":
        accelerator.print(
            f"note: accelerate asks for {accumulation} accumulation steps; "
            f"batch.queries={config.batch.queries} is one step"
        )
    if accelerator.is_main_process:
        loggable = {key: value for key, value in flat(config).items() if isinstance(value, (bool, int, float, str))}
        accelerator.init_trackers("bigbatch", config=loggable)
    several = accelerator.num_processes > 1
    if sharded and not several:
        accelerator.print("note: accelerate asks for FSDP of one process; it holds the encoder whole")
    return accelerator, World(
        accelerator.device, accelerator.process_index, accelerator.num_processes, sharded=sharded and several
    )


def agree(world: World, **values: object) -> None:
    """Raises ConfigError, on every rank, naming the first of `values` that is not the same on all ranks.

    Nodes that do not share a file system would otherwise train on together from different states.
    """
    for name, value in values.items():
        digest = int.from_bytes(hashlib.blake2b(repr(value).encode(), digest_size=7).digest())
        extent = world.max(torch.tensor([digest, -digest], device=world.device))
        if int(extent[0]) != -int(extent[1]):
            raise ConfigError(
                f"the ranks disagree on the {name} (rank {world.rank}: {value}): all nodes need the same "
                "run.output_dir and data"
            )


def _check_fsdp() -> None:
    """Raises ConfigError for settings of accelerate's `fsdp_config` that this project does not follow; the rest it does
    not need.
    """
    meant = {"version": ("1", "2"), "offload_params": ("false", "false"), "reshard_after_forward": ("true", "true")}
    meant |= {"activation_checkpointing": ("false", "false")}
    for name, (default, expected) in meant.items():
        received = os.environ.get(f"FSDP_{name.upper()}", default).lower()
        if received != expected:
            raise ConfigError(f"accelerate's fsdp_config: fsdp_{name}: expected {expected}; received {received}")


def _is_on(variable: str) -> bool:
    return os.environ.get(variable, "false").lower() in ("true", "1")
