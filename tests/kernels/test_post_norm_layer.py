"""A post-norm layer written out, against the same layer in plain torch operations under autograd, in float64."""

from __future__ import annotations

from unittest.mock import Mock

import pytest
import torch
from torch import Tensor
from torch.nn.functional import gelu, layer_norm, linear

from kernels.attention.reference import Mask, Texts
from kernels.dropout import keep_mask
from kernels.layers import layer as module
from kernels.layers.layer import LayerKind, LayerSettings, SavedActivations, transformer_layer, without_graph
from kernels.layers.weights import Parameters, rounded_weights
from tests.kernels.attention_oracle import dense_attention, texts
from tests.kernels.oracle import gradient, relative_error

HEADS, D, F = 2, 8, 12
LENGTHS = [7, 1, 12, 0, 3]
EPS = 1e-5
FIELDS = Parameters._fields[:16]  # what BERT's layer has
ON, OFF = (0.1, 0.2, 0.3), (0.0, 0.0, 0.0)


def make_parameters(
    D: int, F: int, dtype: torch.dtype = torch.float64, scale: float = 0.3, device: str = "cpu"
) -> Parameters:
    """Random ones that want gradients, weights of norms around 1."""
    generator = torch.Generator().manual_seed(D)
    square, vector, widened, norm = ((D, D), scale), ((D,), scale), ((F, D), scale), ((D,), 0.1)
    shapes = [square, vector] * 4 + [norm, norm, widened, ((F,), scale), ((D, F), scale), vector, norm, norm]
    made = [size * torch.randn(shape, generator=generator, dtype=torch.float64) for shape, size in shapes]
    shifted = [v + 1 if name.endswith("norm_weight") else v for name, v in zip(FIELDS, made, strict=True)]
    return Parameters(*(v.to(device, dtype).requires_grad_() for v in shifted))


def given(p: Parameters) -> list[Tensor]:
    """Those that the layer has."""
    return [v for v in p if v is not None]


def make_layer(
    dropouts: tuple[float, float, float],
    lengths: list[int] = LENGTHS,
    heads: int = HEADS,
    device: str = "cpu",
    longest: int | None = None,
) -> LayerSettings:
    starts, most = texts(lengths, device)
    seeds = torch.tensor([2**40 + 3, 4, 5], device=device).split(1)
    return LayerSettings(LayerKind(heads, heads, EPS), Texts(starts, longest or most), dropouts, seeds)


def make_stream(T: int, D: int, dtype: torch.dtype = torch.float64, device: str = "cpu") -> Tensor:
    return (
        torch.randn(T, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        .to(device, dtype)
        .requires_grad_()
    )


def by_definition(stream: Tensor, layer: LayerSettings, p: Parameters) -> Tensor:
    """The stream after the layer, by torch's own operations."""

    def dropped(x: Tensor, place: int) -> Tensor:
        rows, columns = (torch.arange(n, device=x.device) for n in x.shape)
        seed = layer.seeds[place]
        assert seed is not None
        return x * keep_mask(seed, rows, columns, layer.dropouts[place]) / (1 - layer.dropouts[place])

    T, D = stream.shape
    assert p.key_weight is not None and p.value_weight is not None
    query, key, value = (
        linear(stream, weight, bias).view(T, layer.kind.heads, -1)
        for weight, bias in ((p.query_weight, p.query_bias), (p.key_weight, p.key_bias), (p.value_weight, p.value_bias))
    )
    context = dense_attention(
        query, key, value, layer.texts.starts, Mask((D // layer.kind.heads) ** -0.5, layer.dropouts[0], layer.seeds[0])
    )
    added = dropped(linear(context.flatten(1), p.attention_out_weight, p.attention_out_bias), 1)
    middle = layer_norm(stream + added, (D,), p.attention_norm_weight, p.attention_norm_bias, layer.kind.eps)
    added = dropped(linear(gelu(linear(middle, p.ffn_in_weight, p.ffn_in_bias)), p.ffn_out_weight, p.ffn_out_bias), 2)
    return layer_norm(middle + added, (D,), p.ffn_norm_weight, p.ffn_norm_bias, layer.kind.eps)


def run(stream: Tensor, layer: LayerSettings, p: Parameters, dtype: torch.dtype) -> Tensor:
    """The layer computing in `dtype`, by the mean of its two results."""
    out, low = transformer_layer(
        stream, stream if dtype == stream.dtype else stream.to(dtype), layer, rounded_weights(p, dtype), p
    )
    assert low.dtype == dtype and torch.equal(low, out.to(dtype))
    return (out + low.to(out.dtype)) / 2


def check(layer: LayerSettings, p: Parameters, stream: Tensor, computing: torch.dtype, bound: float) -> None:
    """The result and every gradient against the definition in float64."""
    exact = Parameters(*(v.detach().double().requires_grad_() for v in given(p)))
    exact_stream = stream.detach().double().requires_grad_()
    out, want = run(stream, layer, p, computing), by_definition(exact_stream, layer, exact)
    assert out.dtype == stream.dtype and relative_error(out.detach(), want.detach()) < bound
    dout = torch.randn(want.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64).to(stream.device)
    got = torch.autograd.grad(out, (stream, *given(p)), dout.to(stream.dtype))
    expected = torch.autograd.grad(want, (exact_stream, *given(exact)), dout)
    for name, a, b in zip(("stream", *FIELDS), got, expected, strict=True):
        if name == "key_bias":  # softmax does not see it
            assert a.abs().max() < bound and b.abs().max() < 1e-12
        else:
            assert a.dtype == stream.dtype and b.norm() > 0 and relative_error(a, b) < bound, name


@pytest.mark.parametrize(
    ("dtype", "computing", "bound"),
    [
        (torch.float64, torch.float64, 1e-11),
        (torch.float32, torch.float32, 2e-5),
        (torch.float32, torch.bfloat16, 4e-2),
        (torch.float32, torch.float16, 5e-3),
    ],
)
@pytest.mark.parametrize("dropouts", [OFF, ON])
def test_results_and_gradients(
    dtype: torch.dtype, computing: torch.dtype, bound: float, dropouts: tuple[float, float, float]
) -> None:
    layer, p, stream = make_layer(dropouts), make_parameters(D, F, dtype), make_stream(sum(LENGTHS), D, dtype)
    check(layer, p, stream, computing, bound)


@pytest.mark.parametrize(
    ("trained", "products"),
    [
        ({"ffn_norm_weight"}, 0),
        ({"value_bias", "ffn_in_weight"}, 1),
        ({"key_weight"}, 1),
        ({"attention_out_weight", "ffn_out_weight", "query_bias"}, 2),
    ],
)
@pytest.mark.parametrize("from_stream", [True, False])
def test_frozen_parameters_cost_nothing(
    trained: set[str], products: int, from_stream: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is trained has the gradient it always has, what is frozen has none, and its matrix product does not run."""
    layer, p, stream = make_layer(ON), make_parameters(D, F), make_stream(sum(LENGTHS), D)
    weights = torch.randn(stream.shape, dtype=torch.float64)
    (run(stream, layer, p, torch.float64) * weights).sum().backward()
    some = Parameters(*(v.detach().requires_grad_(name in trained) for name, v in zip(FIELDS, given(p), strict=True)))
    weight_gradient = Mock(wraps=module.weight_gradient)
    monkeypatch.setattr(module, "weight_gradient", weight_gradient)
    beside = stream.detach().requires_grad_(from_stream)
    (run(beside, layer, some, torch.float64) * weights).sum().backward()
    assert weight_gradient.call_count == products
    assert torch.equal(gradient(beside), gradient(stream)) if from_stream else beside.grad is None
    for name, got, whole in zip(FIELDS, given(some), given(p), strict=True):
        assert torch.equal(gradient(got), gradient(whole)) if name in trained else got.grad is None


def test_layers_may_share_their_parameters() -> None:
    layer, p, stream = make_layer(ON), make_parameters(D, F), make_stream(sum(LENGTHS), D)
    twice = run(run(stream, layer, p, torch.float64), layer, p, torch.float64)
    want = by_definition(by_definition(stream, layer, p), layer, p)
    dout = torch.randn(want.shape, dtype=torch.float64)
    for got, expected in zip(
        torch.autograd.grad(twice, given(p), dout), torch.autograd.grad(want, given(p), dout), strict=True
    ):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-11)


def test_bits_are_the_same_without_a_graph_and_again() -> None:
    layer, p, stream = make_layer(ON), make_parameters(D, F, torch.float32), make_stream(sum(LENGTHS), D, torch.float32)
    kept = [run(stream, layer, p, torch.bfloat16) for _ in range(2)]
    with torch.no_grad():
        without = run(stream, layer, p, torch.bfloat16)
    with torch.inference_mode():
        inference = run(stream, layer, p, torch.bfloat16)
    assert not without.requires_grad and all(torch.equal(kept[0], other) for other in (kept[1], without, inference))
    gradients = [torch.autograd.grad(out.square().sum(), (stream, *given(p))) for out in kept]
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("computing", [torch.float32, torch.bfloat16, torch.float16])
def test_a_pass_without_a_graph_has_the_bits_of_one_with_it(computing: torch.dtype) -> None:
    """Through three layers, in the stream and in what matrix products read of it."""
    layer, p, stream = (
        make_layer(ON),
        make_parameters(D, F, torch.float32),
        make_stream(sum(LENGTHS), D, torch.float32).detach(),
    )
    read, rounded = rounded_weights(p, computing), stream.to(computing)
    kept: tuple[Tensor, Tensor] = stream, rounded
    out = stream
    for _ in range(3):
        kept = transformer_layer(*kept, layer, read, p)
        out, rounded, _ = without_graph(out, rounded, layer, read, p)
        assert torch.equal(out, kept[0]) and torch.equal(rounded, kept[1])
    assert out.dtype == torch.float32


@pytest.mark.parametrize(("dtype", "computing"), [(torch.float64, torch.float64), (torch.float32, torch.bfloat16)])
def test_products_of_a_pass_without_a_graph_are_used_and_change_no_bit(
    dtype: torch.dtype, computing: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer, p, stream = make_layer(ON), make_parameters(D, F, dtype), make_stream(sum(LENGTHS), D, dtype)
    inputs = stream, stream if dtype == computing else stream.to(computing), layer, rounded_weights(p, computing), p
    out, rounded, saved = without_graph(*inputs)
    assert not any(x.requires_grad for x in (out, rounded, *saved)) and saved.ffn_out.dtype == computing

    def gradients(saved: SavedActivations | None) -> list[Tensor]:
        results = transformer_layer(*inputs, saved)
        squares = torch.stack([x.double().square().sum() for x in results])
        return [*results, *torch.autograd.grad(squares.sum(), (stream, *given(p)))]

    expected = gradients(None)
    assert all(torch.equal(a, b) for a, b in zip(expected[:2], (out, rounded), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(expected, gradients(saved), strict=True))
    backward = Mock(wraps=module.attention_backward)
    monkeypatch.setattr(module, "attention_backward", backward)
    gradients(saved)
    assert backward.call_args.args[2][1].data_ptr() == saved.lse.data_ptr()  # the kernels of a GPU go on with it
    for name in ("context", "ffn_out"):  # they are what the layer goes on with
        others = gradients(saved._replace(**{name: getattr(saved, name) + 1}))
        assert not all(torch.equal(a, b) for a, b in zip(expected, others, strict=True)), name


@pytest.mark.parametrize("used", [0, 1])
def test_either_result_alone_has_its_gradient(used: int) -> None:
    """An expanded gradient, as a sum has it, is no trap; nor is the other result's, which is None."""
    layer, p, stream = (
        make_layer(OFF),
        make_parameters(D, F, torch.float32),
        make_stream(sum(LENGTHS), D, torch.float32),
    )
    transformer_layer(stream, stream.bfloat16(), layer, rounded_weights(p, torch.bfloat16), p)[used].sum().backward()
    assert p.ffn_norm_bias is not None and p.ffn_norm_bias.grad is not None  # Σ over rows of 1
    torch.testing.assert_close(p.ffn_norm_bias.grad, torch.full((D,), float(len(stream))))


def test_it_is_differentiable_once_and_before_its_parameters_change() -> None:
    layer, p, stream = make_layer(ON), make_parameters(D, F), make_stream(sum(LENGTHS), D)
    (first,) = torch.autograd.grad(run(stream, layer, p, torch.float64).square().sum(), stream, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()
    out = run(stream, layer, p, torch.float64)
    with torch.no_grad():
        p.ffn_norm_weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()
