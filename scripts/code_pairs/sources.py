"""Where the Python files of the standard library and of installed packages are, and what they are called."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from retriever.errors import RefusedError

STDLIB = "stdlib"

# Large, documented packages a machine learning installation tends to hold: `--packages auto` takes those it finds.
WELL_KNOWN = (
    STDLIB, "accelerate", "datasets", "faiss", "jax", "joblib", "matplotlib", "mpmath", "networkx", "numpy", "pandas", "pyarrow",
    "scipy", "sentence_transformers", "skimage", "sklearn", "statsmodels", "sympy", "tensorboard", "torch", "torchvision", "transformers",
)  # fmt: skip

_SKIPPED_FOLDERS = frozenset((
    "__pycache__", "site-packages", "dist-packages", "test", "tests", "testing", "idle_test", "lib2to3", "ensurepip", "pydoc_data",
    "_vendor", "vendor", "vendored", "_vendored", "extern", "externals", "third_party",
))  # fmt: skip


@dataclass(frozen=True)
class SourceFile:
    """A Python file and the dotted name it is imported by."""

    module: str
    path: Path

    @property
    def unit(self) -> str:
        """What is never divided by the split: a top-level module of the standard library, a subpackage elsewhere."""
        package, *parts = self.module.split(".")
        return parts[0] if package == STDLIB else ".".join([package, *parts[:1]])


def installed(names: tuple[str, ...] = WELL_KNOWN) -> list[str]:
    """Those of `names` that can be found here, in their order. Nothing is imported."""
    return [name for name in names if name == STDLIB or importlib.util.find_spec(name) is not None]


def version(package: str) -> str:
    """The installed version, by import name; `unknown` for a package without metadata."""
    if package == STDLIB:
        return platform.python_version()
    distributions = importlib.metadata.packages_distributions().get(package)
    return importlib.metadata.version(distributions[0]) if distributions else "unknown"


def python_files(package: str) -> Iterator[SourceFile]:
    """The package's own modules in order of their names, without tests, caches and vendored copies of others.

    The standard library's modules are named `stdlib.<module>`. Raises RefusedError where `package` isn't installed.
    """
    for root in _roots(package):
        if root.is_file():
            yield SourceFile(package, root)
            continue
        found = []
        for path in root.rglob("*.py"):
            *folders, name = path.relative_to(root).with_suffix("").parts
            if (
                any(_is_skipped(folder) for folder in folders)
                or name.startswith(("test_", "conftest"))
                or name.endswith("_test")
            ):
                continue
            found.append(SourceFile(".".join([package, *folders] + ([] if name == "__init__" else [name])), path))
        yield from sorted(found, key=lambda file: (file.module, str(file.path)))


def _is_skipped(folder: str) -> bool:
    return folder in _SKIPPED_FOLDERS or not folder.isidentifier()


def _roots(package: str) -> list[Path]:
    if package == STDLIB:
        return [Path(sysconfig.get_path("stdlib"))]
    spec = importlib.util.find_spec(package)
    if spec is None:
        raise RefusedError(
            f"--packages {package}: no module of this name is installed; expected import names such as {', '.join(WELL_KNOWN[:4])}"
        )
    if spec.submodule_search_locations:
        return sorted(Path(folder) for folder in spec.submodule_search_locations)
    return [Path(spec.origin)] if spec.origin and spec.origin.endswith(".py") else []
