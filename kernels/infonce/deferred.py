"""Numbers that the host wants to know without stopping the device."""

from __future__ import annotations

import torch
from torch import Tensor


class Deferred:
    """A few numbers on their way from the device; `get` waits for them alone, not for what was queued since."""

    def __init__(self, values: Tensor) -> None:
        self._host, self._arrived = values, None
        if values.is_cuda:
            self._host = torch.empty(values.shape, dtype=values.dtype, device="cpu", pin_memory=True)
            self._host.copy_(values, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    def get(self) -> list[float]:
        """The numbers."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._host.tolist()
