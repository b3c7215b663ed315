"""One of a thing is not several."""

from __future__ import annotations

import pytest

from retriever.wording import counted, without_folders


@pytest.mark.parametrize(
    ("count", "noun", "said"),
    [
        (1, "step", "1 step"),
        (0, "step", "0 steps"),
        (1, "judged query", "1 judged query"),
        (2, "judged query", "2 judged queries"),
        (1_048_576, "chunk", "1,048,576 chunks"),
    ],
)
def test_a_noun_follows_its_count(count: int, noun: str, said: str) -> None:
    assert counted(count, noun) == said


def test_a_path_is_shown_without_the_folders_above_it() -> None:
    shown = {
        "/home/anna/model": "model",
        "~/data/": "data",
        "org/model": "org/model",
        "runs/a/export": "runs/a/export",
        "/": "/",
    }
    assert {name: without_folders(name) for name in shown} == shown
