"""The result of the demo: three rows, the interval of the difference, and the speed and exactness of training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from eval.measures import Scores
from eval.report import format_table
from eval.significance import bootstrap_interval
from retriever.config import Config
from retriever.verify import GradientCheck
from retriever.wording import counted

HEADLINE = "nDCG@10"


def outcome(scores: Mapping[str, Scores], modules: Mapping[str, str]) -> dict[str, Any]:
    """The means of every row, and the mean of after − before in `HEADLINE` with its 95% interval over `modules` (query
    id -> module).
    """
    before, after = scores["before training"], scores["after training"]
    if before.query_ids != after.query_ids:
        raise ValueError(
            "before and after training were measured on different queries: expected the same, in the same order"
        )
    differences = after.per_query[HEADLINE] - before.per_query[HEADLINE]  # [Q]
    clusters = [modules[query_id] for query_id in after.query_ids]
    return {
        "rows": {name: row.means for name, row in scores.items()},
        "gain": float(differences.mean()),
        "interval": bootstrap_interval(differences, clusters),
        "queries": len(clusters),
        "modules": len(set(clusters)),
    }


def table(result: Mapping[str, Any], config: Config, speed: Mapping[str, float], check: GradientCheck) -> str:
    """The outcome as text."""
    low, high = result["interval"]
    verdict = "" if low > 0 else "; not above 0 beyond doubt"
    interval = f"95% interval [{low:+.4f}, {high:+.4f}] over modules{verdict}"
    queries = counted(result["queries"], "query")
    memory = f", at most {speed['peak_gib']:.1f} GiB" if "peak_gib" in speed else ""
    trained = f"{counted(config.train.max_steps or 0, 'step')} × {config.batch.queries:,} pairs"
    return "\n".join(
        (
            format_table(result["rows"]),
            f"\n{HEADLINE} after − before: {result['gain']:+.4f}, {interval}",
            f"{queries} from {counted(result['modules'], 'module')} that were not trained on",
            f"trained {trained} at {speed['pairs_per_s']:,.0f} pairs/s{memory}",
            f"exactness, in float64: {check}",
        )
    )
