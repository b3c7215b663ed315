"""Random-number state of a chunk: saved in the first pass, restored in the second, so that dropout draws the same
masks.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


@dataclass(frozen=True)
class RngState:
    """The state of the generators that a forward pass on `device` draws from: the CPU's and that device's own."""

    device: torch.device
    cpu: Tensor
    accelerator: Tensor | None

    @classmethod
    def capture(cls, device: torch.device) -> RngState:
        """The present state. The device is explicit: the *current* device may be another one."""
        accelerator = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
        return cls(device, torch.get_rng_state(), accelerator)

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Draws inside the context repeat those that followed `capture`; outside it nothing changes."""
        outside = RngState.capture(self.device)
        self._set()
        try:
            yield
        finally:
            outside._set()

    def _set(self) -> None:
        torch.set_rng_state(self.cpu)
        if self.accelerator is not None:
            torch.cuda.set_rng_state(self.accelerator, self.device)


class OwnGenerator(TorchDispatchMode):
    """Inside, what this thread draws on the CPU comes from a generator of its own: other threads' draws are as if
    nothing were drawn. Dropout's masks take no generator and are no part of this.
    """

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self._generator = torch.Generator().manual_seed(seed)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if any(argument.name == "generator" for argument in func._schema.arguments):
            return func(*args, **{**kwargs, "generator": self._generator})
        if any(name.endswith("generator") for name in func.overloadpacket.overloads()):  # those of torch.randn
            return func.overloadpacket(*args, **kwargs, generator=self._generator)
        return func(*args, **kwargs)


def named_generator(name: str) -> torch.Generator:
    """A generator on the CPU whose draws are a function of `name`, so that ranks and devices agree."""
    return torch.Generator().manual_seed(int.from_bytes(hashlib.blake2b(name.encode(), digest_size=7).digest()))


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seeds every generator for one step of one rank, so that a resumed run draws what an undisturbed one drew."""
    mixed = 0
    for part in (seed, step, rank):  # splitmix64: neighbouring inputs give unrelated seeds
        mixed = (mixed + part + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
        mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
        mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
        mixed ^= mixed >> 31
    torch.manual_seed(mixed)
