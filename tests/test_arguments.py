"""No function takes more arguments than a reader can hold: beyond seven they are fields of a dataclass that has a
meaning.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MOST = 7  # besides self
ALLOWED = {"kernels/infonce/api.py: infonce": 12}  # the problem in 4, and 8 keyword arguments
# To be emptied; a function that takes no more than MOST any longer leaves this list.
TOO_MANY: set[str] = set()


def _counts(source: str) -> Iterator[tuple[str, int]]:
    """(function, arguments besides self) of a module; those of Triton kernels and of `autograd.Function.forward` are
    given by their callers' interfaces and left out.
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            decorators = " ".join(map(ast.unparse, node.decorator_list))
            arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            if "jit" not in decorators and node.name != "forward":
                yield node.name, sum(argument.arg not in ("self", "cls") for argument in arguments)


def _too_many() -> set[str]:
    found = set()
    for room in ("kernels", "retriever", "eval", "scripts"):
        for file in sorted((ROOT / room).rglob("*.py")):
            for name, count in _counts(file.read_text(encoding="utf-8")):
                label = f"{file.relative_to(ROOT).as_posix()}: {name}"
                if count > ALLOWED.get(label, MOST):
                    found.add(label)
    return found


def test_no_function_takes_more_than_seven_arguments() -> None:
    assert sorted(_too_many() - TOO_MANY) == [], "put what belongs together into a dataclass"


def test_the_list_names_only_functions_that_take_more() -> None:
    assert sorted(TOO_MANY - _too_many()) == [], "take these off the list TOO_MANY"


@pytest.mark.parametrize(
    ("source", "count"),
    [
        ("def f(a, b, /, c, *, d, e): ...", 5),
        ("class C:\n    def f(self, a, b=1): ...", 2),
        ("class C:\n    @classmethod\n    async def f(cls, a): ...", 1),
    ],
)
def test_every_kind_of_argument_counts(source: str, count: int) -> None:
    assert [found for _, found in _counts(source)] == [count]


@pytest.mark.parametrize(
    "source", ["@triton.jit\ndef f(a): ...", "class C:\n    @staticmethod\n    def forward(a): ..."]
)
def test_kernels_and_autograd_are_left_out(source: str) -> None:
    assert list(_counts(source)) == []
