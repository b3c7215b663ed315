"""The loss alone: time, memory and error of InfoNCE with in-batch negatives, beside every other implementation.

    python -m scripts.bench.loss --output docs/bench/loss.json

One NVIDIA GPU; `pip install -e .[bench]` for the peers. A method that is wrong is not timed, one that does not run is named with
the reason. Times are medians of calls queued one after the other, between CUDA events; memory is what a call adds to its inputs,
gradients and cuBLAS's workspaces included. `scripts.bench.loss_report` makes the table and the plot from the JSON.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import normalize

from kernels.infonce.api import Exclusions, infonce
from scripts.bench.loss_methods import Method, Problem, methods
from scripts.bench.tables import Table

_WRONG = 0.1  # a gradient further off than this is another function
_PACKAGES = ("torch", "triton", "inf-cl", "memeff", "cut-cross-entropy", "liger-kernel")


def problem_of(b: int, d: int, cosine: float, temperature: float, seed: int = 0) -> Problem:
    """Random unit queries, passages with `cosine` to their query; every query also knows one more of the passages as a positive."""
    generator = torch.Generator("cuda").manual_seed(seed)
    queries, noise = (normalize(torch.randn(b, d, device="cuda", generator=generator), dim=1) for _ in range(2))
    passages = normalize(cosine * queries + math.sqrt(1 - cosine**2) * noise, dim=1)
    ids = torch.randperm(b, device="cuda", generator=generator)
    known = torch.stack([ids, ids[torch.randint(b, (b,), device="cuda", generator=generator)]], dim=1).flatten()
    exclusions = Exclusions(ids, torch.arange(0, 2 * b + 1, 2, device="cuda"), known)
    return Problem(queries.bfloat16(), passages.bfloat16(), temperature, exclusions)


def cosine_for(loss: float, b: int, d: int, temperature: float) -> float:
    """The cosine of pairs at which random vectors have this mean loss (normal approximation of the logits)."""
    scale = 1 / temperature
    lse = math.log(b) + scale**2 / (2 * d)
    z = torch.linspace(-6, 6, 2001, dtype=torch.float64)
    density = (-(z**2) / 2).exp() / (-(z**2) / 2).exp().sum()
    low, high = 0.0, 0.999
    for _ in range(50):
        middle = (low + high) / 2
        across = math.sqrt((1 - middle**2) / d) * z  # of the noise along the query
        logits = scale * (middle + across) / (1 + 2 * middle * across).sqrt()
        low, high = (middle, high) if (density * torch.logaddexp(lse - logits, z * 0)).sum() > loss else (low, middle)
    return (low + high) / 2


def reference(problem: Problem, symmetric: bool = False, masked: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """(mean loss, dqueries, dpassages) in float64, from the definition, a thousand rows at a time."""
    q, p, scale = problem.queries.double(), problem.passages.double(), 1 / problem.temperature
    b = len(q)
    diagonal = torch.arange(b, device=q.device)

    def logits() -> Iterator[tuple[Tensor, Tensor]]:
        for i in diagonal.split(1024):
            x = scale * q[i] @ p.T
            if masked:
                known = problem.exclusions.known_ids.view(b, 2)[i]
                excluded = torch.zeros(len(i), b, dtype=torch.bool, device=q.device)
                column_of = problem.exclusions.passage_ids.argsort()
                excluded[torch.arange(len(i), device=q.device), column_of[known[:, 1]]] = True
                excluded[torch.arange(len(i), device=q.device), i] = False
                x = x.masked_fill(excluded, -torch.inf)
            yield i, x

    rows, columns, target = (torch.full_like(q[:, 0], -torch.inf) for _ in range(3))
    for i, x in logits():
        rows[i], target[i] = x.logsumexp(1), x[torch.arange(len(i), device=q.device), i]
        columns = torch.logaddexp(columns, x.logsumexp(0))
    loss = (rows - target).mean() if not symmetric else ((rows + columns) / 2 - target).mean()
    dqueries, dpassages = torch.zeros_like(q), torch.zeros_like(p)
    for i, x in logits():
        g = (x - rows[i, None]).exp()
        if symmetric:
            g = (g + (x - columns).exp()) / 2
        g[torch.arange(len(i), device=q.device), i] -= 1
        dqueries[i] = scale / b * g @ p
        dpassages += scale / b * g.T @ q[i]
    return loss, dqueries, dpassages


def errors(result: tuple[Tensor, Tensor | None, Tensor | None], truth: tuple[Tensor, Tensor, Tensor]) -> tuple[float, float]:
    """(relative loss error, the larger of dQ's and dP's ‖Δ‖/‖reference‖); NaN stays NaN."""
    loss = float((result[0].double() - truth[0]).abs() / truth[0])
    both = [float((got.double() - want).norm() / want.norm()) for got, want in zip(result[1:], truth[1:], strict=True) if got is not None]
    return loss, max(both) if all(math.isfinite(e) for e in both) else math.nan


def median_ms(call: Callable[[], object], seconds: float = 0.7, least: int = 2, most: int = 30) -> float:
    """The median time of calls queued one after the other."""
    call()
    torch.cuda.synchronize()
    started = time.perf_counter()
    call()
    torch.cuda.synchronize()
    n = max(least, min(most, int(seconds / (time.perf_counter() - started))))
    events = [torch.cuda.Event(enable_timing=True) for _ in range(2 * n)]
    for begin, end in zip(events[::2], events[1::2], strict=True):
        begin.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(begin.elapsed_time(end) for begin, end in zip(events[::2], events[1::2], strict=True))


def peak_extra_mb(call: Callable[[], object]) -> float:
    """MiB that a call adds to what is allocated before it, at its peak."""
    torch._C._cuda_clearCublasWorkspaces()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    kept = call()
    torch.cuda.synchronize()
    del kept
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def matmul_tflops() -> float:
    """The best of five medians of an 8192³ bf16 product of N(0, 1) matrices."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return max(2 * 8192**3 / median_ms(lambda: a @ b, 0.1, 20, 50) / 1e9 for _ in range(5))


def case_of(b: int, condition: str) -> str:
    return f"b={b}" + (f",{condition}" if condition else "")


def measure(table: Table, method: Method, sizes: list[int], d: int) -> None:
    """Checks `method` at 4,096, then times it at every size it is for; a failure becomes a row with the reason."""
    small = problem_of(4096, d, 0.3, 0.02)
    truth = reference(small, method.symmetric, method.masked)
    case = case_of(4096, method.condition)
    try:
        loss_error, gradient_error = errors(method.run(small, True), truth)
    except Exception as error:  # a peer may fail in any way, and the table says how
        table.add(case, method.name, "gradient_error", None, "", f"does not run: {type(error).__name__}: {str(error)[:160]}")
        return
    table.add(case, method.name, "loss_error", loss_error, "relative", method.note)
    table.add(case, method.name, "gradient_error", gradient_error, "relative", method.note)
    if not (math.isfinite(loss_error) and gradient_error < _WRONG):
        table.add(case, method.name, "forward_backward_ms", None, "ms", "not timed: wrong")
        return
    for b in sizes:
        if b > method.largest:
            continue
        problem, case = problem_of(b, d, 0.3, 0.02), case_of(b, method.condition)
        with_gradients, alone = partial(method.run, problem, True), partial(method.run, problem, False)
        try:
            table.add(case, method.name, "peak_extra_mb", peak_extra_mb(with_gradients), "MiB")
            table.add(case, method.name, "forward_backward_ms", median_ms(with_gradients), "ms")
            table.add(case, method.name, "forward_ms", median_ms(alone), "ms")
        except Exception as error:
            table.add(case, method.name, "forward_backward_ms", None, "ms", f"fails: {type(error).__name__}: {str(error)[:120]}")
        del problem, with_gradients, alone
        torch.cuda.empty_cache()


def accuracy(table: Table, sizes: list[int], d: int) -> None:
    """Errors of the tiers against float64, random embeddings and such as training leaves, and whether a repeat gives the same bits."""
    for b in sizes:
        for temperature in (0.01, 0.02, 0.05):
            for loss in (None, 2.0, 0.2, 0.02):
                cosine = 0.0 if loss is None else cosine_for(loss, b, d, temperature)
                problem = problem_of(b, d, cosine, temperature, seed=1)
                truth = reference(problem)
                for precision in ("bf16", "high"):
                    case = case_of(b, f"t={temperature}," + ("random" if loss is None else f"loss={loss}") + f",{precision}")
                    first, second = (_tier(problem, precision) for _ in range(2))
                    loss_error, gradient_error = errors(first, truth)
                    same = all(torch.equal(x, y) for x, y in zip(first, second, strict=True))
                    note = f"mean loss {float(truth[0]):.3g}" + ("" if same else "; the repeat differs")
                    table.add(case, "bigbatch", "loss_error", loss_error, "relative", note)
                    table.add(case, "bigbatch", "gradient_error", gradient_error, "relative", note)


def _tier(problem: Problem, precision: str) -> tuple[Tensor, Tensor, Tensor]:
    weights = torch.full((len(problem.queries),), 1 / len(problem.queries), device="cuda")
    out = infonce(problem.queries, problem.passages, problem.targets, 1 / problem.temperature, weights=weights, precision=precision)  # type: ignore[arg-type]
    assert out.dqueries is not None and out.dpassages is not None
    return out.loss.mean(), out.dqueries, out.dpassages


def million(table: Table, d: int) -> None:
    """One call over 1,048,576 pairs."""
    problem = problem_of(2**20, d, 0.3, 0.02)
    method = methods()[0]
    case = case_of(2**20, "")
    table.add(case, method.name, "peak_extra_mb", peak_extra_mb(lambda: method.run(problem, True)), "MiB")
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    method.run(problem, True)
    end.record()
    torch.cuda.synchronize()
    table.add(case, method.name, "forward_backward_ms", begin.elapsed_time(end), "ms", "one call")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("docs/bench/loss.json"))
    parser.add_argument("--sizes", type=int, nargs="+", default=[8192, 16384, 32768, 65536, 131072])
    parser.add_argument("--accuracy-sizes", type=int, nargs="*", default=[4096, 32768])
    parser.add_argument("--methods", nargs="*", help="names; all if absent")
    parser.add_argument("--dim", type=int, default=768)
    parser.add_argument("--million", action="store_true", help="also one call at b=1,048,576")
    args = parser.parse_args()
    table = Table.begin(_PACKAGES)
    table.add("8192x8192x8192", "floor", "matmul_tflops", matmul_tflops(), "TFLOP/s", "best of five medians, bf16")
    for method in methods():
        if not args.methods or method.name in args.methods:
            measure(table, method, args.sizes, args.dim)
            table.save(args.output)
    accuracy(table, args.accuracy_sizes, args.dim)
    if args.million:
        with suppress(torch.cuda.OutOfMemoryError):
            million(table, args.dim)
    table.save(args.output)


if __name__ == "__main__":
    main()
