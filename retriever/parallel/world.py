"""The ranks of a run and the few collectives that training needs. With one rank every call is the identity.

Ranks may hold unequal numbers of rows, zero included; rows travel as they are, into their place and without a copy in
between.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from retriever.parallel.watch import Watch

_BUCKET_BYTES = 256 * 2**20
# torch 2.13 renamed both.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

Guard = Callable[[], AbstractContextManager[None]]  # what stands around a wait for other ranks


@dataclass(frozen=True)
class Gathered:
    """Rows of all ranks, rank after rank, and where each rank's stand."""

    rows: Tensor  # [sum of counts, ...]
    counts: tuple[int, ...]
    rank: int

    @property
    def own(self) -> slice:
        """The slice of this rank's rows in `rows`."""
        start = sum(self.counts[: self.rank])
        return slice(start, start + self.counts[self.rank])


class Transfer:
    """Rows on their way from other ranks."""

    def __init__(self, sent: Tensor, arriving: Tensor, work: Sequence[dist.Work], guard: Guard = nullcontext) -> None:
        self._sent, self._arriving, self._work = sent, arriving, work  # both live until they have arrived
        self._guard = guard

    def wait(self) -> Tensor:
        """The rows that arrived; on a GPU what is queued from now on waits for them, the host does not."""
        with self._guard():
            for work in self._work:
                work.wait()
        return self._arriving


class World:
    """`size` ranks of torch's default process group; this is `rank`, on `device`. `sharded`: no rank holds the whole
    encoder.
    """

    def __init__(self, device: torch.device, rank: int = 0, size: int = 1, *, sharded: bool = False) -> None:
        if size > 1 and not dist.is_initialized():
            raise ValueError(f"a world of {size} ranks needs torch.distributed to be initialised first")
        self.device, self.rank, self.size, self.sharded = device, rank, size, sharded
        self.watch: Watch | None = None

    @property
    def is_first(self) -> bool:
        """Whether this rank is the one that writes files and prints."""
        return self.rank == 0

    @contextmanager
    def collective(self) -> Iterator[None]:
        """Around every collective: counts it, and names the rank it failed for."""
        if self.watch is None:
            yield
            return
        self.watch.enter()
        try:
            yield
        except RuntimeError as error:
            raise self.watch.blame(error) from error

    @contextmanager
    def watched(self, timeout_s: float) -> Iterator[None]:
        """Inside, a rank that is lost ends the run on all ranks within `timeout_s` of their waiting for it.

        The other ranks are told the error that ends this one. Raises RankError if a collective failed because of
        another rank. If the main thread is stuck, the process prints the same message and exits with its status.
        """
        if self.size == 1:
            yield
            return
        # The thread's own connection to the ranks' store.
        store = dist.distributed_c10d._get_default_store().clone()  # type: ignore[attr-defined]
        watch = self.watch = Watch(dist.PrefixStore("watch", store), self.rank, self.size, timeout_s)
        self.barrier()
        watch.start()
        try:
            yield
            watch.close()
            self.barrier()
        except BaseException as error:
            cause = watch.tell(error)
            if cause is error:
                raise
            raise cause from error
        finally:
            watch.stop()
            self.watch = None

    def barrier(self) -> None:
        """Waits for all ranks."""
        if self.size > 1:
            with self.collective():
                dist.barrier()

    def sum(self, x: Tensor) -> Tensor:
        """Σ over ranks of `x`, the same shape on each; `x` itself is left as it is."""
        return self._all_reduce(x, dist.ReduceOp.SUM)

    def max(self, x: Tensor) -> Tensor:
        """Element-wise maximum over ranks."""
        return self._all_reduce(x, dist.ReduceOp.MAX)

    def least(self, value: float) -> float:
        """The smallest of all ranks' values; the host waits for it."""
        return -float(self.max(torch.tensor(-value, dtype=torch.float64, device=self.device)))

    def logsumexp(self, x: Tensor) -> Tensor:
        """log Σ over ranks of exp(x), element-wise; −inf where every rank has −inf."""
        if self.size == 1:
            return x
        shift = self.max(x).nan_to_num(neginf=0.0)
        return self.sum((x - shift).exp()).log() + shift

    def counts(self, n: int) -> tuple[int, ...]:
        """Every rank's `n`; the host waits for them."""
        if self.size == 1:
            return (n,)
        every = torch.empty(self.size, dtype=torch.int64, device=self.device)
        with self.collective():
            _all_gather(every, torch.tensor([n], device=self.device))
            return tuple(every.tolist())

    def gather_rows(self, x: Tensor, counts: Sequence[int] | None = None) -> Gathered:
        """All ranks' rows of `x` [n, ...], n free on each rank; `counts`, where they are known already, spare asking
        for them.
        """
        if self.size == 1:
            return Gathered(x, (len(x),), 0)
        counts = self.counts(len(x)) if counts is None else tuple(counts)
        return Gathered(self.begin_gather(x, counts).wait(), counts, self.rank)

    def begin_gather(self, x: Tensor, counts: Sequence[int]) -> Transfer:
        """Begins `gather_rows`: what is queued before `wait` runs meanwhile. `x` stays as it is until then."""
        if self.size == 1:
            return Transfer(x, x, [])
        x, rows = x.contiguous(), x.new_empty((sum(counts), *x.shape[1:]))
        parts = list(rows.split(list(counts)))
        with self.collective():
            if len(set(counts)) == 1:
                work = [_all_gather(rows, x, async_op=True)]
            elif dist.get_backend() == "nccl":  # one group of broadcasts
                work = [dist.all_gather(parts, x, async_op=True)]
            else:  # gloo gathers equal parts only
                parts[self.rank].copy_(x)
                work = [dist.broadcast(part, rank, async_op=True) for rank, part in enumerate(parts) if len(part)]
        return Transfer(x, rows, work, self.collective)

    def reduce_rows(self, x: Tensor, counts: Sequence[int]) -> Tensor:
        """This rank's rows of Σ over ranks of `x` [Σ counts, D], where every rank holds a term for every row."""
        if self.size == 1:
            return x
        x, own = x.contiguous(), x.new_empty((counts[self.rank], *x.shape[1:]))
        with self.collective():
            if len(set(counts)) == 1:
                _reduce_scatter(own, x)
            else:
                dist.reduce_scatter(own, list(x.split(list(counts))))
        return own

    def pass_on(self, x: Tensor, arriving: Tensor, step: int) -> Transfer:
        """Begins to send `x` to the rank `step` places on and to receive into `arriving` from the rank `step` places
        back.

        Every rank calls it, in the same order. Both are contiguous, unchanged until `wait`, and may have unequal
        numbers of rows.
        """
        after, before = (self.rank + step) % self.size, (self.rank - step) % self.size
        ends = [(dist.isend, x, after), (dist.irecv, arriving, before)]
        operations = [dist.P2POp(operation, tensor, peer) for operation, tensor, peer in ends if tensor.numel()]
        with self.collective():
            return Transfer(x, arriving, dist.batch_isend_irecv(operations) if operations else [], self.collective)

    def sum_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Σ over ranks of every parameter's gradient, in flat buckets: a step's only parameter collective.

        A parameter that has no gradient here enters as zeros; one that has none on any rank keeps none. Gradients of
        parameters in shards are sums already.
        """
        if self.size == 1:
            return
        trainable = [p for p in parameters if p.requires_grad and not isinstance(p, DTensor)]
        for dtype in sorted({p.dtype for p in trainable}, key=str):
            of_dtype = [p for p in trainable if p.dtype == dtype]
            for bucket in _buckets(of_dtype):
                self._sum_bucket(bucket)

    def _sum_bucket(self, bucket: Sequence[nn.Parameter]) -> None:
        present = torch.tensor([p.grad is not None for p in bucket], dtype=bucket[0].dtype, device=bucket[0].device)
        gradients = [p.grad.flatten() if p.grad is not None else torch.zeros_like(p).flatten() for p in bucket]
        flat = self.sum(torch.cat([present, *gradients]))
        sums = flat[len(bucket) :].split([p.numel() for p in bucket])
        for p, somewhere, total in zip(bucket, flat[: len(bucket)].tolist(), sums, strict=True):
            p.grad = total.view_as(p).clone() if somewhere else None

    def _all_reduce(self, x: Tensor, operation: dist.ReduceOp.RedOpType) -> Tensor:
        if self.size == 1:
            return x
        result = x.clone()
        with self.collective():
            dist.all_reduce(result, operation)
        return result


def _buckets(parameters: Sequence[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Consecutive parameters, at most `_BUCKET_BYTES` together."""
    buckets: list[list[nn.Parameter]] = [[]]
    filled = 0
    for p in parameters:
        size = p.numel() * p.element_size()
        if buckets[-1] and filled + size > _BUCKET_BYTES:
            buckets.append([])
            filled = 0
        buckets[-1].append(p)
        filled += size
    return buckets
