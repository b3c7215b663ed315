"""Fused layers are the library's layers: same embeddings, same gradients, same names; dropout replays bitwise."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModel
from transformers.models.gemma import modeling_gemma
from transformers.models.gemma3 import modeling_gemma3
from transformers.models.llama import modeling_llama
from transformers.models.mistral import modeling_mistral
from transformers.models.modernbert import modeling_modernbert
from transformers.models.qwen2 import modeling_qwen2
from transformers.models.qwen3 import modeling_qwen3

from retriever.config import ConfigError, LoraConfig, ModelConfig
from retriever.data.layout import Packed, pack_rows, pad_rows
from retriever.encoder import fused_layers
from retriever.encoder.dual_encoder import DualEncoder
from retriever.encoder.fused_embeddings import FusedEmbeddings
from retriever.encoder.fused_layers import FusedLayers
from retriever.encoder.fused_specs import BERT_FAMILY, FAMILY, angles
from retriever.encoder.lora import adapt
from retriever.encoder.text_batches import inference
from retriever.rng import RngState
from tests.kernels.oracle import gradient
from tests.tiny import MAX_POSITIONS, save_tiny_model

LENGTHS = (90, 41, 17, 3, 1)
NEEDED: dict[str, dict[str, Any]] = {
    "modernbert": {"mlp_dropout": 0.0},
    "qwen2": {"use_sliding_window": True, "sliding_window": 20, "max_window_layers": 1},
}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}


@pytest.fixture(scope="module", params=sorted(FAMILY))
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model"), request.param, **NEEDED.get(request.param, {}))


@pytest.fixture
def tokens() -> Packed:
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(5, 198, (n,), generator=generator).numpy() for n in LENGTHS]
    rows[0][3], rows[1][5] = 0, 1  # padding's own tokens within a text: their rows get no gradient
    return pack_rows(rows)


def _loaded(folder: Path, lora: LoraConfig | None = None) -> DualEncoder:
    """Adapters are as after some steps: B is no longer zero."""
    encoder = DualEncoder.from_pretrained(ModelConfig(str(folder), passage_max_tokens=MAX_POSITIONS))
    if lora is not None:
        adapt(encoder.towers, lora, seed=0)
        generator = torch.Generator().manual_seed(3)
        for name, p in encoder.named_parameters():
            if name.endswith("lora_b"):
                torch.nn.init.normal_(p, std=0.1, generator=generator)
    return encoder


def _packed(folder: Path, *, fused: bool, lora: LoraConfig | None = None) -> DualEncoder:
    encoder = _loaded(folder, lora)
    encoder.pack()
    if fused:
        encoder.fuse_layers()
    return encoder


def _compute_in_double(monkeypatch: pytest.MonkeyPatch) -> None:
    """The library's RMSNorms and ModernBERT's rotation compute in float32 whatever they are given; not here."""

    def rms_norm(self: Any, x: torch.Tensor) -> torch.Tensor:
        return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon)

    def offset_rms_norm(self: Any, x: torch.Tensor) -> torch.Tensor:
        return (1 + self.weight) * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)

    for gemma_norm in (modeling_gemma.GemmaRMSNorm, modeling_gemma3.Gemma3RMSNorm):
        monkeypatch.setattr(gemma_norm, "forward", offset_rms_norm)
    for module in (modeling_llama.LlamaRMSNorm, modeling_mistral.MistralRMSNorm, modeling_qwen2.Qwen2RMSNorm):
        monkeypatch.setattr(module, "forward", rms_norm)
    monkeypatch.setattr(modeling_qwen3.Qwen3RMSNorm, "forward", rms_norm)
    monkeypatch.setattr(modeling_modernbert, "apply_rotary_pos_emb", modeling_llama.apply_rotary_pos_emb)


@pytest.mark.parametrize("lora", [None, LoraConfig(r=3, alpha=6.0)], ids=["all", "adapters"])
def test_embeddings_and_gradients_are_the_library_s(
    folder: Path, tokens: Packed, lora: LoraConfig | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float64, dropout off: 1e-12 for embeddings, every trained parameter's gradient to 1e-9; of padded texts with
    the library's layers.
    """
    _compute_in_double(monkeypatch)
    _compare(folder, tokens, lora)


@pytest.mark.parametrize("targets", [("k_proj", "up_proj"), ("q_proj", "v_proj", "gate_proj"), ("o_proj", "down_proj")])
def test_some_linear_layers_have_adapters(
    tmp_path: Path, tokens: Packed, targets: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a product of several weights, any may be adapted."""
    _compute_in_double(monkeypatch)
    _compare(save_tiny_model(tmp_path / "model", "qwen3"), tokens, LoraConfig(r=3, alpha=6.0, targets=targets))


def _compare(folder: Path, tokens: Packed, lora: LoraConfig | None) -> None:
    library = _loaded(folder, lora)
    encoders = [encoder.double().eval() for encoder in (library, _packed(folder, fused=True, lora=lora))]
    rows = np.split(tokens.input_ids.numpy(), tokens.starts[1:-1].numpy())
    padding = library.passage_tower.config.pad_token_id
    expected, found = encoders[0]("passage", pad_rows(rows, padding)), encoders[1]("passage", tokens)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    direction = torch.randn(expected.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for embeddings in (expected, found):
        (embeddings * direction).sum().backward()
    named = [dict(encoder.named_parameters()) for encoder in encoders]
    assert named[0].keys() == named[1].keys()
    for name, p in named[0].items():
        found = named[1][name]
        assert (p.grad is not None) == p.requires_grad and found.requires_grad == p.requires_grad
        assert found.grad is not None if p.requires_grad else found.grad is None, name
        if p.grad is not None:
            torch.testing.assert_close(found.grad, p.grad, rtol=1e-9, atol=1e-12, msg=f"{name}: {{}}".format)
    if lora is not None:
        assert all(gradient(p).norm() > 0 for p in encoders[1].parameters() if p.requires_grad)
    assert any(isinstance(module, FusedLayers) for module in encoders[1].modules())
    kind = library.passage_tower.config.model_type  # ELECTRA's tables are narrower than its layers
    fused = any(isinstance(module, FusedEmbeddings) for module in encoders[1].modules())
    assert fused == (kind in BERT_FAMILY - {"electra"})


def test_dropout_draws_at_every_place_and_replays_bitwise(folder: Path, tokens: Packed) -> None:
    encoder = _packed(folder, fused=True)
    state = RngState.capture(torch.device("cpu"))
    with torch.no_grad():
        first = encoder("passage", tokens)
    other = encoder("passage", tokens)
    with state.restored():
        again = encoder("passage", tokens)
    assert again.requires_grad and torch.equal(first, again) and not torch.equal(first, other)
    places = _dropouts(encoder)
    seen = []
    for name in places:  # one at a time
        for other_name, (module, rate) in places.items():
            setattr(module, rate, 0.5 if name == other_name else 0.0)
        if "layers.1." not in name and "layer.1." not in name:
            seen.append(encoder("passage", tokens).detach())
    kind = encoder.passage_tower.config.model_type
    assert len(seen) == (4 if kind in BERT_FAMILY | {"nomic_bert"} else 3 if kind == "modernbert" else 1)
    encoder.eval()
    seen.append(encoder("passage", tokens).detach())
    assert all(not torch.equal(a, b) for i, a in enumerate(seen) for b in seen[:i])


def _dropouts(encoder: DualEncoder) -> dict[str, tuple[torch.nn.Module, str]]:
    """By name, the modules that drop, and what their rate is called; not ModernBERT's second one of a layer, which has
    to be 0.
    """
    named = {name: module for name, module in encoder.named_modules() if not name.endswith("mlp.drop")}
    places = {name: (module, "p") for name, module in named.items() if isinstance(module, torch.nn.Dropout)}
    attention = {
        name: (module, "attention_dropout") for name, module in named.items() if hasattr(module, "attention_dropout")
    }
    return places | attention


def test_a_dropout_that_is_switched_off_by_hand_draws_nothing(folder: Path, tokens: Packed) -> None:
    encoder = _packed(folder, fused=True).eval()
    expected = encoder("passage", tokens)
    encoder.train()
    places = [module for module, _ in _dropouts(encoder).values()]
    for place in places:
        place.eval()
    assert torch.equal(encoder("passage", tokens), expected)
    places[0].train()
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
    assert type(encoder.passage_tower.embeddings) is not FusedEmbeddings and isinstance(
        encoder.passage_tower.encoder, FusedLayers
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
    # Gates and a stream that is not normed leave more to chance at this size.
    most = 1.2 if exact.passage_tower.config.model_type in BERT_FAMILY else 1.6
    assert ours.dtype == torch.float32 and (ours - want).norm() <= most * (theirs - want).norm()
    errors = [
        sum(float((gradient(p).double() - gradient(q)).square().sum()) for p, q in _pairs(encoder, exact))
        for encoder in (fused, plain)
    ]
    assert all(gradient(p).dtype == p.dtype and bool(gradient(p).any()) for p in fused.parameters())
    assert errors[0] ** 0.5 <= most * errors[1] ** 0.5


def test_encoding_is_as_exact_in_a_stream_of_float16(folder: Path, tokens: Packed) -> None:
    """bfloat16 products round far more than the stream does. A pass outside of `inference` has its own bits again. A
    pre-norm stream stays as it is.
    """
    exact, fused = _packed(folder, fused=False).double().eval(), _packed(folder, fused=True).eval()
    fused.autocast_dtype = torch.bfloat16
    with torch.no_grad():
        want, trained = exact("passage", tokens), fused("passage", tokens)
        with inference(fused):
            encoded = fused("passage", tokens)
        again = fused("passage", tokens)
    normed = fused.passage_tower.config.model_type in BERT_FAMILY | {"nomic_bert"}
    assert encoded.dtype == torch.float32 and torch.equal(encoded, trained) != normed and torch.equal(again, trained)
    assert (encoded - want).norm() <= 1.2 * (trained - want).norm()


def test_angles_are_not_rounded_where_the_stream_is(tmp_path: Path, tokens: Packed, monkeypatch: Any) -> None:
    """Rotary angles of float16 would move the last positions of a long text by a tenth of a radian."""
    fused = _packed(save_tiny_model(tmp_path, "nomic_bert"), fused=True).eval()
    fused.autocast_dtype = torch.bfloat16
    seen: list[Any] = []

    def watched(*given: Any) -> Any:
        seen.append(angles(*given))
        return seen[-1]

    monkeypatch.setattr(fused_layers, "angles", watched)
    with torch.no_grad(), inference(fused):
        fused("passage", tokens)
    assert {table.dtype for turned in seen for pair in turned.values() if pair for table in pair} == {torch.float32}


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


def test_a_step_of_the_adapters_is_seen(folder: Path, tokens: Packed) -> None:
    """And before it, a pass with a graph has the bits of one without."""
    encoder = _packed(folder, fused=True, lora=LoraConfig(r=3)).eval()
    encoder.autocast_dtype = torch.bfloat16
    with torch.no_grad():
        before = encoder("passage", tokens)
    trained = [p for p in encoder.parameters() if p.requires_grad]
    again = encoder("passage", tokens)
    again[:, 0].sum().backward()
    assert torch.equal(again, before)
    torch.optim.AdamW(trained, lr=0.05, fused=True).step()
    found = encoder("passage", tokens).detach()
    layers = next(module for module in encoder.modules() if isinstance(module, FusedLayers))
    layers._rounded.clear()
    assert torch.equal(found, encoder("passage", tokens)) and not torch.equal(before, found)


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


class Adapted(torch.nn.Linear):
    """Stands in the place of a linear layer, as an adapter does."""


def test_a_module_replaced_afterwards_is_refused(folder: Path, tokens: Packed) -> None:
    """And fused layers leave it to the library's where it was there before. Copies have modules of their own."""
    encoder = copy.deepcopy(_packed(folder, fused=True))
    encoder("passage", tokens)
    layers = next(module for module in encoder.modules() if isinstance(module, FusedLayers))
    parents = [m for m in layers.modules() if any(type(child) is torch.nn.Linear for child in m.children())]
    name = next(name for name, child in parents[-1].named_children() if type(child) is torch.nn.Linear)
    setattr(parents[-1], name, Adapted(8, 8))
    with pytest.raises(RuntimeError, match=f"{name}: expected the Linear that was fused, received Adapted; .* first"):
        encoder("passage", tokens)


def test_a_replaced_table_is_refused(tmp_path: Path, tokens: Packed) -> None:
    encoder = _fused_bert(tmp_path, None)
    encoder.passage_tower.set_input_embeddings(torch.nn.Embedding(200, 32))
    encoder("passage", tokens)  # a larger vocabulary, say
    encoder.passage_tower.set_input_embeddings(Adapted(8, 8))
    with pytest.raises(RuntimeError, match="word_embeddings: expected an Embedding, received an? Adapted"):
        encoder("passage", tokens)


def test_gradient_checkpointing_is_for_the_library_s_layers(folder: Path, tokens: Packed) -> None:
    encoder = _packed(folder, fused=True)
    encoder.enable_gradient_checkpointing()
    with pytest.raises(RuntimeError, match="gradient checkpointing: expected it off, received on"):
        encoder("passage", tokens)
    assert encoder.eval()("passage", tokens).isfinite().all(), "without effect there, as in the library"
    plain = _packed(folder, fused=False)
    assert plain.unfused_because is None
    plain.enable_gradient_checkpointing()
    assert plain.unfused_because == "it checkpoints gradients"


def test_what_cannot_be_fused_is_refused(tmp_path: Path) -> None:
    encoder = DualEncoder.from_pretrained(ModelConfig(str(save_tiny_model(tmp_path / "a", "gpt2"))))
    assert not encoder.can_fuse
    with pytest.raises(ConfigError, match="model.fused: true, but the layers of a 'gpt2' model are not known"):
        encoder.fuse_layers()
    config = AutoConfig.from_pretrained(save_tiny_model(tmp_path / "b"), hidden_act="relu")
    AutoModel.from_config(config).save_pretrained(tmp_path / "c")
    (tmp_path / "c").joinpath("tokenizer.json").write_bytes((tmp_path / "b" / "tokenizer.json").read_bytes())
    relu = copy.deepcopy(DualEncoder.from_pretrained(ModelConfig(str(tmp_path / "c"))))
    assert not relu.can_fuse


@pytest.mark.parametrize(
    ("architecture", "setting", "reason"),
    [
        ("gemma3_text", {"attn_logit_softcapping": 50.0}, "it has attn_logit_softcapping=50.0"),
        ("modernbert", {"mlp_dropout": 0.1}, "it has mlp_dropout=0.1"),
        ("modernbert", {"mlp_dropout": 0.0, "mlp_bias": True}, "its gated feed-forward part has biases"),
        ("llama", {"hidden_act": "relu"}, "its activation is relu"),
        ("qwen3", {"rope_parameters": DYNAMIC}, "its rotations are of rope_type dynamic"),
    ],
)
def test_settings_that_fused_layers_lack_are_named(
    tmp_path: Path, architecture: str, setting: dict[str, Any], reason: str
) -> None:
    usual = NEEDED.get(architecture, {})
    for number, changes in enumerate(({}, setting)):
        folder = save_tiny_model(tmp_path / str(number), architecture, **usual | changes)
        encoder = DualEncoder.from_pretrained(ModelConfig(str(folder)))
        assert encoder.unfused_because == (reason if number else None)
    with pytest.raises(ConfigError, match=f"model.fused: true, but {reason}; set it to auto"):
        encoder.fuse_layers()


def test_adapters_with_dropout_are_left_to_the_library(tmp_path: Path) -> None:
    encoder = _loaded(save_tiny_model(tmp_path / "model"), LoraConfig(dropout=0.1))
    assert encoder.unfused_because == "its LoRA adapters have dropout"
