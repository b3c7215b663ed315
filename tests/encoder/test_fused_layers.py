"""Fused layers are the library's layers: same embeddings, same gradients, same names; dropout replays bitwise."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from transformers import AutoConfig, AutoModel

from retriever.config import ConfigError, ModelConfig
from retriever.data.layout import Packed, pack_rows
from retriever.encoder import fused_layers
from retriever.encoder.dual_encoder import DualEncoder
from retriever.encoder.fused_layers import FAMILY, FusedEmbeddings, FusedLayers
from retriever.encoder.text_batches import inference
from retriever.rng import RngState
from tests.kernels.oracle import gradient
from tests.tiny import MAX_POSITIONS, save_tiny_model

LENGTHS = (90, 41, 17, 3, 1)


@pytest.fixture(scope="module", params=sorted(FAMILY))
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model"), request.param)


@pytest.fixture
def tokens() -> Packed:
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(5, 198, (n,), generator=generator).numpy() for n in LENGTHS]
    rows[0][3], rows[1][5] = 0, 1  # padding's own tokens within a text: their rows get no gradient
    return pack_rows(rows)


def _packed(folder: Path, *, fused: bool) -> DualEncoder:
    encoder = DualEncoder.from_pretrained(ModelConfig(str(folder), passage_max_tokens=MAX_POSITIONS))
    encoder.pack()
    if fused:
        encoder.fuse_layers()
    return encoder


def test_embeddings_and_gradients_are_the_library_s(folder: Path, tokens: Packed) -> None:
    """In float64, dropout off: 1e-12 for embeddings, every parameter's gradient to 1e-9."""
    encoders = [_packed(folder, fused=fused).double().eval() for fused in (False, True)]
    expected, found = (encoder("passage", tokens) for encoder in encoders)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    direction = torch.randn(expected.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for embeddings in (expected, found):
        (embeddings * direction).sum().backward()
    named = [dict(encoder.named_parameters()) for encoder in encoders]
    assert named[0].keys() == named[1].keys()
    for name, p in named[0].items():
        torch.testing.assert_close(named[1][name].grad, p.grad, rtol=1e-9, atol=1e-12, msg=f"{name}: {{}}".format)
    assert any(isinstance(module, FusedLayers) for module in encoders[1].modules())
    fused = type(encoders[1].passage_tower.embeddings) is FusedEmbeddings
    assert fused == (
        encoders[1].passage_tower.config.model_type != "electra"
    )  # whose tables are narrower than its layers


def test_dropout_draws_at_every_place_and_replays_bitwise(folder: Path, tokens: Packed) -> None:
    encoder = _packed(folder, fused=True)
    state = RngState.capture(torch.device("cpu"))
    with torch.no_grad():
        first = encoder("passage", tokens)
    other = encoder("passage", tokens)
    with state.restored():
        again = encoder("passage", tokens)
    assert again.requires_grad and torch.equal(first, again) and not torch.equal(first, other)
    layer = "encoder.layer.0"
    names = (f"{layer}.attention.self", f"{layer}.attention.output", f"{layer}.output", "embeddings")
    places = [encoder.passage_tower.get_submodule(f"{name}.dropout") for name in names]
    seen = []
    for place in places:  # one at a time
        for other_place in encoder.modules():
            if isinstance(other_place, torch.nn.Dropout):
                other_place.p = 0.5 if other_place is place else 0.0
        seen.append(encoder("passage", tokens).detach())
    encoder.eval()
    seen.append(encoder("passage", tokens).detach())
    assert all(not torch.equal(a, b) for i, a in enumerate(seen) for b in seen[:i])


def test_a_dropout_that_is_switched_off_by_hand_draws_nothing(folder: Path, tokens: Packed) -> None:
    encoder = _packed(folder, fused=True).eval()
    expected = encoder("passage", tokens)
    encoder.train()
    places = [module for module in encoder.modules() if isinstance(module, torch.nn.Dropout)]
    for place in places:
        place.eval()
    assert torch.equal(encoder("passage", tokens), expected)
    encoder.passage_tower.get_submodule("embeddings.dropout").train()
    assert not torch.equal(encoder("passage", tokens), expected)


@pytest.mark.parametrize("setting", [{"sparse": True}, {"scale_grad_by_freq": True}, {"max_norm": 1.0}])
def test_tables_that_are_no_plain_ones_stay_the_library_s(tmp_path: Path, setting: dict[str, object]) -> None:
    encoder = DualEncoder.from_pretrained(
        ModelConfig(str(save_tiny_model(tmp_path / "bert")), passage_max_tokens=MAX_POSITIONS)
    )
    for name, value in setting.items():
        setattr(encoder.passage_tower.get_submodule("embeddings.word_embeddings"), name, value)
    encoder.pack()
    encoder.fuse_layers()
    assert (
        type(encoder.passage_tower.embeddings) is not FusedEmbeddings
        and type(encoder.passage_tower.encoder) is FusedLayers
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_tower_in_half_precision_encodes_with_a_graph_and_without(
    tmp_path: Path, tokens: Packed, dtype: torch.dtype
) -> None:
    encoder = _fused_bert(tmp_path, None).to(dtype)
    with torch.no_grad():
        without = encoder("passage", tokens)
    assert without.isfinite().all() and torch.equal(without, encoder("passage", tokens))


def test_weights_keep_their_names_in_memory_and_on_disk(folder: Path, tmp_path: Path) -> None:
    plain, fused = _packed(folder, fused=False), _packed(folder, fused=True)
    assert list(plain.state_dict()) == list(fused.state_dict())
    for name, encoder in (("plain", plain), ("fused", fused)):
        encoder.passage_tower.save_pretrained(tmp_path / name)
    files = [tmp_path / name / "model.safetensors" for name in ("plain", "fused")]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert (tmp_path / "plain" / "config.json").read_text() == (tmp_path / "fused" / "config.json").read_text()


def _fused_bert(tmp_path: Path, dtype: torch.dtype | None = torch.bfloat16) -> DualEncoder:
    encoder = _packed(save_tiny_model(tmp_path / "bert"), fused=True).eval()
    encoder.autocast_dtype = dtype
    return encoder


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_near_the_library_s(folder: Path, tokens: Packed, dtype: torch.dtype) -> None:
    """Embeddings that a linear layer projects (electra's) come rounded; parameters get gradients in their own dtype all
    the same.
    """
    exact, plain, fused = (
        _packed(folder, fused=False).double(),
        _packed(folder, fused=False),
        _packed(folder, fused=True),
    )
    plain.autocast_dtype = fused.autocast_dtype = dtype
    want, theirs, ours = (encoder.eval()("passage", tokens) for encoder in (exact, plain, fused))
    direction = torch.randn(want.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for embeddings in (want, theirs, ours):
        (embeddings * direction).sum().backward()
    assert ours.dtype == torch.float32 and (ours - want).norm() <= 1.2 * (theirs - want).norm()
    errors = [
        sum(float((gradient(p).double() - gradient(q)).square().sum()) for p, q in _pairs(encoder, exact))
        for encoder in (fused, plain)
    ]
    assert all(gradient(p).dtype == p.dtype and bool(gradient(p).any()) for p in fused.parameters())
    assert errors[0] ** 0.5 <= 1.2 * errors[1] ** 0.5


def test_encoding_is_as_exact_in_a_stream_of_float16(folder: Path, tokens: Packed) -> None:
    """bfloat16 products round far more than the stream does. A pass outside of `inference` has its own bits again."""
    exact, fused = _packed(folder, fused=False).double().eval(), _packed(folder, fused=True).eval()
    fused.autocast_dtype = torch.bfloat16
    with torch.no_grad():
        want, trained = exact("passage", tokens), fused("passage", tokens)
        with inference(fused):
            encoded = fused("passage", tokens)
        again = fused("passage", tokens)
    assert encoded.dtype == torch.float32 and not torch.equal(encoded, trained) and torch.equal(again, trained)
    assert (encoded - want).norm() <= 1.2 * (trained - want).norm()


def _pairs(first: DualEncoder, second: DualEncoder) -> list[tuple[torch.nn.Parameter, torch.nn.Parameter]]:
    return list(zip(first.parameters(), second.parameters(), strict=True))


def _step(optimizer: Callable[..., torch.optim.Optimizer], **settings: object) -> Callable[[DualEncoder, Packed], None]:
    def step(encoder: DualEncoder, tokens: Packed) -> None:
        encoder("passage", tokens).square().sum(1).add(encoder("passage", tokens)[:, 0]).sum().backward()
        optimizer(encoder.parameters(), lr=0.05, **settings).step()

    return step


def _layers(encoder: DualEncoder) -> FusedLayers:
    layers = encoder.passage_tower.get_submodule("encoder")
    assert isinstance(layers, FusedLayers)
    return layers


def _load(encoder: DualEncoder, *, assign: bool) -> None:
    for _ in range(2):  # twice: what was loaded first is freed, and its memory may be used again
        encoder.load_state_dict(
            {name: v + 0.1 * torch.randn_like(v) for name, v in encoder.state_dict().items()}, assign=assign
        )


@pytest.mark.parametrize(
    "change",
    [
        _step(torch.optim.AdamW, fused=True),
        _step(torch.optim.AdamW, foreach=True),
        _step(torch.optim.SGD, foreach=False),
        _step(torch.optim.SGD, fused=True),
        lambda encoder, _: _load(encoder, assign=False),
        lambda encoder, _: _load(encoder, assign=True),
        lambda encoder, _: encoder.half().float(),
        lambda encoder, _: encoder.bfloat16().double(),
    ],
    ids=["fused AdamW", "AdamW", "SGD", "fused SGD", "load", "assign", "half and back", "to double"],
)
def test_a_change_of_weights_is_seen(
    tmp_path: Path, tokens: Packed, change: Callable[[DualEncoder, Packed], None]
) -> None:
    encoder = _fused_bert(tmp_path)
    with torch.no_grad():
        before = encoder("passage", tokens)
    change(encoder, tokens)
    with torch.no_grad():
        found = encoder("passage", tokens)
        _layers(encoder)._rounded.clear()
        expected = encoder("passage", tokens)
    assert torch.equal(found, expected) and not torch.equal(before.double(), found.double())


def test_weights_are_rounded_once_a_step(tmp_path: Path, tokens: Packed, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder, rounded = _fused_bert(tmp_path), Mock(wraps=fused_layers.rounded_weights)
    monkeypatch.setattr(fused_layers, "rounded_weights", rounded)
    step = _step(torch.optim.AdamW, fused=True)
    step(encoder, tokens)
    assert rounded.call_count == 2  # layers, of two chunks
    step(encoder, tokens)
    assert rounded.call_count == 4


def test_copies_have_their_own_weights(tmp_path: Path, tokens: Packed) -> None:
    encoder = _fused_bert(tmp_path)
    with torch.no_grad():
        before = encoder("passage", tokens)
    other = copy.deepcopy(encoder)
    assert not other.training and not _layers(other)._rounded
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(1.5)
        assert not torch.equal(other("passage", tokens), before) and torch.equal(encoder("passage", tokens), before)
    other("passage", tokens)[:, 0].sum().backward()
    assert all(p.grad is None for p in encoder.parameters()) and all(p.grad is not None for p in other.parameters())


def test_training_after_encoding_in_inference_mode(tmp_path: Path, tokens: Packed) -> None:
    encoder = _fused_bert(tmp_path)
    with torch.inference_mode():
        first = encoder("passage", tokens)
    again = encoder("passage", tokens)
    again[:, 0].sum().backward()
    assert torch.equal(first, again) and all(p.grad is not None and p.grad.any() for p in encoder.parameters())


def test_frozen_layers_and_embeddings_get_no_gradient(tmp_path: Path, tokens: Packed) -> None:
    encoder = _fused_bert(tmp_path, None)
    tower = encoder.passage_tower
    for name in ("embeddings", "encoder.layer.0"):
        tower.get_submodule(name).requires_grad_(False)
    encoder("passage", tokens)[:, 0].sum().backward()
    trained = {id(p) for p in tower.get_submodule("encoder.layer.1").parameters()}
    assert all(
        (p.grad is not None and p.grad.any()) if id(p) in trained else p.grad is None for p in encoder.parameters()
    )


def test_what_cannot_be_fused_is_refused(tmp_path: Path) -> None:
    encoder = DualEncoder.from_pretrained(ModelConfig(str(save_tiny_model(tmp_path / "a", "modernbert"))))
    assert not encoder.can_fuse
    with pytest.raises(ConfigError, match="model.fused: true, but the layers of a 'modernbert' model are not known"):
        encoder.fuse_layers()
    config = AutoConfig.from_pretrained(save_tiny_model(tmp_path / "b"), hidden_act="relu")
    AutoModel.from_config(config).save_pretrained(tmp_path / "c")
    (tmp_path / "c").joinpath("tokenizer.json").write_bytes((tmp_path / "b" / "tokenizer.json").read_bytes())
    relu = copy.deepcopy(DualEncoder.from_pretrained(ModelConfig(str(tmp_path / "c"))))
    assert not relu.can_fuse
