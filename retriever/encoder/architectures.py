"""Which Hugging Face models may be a tower: those whose behaviour the tests have seen.

For each architecture below a test shows on a random model that a padded batch gives what its texts give one by one,
that every parameter receives a gradient, and that a forward pass with dropout repeats bitwise under its RNG state.
"""

from __future__ import annotations

from typing import Any

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
        "xlm-roberta",
    }
)
DECODERS = frozenset({"gemma", "gpt2", "llama", "mistral", "qwen2", "qwen3"})

# These hand the boundaries of packed texts through to their attention; the others run padded.
PACKED = (ENCODERS | DECODERS) - {"deberta-v2", "mpnet"}

# Position ids of these start behind the padding token's id, so that many fewer positions are left for tokens.
_OFFSET_POSITIONS = frozenset({"camembert", "mpnet", "roberta", "xlm-roberta"})


def check_architecture(config: Any, name: str) -> None:
    """Raises ConfigError where the model `name` is of an architecture that no test covers."""
    if config.model_type not in ENCODERS | DECODERS:
        known = ", ".join(sorted(ENCODERS | DECODERS))
        raise ConfigError(
            f"model {name} is a {config.model_type!r} model, an architecture on which padding, gradients and the "
            f"replay of dropout have not been verified; expected one of {known}"
        )


def is_decoder(config: Any) -> bool:
    """Whether a token sees only those before it."""
    return config.model_type in DECODERS


def first_position(config: Any) -> int:
    """The position id of a text's first token."""
    return int(config.pad_token_id) + 1 if config.model_type in _OFFSET_POSITIONS else 0


def longest_input(config: Any) -> int | None:
    """How many tokens, special ones included, the model has positions for; None where it has no limit."""
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
