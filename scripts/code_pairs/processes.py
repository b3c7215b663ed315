"""Work of plain Python on all cores."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

_WORTH_STARTING = 20  # items: new processes take a second or two


def spread(work: Callable[[Item], Result], items: Sequence[Item]) -> Iterable[Result]:
    """`work` of each item, in the order of the items; in processes where there are many items and several cores."""
    from eval.engines.bm25 import cores  # not in the processes

    if cores() < 2 or len(items) < _WORTH_STARTING:
        yield from map(work, items)
        return
    with ProcessPoolExecutor(min(cores(), len(items)), multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(work, items)
