"""Where the tests of this folder run: correctness on every device, the rest on a GPU alone."""

from __future__ import annotations

from typing import TypeVarTuple

Sizes = TypeVarTuple("Sizes")

# Tests that only a GPU can run, and why. All others take the fixture `device` and run on the CPU too, at toy size, by
# the references.
GPU_ONLY = {
    "test_attention.py::test_addresses_beyond_two_to_the_31": "memory: tensors of more than 2³¹ elements",
    "test_fused_layer.py::test_more_than_2_to_the_31_elements": "memory: tensors of more than 2³¹ elements",
    "test_gelu_product.py::test_more_than_2_to_the_31_elements": "memory: tensors of more than 2³¹ elements",
    "test_host_waits.py::test_nothing_is_waited_for_between_the_passes": "stream: torch watches for synchronization on a GPU alone",
    "test_host_waits.py::test_an_update_is_queued_before_it_is_asked_for": "stream: torch watches for synchronization on a GPU alone",
    "test_offload.py::test_memory_does_not_grow_with_the_batch": "memory: the allocator's peak on a GPU",
    "test_sharded.py::test_two_ranks_hold_half_each": "memory: what the allocator holds on a GPU",
    "test_plan.py::test_a_step_is_as_it_was_predicted": "timing and memory: a step on a GPU against its forecast",
    "test_plan.py::test_measuring_leaves_no_memory_and_no_trace": "memory: what the allocator holds on a GPU",
}


def toy(device: str, *sizes: *Sizes, most: int = 48) -> tuple[*Sizes]:
    """`sizes`, which are ints, on a GPU; on the CPU each is at most `most`."""
    return sizes if device == "cuda" else tuple(min(size, most) for size in sizes)  # type: ignore[call-overload]
