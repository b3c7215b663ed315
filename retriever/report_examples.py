"""The part of a report on queries that a run won and lost: their ranks, and the passages."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import Any

STYLE = """
.examples { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr)); gap: 0 2rem; }
.examples article { border-top: 1px solid var(--line); padding: .5rem 0; break-inside: avoid; }
.examples p { margin: .2rem 0; } .examples .passage { font-size: 14px; opacity: .85; }
.examples .rank { font-variant-numeric: tabular-nums; font-weight: 600; }
"""


def won_and_lost(examples: Mapping[str, Any]) -> str:
    """A section of HTML from what `eval.examples` keeps; nothing where a run has been evaluated once."""
    if "after" not in examples:
        return ""
    collection, steps = html.escape(examples["collection"]), f"{examples['before']:,} and {examples['after']:,}"
    what = f"Ranks of the first relevant passage in {collection}, after the steps {steps}."
    columns = (("Queries won most", examples["won"]), ("Queries lost most", examples["lost"]))
    each = "".join(f"<section><h3>{title}</h3>{_articles(found)}</section>" for title, found in columns)
    return f"<h2>Queries won and lost</h2><p>{what}</p><div class=examples>{each}</div>"


def _articles(found: Sequence[Mapping[str, Any]]) -> str:
    return "".join(map(_article, found)) or "<p>none</p>"


def _article(query: Mapping[str, Any]) -> str:
    ranks = f"{_rank(query['before'])} → {_rank(query['after'])}"
    shown = [f"<p><span class=rank>{ranks}</span> {html.escape(query['query'])}</p>"]
    shown.append(f"<p class=passage>{html.escape(query['relevant'])}</p>")
    if query["first"] != query["relevant"]:
        shown.append(f"<p class=passage><i>now first:</i> {html.escape(query['first'])}</p>")
    return f"<article>{''.join(shown)}</article>"


def _rank(rank: int | None) -> str:
    return "not found" if rank is None else f"{rank:,}"
