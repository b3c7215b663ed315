"""Each correctness test runs twice: on the CPU, where the references stand in for the kernels, and on a GPU, where it
is marked `gpu`.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.gpu.devices import GPU_ONLY


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    """The device that a correctness test computes on."""
    return request.param


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks what `GPU_ONLY` names."""
    for item in items:
        name = f"{item.path.name}::{getattr(item, 'originalname', item.name)}"
        if item.path.parent == Path(__file__).parent and name in GPU_ONLY and not item.get_closest_marker("multi_gpu"):
            item.add_marker("gpu")
