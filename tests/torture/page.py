"""The tables of docs/reliability.md."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

PAGE = Path(__file__).resolve().parents[2] / "docs" / "reliability.md"


@dataclass(frozen=True)
class Row:
    """What was done how often, what was seen, and what went wrong."""

    what: str
    count: int
    outcome: str
    failures: list[str] = field(default_factory=list)


def table(rows: Iterable[Row]) -> str:
    """The rows in Markdown."""
    lines = [f"| {row.what} | {row.count:,} | {row.outcome} | {len(row.failures) or 'none'} |" for row in rows]
    return "\n".join(["| what | count | seen | failures |", "|---|---|---|---|", *lines])


def write(section: str, text: str) -> None:
    """Replaces what the page holds between the marks of a section."""
    begin, end = f"<!-- {section} -->\n", f"\n<!-- end of {section} -->"
    before = PAGE.read_text(encoding="utf-8")
    after, count = re.subn(f"{re.escape(begin)}.*?{re.escape(end)}", lambda _: begin + text + end, before, flags=re.S)
    assert count == 1, f"{PAGE} has {count} places for {section}"
    PAGE.write_text(after, encoding="utf-8")
