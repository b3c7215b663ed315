"""Settings that every process of the tests starts with."""

import torch


def make_strict() -> None:
    """Deterministic algorithms only; `torch.empty` gives NaN, so that an element nobody wrote is seen."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    torch.set_num_threads(1)
