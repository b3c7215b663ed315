"""Rows in host memory that pass over the device block by block: a ring whose hops are copies.

The device holds two blocks, one that is worked on and the next one, on its way. All copies of a call, in and out, go
through one stream, in the order in which they are begun: a block that is written back and comes again needs no other
care.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor


def host_rows(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Room in host memory, page-locked where `device` is a GPU, so that copies run beside what else is done."""
    return torch.empty(tuple(shape), dtype=dtype, device="cpu", pin_memory=device.type == "cuda")


class CopyStream:
    """Copies between host and `device`, one after the other, beside what the device computes; on a CPU, plain
    copies.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def begin(self, *copies: tuple[Tensor, Tensor]) -> torch.cuda.Event | None:
        """Begins to copy each (destination, source), once all that is queued on the device is done; the host waits for
        nothing.
        """
        if self._stream is None:
            for destination, source in copies:
                destination.copy_(source)
            return None
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._stream):
            for destination, source in copies:
                destination.copy_(source, non_blocking=True)
        return self._stream.record_event()

    def wait(self, begun: torch.cuda.Event | None) -> None:
        """Makes later work on the device wait for the copies that `begin` returned; the host does not wait."""
        if begun is not None:
            torch.cuda.current_stream(self.device).wait_event(begun)

    def finish(self) -> None:
        """The host waits until all copies are done."""
        if self._stream is not None:
            self._stream.synchronize()


class HostRows:
    """One side's rows [n, D] and the sums of their gradient, in host memory; of each the device holds two blocks of
    `size` rows.
    """

    def __init__(self, rows: Tensor, size: int, blocks: int, copies: CopyStream) -> None:
        """Cuts the rows into `blocks`, at least as many as they fill; further ones are empty."""
        n, dimension = rows.shape
        self._rows, self._copies = rows, copies
        self.sums = host_rows((n, dimension), torch.promote_types(rows.dtype, torch.float32), copies.device)
        self.places = [slice(min(k * size, n), min((k + 1) * size, n)) for k in range(blocks)]
        # Explicit buffers, written in turn: the stream that copies knows nothing of what the allocator gives away
        # again.
        room = [
            torch.empty(min(size, n), dimension, dtype=host.dtype, device=copies.device)
            for host in (rows, rows, self.sums, self.sums)
        ]
        self._row_buffers, self._sum_buffers = room[:2], room[2:]
        self._zero = torch.zeros((), dtype=self.sums.dtype, device=copies.device)

    def read(self) -> Iterator[tuple[int, Tensor]]:
        """(number, rows [n_k, D]) of every block in turn, on the device; valid until the next one is asked for."""
        return ((number, rows) for number, rows, _ in self._sweep(sums=False, fresh=False))

    def accumulate(self, *, fresh: bool) -> Iterator[tuple[int, Tensor, Tensor]]:
        """(number, rows, sums) of every block in turn; what the caller adds to the sums in place goes back. `fresh`:
        they begin at zero.
        """
        return self._sweep(sums=True, fresh=fresh)

    def _sweep(self, *, sums: bool, fresh: bool) -> Iterator[tuple[int, Tensor, Tensor]]:
        arriving = self._fetch(0, sums, fresh)
        for number, place in enumerate(self.places):
            self._copies.wait(arriving)
            if number + 1 < len(self.places):
                arriving = self._fetch(number + 1, sums, fresh)
            yield number, *self._block(number)
            if sums:
                self._copies.begin((self.sums[place], self._block(number)[1]))

    def _fetch(self, number: int, sums: bool, fresh: bool) -> torch.cuda.Event | None:
        place, (rows, totals) = self.places[number], self._block(number)
        copies = [(rows, self._rows[place])]
        if sums:
            copies.append((totals, self._zero if fresh else self.sums[place]))
        return self._copies.begin(*copies)

    def _block(self, number: int) -> tuple[Tensor, Tensor]:
        """The device buffers of block `number`: its rows and its sums."""
        count = self.places[number].stop - self.places[number].start
        return self._row_buffers[number % 2][:count], self._sum_buffers[number % 2][:count]
