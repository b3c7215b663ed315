"""Documented functions of a Python source: what the docstring says, and the code without it."""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
import unicodedata
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace

MIN_SUMMARY_WORDS = 3
MIN_DETAILS_WORDS = 8

_Definition = ast.FunctionDef | ast.AsyncFunctionDef
_PARAGRAPH_END = re.compile(r"\n[ \t]*\n")
_SIGNATURE_LINE = re.compile(r"\A[\w.]+\(.*\)(\s*->\s*[\w(), \[\]|]+)?:?(\n|\Z)")  # "fork() -> (pid, fd)"
_NOT_PROSE = (">>>", ":param", ":return", "@", "..", "---", "===")


@dataclass(frozen=True)
class Function:
    """A documented function or method."""

    id: str  # module:Class.method
    summary: str  # the docstring's first paragraph, on one line
    details: str  # the rest of the docstring; "" where there is none worth reading
    code: str  # decorators, signature and body, dedented, without the docstring


def documented_functions(source: str, module: str) -> Iterator[Function]:
    """Functions at module and class level with a summary in words, which the code does not repeat, and a body that does
    something.

    Functions inside functions belong to their parent's code. Raises SyntaxError, and ValueError for null bytes.
    """
    lines = source.split("\n")  # as ast counts them: str.splitlines would also break at form feeds
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntaxWarning)  # other people's escape sequences
        tree = ast.parse(source)
    seen: dict[str, int] = {}
    for name, node in _definitions(tree, ""):
        docstring = ast.get_docstring(node)
        if docstring is None or not _does_something(node):
            continue
        summary, details = _paragraphs(docstring)
        code = _code_without_docstring(node, lines)
        if (
            code is None
            or len(re.findall(r"[A-Za-z]{2,}", summary)) < MIN_SUMMARY_WORDS
            or summary.startswith(_NOT_PROSE)
        ):
            continue
        if _spoken(summary) in _spoken(
            code
        ):  # the query stands in the passage: repeated in a comment, a string or a message
            continue
        seen[name] = seen.get(name, 0) + 1  # a property's setter and an `else:` branch bear the same name
        suffix = f"~{seen[name]}" if seen[name] > 1 else ""
        yield Function(f"{module}:{name}{suffix}", summary, details, code)


def without_name(function: Function) -> Function:
    """The function with its own name replaced by `_` wherever it stands in the code as a word. A ligature is its
    letters, as in Python.
    """
    name = re.split(r"[.:]", function.id)[-1].partition("~")[0]
    code = re.sub(
        r"\w+", lambda word: "_" if unicodedata.normalize("NFKC", word[0]) == name else word[0], function.code
    )
    return replace(function, code=code)


def _spoken(text: str) -> str:
    """The words of a text in small letters, one blank around each."""
    words = re.findall(r"[^\W_]+", text.lower())
    return f" {' '.join(words)} "


def _definitions(node: ast.AST, prefix: str) -> Iterator[tuple[str, _Definition]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, _Definition):
            yield prefix + child.name, child
        elif isinstance(child, ast.ClassDef):
            yield from _definitions(child, f"{prefix}{child.name}.")
        elif isinstance(child, ast.If | ast.Try | ast.ExceptHandler | ast.With):
            yield from _definitions(child, prefix)


def _does_something(node: _Definition) -> bool:
    """Not an overload, and more than `...`, `pass`, `raise NotImplementedError` or `return NotImplemented`."""
    overloaded = any("overload" in ast.unparse(decorator) for decorator in node.decorator_list)
    return not overloaded and not all(map(_does_nothing, node.body[1:]))


def _does_nothing(statement: ast.stmt) -> bool:
    if isinstance(statement, ast.Raise | ast.Return):
        return "NotImplemented" in ast.unparse(statement)
    return isinstance(statement, ast.Pass) or (
        isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
    )


def _paragraphs(docstring: str) -> tuple[str, str]:
    """The first paragraph on one line, without a leading signature line, and the rest; "" for what isn't worth
    reading.
    """
    first, *rest = _PARAGRAPH_END.split(inspect.cleandoc(docstring), maxsplit=1)
    first = _SIGNATURE_LINE.sub("", first)
    details = rest[0].strip() if rest else ""
    return " ".join(first.split()), details if len(details.split()) >= MIN_DETAILS_WORDS else ""


def _code_without_docstring(node: _Definition, lines: list[str]) -> str | None:
    """Whole lines, so that comments stay; None where the docstring shares a line with code."""
    docstring, body = node.body[0], node.body[1]
    first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
    if docstring.end_lineno is None or docstring.lineno == node.lineno or docstring.end_lineno == body.lineno:
        return None
    signature, rest = lines[first - 1 : docstring.lineno - 1], lines[docstring.end_lineno : node.end_lineno]
    while not rest[0].strip():
        rest = rest[1:]
    return textwrap.dedent("\n".join(line.rstrip() for line in signature + rest)).strip("\n")
