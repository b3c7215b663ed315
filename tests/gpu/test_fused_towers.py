"""Fused layers of every architecture but BERT's kin are as exact as the library's under autocast; every architecture
that takes packed texts is replayed bitwise.
"""

from __future__ import annotations

import copy
from collections import deque
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel

from kernels.layers.layer import SavedActivations
from retriever.config import LoraConfig
from retriever.data.layout import Packed, pack_rows
from retriever.encoder.architectures import PACKED
from retriever.encoder.dual_encoder import DualEncoder
from retriever.encoder.fused_specs import FAMILY
from retriever.encoder.lora import adapt
from retriever.rng import RngState
from tests.gpu.devices import toy
from tests.tiny import ARCHITECTURES

LENGTHS = [4, 256, 17, 90, 33, 64, 5, 128, 201, 76]
_WIDE = {"hidden_size": 1024, "intermediate_size": 3072, "num_attention_heads": 16}
_NARROW = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}
_GROUPED = {"num_key_value_heads": 2, "attention_dropout": 0.1}
SIZES: dict[str, dict[str, Any]] = {
    "modernbert": {"global_attn_every_n_layers": 2, "local_attention": 32, "attention_dropout": 0.1},
    "nomic_bert": {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1},
    "gemma": _GROUPED,
    "gemma3_text": _GROUPED
    | {
        "sliding_window": 48,
        "layer_types": ["sliding_attention", "full_attention"],
        "use_bidirectional_attention": True,
    },
    "llama": _GROUPED | {"attention_bias": True},
    "mistral": _GROUPED | {"sliding_window": 24},
    "qwen2": _GROUPED,
    "qwen3": _GROUPED,
}


def make_encoder(name: str, device: str, *, fused: bool) -> DualEncoder:
    """Two layers with the same random weights at every call, in bf16; narrow on the CPU, and where they are not new.

    `name` is an architecture, with ", lora" one whose linear layers have adapters.
    """
    torch.manual_seed(0)
    architecture, _, condition = name.partition(", ")
    wide, own = device == "cuda", SIZES.get(architecture)
    sizes = (own | (_WIDE if wide else _NARROW)) if own else ARCHITECTURES[architecture]
    sizes = sizes | {"num_hidden_layers": 2, "vocab_size": 100}
    if architecture in ("gemma", "gemma3_text", "qwen3"):
        own_width = 256 if architecture == "gemma3_text" else 128
        sizes["head_dim"] = own_width if wide else 24  # heads together wider than the stream
    config = AutoConfig.for_model(architecture, pad_token_id=0, bos_token_id=1, eos_token_id=2, **sizes)
    tower = AutoModel.from_config(config).to(device).train()
    with torch.no_grad():
        for name, p in tower.named_parameters():
            p.normal_(1.0, 0.1) if "norm" in name.lower() and name.endswith("weight") else p.normal_(0.0, 0.04)
    encoder = DualEncoder(tower, tower, pooling="mean", autocast_dtype=torch.bfloat16)
    if condition == "lora":
        adapt(encoder.towers, LoraConfig(), seed=0)
        for parameter_name, p in tower.named_parameters():
            if parameter_name.endswith("lora_b"):
                nn.init.normal_(p, std=0.02)
    encoder.pack()
    if fused and encoder.can_fuse:
        encoder.fuse_layers()
    return encoder


def make_texts(device: str) -> Packed:
    generator = torch.Generator().manual_seed(0)
    lengths = toy(device, *LENGTHS, most=40)
    rows = [torch.randint(5, 100, (n,), generator=generator).numpy() for n in lengths]
    return pack_rows(rows).map(lambda t: t.to(device))


def gradients(
    encoder: DualEncoder, tokens: Packed, saved: deque[SavedActivations] | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """The embeddings, and the gradients of all parameters but the embedding table's, whose rows a GPU sums in any
    order.
    """
    embeddings = encoder("passage", tokens, saved)
    direction = torch.randn(embeddings.shape, generator=torch.Generator().manual_seed(1)).to(embeddings)
    (embeddings * direction).sum().backward()
    tables = {f"{name}.weight" for name, module in encoder.named_modules() if isinstance(module, nn.Embedding)}
    found = {name: p.grad for name, p in encoder.named_parameters() if p.grad is not None and name not in tables}
    trained = {name for name, p in encoder.named_parameters() if p.requires_grad}
    assert found.keys() == trained - tables
    encoder.zero_grad(set_to_none=True)
    return embeddings.detach(), found


ADAPTED = ["bert, lora", "modernbert, lora", "qwen3, lora"]


@pytest.mark.parametrize("architecture", [*sorted(SIZES), *ADAPTED])
def test_as_exact_as_the_library_s_layers(architecture: str, device: str) -> None:
    """Errors against fp32, dropout off: of embeddings and of all gradients, at most 1.1 times the library's in bf16."""
    tokens, library = make_texts(device), make_encoder(architecture, device, fused=False).eval()
    exact = copy.deepcopy(library)
    exact.autocast_dtype = None
    want, of_exact = gradients(exact, tokens)
    errors = []
    for encoder in (make_encoder(architecture, device, fused=True).eval(), library):
        found, of_encoder = gradients(encoder, tokens)
        assert of_encoder.keys() == of_exact.keys()
        squares = sum(float((of_encoder[name] - exact).square().sum()) for name, exact in of_exact.items())
        errors.append((float((found - want).norm()), squares**0.5))
    assert all(of_exact[name].norm() > 0 for name in of_exact)
    (ours, our_gradient), (theirs, their_gradient) = errors
    print(f"{architecture}: embeddings {ours / theirs:.2f}, gradients {our_gradient / their_gradient:.2f}")
    assert 0 < ours <= 1.1 * theirs and our_gradient <= 1.1 * their_gradient


@pytest.mark.filterwarnings("ignore:.*script_method. is deprecated:DeprecationWarning")  # torch's own, compiling
@pytest.mark.parametrize("architecture", [*sorted(PACKED), *ADAPTED, "gpt2, compiled"])
def test_replays_have_the_same_bits(architecture: str, device: str) -> None:
    """Without a graph, with one, and with the products of the pass without one; dropout on."""
    name, _, condition = architecture.partition(", ")
    encoder, tokens = make_encoder(architecture, device, fused=True), make_texts(device)
    assert encoder.keeps_products == (name in FAMILY)
    if condition == "compiled" and device == "cuda":  # half a minute on a CPU
        encoder.compile_layers()
    state, saved = RngState.capture(torch.device(device)), deque[SavedActivations]()
    products = saved if encoder.keeps_products else None
    with torch.no_grad():
        first = encoder("passage", tokens, products)
    runs = []
    for given in (None, None, products):
        with state.restored():
            runs.append(gradients(encoder, tokens, given))
    assert not saved and all(torch.equal(first, embeddings) for embeddings, _ in runs)
    (_, kept), *others = runs
    for _, other in others:
        assert all(kept[name].norm() > 0 and torch.equal(kept[name], other[name]) for name in kept)
    assert not torch.equal(first, encoder("passage", tokens))  # other masks
