"""Another `kernels` package stops a command with one line, before transformers is imported."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from retriever.environment import check_environment

ROOT = Path(__file__).resolve().parents[1]


def _fake_distribution(folder: Path, with_code: bool) -> Path:
    metadata = folder / "kernels-0.99.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: kernels\nVersion: 0.99\n")
    if with_code:
        (folder / "kernels").mkdir()
        (folder / "kernels" / "__init__.py").write_text("")
    return folder


def test_this_environment_passes() -> None:
    check_environment()


@pytest.mark.parametrize(
    ("theirs_first", "what"), [(True, "hides bigbatch's own"), (False, "is hidden from transformers by bigbatch's own")]
)
def test_the_distribution_called_kernels_is_named(tmp_path: Path, theirs_first: bool, what: str) -> None:
    """In a process of its own: which of the two packages is found depends on the path that Python starts with."""
    theirs = _fake_distribution(tmp_path, with_code=True)
    path = [str(theirs), str(ROOT)] if theirs_first else [str(ROOT), str(theirs)]
    code = "from retriever.environment import check_environment; check_environment()"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path)}
    ran = subprocess.run([sys.executable, "-P", "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 1
    assert ran.stderr == f"the distribution kernels 0.99 {what} package kernels: run `pip uninstall kernels` in this environment\n"


def test_a_stray_package_called_kernels_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("")
    for module in [name for name in sys.modules if name == "kernels" or name.startswith("kernels.")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(SystemExit, match=f"kernels is found at {tmp_path}/kernels, not at {ROOT}/kernels"):
        check_environment()


def test_commands_check_before_they_import_transformers(tmp_path: Path) -> None:
    _fake_distribution(tmp_path, with_code=False)
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    arguments = ["--model", "m", "--input", "i", "--side", "query", "--output", str(tmp_path / "o")]
    command = [sys.executable, str(ROOT / "retriever" / "encode.py"), *arguments]
    ran = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stderr.count("\n")) == (1, 1)
    assert "pip uninstall kernels" in ran.stderr
