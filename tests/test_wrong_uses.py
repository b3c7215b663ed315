"""The page of wrong uses: its lines are what commands print."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.wrong_uses import CASES, PAGE, make_place, page


def test_every_line_names_what_was_wrong() -> None:
    """At least forty, each one line of an error that was meant."""
    rows = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| ")][1:]
    assert len(rows) == len(CASES) >= 40
    assert all("| 2 | `error: " in line and "Traceback" not in line for line in rows)


def test_the_page_is_what_the_commands_print(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_place(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert page(tmp_path) == PAGE.read_text(encoding="utf-8"), "write it anew: python -m tests.wrong_uses"
