"""Python sources installed here: a package's modules, and the documented functions in a module."""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import inspect
import platform
import re
import sysconfig
import textwrap
import unicodedata
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from retriever.errors import RefusedError

STDLIB = "stdlib"
OUR_DISTRIBUTION = "bigbatch"
_CHECKOUT = Path(__file__).resolve().parents[2]  # another distribution may bring a package called scripts

# Large, documented packages a machine learning installation tends to hold: `--packages auto` takes those it finds.
WELL_KNOWN = (
    STDLIB, "accelerate", "datasets", "faiss", "jax", "joblib", "matplotlib", "mpmath", "networkx", "numpy", "pandas",
    "pyarrow", "scipy", "sentence_transformers", "skimage", "sklearn", "statsmodels", "sympy", "tensorboard", "torch",
    "torchvision", "transformers",
)  # fmt: skip

_SKIPPED_FOLDERS = frozenset((
    "__pycache__", "site-packages", "dist-packages", "test", "tests", "testing", "idle_test", "lib2to3", "ensurepip",
    "pydoc_data", "_vendor", "vendor", "vendored", "_vendored", "extern", "externals", "third_party",
))  # fmt: skip

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

    @property
    def unit(self) -> str:
        """The smallest part of a package that the split keeps together: a top-level module of the standard library, a
        subpackage of any other package.
        """
        package, *parts = self.id.partition(":")[0].split(".")
        return parts[0] if package == STDLIB and parts else ".".join([package, *parts[:1]])

    @property
    def package(self) -> str:
        """The import name of its package."""
        return self.id.partition(":")[0].partition(".")[0]


def every_package() -> list[str]:
    """The standard library and the import name of every installed package but this project's, by name."""
    found = _distributions()
    names = (name for name, distributions in found.items() if OUR_DISTRIBUTION not in distributions)
    named = sorted(name for name in names if name.isidentifier() and name not in _SKIPPED_FOLDERS)
    found_here = (name for name in installed((STDLIB, *named)) if name != STDLIB)
    return [STDLIB, *(name for name in found_here if all(root.parent != _CHECKOUT for root in _roots(name)))]


def installed(names: tuple[str, ...] = WELL_KNOWN) -> list[str]:
    """The packages among `names` that are installed, in the same order. Nothing is imported."""
    return [name for name in names if name == STDLIB or _can_be_found(name)]


def _can_be_found(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):  # a module that was put into sys.modules without a spec
        return False


def version(package: str) -> str:
    """The installed version of a package, by import name; `unknown` if it has no metadata."""
    if package == STDLIB:
        return platform.python_version()
    distributions = _distributions().get(package)
    return importlib.metadata.version(distributions[0]) if distributions else "unknown"


@cache
def _distributions() -> Mapping[str, list[str]]:
    """Import name -> names of the distributions that bring it."""
    return importlib.metadata.packages_distributions()


def python_files(package: str) -> Iterator[tuple[str, Path]]:
    """(dotted name, path) of a package's own modules, sorted by name. Tests, caches and vendored packages are left out.

    The standard library's modules are named `stdlib.<module>`. Raises RefusedError if `package` is not installed.
    """
    for root in _roots(package):
        if root.is_file():
            yield package, root
            continue
        found = []
        for path in root.rglob("*.py"):
            *folders, name = path.relative_to(root).with_suffix("").parts
            skipped = any(folder in _SKIPPED_FOLDERS or not folder.isidentifier() for folder in folders)
            if not skipped and not name.startswith(("test_", "conftest")) and not name.endswith("_test"):
                found.append((".".join([package, *folders] + ([] if name == "__init__" else [name])), path))
        yield from sorted(found)


def _roots(package: str) -> list[Path]:
    if package == STDLIB:
        return [Path(sysconfig.get_path("stdlib"))]
    spec = importlib.util.find_spec(package)
    if spec is None:
        raise RefusedError(
            f"--packages {package}: no module of this name is installed; "
            f"expected import names such as {', '.join(WELL_KNOWN[:4])}"
        )
    if spec.submodule_search_locations:
        return sorted(Path(folder) for folder in spec.submodule_search_locations)
    return [Path(spec.origin)] if spec.origin and spec.origin.endswith(".py") else []


def documented_functions(source: str, module: str) -> Iterator[Function]:
    """The functions at module and class level that have a summary in words and a body that does something.

    A function whose code repeats its summary is left out. Functions inside functions belong to the code of the outer
    one. Raises SyntaxError, and ValueError for null bytes.
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
        docstring = docstring.encode("utf-8", "ignore").decode()  # without lone surrogates, which no file can hold
        summary, details = _paragraphs(docstring)
        code = _code_without_docstring(node, lines)
        in_words = len(re.findall(r"[A-Za-z]{2,}", summary)) >= MIN_SUMMARY_WORDS and not summary.startswith(_NOT_PROSE)
        # A comment, a string or a message of the code may repeat the summary: the query would stand in the passage.
        if code is None or not in_words or _spoken(summary) in _spoken(code):
            continue
        seen[name] = seen.get(name, 0) + 1  # a property's setter and an `else:` branch bear the same name
        suffix = f"~{seen[name]}" if seen[name] > 1 else ""
        yield Function(f"{module}:{name}{suffix}", summary, details, code)


def without_name(function: Function) -> Function:
    """The function with `_` in place of its own name, wherever that is a word of the code. As in Python, a ligature
    equals its letters.
    """
    name = re.split(r"[.:]", function.id)[-1].partition("~")[0]
    code = re.sub(
        r"\w+", lambda word: "_" if unicodedata.normalize("NFKC", word[0]) == name else word[0], function.code
    )
    return replace(function, code=code)


def _spoken(text: str) -> str:
    """The words of a text in lower case, with one blank around each."""
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
    """Whether the function is no overload and its body is more than `...`, `pass`, `raise NotImplementedError` or
    `return NotImplemented`.
    """
    overloaded = any("overload" in ast.unparse(decorator) for decorator in node.decorator_list)
    return not overloaded and not all(map(_does_nothing, node.body[1:]))


def _does_nothing(statement: ast.stmt) -> bool:
    if isinstance(statement, ast.Raise | ast.Return):
        return "NotImplemented" in ast.unparse(statement)
    return isinstance(statement, ast.Pass) or (
        isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
    )


def _paragraphs(docstring: str) -> tuple[str, str]:
    """(summary, details): the first paragraph on one line, without a leading signature, and the rest. A part that is
    too short to be useful is "".
    """
    first, *rest = _PARAGRAPH_END.split(inspect.cleandoc(docstring), maxsplit=1)
    first = _SIGNATURE_LINE.sub("", first)
    details = rest[0].strip() if rest else ""
    return " ".join(first.split()), details if len(details.split()) >= MIN_DETAILS_WORDS else ""


def _code_without_docstring(node: _Definition, lines: list[str]) -> str | None:
    """The lines of the function without its docstring, comments included; None if the docstring shares a line with
    code.
    """
    docstring, body = node.body[0], node.body[1]
    first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
    if docstring.end_lineno is None or docstring.lineno == node.lineno or docstring.end_lineno == body.lineno:
        return None
    signature, rest = lines[first - 1 : docstring.lineno - 1], lines[docstring.end_lineno : node.end_lineno]
    while not rest[0].strip():
        rest = rest[1:]
    return textwrap.dedent("\n".join(line.rstrip() for line in signature + rest)).strip("\n")
