"""Random-number states: a replayed chunk draws what it drew, and nobody else notices."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from retriever.rng import OwnGenerator, RngState, named_generator, seed_step

CPU = torch.device("cpu")


def _draws() -> list[float]:
    return [*torch.rand(3).tolist(), *torch.nn.functional.dropout(torch.ones(8), 0.5).tolist(), torch.randn(()).item()]


def test_restored_repeats_the_draws_and_leaves_the_outside_alone() -> None:
    """Inside, the draws that followed capture; after it, the draws that would have come without the visit. Any number
    of times.
    """
    torch.manual_seed(3)
    state = RngState.capture(CPU)
    first = _draws()
    with state.restored():
        assert _draws() == first
    between = RngState.capture(CPU)
    following = _draws()
    between_again = torch.get_rng_state()
    with between.restored(), state.restored():
        assert _draws() == first
    assert torch.equal(torch.get_rng_state(), between_again)
    with between.restored():
        assert _draws() == following
    assert following != first


def test_an_exception_inside_restores_the_outside() -> None:
    """An encoder that fails in the second pass leaves the generators where they were."""
    state = RngState.capture(CPU)
    torch.rand(5)
    outside = torch.get_rng_state()
    with pytest.raises(RuntimeError, match="encoder"), state.restored():
        torch.rand(2)
        raise RuntimeError("encoder")
    assert torch.equal(torch.get_rng_state(), outside)


def test_capture_is_a_snapshot() -> None:
    """Drawing after capture does not move the captured state."""
    state = RngState.capture(CPU)
    saved = state.cpu.clone()
    torch.rand(7)
    assert torch.equal(state.cpu, saved)


def test_a_name_gives_the_numbers_that_it_always_gave() -> None:
    """Low-rank parts and projections start from them."""
    assert named_generator("0 shared.layer").initial_seed() == 27_420_775_495_443_142


def _every_kind_of_draw() -> list[torch.Tensor]:
    x = torch.zeros(3)
    fresh = [torch.rand(3), torch.randn(3, dtype=torch.float64), torch.randint(99, (3,)), torch.randint(5, 99, (3,))]
    like = [torch.rand_like(x), torch.randn_like(x), torch.randint_like(x, 99), torch.randint_like(x, 5, 99)]
    out = [
        torch.randn(3, out=torch.empty(3)),
        torch.randperm(9),
        torch.normal(0.0, 1.0, (3,)),
        x.new_empty(3).normal_(),
    ]
    return [*fresh, *like, *out, torch.bernoulli(x + 0.5), torch.multinomial(x + 1, 2), x.clone().uniform_()]


def test_an_own_generator_serves_every_function_that_takes_one() -> None:
    """The seed decides what is drawn, whatever the global state, which stays."""
    drawn = []
    for state, seed in ((1, 3), (2, 3), (2, 4)):
        torch.manual_seed(state)
        outside = torch.get_rng_state()
        with OwnGenerator(seed):
            drawn.append(_every_kind_of_draw())
        assert torch.equal(torch.get_rng_state(), outside)
    first, same, other = drawn
    assert all(map(torch.equal, first, same)) and not any(map(torch.equal, first[:8], other[:8]))


def _first_draw(seed: int, step: int, rank: int) -> int:
    seed_step(seed, step, rank)
    return int(torch.randint(2**62, ()))


def test_steps_ranks_and_seeds_draw_different_numbers() -> None:
    """No two of (seed, step, rank) share a stream, neighbours and swapped places included; the same three always do."""
    keys = [(seed, step, rank) for seed in range(4) for step in range(12) for rank in range(4)]
    draws = {_first_draw(*key) for key in keys}
    assert len(draws) == len(keys)
    assert _first_draw(1, 2, 3) == _first_draw(1, 2, 3)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**64 - 1), st.integers(0, 2**40), st.integers(0, 2**16))
def test_any_seed_step_and_rank_seed_the_generators(seed: int, step: int, rank: int) -> None:
    """Whatever was drawn before, a step starts from the same state."""
    assert _first_draw(seed, step, rank) == _first_draw(seed, step, rank)
