"""No function takes more than seven parameters: a reader keeps no more apart."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = ("kernels", "retriever", "eval", "scripts", "bigbatch")
MOST, KEYWORDS_OF_INFONCE = 7, 8


def _too_many(tree: ast.AST) -> Iterator[str]:
    """The functions beyond the bound, kernels and the forward methods of autograd functions apart."""
    for node in ast.walk(tree):
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        positional = [a.arg for a in (*node.args.posonlyargs, *node.args.args) if a.arg not in ("self", "cls")]
        keywords = [a.arg for a in node.args.kwonlyargs]
        compiled = any("jit" in ast.unparse(decorator) for decorator in node.decorator_list)
        of_autograd = node.name == "forward" and positional[:1] == ["ctx"]
        of_infonce = node.name == "infonce" and len(keywords) <= KEYWORDS_OF_INFONCE and len(positional) <= MOST
        if len(positional) + len(keywords) > MOST and not (compiled or of_autograd or of_infonce):
            yield f"{node.name}: {len(positional) + len(keywords)}"


def test_no_function_takes_more_than_seven() -> None:
    files = [file for package in PACKAGES for file in (ROOT / package).rglob("*.py")]
    found = [f"{file.relative_to(ROOT)}: {name}" for file in files for name in _too_many(ast.parse(file.read_text()))]
    assert len(files) > 100 and not found, f"expected at most {MOST} parameters (make a dataclass): {found}"


def test_the_count_sees_them() -> None:
    """Guard: keywords count, `self` does not; kernels and autograd's forward may have more."""
    wrong = "class A:\n    def f(self, a, b, c, d, /, e, f, *, g, h): ...\n    def forward(self, a, b, c, d, e, f, g, h): ..."
    right = (
        "@triton.jit\ndef k(a, b, c, d, e, f, g, h): ...\nclass F:\n    def forward(ctx, a, b, c, d, e, f, g, h): ...\n"
        "    def f(self, a, b, c, d, e, f, g): ..."
    )
    assert list(_too_many(ast.parse(wrong))) == ["f: 8", "forward: 8"] and not list(_too_many(ast.parse(right)))
