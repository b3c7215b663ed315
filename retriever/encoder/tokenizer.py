"""The tokenizer of a model: loaded and checked, with or without an end-of-text token behind every text."""

from __future__ import annotations

from pathlib import Path, PurePosixPath
from typing import Any

from tokenizers import processors
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from retriever.config import Config, ConfigError, ModelConfig
from retriever.config_sources import text_kinds
from retriever.data.tokens import SIDES, Side, TokenTemplate, tokenize_flat
from retriever.encoder.model_files import one_line, read_json
from retriever.encoder.pretrained import quiet_transformers
from retriever.encoder.settings import describes_itself, pooling_of, read_model_config, tower_folder

_FILES = ("tokenizer_config.json", "tokenizer.json", "special_tokens_map.json", "added_tokens.json", "vocab.json")
# A vocabulary that has no token for unknown words fails here.
_PROBE = "retrieval, \N{SNOWMAN} \N{CJK UNIFIED IDEOGRAPH-6C34}"


def load_tokenizer(name_or_path: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of an encoder's folder or Hugging Face name, which both towers share. Raises ConfigError."""
    return pretrained_tokenizer(
        read_model_config(name_or_path), str(name_or_path), tower_folder(name_or_path, "passage")
    )


def training_tokenizer(model: ModelConfig) -> PreTrainedTokenizerBase:
    """The tokenizer that a run trains with and exports. Raises ConfigError where a prompt leaves no room for a text.

    `append_eos: auto` appends where the last token is pooled, the model is a plain language model and its tokenizer
    appends nothing.
    """
    name = model.name_or_path
    tokenizer = load_tokenizer(name)
    appends, last = model.append_eos, TokenTemplate.from_tokenizer(tokenizer).suffix
    if appends == "auto":
        plain = pooling_of(model) == "last" and not describes_itself(name)
        appends = True if plain and not last and tokenizer.eos_token_id is not None else ends_texts(tokenizer)
    if appends != ends_texts(tokenizer):
        _set_end(tokenizer, appends)
    check_prompt(tokenizer, "query", model.query_prompt, model.query_max_tokens)
    check_prompt(tokenizer, "passage", model.passage_prompt, model.passage_max_tokens)
    return tokenizer


def pretrained_tokenizer(config: Any, name: str, folder: str = "") -> PreTrainedTokenizerBase:
    """The tokenizer of a model of `config`. Raises ConfigError if it cannot be loaded or knows tokens without a row."""
    where = "/".join(part for part in (name, folder) if part)
    try:
        with one_line(f"{where}/tokenizer.json: no tokenizer that can be loaded"), quiet_transformers():
            tokenizer = AutoTokenizer.from_pretrained(name, subfolder=folder, trust_remote_code=False)
            tokenizer(_PROBE)
    except ConfigError:
        for file in _FILES:  # the one to blame, where it is no JSON
            read_json(name, str(PurePosixPath(folder) / file))
        raise
    # Without any tokenizer file transformers makes up an empty tokenizer of the architecture's class.
    if len(tokenizer) <= len(tokenizer.all_special_ids):
        raise ConfigError(
            f"{where}: has no tokenizer that knows a word; expected its tokenizer files beside the weights"
        )
    token, last = max(tokenizer.get_vocab().items(), key=lambda item: item[1])
    if last >= getattr(config, "vocab_size", last + 1):
        raise ConfigError(
            f"{where}/tokenizer.json: token {token!r} has the id {last}, but vocab_size in config.json is "
            f"{config.vocab_size}; expected a model whose embedding table was resized to its tokenizer"
        )
    return tokenizer


def ends_texts(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer puts its end-of-text token behind every text."""
    return tokenizer.eos_token_id is not None and TokenTemplate.from_tokenizer(tokenizer).suffix[-1:] == (
        tokenizer.eos_token_id,
    )


def check_source_prompts(tokenizer: PreTrainedTokenizerBase, config: Config) -> None:
    """Raises ConfigError where the prompt of a source leaves no room for a text."""
    for side in SIDES:
        for number, (prompt, max_tokens) in enumerate(text_kinds(config, side)):
            check_prompt(tokenizer, side, prompt, max_tokens, f"data.train.{number}")


def check_prompt(
    tokenizer: PreTrainedTokenizerBase, side: Side, prompt: str, max_tokens: int, section: str = "model"
) -> None:
    """Raises ConfigError, which names the `section`, where prompt and special tokens leave no token for a text."""
    with one_line(f"{section}.{side}_prompt: {prompt!r} cannot be tokenised"):
        taken = len(tokenize_flat(tokenizer, [prompt])[0])
    special = TokenTemplate.from_tokenizer(tokenizer).special_tokens
    if taken + special >= max_tokens:
        raise ConfigError(
            f"{section}.{side}_prompt: {taken} tokens and {special} special ones leave no room for a text in the "
            f"{max_tokens} of {section}.{side}_max_tokens; expected a shorter prompt or at least {taken + special + 1} "
            "tokens"
        )


def _set_end(tokenizer: PreTrainedTokenizerBase, appends: bool) -> None:
    """Puts the end-of-text token behind every text from now on, or no longer, beside the other special tokens."""
    backend, eos = getattr(tokenizer, "backend_tokenizer", None), tokenizer.eos_token_id
    if backend is None or eos is None:
        reason = "has no eos_token" if eos is None else "is no fast tokenizer"
        raise ConfigError(
            f"model.append_eos: {appends}, but the {type(tokenizer).__name__} of this model {reason}; set it to auto"
        )
    template = TokenTemplate.from_tokenizer(tokenizer)
    suffix = (*template.suffix, eos) if appends else template.suffix[:-1]
    tokens = {token: str(tokenizer.convert_ids_to_tokens(token)) for token in (*template.prefix, *suffix)}
    behind = [tokens[token] for token in suffix]
    single = [*(tokens[token] for token in template.prefix), "$A", *behind]
    # What else a post-processor does, such as trimming offsets, moves no token.
    backend.post_processor = processors.TemplateProcessing(
        single=single,
        pair=[*single, "$B:1", *(f"{token}:1" for token in behind)],
        special_tokens=[(text, i) for i, text in tokens.items()],
    )
