"""Joining the other ranks: what accelerate set up, and where our own settings win."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import InitProcessGroupKwargs, ProjectConfiguration

from retriever import trackers
from retriever.config import Config, ConfigError
from retriever.config_rules import check_sharded
from retriever.parallel.world import World
from retriever.screen import say

_ALLOCATOR = "PYTORCH_ALLOC_CONF"
_TAKEN = ("ACCELERATE_USE_FSDP", "ACCELERATE_MIXED_PRECISION", "ACCELERATE_GRADIENT_ACCUMULATION_STEPS")  # by `join`


@contextmanager
def environment_restored() -> Iterator[None]:
    """Inside, torch's allocator is set up for chunks. Afterwards the variables that a run changes are as before."""
    before = {name: os.environ.get(name) for name in (_ALLOCATOR, *_TAKEN)}
    # Chunks differ a little in size: without it, what they leave free falls into pieces. Read by torch before it first
    # allocates.
    os.environ.setdefault(_ALLOCATOR, "expandable_segments:True")
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


@contextmanager
def joined(config: Config) -> Iterator[tuple[Accelerator, World]]:
    """`join`, and at the end trackers are closed, the process group is left and accelerate forgets its state.

    After an error of several ranks none of this happens: an ordinary end would wait for a rank that is lost.
    """
    had_group = dist.is_initialized()
    accelerator, world = join(config)
    ended = world.size == 1
    try:
        yield accelerator, world
        ended = True
    finally:
        if ended:
            for tracker in accelerator.trackers:
                tracker.finish()
            if dist.is_initialized() and not had_group:
                dist.destroy_process_group()
            GradientState._reset_state()
            AcceleratorState._reset_state(reset_partial_state=True)


@contextmanager
def launched() -> Iterator[World]:
    """This process among those that `accelerate launch` started; alone, one rank. At the end the process group is left
    and accelerate forgets its state.
    """
    # Every rank needs the whole model; with this variable transformers would leave weights out.
    os.environ.pop("ACCELERATE_USE_FSDP", None)
    # Without `cpu`, accelerate runs processes on CPUs as strangers to each other.
    state = PartialState(cpu=not torch.cuda.is_available())
    try:
        yield World(state.device, state.process_index, state.num_processes)
    finally:
        state.destroy_process_group()
        PartialState._reset_state()


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
            log_with=trackers.asked(config) or None,
            project_config=ProjectConfiguration(project_dir=config.run.output_dir, logging_dir=trackers.logs(config)),
            kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(seconds=config.run.timeout_s))],
        )
    except dist.DistError as error:
        raise ConfigError(
            f"rank {os.environ.get('RANK')} of {os.environ.get('WORLD_SIZE')} did not meet the others within "
            f"run.timeout_s={config.run.timeout_s}: {error} All nodes must be started and reach "
            f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        ) from error
    several, queries = accelerator.num_processes > 1, config.batch.queries
    notes = {
        f"accelerate asks for {asked}; optim.precision={config.optim.precision} is used": (
            asked not in ("no", config.optim.precision)
        ),
        f"on most CPUs {config.optim.precision} is slower than fp32 (optim.precision=fp32)": (
            accelerator.device.type == "cpu" and config.optim.precision != "fp32"
        ),
        f"accelerate asks for {accumulation} accumulation steps; batch.queries={queries} is one step": (
            accumulation != "1"
        ),
        "accelerate asks for FSDP of one process; it holds the encoder whole": sharded and not several,
    }
    for note, holds in notes.items():
        if holds and accelerator.is_main_process:
            say(f"note: {note}")
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
