"""Makes `import kernels.…` find this project's package where another distribution's of that name comes first on the
path.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[1] / "kernels"


def find_own_kernels() -> None:
    """Imports our `kernels` from beside this package; to another one that is imported already, adds our folder.

    Our package hands on what Hugging Face's of that name has, so whoever imports that one later finds it.
    """
    there = sys.modules.get("kernels")
    if there is not None:
        if str(FOLDER) not in there.__path__:
            there.__path__.append(str(FOLDER))
        return
    spec = importlib.util.spec_from_file_location(
        "kernels", FOLDER / "__init__.py", submodule_search_locations=[str(FOLDER)]
    )
    assert spec is not None and spec.loader is not None
    sys.modules["kernels"] = module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules["kernels"]
        raise
