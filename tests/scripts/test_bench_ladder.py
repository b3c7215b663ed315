"""The ladder's table: means, paired gains and their intervals from the rounds' own results."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from scripts.bench.ladder import add_loop, main
from scripts.bench.tables import Table

QUERIES = [f"q{i}" for i in range(40)]


@pytest.fixture
def loop(tmp_path: Path) -> dict[str, np.ndarray]:
    """A finished loop of three models; the last gains .1 on every query."""
    draw = np.random.default_rng(0)
    rounds = {"start": draw.random(40) * 0.5, "contrastive": draw.random(40) * 0.8}
    rounds["mined"] = rounds["contrastive"] + 0.1
    places = {"start": "start/evaluate", "contrastive": "contrastive/evaluate", "mined": "mined/variant-2/evaluate"}
    for name, values in rounds.items():
        results = tmp_path / "loop" / places[name] / "results"
        results.mkdir(parents=True)
        content = {"per_query": {"nDCG@10": dict(zip(QUERIES, values.tolist(), strict=True))}}
        (results / "test.json").write_text(json.dumps(content))
    (tmp_path / "loop" / "result.json").write_text(json.dumps({"evaluations": places}))
    lines = (json.dumps({"_id": query, "text": "x", "metadata": {"module": f"m{i % 5}"}}) for i, query in enumerate(QUERIES))
    (tmp_path / "queries.jsonl").write_text("\n".join(lines))
    return rounds


def test_means_gains_and_intervals(loop: dict[str, np.ndarray], tmp_path: Path) -> None:
    output = tmp_path / "ladder.json"
    folder, queries = str(tmp_path / "loop"), str(tmp_path / "queries.jsonl")
    main(["--loop", "a", folder, "--loop", "b", folder, "--groups", "b", queries, "--output", str(output)])
    table = Table.load(output)
    case, grouped = "a, 40 test queries", "b, 40 test queries of 5 modules"
    for name, values in loop.items():
        assert table.get(case, name, "nDCG@10") == pytest.approx(values.mean(), abs=1e-6)
        spread = values.std() / np.sqrt(40)  # of the mean, by the central limit theorem
        low, high = table.get(case, name, "nDCG@10, from"), table.get(case, name, "nDCG@10, to")
        assert low is not None and high is not None
        assert (high - low) == pytest.approx(2 * 1.96 * spread, rel=0.1)
    gain = (loop["mined"] - loop["start"]).mean()
    assert table.get(case, "mined", "gain over the start") == pytest.approx(gain, abs=1e-6)
    for end in ("", ", from", ", to"):  # the same on every query: no doubt about it
        assert table.get(case, "mined", f"gain over the round before{end}") == pytest.approx(0.1, abs=1e-6)
    assert table.get(case, "start", "gain over the start") is None
    assert table.get(case, "mined", "nDCG@10, from") != table.get(grouped, "mined", "nDCG@10, from")
    text = output.with_suffix(".md").read_text()
    assert "+0.1000 [+0.1000, +0.1000] | variant-2 |" in text and f"## {grouped}" in text


def test_rounds_on_other_queries_are_refused(loop: dict[str, np.ndarray], tmp_path: Path) -> None:
    (tmp_path / "loop/contrastive/evaluate/results/test.json").write_text('{"per_query": {"nDCG@10": {"q0": 1.0}}}')
    with pytest.raises(ValueError, match="contrastive was measured on other queries"):
        add_loop(Table("", "", "", {}), "a", tmp_path / "loop", "test", None)
