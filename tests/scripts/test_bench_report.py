"""Pages of benchmarks: the published ones are those of their JSON, and leads and failures are shown."""

from __future__ import annotations

from pathlib import Path

import pytest

from scripts.bench.report import main, markdown
from scripts.bench.tables import Table

PUBLISHED = sorted((Path(__file__).parents[2] / "docs" / "bench").glob("*.json"))


@pytest.mark.parametrize("path", PUBLISHED, ids=lambda path: path.stem)
def test_a_published_page_is_that_of_its_figures(path: Path) -> None:
    expected = markdown(Table.load(path))
    assert path.with_suffix(".md").read_text(encoding="utf-8") == expected, (
        "python -m scripts.bench.report docs/bench/*.json"
    )


def test_a_page_has_leads_and_what_does_not_run(tmp_path: Path) -> None:
    table = Table("python -m scripts.bench.step --tiny", "0" * 40, "a machine", {"torch": "2"}, note="Stopped early.")
    rates = {
        ("b=16", "bigbatch"): 300.0,
        ("b=16,nothing kept", "bigbatch"): 240.0,
        ("b=16,sorted", "other"): 150.0,
        ("b=8", "bigbatch"): 90.0,
    }
    for (case, method), rate in rates.items():
        table.add(case, method, "pairs_per_s", rate, "pairs/s")
    table.add("b=16", "bigbatch", "peak_gib", 2.5, "GiB")
    table.add("b=16", "bigbatch", "predicted_peak_gib", 3.0, "GiB")
    table.add("b=16", "third", "pairs_per_s", None, "pairs/s", "does not run: no CUDA")
    table.save(tmp_path / "step.json")
    assert main([str(tmp_path / "step.json")]) == 0
    lines = (tmp_path / "step.md").read_text().splitlines()
    assert (
        "`python -m scripts.bench.step --tiny` at commit 000000000000, a machine; torch 2." in lines
        and "Stopped early." in lines
    )
    rows = [line for line in lines if line.startswith("| b=")]
    assert rows == [
        "| b=8 | bigbatch | 90 | — | — |  |",
        "| b=16 | bigbatch | 300 | — | 2.5 (3.0) |  |",
        "| b=16,nothing kept | bigbatch | 240 | — | — |  |",
        "| b=16,sorted | other | 150 | 2.00× | — |  |",
        "| b=16 | third | — | — | — | does not run: no CUDA |",
    ]


def test_losses_have_their_share_of_the_matmul_rate_and_a_plot(tmp_path: Path) -> None:
    table = Table("python -m scripts.bench.loss --dim 100", "0" * 40, "a GPU", {})
    table.add("8192x8192x8192", "floor", "matmul_tflops", 800, "TFLOP/s")
    for method, ms in (("bigbatch", 2.0), ("liger", 5.0)):
        table.add("b=1000000", method, "forward_backward_ms", ms * 1000, "ms")
        table.add("b=1000000", method, "peak_extra_mb", 10, "MiB")
    table.save(tmp_path / "loss.json")
    assert main([str(tmp_path / "loss.json")]) == 0
    page = (tmp_path / "loss.md").read_text()
    assert "| b=1000000 | bigbatch | 2,000.00 | — | 50% | 10 |  |" in page  # 8 · 10¹² · 100 operations in 2 s
    assert "| b=1000000 | liger | 5,000.00 | 2.50× | 20% | 10 |  |" in page and "800 TFLOP/s" in page
    assert (tmp_path / "loss.png").stat().st_size > 10_000
