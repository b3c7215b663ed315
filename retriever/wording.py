"""Counts as a person reads them."""

from __future__ import annotations


def counted(count: int, noun: str) -> str:
    """`1 query`, `2 queries`, `1,024 chunks`: the count and its noun, which is given in the singular and may have words
    before it.
    """
    if count == 1:
        return f"1 {noun}"
    plural = f"{noun[:-1]}ies" if noun.endswith("y") else f"{noun}s"
    return f"{count:,} {plural}"
