"""Which Hugging Face models may be a tower: those whose behaviour the tests have seen.

For each architecture below a test shows on a random model that a padded batch gives what its texts give one by one,
that every parameter receives a gradient, and that a forward pass with dropout repeats bitwise under its RNG state.
"""

from __future__ import annotations

from typing import Any, Literal

from retriever.config import ConfigError

ENCODERS = frozenset(
    {
        "albert",
        "bert",
        "camembert",
        "deberta-v2",
        "distilbert",
        "electra",
        "modernbert",
        "mpnet",
        "nomic_bert",
        "roberta",
        "t5",
        "xlm-roberta",
    }
)
DECODERS = frozenset({"gemma", "gemma3_text", "gpt2", "llama", "mistral", "qwen2", "qwen3"})

# These hand the boundaries of packed texts through to their attention; the others run padded.
PACKED = (ENCODERS | DECODERS) - {"deberta-v2", "mpnet", "t5"}

# RMSNorms of these compute in float32 whatever their input is, gradients of their weights included.
FLOAT32_NORMS = frozenset({"gemma", "gemma3_text"})

# Position ids of these start behind the padding token's id, so that many fewer positions are left for tokens.
_OFFSET_POSITIONS = frozenset({"camembert", "mpnet", "roberta", "xlm-roberta"})


def check_architecture(config: Any, name: str) -> None:
    """Raises ConfigError where the model `name` is of an architecture that no test covers, or padding changes it."""
    if config.model_type not in ENCODERS | DECODERS:
        known = ", ".join(sorted(ENCODERS | DECODERS))
        raise ConfigError(
            f"model {name} is a {config.model_type!r} model, an architecture on which padding, gradients and the "
            f"replay of dropout have not been verified; expected one of {known}"
        )
    if config.model_type == "gemma" and config.use_bidirectional_attention:
        raise ConfigError(
            f"model {name}: use_bidirectional_attention: true, which transformers' Gemma obeys in texts without "
            "padding only; write is_causal: false into its config.json instead"
        )


def is_decoder(config: Any) -> bool:
    """Whether the architecture is a language model's, whose tokens see only those before them unless it is told
    otherwise.
    """
    return config.model_type in DECODERS


def is_causal(config: Any) -> bool:
    """Whether a token sees only those before it."""
    return is_decoder(config) and getattr(config, "is_causal", True) and not _built_bidirectional(config)


def set_bidirectional(config: Any, bidirectional: bool | Literal["auto"], name: str) -> None:
    """Makes the model `name` of `config` attend to whole texts, or to what is before a token, as model.bidirectional
    says.

    It is written as `is_causal`, which transformers obeys from 5.2 on and older versions ignore. Raises ConfigError for
    an encoder whose attention should be causal.
    """
    if bidirectional == "auto":
        return
    if is_decoder(config) and not _built_bidirectional(config):
        config.is_causal = not bidirectional
    elif not bidirectional:
        raise ConfigError(
            f"model.bidirectional: false, but {name} is a {config.model_type!r} model, whose tokens see the whole "
            "text; set it to auto"
        )


def _built_bidirectional(config: Any) -> bool:
    """Whether it is a decoder whose layers were built for the whole text, as EmbeddingGemma's are."""
    return config.model_type == "gemma3_text" and bool(config.use_bidirectional_attention)


def first_position(config: Any) -> int:
    """The position id of a text's first token."""
    return int(config.pad_token_id) + 1 if config.model_type in _OFFSET_POSITIONS else 0


def longest_input(config: Any) -> int | None:
    """The number of positions of the model, special tokens included; None if it has no limit."""
    positions = getattr(config, "max_position_embeddings", None)
    if positions is None or positions <= 0:
        return None
    return int(positions) - first_position(config)


def check_lengths(config: Any, query_max_tokens: int, passage_max_tokens: int) -> None:
    """Raises ConfigError where a length exceeds the model's positions, or leaves hardly a token to a text."""
    longest = longest_input(config)
    for key, value in (("model.query_max_tokens", query_max_tokens), ("model.passage_max_tokens", passage_max_tokens)):
        if value < 4:
            raise ConfigError(f"{key}: expected at least 4, special tokens included; received {value}")
        if longest is not None and value > longest:
            raise ConfigError(
                f"{key}: {value} tokens, but the model has positions for {longest}; set it to at most {longest}"
            )
