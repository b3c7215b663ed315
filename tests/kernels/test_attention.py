"""Packed attention on a CPU: against its definition, its dropout mask against plain integers, and the operator's
manners.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.attention import api as attention
from kernels.attention import reference
from kernels.attention.reference import Mask, Texts, kept
from tests.kernels.attention_oracle import attend, each, errors, heads_of, texts

SEED = torch.tensor([-(2**40) - 7])
LENGTHS = [3, 0, 5, 7, 1, 9, 4, 0]


@pytest.mark.parametrize("scores", [1, 200, 2**22])  # a text at a time, a few, all
@pytest.mark.parametrize(
    ("groups", "options"),
    [
        (4, {}),
        (4, {"dropout": 0.3, "seed": SEED}),
        (2, {"dropout": 0.3, "seed": SEED, "causal": True}),
        (1, {"dropout": 0.1, "seed": SEED, "window": 2}),
        (4, {"causal": True, "window": 1}),
        (4, {"window": max(LENGTHS) - 2}),  # hides two pairs of the longest text
        (4, {"window": max(LENGTHS) - 1}),
    ],
)
def test_matches_its_definition(
    groups: int, options: dict[str, Any], scores: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reference, "_SCORES", scores)
    starts, longest = texts(LENGTHS)
    found = errors(heads_of(int(starts[-1]), 4, groups, 8, fused=True), starts, longest, scale=0.3, **options)
    assert max(found.values()) < 1e-14, found


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.bfloat16, 4e-3), (torch.float16, 6e-4)])
def test_half_precision_is_rounded_once(dtype: torch.dtype, bound: float) -> None:
    starts, longest = texts(LENGTHS)
    found = errors(heads_of(int(starts[-1]), 4, 2, 16, dtype), starts, longest, scale=0.25, dropout=0.1, seed=SEED)
    assert max(found.values()) < bound, found


def _hash(seed: int, head: int, row: int, column: int) -> int:
    """The 32-bit word of one element, in plain integers."""
    word = 2**32 - 1

    def mix(x: int) -> int:
        x = ((x ^ (x >> 16)) * 0x85EBCA6B) & word
        x = ((x ^ (x >> 13)) * 0xC2B2AE35) & word
        return x ^ (x >> 16)

    key = mix(mix(mix((seed >> 32 & word) ^ 0x9E3779B9) ^ (seed & word)) ^ head)
    x = ((mix(row ^ key) ^ ((column * 0x9E3779B9 + mix(key ^ 0x9E3779B9)) & word)) * 0x85EBCA6B) & word
    return ((x ^ (x >> 16)) * 0xC2B2AE35) & word


@pytest.mark.parametrize("seed", [0, 1, -1, 2**62 + 12345, -(2**63)])
def test_the_mask_is_a_hash_of_its_place(seed: int) -> None:
    rows, columns = torch.tensor([[0, 1, 70_000], [3, 2**31 - 1, 5]]), torch.tensor([[9, 0], [2**20, 5]])
    mask = kept(torch.tensor([seed]), torch.arange(3), rows, columns, 0.4)
    for i in range(2):
        for head in range(3):
            for r, row in enumerate(rows[i].tolist()):
                for c, column in enumerate(columns[i].tolist()):
                    assert mask[i, head, r, c] == (_hash(seed, head, row, column) >= 0.4 * 2**32)


@pytest.mark.parametrize("dropout", [0.1, 0.5])
def test_the_mask_is_as_good_as_random(dropout: float) -> None:
    """Independent over rows, columns, heads and seeds; singular values, which any pattern left would raise, are a
    random matrix's.
    """
    n, heads = 400, 6
    at = torch.arange(n) + 31_000

    def standard(seed: int) -> Tensor:
        drawn = kept(torch.tensor([seed]), torch.arange(heads), at, at, dropout).double()
        return (drawn - (1 - dropout)) / (dropout * (1 - dropout)) ** 0.5

    z, other = standard(5), standard(6)
    products = {
        "rate": z,
        "rows": z[:, 1:] * z[:, :-1],
        "columns": z[..., 1:] * z[..., :-1],
        "heads": z[1:] * z[:-1],
        "seeds": z * other,
        "transposed": (z * z.mT).tril(-1),
        "rectangles": z[:, ::2, ::2] * z[:, 1::2, ::2] * z[:, ::2, 1::2] * z[:, 1::2, 1::2],
    }
    for name, product in products.items():
        sigmas = float(product.sum() / product.ne(0).sum() ** 0.5)
        assert abs(sigmas) < 4.5, (name, sigmas)
    for means in (z.mean(1), z.mean(2)):
        assert 0.9 < float(means.std()) * n**0.5 < 1.1
    largest = torch.linalg.matrix_norm(z, 2)  # [H]; 2 √n for independent entries
    assert float(largest.max()) < 2.15 * n**0.5


def test_the_operator_keeps_the_rules_of_operators() -> None:
    starts, longest = texts(LENGTHS)
    inputs = heads_of(int(starts[-1]), 4, 2, 8, torch.float32)
    torch.library.opcheck(attention._forward, (*inputs, starts, longest, 0.3, 0.1, SEED, False, 3))
    weights = torch.randn(inputs[0].shape)
    plain = each(inputs, Tensor.detach)
    torch.library.opcheck(
        attention._backward, (weights, *plain, None, torch.empty(0, 0), starts, longest, 0.3, 0.1, SEED, True, None)
    )


def test_compiled_as_one_call_whatever_the_longest_text() -> None:
    starts, _ = texts(LENGTHS)
    inputs = heads_of(int(starts[-1]), 4, 2, 8)
    torch._dynamo.reset()
    graphs: list[torch.fx.GraphModule] = []

    def count(graph: torch.fx.GraphModule, example: list[Any]) -> Any:
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, example)

    def twice(query: Tensor, key: Tensor, value: Tensor, longest: int) -> Tensor:
        return attend(2 * query, key, value, starts, longest, scale=0.3, dropout=0.2, seed=SEED).sin()

    compiled = torch.compile(twice, backend=count, fullgraph=True)
    want = twice(*inputs, 9)
    gradients = torch.autograd.grad(want.sum(), inputs)
    for longest in (9, 12, 33, 150, 151):
        got = compiled(*inputs, longest)
        assert torch.equal(got, want)
        for x, y in zip(torch.autograd.grad(got.sum(), inputs), gradients, strict=True):
            assert torch.equal(x, y)
    assert len(graphs) <= 2


def test_modes_change_nothing_but_the_graph() -> None:
    starts, longest = texts(LENGTHS)
    inputs = heads_of(int(starts[-1]), 4, 4, 8)
    options: dict[str, Any] = {"scale": 0.3, "dropout": 0.2, "seed": SEED}
    with_graph = attend(*inputs, starts, longest, **options)
    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode:
            without = attend(*inputs, starts, longest, **options)
        assert without.grad_fn is None and torch.equal(without, with_graph)


def test_autocast_computes_in_its_dtype() -> None:
    starts, longest = texts(LENGTHS)
    inputs = heads_of(int(starts[-1]), 4, 4, 8, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        got = attend(*inputs, starts, longest, scale=0.3)
    halves = each(inputs, lambda x: x.detach().bfloat16())
    assert got.dtype == torch.bfloat16 and torch.equal(got, attend(*halves, starts, longest, scale=0.3))
    assert all(g.dtype == torch.float32 and g.norm() > 0 for g in torch.autograd.grad(got.float().sin().sum(), inputs))
    doubles = each(inputs, lambda x: x.detach().double())
    with torch.autocast("cpu", torch.bfloat16):
        under = attend(*doubles, starts, longest, scale=0.3)
    assert torch.equal(under, attend(*doubles, starts, longest, scale=0.3))


def test_no_text_at_all() -> None:
    starts = torch.zeros(1, dtype=torch.int32)
    assert attend(*heads_of(0, 2, 2, 8), starts, 5, scale=1.0).shape == (0, 2, 8)


def _good() -> dict[str, Any]:
    query, key, value = each(heads_of(6, 4, 2, 8), Tensor.detach)
    starts, longest = texts([2, 4])
    return {"query": query, "key": key, "value": value, "starts": starts, "longest": longest, "scale": 1.0}


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "two dimensions": ({"query": torch.zeros(6, 8)}, r"received \[\[6, 8\]"),
    "other tokens": (
        {"key": torch.zeros(5, 2, 8).double(), "value": torch.zeros(5, 2, 8).double()},
        r"key and value \[T, G, d\]",
    ),
    "too wide": ({name: torch.zeros(6, 2, 257) for name in ("query", "key", "value")}, r"d in 1..256"),
    "undivided heads": ({"query": torch.zeros(6, 3, 8).double()}, "that the 2 key heads divide, received 3"),
    "two dtypes": ({"key": torch.zeros(6, 2, 8)}, "one floating dtype on one device"),
    "whole numbers": (
        {name: torch.zeros(6, 2, 8, dtype=torch.int64) for name in ("query", "key", "value")},
        "one floating dtype",
    ),
    "strided": ({"query": torch.zeros(6, 4, 16).double()[..., ::2]}, "contiguous last dimension"),
    "starts as int64": ({"starts": torch.tensor([0, 2, 6])}, r"starts \[n \+ 1\] int32"),
    "no longest": ({"longest": 0}, "longest of at least 1 token, received 0"),
    "text too long": ({"longest": 3}, "at most longest = 3 tokens, received one of 4"),
    "tokens of no text": ({"starts": torch.tensor([0, 2, 5], dtype=torch.int32)}, "from 0 to 6 .* received 0 to 5"),
    "falling starts": ({"starts": torch.tensor([0, 4, 2, 6], dtype=torch.int32)}, "starts to rise"),
    "all dropped": ({"dropout": 1.0, "seed": SEED}, "dropout in 0..1"),
    "no seed": ({"dropout": 0.1}, "a seed where it is above 0"),
    "seed as float": ({"dropout": 0.1, "seed": torch.zeros(1)}, r"seed \[1\] int64"),
    "negative window": ({"window": -1}, "at least 0 tokens, received -1"),
}


@pytest.mark.parametrize("case", WRONG)
def test_errors_name_what_was_received(case: str) -> None:
    change, message = WRONG[case]
    with pytest.raises(ValueError, match=message):
        attend(**(_good() | change))


def test_angles_that_nobody_turns_by_are_an_error() -> None:
    """The references turn heads before attention; silence would leave the positions out."""
    heads, angles = torch.zeros(3, 2, 8), torch.zeros(3, 4)
    texts = Texts(torch.tensor([0, 3], dtype=torch.int32), 3, (angles, angles))
    with pytest.raises(ValueError, match="expected no angles: heads of this width, device and length are turned"):
        attention.attention_forward(heads, heads, heads, texts, Mask(1.0))
