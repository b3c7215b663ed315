"""The search for the largest batch, over steps that compute little and allocate all."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from scripts.bench import largest
from scripts.bench.report import markdown
from scripts.bench.tables import Table


@pytest.mark.parametrize(("first", "least_failing"), [(64, 100_000), (64, 65), (4096, 3), (1, 2)])
def test_a_search_ends_beside_the_limit(first: int, least_failing: int) -> None:
    tried: list[int] = []

    def peak_of(size: int) -> float | None:
        tried.append(size)
        return 1.0 if size < least_failing else None

    fitting, failing = largest.search(peak_of, first, 2**20, within=1.1)
    assert failing is not None
    assert fitting < least_failing <= failing and (failing <= 1.1 * fitting or failing == fitting + 1)
    assert len(tried) == len(set(tried)) < 20


def test_a_search_ends_at_the_most_and_at_nothing() -> None:
    assert largest.search(lambda size: 1.0, 64, 1000, within=1.1) == (1000, None)
    assert largest.search(lambda size: None, 64, 1000, within=1.1) == (0, 1)


def test_every_row_comes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches are those of all ranks; what does not fit is named, and no step of it is left behind."""
    output, run = tmp_path / "largest.json", largest.run
    sizes: list[tuple[int, int]] = []

    def counted(trainer: largest.Trainer, batch: largest.Batch) -> None:
        sizes.append((batch.sizes[0], len(list(batch.chunks))))
        if batch.sizes[0] > 20:
            raise torch.cuda.OutOfMemoryError
        run(trainer, batch)

    monkeypatch.setattr(largest, "run", counted)
    command = ["--tiny", "--most", "32", "--compare-at", "16", "--offload-at", "8", "--ranks", "1", "2"]
    command += ["--tokens-per-chunk", "400", "--strategies", "dense", "tiled", "tiled, ring", "--within", "1.3"]
    command += ["--settings", "optim.precision=fp32", "loss.precision=fp32"]
    assert largest.main([*command, "--output", str(output)]) == 0
    table = Table.load(output)
    for ranks, kept, names in ((1, "nothing kept", ("dense", "tiled")), (2, "all graphs", ("dense", "tiled, ring"))):
        for name in names:
            found = table.get(f"tiny,W={ranks},{kept}", name, "largest")
            failing = table.get(f"tiny,W={ranks},{kept}", name, "fails_at")
            assert found is not None and failing is not None
            assert found <= 20 * ranks < failing <= 1.3 * found
    assert table.get("tiny,W=1,nothing kept", "tiled, ring", "largest") is None
    assert (32, 2) in sizes and any(chunks > 2 for _, chunks in sizes), (
        "whole steps have all chunks, shortened ones one of each side"
    )
    page = markdown(table)
    assert "## Whole steps and shortened ones" in page and "| tiny,W=1,nothing kept,b=8 | tiled |" in page
