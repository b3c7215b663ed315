"""Tiny random models with real tokenizers, for tests: two layers, hidden size 32, a vocabulary of about 200."""

from __future__ import annotations

import json
import random
import string
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedTokenizerFast

from retriever.encoder.dual_encoder import DualEncoder

MAX_POSITIONS = 256

_TEXT = (
    "a an the of in on at by for to from with and or not is are was were be it this that what which who how why when where "
    "river mountain city ocean forest storm summer winter people history science music language number energy water light "
    "cell protein virus heart brain blood disease treatment patient drug study effect cause result market price bank money "
    "law court state school child game team player film book story road bridge train ship engine computer network memory "
    "search query passage answer question find"
)
_WORDS = _TEXT.split()

_ENCODER = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
_ENCODER_DROPOUT = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
_POSITIONS = {"max_position_embeddings": MAX_POSITIONS}
_BERT = _ENCODER | _ENCODER_DROPOUT | _POSITIONS
_ROBERTA = _BERT | {"max_position_embeddings": MAX_POSITIONS + 2}  # positions start at pad_id + 1
_DECODER = _ENCODER | _POSITIONS | {"num_key_value_heads": 1, "attention_dropout": 0.1, "head_dim": 16}

# What each architecture's config calls the sizes; the dropout of a decoder is that of its attention.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "bert": _BERT,
    "roberta": _ROBERTA,
    "xlm-roberta": _ROBERTA,
    "camembert": _ROBERTA,
    "distilbert": {"dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 64, "dropout": 0.1, "attention_dropout": 0.1}
    | _POSITIONS,
    "albert": _BERT | {"embedding_size": 16},
    "electra": _BERT | {"embedding_size": 16},
    "mpnet": _ROBERTA,
    "deberta-v2": _BERT | {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 16},
    "modernbert": _ENCODER
    | _POSITIONS
    | {
        "local_attention": 8,
        "attention_dropout": 0.1,
        "mlp_dropout": 0.1,
        "embedding_dropout": 0.1,
        "global_attn_every_n_layers": 2,
    },
    "nomic_bert": _BERT,
    "llama": _DECODER,
    "mistral": _DECODER | {"sliding_window": 16},
    "qwen2": _DECODER,
    "qwen3": _DECODER,
    "gemma": _DECODER,
    "gemma3_text": _DECODER
    | {
        "query_pre_attn_scalar": 16,
        "sliding_window": 16,
        "layer_types": ["sliding_attention", "full_attention"],
        "use_bidirectional_attention": True,
    },
    "t5": {
        "d_model": 32,
        "d_kv": 16,
        "d_ff": 64,
        "num_layers": 2,
        "num_heads": 2,
        "dropout_rate": 0.1,
        "feed_forward_proj": "gated-gelu",
    },
    "gpt2": {
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 2,
        "n_positions": MAX_POSITIONS,
        "attn_pdrop": 0.1,
        "resid_pdrop": 0.1,
    },
}
DECODERS = frozenset({"llama", "mistral", "qwen2", "qwen3", "gemma", "gemma3_text", "gpt2"})
_PAD_SECOND = frozenset({"roberta", "xlm-roberta", "camembert", "mpnet"})


def tiny_tokenizer(architecture: str = "bert", max_tokens: int = MAX_POSITIONS) -> PreTrainedTokenizerFast:
    """A lower-casing WordPiece tokenizer: `[CLS] … [SEP]` for encoders, `… [SEP]` for decoders."""
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    if architecture in _PAD_SECOND:
        specials[:2] = ["[UNK]", "[PAD]"]
    characters = list(string.ascii_lowercase + string.digits)
    words = [w for w in _WORDS if len(w) > 1]
    vocabulary = specials + list(string.punctuation) + characters + [f"##{c}" for c in characters] + words
    ids = {token: i for i, token in enumerate(vocabulary)}
    backend = Tokenizer(models.WordPiece(ids, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    template = "$A [SEP]" if architecture in DECODERS else "[CLS] $A [SEP]"
    backend.post_processor = processors.TemplateProcessing(
        single=template, pair=f"{template} $B:1 [SEP]:1", special_tokens=[(t, ids[t]) for t in ("[CLS]", "[SEP]")]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        eos_token="[SEP]",
        model_max_length=max_tokens,
        padding_side="left" if architecture in DECODERS else "right",
    )


def save_tiny_model(folder: str | Path, architecture: str = "bert", *, seed: int = 0, **overrides: Any) -> Path:
    """Writes a random model and its tokenizer as AutoModel and AutoTokenizer load them; returns `folder`.

    transformers loads `qwen2` with its own tokenizer class, which splits these words into letters.

    `overrides` go to the model's config (`hidden_dropout_prob=0.0`, `num_hidden_layers=1`, …).
    """
    folder = Path(folder)
    tokenizer = tiny_tokenizer(architecture)
    tokens = {
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.cls_token_id,
        "eos_token_id": tokenizer.sep_token_id,
    }
    if architecture == "modernbert":
        tokens |= {"cls_token_id": tokenizer.cls_token_id, "sep_token_id": tokenizer.sep_token_id}
    sizes = {"vocab_size": len(tokenizer)} | tokens | ARCHITECTURES[architecture] | overrides
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModel.from_config(AutoConfig.for_model(architecture, **sizes))
        _spread(model)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def save_plain_model(folder: str | Path, architecture: str = "llama", **tokenizer_config: Any) -> Path:
    """A decoder whose tokenizer puts nothing around a text, as most language models' do; entries of its
    tokenizer_config.json are set.
    """
    folder = save_tiny_model(folder, architecture)
    for file, changes in (("tokenizer.json", {"post_processor": None}), ("tokenizer_config.json", tokenizer_config)):
        found = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps(found | changes))
    return folder


class TokenBatchNorm(nn.BatchNorm1d):
    """Batch normalisation over the tokens of a chunk [..., H], padding too."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.flatten(0, -2)).view_as(x)


def add_batch_norm(encoder: DualEncoder) -> None:
    """Puts batch normalisation in the place of the last layer's last norm, in every tower."""
    for tower in encoder.each_tower:
        norm = tower.encoder.layer[-1].output.LayerNorm = TokenBatchNorm(32)  # type: ignore[union-attr, index]
        norm.bias.data = torch.linspace(-1, 1, 32)  # else the mean of a chunk of one text would be zero


def random_texts(count: int, *, shortest: int = 1, longest: int = 24, seed: int = 0) -> list[str]:
    """`count` texts of `shortest` to `longest` words of the tokenizer's vocabulary."""
    draw = random.Random(seed)
    return [" ".join(draw.choices(_WORDS, k=draw.randint(shortest, longest))) for _ in range(count)]


def _spread(model: torch.nn.Module) -> None:
    """Weights five times wider than at initialisation, so that embeddings of different texts differ clearly."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.mul_(5.0)
