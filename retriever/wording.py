"""Counts and names as a person reads them."""

from __future__ import annotations

from pathlib import Path


def counted(count: int, noun: str) -> str:
    """`1 query`, `2 queries`, `1,024 chunks`: the count and its noun, which is passed in the singular."""
    if count == 1:
        return f"1 {noun}"
    plural = f"{noun[:-1]}ies" if noun.endswith("y") else f"{noun}s"
    return f"{count:,} {plural}"


def without_folders(name: str) -> str:
    """The last part of an absolute path, to be shown to others; any other name as it is."""
    path = Path(name)
    return path.name or name if name.startswith("~") or path.is_absolute() else name
