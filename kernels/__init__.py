"""Log-sum-exp over query-passage similarities, tile by tile; and the modules of Hugging Face's distribution `kernels`,
if installed.

That distribution names its package as ours is named, and transformers imports it. So this package's path goes on in
theirs, ours first, and an attribute that is not ours is looked up in their `__init__.py`, which is run at the first
such look-up.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any


def _folder_of_theirs() -> Path | None:
    """Where their package is, if it has a folder of its own."""
    try:
        folder = Path(str(importlib.metadata.distribution("kernels").locate_file("kernels")))
    except importlib.metadata.PackageNotFoundError:
        return None
    apart = folder.resolve() != Path(__file__).resolve().parent
    return folder if apart and (folder / "__init__.py").is_file() else None


_THEIRS = _folder_of_theirs()
if _THEIRS is not None:
    __path__.append(str(_THEIRS))


def __getattr__(name: str) -> Any:
    """An attribute of their package. Submodules of either package are none: the import statement finds them by the
    path.
    """
    special = name.startswith("__") and name != "__version__"
    if _THEIRS is None or special or importlib.util.find_spec(f"{__name__}.{name}") is not None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(_their_package(_THEIRS / "__init__.py"), name)


def _their_package(file: Path) -> ModuleType:
    name = f"{__name__}._hugging_face"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, file)
        assert spec is not None and spec.loader is not None
        sys.modules[name] = module = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[name]
            raise
    return sys.modules[name]
