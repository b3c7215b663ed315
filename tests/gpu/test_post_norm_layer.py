"""The post-norm layer: against its definition, as exact as the library's layer under autocast, and repeatable."""

from __future__ import annotations

import re
from collections import deque
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import BertConfig, BertModel, PreTrainedModel

from kernels.layers import gelu_product
from kernels.layers.layer import SavedActivations
from retriever.encoder.fused_layers import fuse
from retriever.encoder.packed_attention import use_packed_attention
from retriever.rng import RngState
from tests.gpu.devices import toy
from tests.kernels.attention_oracle import texts
from tests.kernels.test_post_norm_layer import ON, check, given, make_layer, make_parameters, make_stream, run

LENGTHS = [4, 256, 17, 90, 33, 64, 5, 128, 201, 76]


def lengths_on(device: str) -> list[int]:
    return [*toy(device, *LENGTHS, most=20)]


@pytest.fixture
def gelu_in_the_product(monkeypatch: pytest.MonkeyPatch) -> None:
    """On Hopper the widened product and its GELU as one kernel, in chunks of any size."""
    monkeypatch.setattr(gelu_product, "FUSED_FROM", 0)


@pytest.mark.parametrize(("computing", "bound"), [(torch.float32, 1e-4), (torch.bfloat16, 4e-2)])
def test_results_and_gradients(computing: torch.dtype, bound: float, device: str) -> None:
    lengths = lengths_on(device)
    p = make_parameters(128, 512, torch.float32, scale=0.05, device=device)
    stream = make_stream(sum(lengths), 128, torch.float32, device)
    check(make_layer(ON, lengths, device=device), p, stream, computing, bound)


def make_tower(device: str, dropout: float) -> Any:
    """Two layers of BERT-base on packed texts, their weights as wide as trained ones; on the CPU narrower."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = (
        {}
        if device == "cuda"
        else {"hidden_size": 96, "num_attention_heads": 4, "intermediate_size": 192, "vocab_size": 100}
    )
    config = BertConfig(num_hidden_layers=2, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout, **sizes)
    tower: Any = BertModel(config, add_pooling_layer=False)
    tower.to(device)
    with torch.no_grad():
        for name, p in tower.named_parameters():
            p.normal_(1.0, 0.1) if name.endswith("LayerNorm.weight") else p.normal_(0.0, 0.04)
    use_packed_attention(tower)
    return tower


def encode(tower: PreTrainedModel, hidden: Tensor, dtype: torch.dtype | None, **more: Any) -> Tensor:
    """What the layers make of hidden [T, D] under autocast to `dtype`."""
    encoder: Any = tower.encoder
    starts, longest = texts(lengths_on(hidden.device.type), hidden.device.type)
    with torch.autocast(hidden.device.type, dtype=dtype, enabled=dtype is not None):
        given = {"packed_starts": starts, "packed_longest": longest, "packed_positions": starts} | more
        return encoder(hidden[None], **given).last_hidden_state[0]  # BERT's layers read no positions


def gradients(tower: PreTrainedModel, hidden: Tensor, dtype: torch.dtype | None, **more: Any) -> dict[str, Tensor]:
    """By name: at the layers' parameters, at their input, and the output itself."""
    out = encode(tower, hidden, dtype, **more)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).to(out)
    named = {name: p for name, p in tower.named_parameters() if name.startswith("encoder.")}
    found = torch.autograd.grad(out, (hidden, *named.values()), weights)
    return dict(zip(("input", *named), found, strict=True)) | {"output": out.detach()}


@pytest.mark.parametrize("fused_from", [0, gelu_product.FUSED_FROM], ids=["GELU in the product", "GELU after it"])
def test_as_exact_as_the_library_s_layers(fused_from: int, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Errors against float64, dropout off: at most 1.1 times those of transformers' layers under autocast, for each
    kind of parameter.

    At toy size chance is larger: a bias is two vectors of 96 numbers.
    """
    monkeypatch.setattr(gelu_product, "FUSED_FROM", fused_from)
    library, fused = make_tower(device, 0.0), make_tower(device, 0.0)
    hidden = make_stream(sum(lengths_on(device)), library.config.hidden_size, torch.float32, device)
    fuse(fused)
    theirs, ours = gradients(library, hidden, torch.bfloat16), gradients(fused, hidden, torch.bfloat16)
    exact = gradients(library.double(), hidden.detach().double().requires_grad_(), None)
    assert ours.keys() == exact.keys()
    squares: dict[
        str, Tensor
    ] = {}  # by kind: of our error, of the library's; a single vector's error is too much a matter of chance
    for name, want in exact.items():
        assert want.norm() > 0 or name.endswith("key.bias")
        errors = torch.stack([(found[name].double() - want).square().sum() for found in (ours, theirs)])
        kind = re.sub(r"layer\.\d+", "layer", name)
        squares[kind] = squares.get(kind, 0) + errors
    ratios = {kind: (both[0] / both[1]).sqrt().item() for kind, both in squares.items()}
    print("error over the library's:", {kind: round(ratio, 2) for kind, ratio in ratios.items()})
    assert max(ratios.values()) <= (1.1 if device == "cuda" else 1.3), ratios


@pytest.mark.usefixtures("gelu_in_the_product")
def test_repeats_and_passes_without_a_graph_give_the_same_bits(device: str) -> None:
    tower = make_tower(device, 0.1)
    hidden = make_stream(sum(lengths_on(device)), tower.config.hidden_size, torch.float32, device)
    fuse(tower)
    state = RngState.capture(torch.device(device))
    products = deque[SavedActivations]()
    with torch.no_grad():
        without = encode(tower, hidden, torch.bfloat16, saved_activations=products)
    assert len(products) == 2
    runs = []
    for kept in (None, None, products):
        with state.restored():
            runs.append(gradients(tower, hidden, torch.bfloat16, saved_activations=kept))
    assert torch.equal(without, runs[0]["output"]) and not products
    for other in runs[1:]:
        assert all(runs[0][name].any() and torch.equal(runs[0][name], other[name]) for name in runs[0])
    assert not torch.equal(encode(tower, hidden, torch.bfloat16), without)  # other masks


def test_no_token_is_no_error(device: str) -> None:
    layer, p = (
        make_layer(ON, [0, 0], device=device, longest=1),
        make_parameters(128, 512, torch.float32, device=device),
    )
    stream = make_stream(0, 128, torch.float32, device)
    run(stream, layer, p, torch.bfloat16).sum().backward()
    assert all(v.grad is not None and v.grad.shape == v.shape and not v.grad.any() for v in (stream, *given(p)))
