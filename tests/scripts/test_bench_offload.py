"""The benchmark of offloaded representations, small and on a CPU: it runs, it checks itself, and its checks can fail."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from retriever.loss import tiled
from retriever.loss.problem import Problem
from retriever.parallel.host import CopyStream
from retriever.parallel.world import World
from scripts.bench.offload import Placed, copied_bytes, main
from scripts.bench.offload_report import markdown
from scripts.bench.ring_methods import Shard
from scripts.bench.tables import Table

SIZES = "--sizes 100 200 --check 64 --dim 16 --block-rows 48 --repeats 2 --device cpu"


def _run(folder: Path) -> tuple[Table, str]:
    output = folder / "offload.json"
    main([*SIZES.split(), "--output", str(output)])
    return Table.load(output), output.with_suffix(".md").read_text(encoding="utf-8")


def test_the_table_has_every_figure(tmp_path: Path) -> None:
    table, page = _run(tmp_path)
    for case in ("b=64", "b=64,offload"):
        for metric in ("gradient_error", "loss_error"):
            error = table.get(case, "bigbatch", metric)
            assert error is not None and error < 1e-4, f"{case}, {metric}: {error}"
    assert "blocks of 19 rows" in {row.note for row in table.rows if row.case == "b=64,offload"}
    for b in (100, 200):
        for case in (f"b={b}", f"b={b},offload"):
            time = table.get(case, "bigbatch", "forward_backward_ms")
            assert time is not None and time > 0
        difference = table.get(f"b={b},offload", "bigbatch", "gradient_difference")
        assert difference is not None and difference < 1e-4
        assert page.count(f"\n| {b} | offloaded | ") == 2 and page.count(f"\n| {b} | resident | ") == 1
    assert not any(row.metric in ("peak_extra_mb", "gpu_mb", "copies_ms") for row in table.rows), "on a CPU"
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["offload.json", "offload.md"]


@pytest.mark.parametrize(("wrong_from", "factor"), [(0, 1.1), (0, float("nan")), (150, 1.1)])
def test_wrong_gradients_are_not_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrong_from: int, factor: float) -> None:
    """At once, or, where only larger batches are wrong, from their size on; resident rows are timed all the same."""
    right = tiled.offloaded

    def offloaded(problem: Problem, world: World) -> tuple[Tensor, Tensor, Tensor]:
        losses, dqueries, dpassages = right(problem, world)
        dpassages[::5] *= factor if len(problem.queries) >= wrong_from else 1
        return losses, dqueries, dpassages

    monkeypatch.setattr(tiled, "offloaded", offloaded)
    table, page = _run(tmp_path)
    timed = [row.case for row in table.rows if row.metric == "forward_backward_ms" and row.value is not None]
    assert timed == (["b=100", "b=200"] if wrong_from == 0 else ["b=100", "b=100,offload", "b=200"])
    assert page.count("not timed: wrong") == 1


def test_copies_are_counted_as_they_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    copied, begin = list[int](), CopyStream.begin

    def noted(self: CopyStream, *copies: tuple[Tensor, Tensor]) -> torch.cuda.Event | None:
        copied.extend(target.nbytes for target, source in copies if source.dim())  # a zero comes from the device
        return begin(self, *copies)

    monkeypatch.setattr(CopyStream, "begin", noted)
    b, dim, block_rows = 100, 16, 48
    rows = torch.nn.functional.normalize(torch.randn(2 * b, dim, generator=torch.Generator().manual_seed(0)), dim=1).bfloat16()
    world = World(torch.device("cpu"))
    Placed.of(Shard(rows[:b], rows[b:], 0.02, world), block_rows).call(world, 1024)()
    assert sum(copied) == sum(copied_bytes(b, dim, block_rows)) > 0


def test_the_page_has_memory_rates_and_what_does_not_fit() -> None:
    table = Table("python -m scripts.bench.offload", "0" * 40, "a GPU", {"torch": "2"})
    table.add("8192x8192x8192", "floor", "matmul_tflops", 700, "TFLOP/s")
    table.add("256 MiB", "copy", "to_device_gb_s", 50.5, "GB/s")
    table.add("256 MiB", "copy", "to_host_gb_s", 40.5, "GB/s")
    table.add("b=262144", "bigbatch", "forward_backward_ms", None, "ms", "does not fit on the GPU")
    figures = {"peak_extra_mb": 1700, "gpu_mb": 1701, "host_mb": 5376, "rounding_ms": 40.25, "copies_ms": 500}
    for metric, value in figures.items():
        table.add("b=262144,offload", "bigbatch", metric, value, "")
    table.add("b=262144,offload", "bigbatch", "forward_backward_ms", 1000, "ms", "3 calls")
    page = markdown(table)
    assert "| 262,144 | resident | — | — | — | — | — | — | — | does not fit on the GPU |" in page
    # 8 · 262144² · 768 operations in a second
    assert "| 262,144 | offloaded | 1,000.0 | 422 | 1,700 | 1,701 | 5,376 | 40.2 | 500.0 | 3 calls |" in page
    assert "50.5 GB/s to the GPU, 40.5 GB/s from it" in page and "700 TFLOP/s" in page
