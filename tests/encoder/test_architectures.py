"""What puts an architecture on the allow-list: padding changes nothing, every parameter is trained, dropout replays
bitwise.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only
from transformers import AutoConfig, AutoModel

from retriever.config import ConfigError, ModelConfig
from retriever.data.layout import Packed, Padded, pack_rows, pad_rows
from retriever.encoder.architectures import DECODERS, ENCODERS, PACKED, check_lengths, longest_input
from retriever.encoder.dual_encoder import DualEncoder
from retriever.encoder.pooling import PoolingMode
from retriever.rng import RngState
from tests.tiny import MAX_POSITIONS, save_tiny_model

LENGTHS = (3, 41, 17, 90, 1)
WITHOUT_CHECKPOINTING = {"albert", "mpnet"}


@pytest.fixture(scope="module", params=sorted(ENCODERS | DECODERS))
def encoder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> DualEncoder:
    folder = save_tiny_model(tmp_path_factory.mktemp("model"), request.param)
    return DualEncoder.from_pretrained(ModelConfig(str(folder), passage_max_tokens=MAX_POSITIONS))


@pytest.fixture
def rows(encoder: DualEncoder) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(5, encoder.passage_tower.config.vocab_size, (n,), generator=generator) for n in LENGTHS]


def _padded(encoder: DualEncoder, rows: list[Tensor]) -> Padded:
    return pad_rows([row.numpy() for row in rows], encoder.passage_tower.config.pad_token_id)


@pytest.mark.parametrize("pooling", ["cls", "mean", "last"])
def test_padding_changes_no_embedding(encoder: DualEncoder, rows: list[Tensor], pooling: PoolingMode) -> None:
    alone_encoder = DualEncoder(encoder.query_tower, encoder.passage_tower, pooling=pooling).double().eval()
    with torch.no_grad():
        together = alone_encoder("passage", _padded(encoder, rows))
        alone = torch.cat([alone_encoder("passage", _padded(encoder, [row])) for row in rows])
    alone_encoder.float().train()
    assert (alone[0] - alone[1]).abs().max() > 0.01
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-6)


def test_every_parameter_receives_a_gradient(encoder: DualEncoder, rows: list[Tensor]) -> None:
    encoder.zero_grad()
    embeddings = encoder("passage", _padded(encoder, rows))
    (embeddings * torch.randn(embeddings.shape, generator=torch.Generator().manual_seed(1))).sum().backward()
    untrained = [name for name, parameter in encoder.named_parameters() if parameter.grad is None]
    assert untrained == []
    assert all(torch.isfinite(p.grad).all() for p in encoder.parameters() if p.grad is not None)
    assert sum(float(p.grad.abs().sum()) for p in encoder.parameters() if p.grad is not None) > 0.1


@pytest.mark.parametrize("pooling", ["cls", "mean", "last"])
def test_packed_texts_have_the_embeddings_of_padded_ones(
    encoder: DualEncoder, rows: list[Tensor], pooling: PoolingMode
) -> None:
    """Embeddings and gradients of every parameter, in float64 (decoders' norms compute in float32): no text sees its
    neighbours.
    """
    tolerance = 1e-6 if encoder.passage_tower.config.model_type in DECODERS else 1e-11
    padded = DualEncoder(*[copy.deepcopy(encoder.passage_tower).double().eval()] * 2, pooling=pooling).eval()
    packed = copy.deepcopy(padded)
    if encoder.passage_tower.config.model_type not in PACKED:
        with pytest.raises(ConfigError, match=r"model\.attention: packed, but a '[\w-]+' model ignores the boundaries"):
            packed.pack()
        return
    packed.pack()
    expected, found = (
        padded("passage", _padded(encoder, rows)),
        packed("passage", pack_rows([row.numpy() for row in rows])),
    )
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)
    direction = torch.randn(expected.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for embeddings in (expected, found):
        (embeddings * direction).sum().backward()
    for (name, p), (_, q) in zip(packed.named_parameters(), padded.named_parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=100 * tolerance, atol=tolerance, msg=f"{name}: {{}}".format)


def test_a_text_may_spell_out_the_padding_token(encoder: DualEncoder) -> None:
    """Packed, it has the positions that the model gives it padded: some count the padding token nowhere."""
    config = encoder.passage_tower.config
    if config.model_type not in PACKED:
        return
    pad, tokens = config.pad_token_id, torch.arange(6, 16).numpy()
    rows = [np.insert(tokens, places, pad) for places in ([], [3], [0, 0, 0], [2, 2, 5, 10])]
    padded = DualEncoder(*[copy.deepcopy(encoder.passage_tower).double().eval()] * 2, pooling="mean").eval()
    packed = copy.deepcopy(padded)
    packed.pack()
    with torch.no_grad():
        expected = padded("passage", pad_rows(rows, pad))
        torch.testing.assert_close(packed("passage", pack_rows(rows)), expected, rtol=0, atol=1e-6)
    assert (expected[1:] - expected[0]).abs().amax(dim=1).min() > 1e-4


def _assert_dropout_replays(encoder: DualEncoder, tokens: Padded | Packed, device: str = "cpu") -> None:
    state = RngState.capture(torch.device(device))
    with torch.no_grad():
        first = encoder("passage", tokens)
    other = encoder("passage", tokens)
    with state.restored():
        again = encoder("passage", tokens)
    assert again.requires_grad
    assert not torch.equal(first, other), "dropout is off"
    assert torch.equal(first, again)


def test_packed_dropout_replays_bitwise_under_its_rng_state(encoder: DualEncoder, rows: list[Tensor]) -> None:
    packed = DualEncoder(*[copy.deepcopy(encoder.passage_tower)] * 2, pooling="mean").train()
    if packed.can_pack:
        packed.pack()
        _assert_dropout_replays(packed, pack_rows([row.numpy() for row in rows]))


@pytest.mark.filterwarnings("ignore:.*script_method. is deprecated:DeprecationWarning")  # torch's own
def test_compiled_layers_see_gradients_enabled_in_both_passes(
    encoder: DualEncoder, rows: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stand-in for torch.compile rounds differently for each kind of graph, as the compiler does."""

    def compiled(call: Callable[..., Any], **_: Any) -> Callable[..., Any]:
        def run(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
            kind = 1.0 + 1e-3 * torch.is_grad_enabled() + 1e-2 * hidden.requires_grad
            return tree_map_only(Tensor, lambda x: x * kind, call(hidden, *args, **kwargs))

        return run

    monkeypatch.setattr(torch, "compile", compiled)
    plain = DualEncoder(*[copy.deepcopy(encoder.passage_tower)] * 2, pooling="mean").train()
    plain.passage_tower.get_input_embeddings().requires_grad_(False)
    plain.compile_layers()
    _assert_dropout_replays(plain, _padded(encoder, rows))
    with torch.no_grad():
        assert not plain("passage", _padded(encoder, rows)).requires_grad


@pytest.mark.parametrize("checkpointing", [False, True])
def test_dropout_replays_bitwise_under_its_rng_state(
    encoder: DualEncoder, rows: list[Tensor], checkpointing: bool
) -> None:
    with _gradient_checkpointing(encoder, checkpointing):
        _assert_dropout_replays(encoder, _padded(encoder, rows))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
def test_dropout_replays_bitwise_on_a_gpu(encoder: DualEncoder, rows: list[Tensor], dtype: torch.dtype | None) -> None:
    tokens = _padded(encoder, rows).map(lambda t: t.to("cuda:0"))
    there = DualEncoder(encoder.query_tower, encoder.passage_tower, pooling="mean", autocast_dtype=dtype).to("cuda:0")
    _assert_dropout_replays(there, tokens, "cuda:0")
    there.to("cpu")


def test_gradient_checkpointing_changes_no_gradient(encoder: DualEncoder, rows: list[Tensor]) -> None:
    inputs, gradients = _padded(encoder, rows), []
    for checkpointing in (False, True):
        with _gradient_checkpointing(encoder, checkpointing):
            encoder.zero_grad()
            torch.manual_seed(3)
            embeddings = encoder("passage", inputs)
            torch.manual_seed(4)  # the backward pass must not depend on where the generator stands
            (embeddings[:, 0].sum()).backward()
            gradients.append(torch.cat([p.grad.flatten() for p in encoder.parameters() if p.grad is not None]))
    assert gradients[0].norm() > 0
    assert torch.equal(*gradients)


@contextmanager
def _gradient_checkpointing(encoder: DualEncoder, enabled: bool) -> Iterator[None]:
    layers: list[Any] = [module for module in encoder.modules() if hasattr(module, "gradient_checkpointing")]
    if enabled and encoder.passage_tower.config.model_type in WITHOUT_CHECKPOINTING:
        with pytest.raises(ConfigError, match=r"model\.gradient_checkpointing: true, but \w+ does not support it"):
            encoder.enable_gradient_checkpointing()
    elif enabled:
        encoder.enable_gradient_checkpointing()
        assert any(layer.gradient_checkpointing for layer in layers)
    yield
    for layer in layers:
        layer.gradient_checkpointing = False


def test_an_unverified_architecture_is_refused(tmp_path: Path) -> None:
    sizes = {
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "vocab_size": 99,
    }
    config = AutoConfig.for_model("roformer", **sizes)
    AutoModel.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=rf"^model {tmp_path} is a 'roformer' model.*expected one of albert"):
        DualEncoder.from_pretrained(ModelConfig(str(tmp_path)))


@pytest.mark.parametrize("architecture", ["bert", "roberta", "gpt2"])
def test_lengths_beyond_the_positions_are_refused(architecture: str, tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path, architecture)
    config = AutoConfig.from_pretrained(folder)
    assert longest_input(config) == MAX_POSITIONS
    check_lengths(config, MAX_POSITIONS, MAX_POSITIONS)
    with pytest.raises(
        ConfigError, match=rf"model\.passage_max_tokens: {MAX_POSITIONS + 1} tokens.*at most {MAX_POSITIONS}"
    ):
        DualEncoder.from_pretrained(ModelConfig(str(folder), passage_max_tokens=MAX_POSITIONS + 1))
    # The limit is the true one: one token more fails in the model itself.
    encoder = DualEncoder.from_pretrained(ModelConfig(str(folder))).eval()
    ids = torch.full((1, MAX_POSITIONS), 9)
    assert encoder("query", Padded(ids, torch.ones_like(ids))).shape == (1, 32)
    ids = torch.full((1, MAX_POSITIONS + 1), 9)
    with pytest.raises((IndexError, RuntimeError)):
        encoder("query", Padded(ids, torch.ones_like(ids)))
