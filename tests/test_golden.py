"""Short CPU runs end with the recorded weights and losses: to rounding, or with BIGBATCH_EXACT=1 bit by bit.

Bits are comparable on the torch and the kind of CPU that recorded them; elsewhere BIGBATCH_EXACT=1 fails and names the
difference.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

from tests.artefacts.archive import FIRST, unpack
from tests.golden.make import RECORDED, RUNS, STEPS, environment, trained

EXACT = os.environ.get("BIGBATCH_EXACT") == "1"
APART = 1e-6  # relative to a run's largest weight and to its losses
APART_ROUNDED = 1e-4  # where similarities are of bf16: another CPU rounds a representation the other way


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("golden")
    unpack(found, FIRST)
    return found


@pytest.fixture(scope="module")
def recorded() -> dict[str, np.ndarray]:
    if EXACT:
        with safe_open(RECORDED, "numpy") as file:
            there, here = file.metadata(), environment()
        assert here == there, f"BIGBATCH_EXACT=1 compares bits, which need {there}; here is {here}"
    return load_file(RECORDED)


@pytest.mark.parametrize("name", RUNS, ids=lambda name: f"{name}-{'bits' if EXACT else 'rounding'}")
def test_a_run_ends_as_recorded(folder: Path, recorded: dict[str, np.ndarray], name: str) -> None:
    found = trained(folder, name)
    expected = {key.removeprefix(f"{name}/"): array for key, array in recorded.items() if key.startswith(f"{name}/")}
    assert found.keys() == expected.keys() and len(expected["losses"]) == STEPS
    if EXACT:
        differing = [key for key in expected if found[key].tobytes() != expected[key].tobytes()]
        assert not differing, f"{len(differing)} of {len(expected)} tensors differ: {', '.join(differing)}"
        return
    apart = APART_ROUNDED if "loss.precision=bf16" in RUNS[name] else APART
    np.testing.assert_allclose(found.pop("losses"), expected.pop("losses"), rtol=apart)
    # The gradient of a key bias is rounding, which Adam makes large.
    trained_keys = [key for key in expected if not key.endswith("key.bias")]
    largest = max(float(np.abs(expected[key]).max()) for key in trained_keys)
    for key in trained_keys:
        np.testing.assert_allclose(found[key], expected[key], rtol=0, atol=apart * largest, err_msg=key)
