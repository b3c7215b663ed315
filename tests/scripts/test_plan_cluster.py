"""The predictions for clusters follow their stated formulas, and the page shows what the command prints."""

from __future__ import annotations

import re
from itertools import product
from pathlib import Path

import pytest

from retriever.parallel.cost import Machine, Workload, ring_cost
from scripts.plan_cluster import Model, main, predict
from tests.commands import assert_refused

PAGE = Path(__file__).resolve().parents[2] / "docs" / "cluster.md"
BERT = Model(pairs_per_s=5_000)


def test_the_page_shows_what_the_command_prints(capsys: pytest.CaptureFixture[str]) -> None:
    main([])
    assert f"<!-- python -m scripts.plan_cluster -->\n{capsys.readouterr().out}<!-- end -->" in PAGE.read_text(
        encoding="utf-8"
    )


def test_one_gpu_by_hand() -> None:
    """65,536 pairs: 13.1 s of encoder; 6·65536²·768 operations at 590 TFLOP/s; weights, a chunk's activations,
    embeddings.
    """
    step = predict(65_536, 1, BERT, Machine(), 75.0)
    assert step.encoder_s == pytest.approx(13.107, abs=1e-3) and step.gradients_s == 0
    assert step.loss_s == pytest.approx(6 * 65_536**2 * 768 / 590e12 + 0.1e-3, rel=1e-6)
    weights, bucket, activations, embeddings = 16 * 109.5e6, 512 * 2**20, 52 * 12 * 768 * 65_536, 10 * 2 * 65_536 * 768
    assert step.gib == pytest.approx((weights + bucket + activations + embeddings) / 2**30, rel=1e-6)


def test_more_gpus_take_less_time_and_less_memory_each() -> None:
    """The encoder's part falls as 1/W; the sum of gradients stays below 2·4·P bytes through one link."""
    steps = [predict(2**24, w, BERT, Machine(), 75.0) for w in (8, 64, 1024)]
    assert [s.encoder_s * w for s, w in zip(steps, (8, 64, 1024), strict=True)] == pytest.approx([2**24 / 5_000] * 3)
    assert steps[0].total_s > steps[1].total_s > steps[2].total_s and steps[0].gib > steps[1].gib > steps[2].gib
    assert all(0 < s.gradients_s < 8 * 109.5e6 / 240e9 for s in steps)


def test_a_gather_that_does_not_fit_is_a_ring() -> None:
    """262,144 gathered passages, their gradients and the workspace are 2.5 GiB: gathered where a quarter of the memory
    holds them.
    """
    assert predict(2**18, 8, BERT, Machine(), 9.0).exchange == "ring"
    assert predict(2**18, 8, BERT, Machine(), 11.0).exchange == "gather"
    assert predict(2**24, 64, BERT, Machine(), 75.0).gib < 75


def test_the_pages_figure_for_hidden_traffic_is_the_models() -> None:
    """To a thousand."""
    (figure,) = re.findall(r"about ([\d,]+) queries per GPU", PAGE.read_text(encoding="utf-8").replace("\n", " "))
    exposed = [
        ring_cost(Workload(queries, queries, 768, 64), Machine()).exposed_ms
        for queries in (64 * (int(figure.replace(",", "")) + more) for more in (-1000, 1000))
    ]
    assert exposed[0] > 0 == exposed[1]


_WHOLE = ("--batches", "--gpus", "--dim", "--layers", "--tokens-per-chunk", "--gpus-per-node")
_REAL = ("--pairs-per-s", "--parameters", "--memory-gib", "--tflops", "--inside-gb-s", "--between-gb-s")


@pytest.mark.parametrize(
    ("option", "value"),
    [*product(_WHOLE, ("0", "-3", "1.5", "many")), *product(_REAL, ("0", "-1", "nan", "inf", "many"))],
)
def test_a_number_that_no_cluster_has_is_refused_by_its_option(
    option: str, value: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert_refused(main, [option, value], f"argument {option}: expected .*received {value!r}")
    assert capsys.readouterr().out == ""


def test_all_options_are_held_to_that(capsys: pytest.CaptureFixture[str]) -> None:
    """One GPU of a laptop may have less than one of a unit."""
    assert main(["--help"]) == 0
    assert set(re.findall(r"^  (--[a-z-]+)", capsys.readouterr().out, re.MULTILINE)) == {
        *_WHOLE,
        *_REAL,
        "--debug",
        "--quiet",
    }
    main(["--batches", "1", "--gpus", "1", "--between-gb-s", "0.5", "--pairs-per-s", "0.1", "--memory-gib", "0.5"])
    assert "| 1 |" in capsys.readouterr().out
