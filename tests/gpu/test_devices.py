"""No test of this folder is left out on the CPU but those that `GPU_ONLY` names."""

from __future__ import annotations

import ast
import re
from pathlib import Path

from tests.gpu.devices import GPU_ONLY

FILES = sorted(Path(__file__).parent.glob("test_*.py"))


def test_the_list_names_tests_that_exist() -> None:
    functions = [
        (path.name, node)
        for path in FILES
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.FunctionDef)
    ]
    assert set(GPU_ONLY) <= {f"{file}::{node.name}" for file, node in functions if node.name.startswith("test_")}
    assert all(
        re.match("(memory|stream|timing)( and (memory|stream|timing))?: ", reason) for reason in GPU_ONLY.values()
    )


def test_no_file_marks_tests_of_its_own() -> None:
    marked = [path.name for path in FILES if path != Path(__file__) and re.search(r"mark\.gpu\b", path.read_text())]
    assert not marked, f"{marked}: take the fixture `device`, or name the test in tests/gpu/devices.py"
