"""Hugging Face's distribution `kernels` and our package of that name work together, whichever is found or imported
first.

By a stand-in, or by the real one where BIGBATCH_KERNELS names a folder that `pip install --no-deps --target` filled
with it (`make test-kernels`).
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
_STAND_IN = {
    "kernels/__init__.py": "from kernels.load import get_kernel\nfrom kernels.layer import kernelize\n__version__ = '0.18.2'\n",
    "kernels/load.py": "def get_kernel(name):\n    from kernels import kernelize\n    return kernelize\n",
    "kernels/layer/__init__.py": "from kernels.layer.device import Device\n\ndef kernelize():\n    return Device\n",
    "kernels/layer/device.py": "class Device:\n    pass\n",
    "kernels-0.18.2.dist-info/METADATA": "Metadata-Version: 2.1\nName: kernels\nVersion: 0.18.2\n",
}
_OURS = f"""
import kernels.dispatch, kernels.infonce.exclusions
assert kernels.infonce.exclusions.__file__ == {str(ROOT / "kernels" / "infonce" / "exclusions.py")!r}
"""
_THEIRS = """
import importlib.metadata
import kernels.layer
from kernels import __version__, get_kernel, kernelize
assert kernels.layer.kernelize is kernelize and kernels.get_kernel is get_kernel
assert __version__ == importlib.metadata.version("kernels")
"""
_CODE = {
    "ours first": "import retriever" + _OURS + _THEIRS,
    "theirs first": _THEIRS + "import retriever" + _OURS + _THEIRS,
    "evaluation first": "import eval" + _OURS + _THEIRS,
    "scripts first": "import scripts" + _OURS + _THEIRS,
    "a command": "import retriever.environment as e; e.check_environment()" + _OURS,
    "none of theirs is run": "import sys, retriever"
    + _OURS
    + "assert not any('layer' in m for m in sys.modules if 'kernels' in m)",
    "unknown": "import retriever, kernels\ntry:\n    kernels.nothing\nexcept AttributeError as e:\n    assert 'nothing' in str(e)\n"
    "else:\n    raise SystemExit('found')",
}
if "BIGBATCH_KERNELS" in os.environ:  # the stand-in has not all that transformers asks for
    _CODE["transformers"] = "import transformers.integrations.hub_kernels, retriever" + _OURS + _THEIRS


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of the path with their package and its metadata."""
    if real := os.environ.get("BIGBATCH_KERNELS"):
        return Path(real).resolve()
    folder = tmp_path_factory.mktemp("theirs")
    for name, text in _STAND_IN.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


_A_COMMAND = "import sys; from retriever.command import command; sys.exit(command('any', None)(print)([]))"


def _run(code: str, *path: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, path))}
    command = [sys.executable, "-P", "-c", code]
    return subprocess.run(
        command, cwd=path[0], env=environment, capture_output=True, text=True, check=False, timeout=120
    )


@pytest.mark.parametrize("order", _CODE)
def test_both_are_found(theirs: Path, order: str) -> None:
    ran = _run(_CODE[order], theirs, ROOT)
    assert ran.returncode == 0, ran.stderr


@pytest.mark.parametrize("order", ["ours first", "theirs first"])
def test_both_are_found_where_ours_comes_first_on_the_path(theirs: Path, order: str) -> None:
    ran = _run(_CODE[order], ROOT, theirs)
    assert ran.returncode == 0, ran.stderr


def test_no_module_has_the_name_of_one_of_theirs(theirs: Path) -> None:
    """Theirs would be hidden by ours, which come first on the package's path."""
    names = [{path.name.split(".")[0] for path in (folder / "kernels").iterdir()} for folder in (theirs, ROOT)]
    assert {"layer", "load"} <= names[0] and "infonce" in names[1]
    assert (names[0] & names[1]) == {"__init__", "__pycache__"} & names[0] & names[1]


def test_of_two_in_one_folder_the_later_decides(theirs: Path, tmp_path: Path) -> None:
    """As pip installs them into one environment. With our `__init__.py` a command and `Run` say what to do; with
    theirs both work.
    """
    shutil.copytree(theirs, tmp_path, dirs_exist_ok=True)
    for package in ("retriever", "kernels"):
        shutil.copytree(
            ROOT / package, tmp_path / package, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__")
        )
    refused = _run(_A_COMMAND, tmp_path)
    assert refused.returncode == 2 and refused.stderr.count("\n") == 1
    assert refused.stderr.startswith("error: bigbatch was installed over the distribution kernels")
    assert "pip install --force-reinstall --no-deps kernels==" in refused.stderr
    from_python = _run("from retriever.inputs import configuration\nconfiguration(None)", tmp_path)
    assert "bigbatch was installed over the distribution kernels" in from_python.stderr
    shutil.copy(theirs / "kernels" / "__init__.py", tmp_path / "kernels" / "__init__.py")
    both = _run(
        "import retriever.environment as e; e.check_environment()\nimport kernels.infonce.exclusions" + _THEIRS,
        tmp_path,
    )
    assert both.returncode == 0, both.stderr
