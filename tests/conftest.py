"""Every test runs offline, on one thread per process, with uninitialised memory filled with NaN."""

import gc
import os
import signal
import tempfile
from pathlib import Path

os.environ.setdefault("BIGBATCH_CACHE", tempfile.mkdtemp(prefix="bigbatch-tests-"))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest  # noqa: E402

import retriever  # noqa: E402, F401 (its `kernels`, where another distribution's comes first on the path)
from tests.determinism import make_strict  # noqa: E402
from tests.tiny import save_tiny_model  # noqa: E402
from tests.workplace import make_workplace  # noqa: E402

make_strict()
# A shell's background job ignores Ctrl-C, and so would every command that a test starts and interrupts.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small training run of `tests.workplace`, one for each file of tests."""
    return make_workplace(tmp_path_factory.mktemp("workplace"))


@pytest.fixture(scope="session")
def one_layer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny model of one layer."""
    return save_tiny_model(tmp_path_factory.mktemp("model"), num_hidden_layers=1)


def pytest_collection_finish() -> None:
    """What the tests import stays: each later search for garbage leaves it out."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _strict_torch() -> None:
    make_strict()
