"""The settings of each source of a mixture: prompts, lengths, hard negatives, and its share of an epoch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from retriever.config import Config, DataConfig, SourceConfig

_SIDES = ("query", "passage")


class TextKind(NamedTuple):
    """The prompt and length of one side of a source."""

    prompt: str
    max_tokens: int  # prompt and special tokens included


def text_kinds(config: Config, side: str) -> list[TextKind]:
    """The kind of each source's texts: what the source leaves null is the model's."""
    names, kinds = (f"{side}_prompt", f"{side}_max_tokens"), []
    for source in config.data.train or (SourceConfig(),):
        own = (getattr(source, name) for name in names)
        models = (getattr(config.model, name) for name in names)
        kinds.append(TextKind(*(model if value is None else value for value, model in zip(own, models, strict=True))))
    return kinds


def kind_numbers(kinds: Sequence[TextKind]) -> list[int]:
    """The number of each source's kind among the different ones, in the order in which they appear."""
    distinct = list(dict.fromkeys(kinds))
    return [distinct.index(kind) for kind in kinds]


def own_texts(config: Config) -> list[tuple[str, str, int]] | None:
    """Each source's query prompt, passage prompt and number of its passages' kind; None where all are the model's."""
    queries, passages = (text_kinds(config, side) for side in _SIDES)
    prompts = [(query.prompt, passage.prompt) for query, passage in zip(queries, passages, strict=True)]
    found = [(*both, number) for both, number in zip(prompts, kind_numbers(passages), strict=True)]
    model = config.model
    return None if set(found) <= {(model.query_prompt, model.passage_prompt, 0)} else found


def prompt_names(config: Config) -> list[str]:
    """Each source's name in the export's prompts, before `_query` and `_document`."""
    sources = enumerate(config.data.train)
    return [f"source{i}" if source.prompt_name is None else source.prompt_name for i, source in sources]


def named_prompts(config: Config) -> dict[str, str]:
    """The prompts of the sources that have their own, by the names in the export."""
    found, names = {}, prompt_names(config)
    for side, called in zip(_SIDES, ("query", "document"), strict=True):
        for name, source in zip(names, config.data.train, strict=True):
            prompt = getattr(source, f"{side}_prompt")
            if prompt is not None:
                found[f"{name}_{called}"] = prompt
    return found


def hard_negatives(data: DataConfig) -> list[int]:
    """Hard negatives of a query of each source."""
    return [data.negatives if source.hard_negatives is None else source.hard_negatives for source in data.train]


def queries_per_epoch(data: DataConfig, sizes: Sequence[int]) -> list[int]:
    """The number of queries that each source, of `sizes` queries, gives to an epoch.

    By `data.sampling`: proportional gives size · weight; the others share out as many queries as there are.
    """
    weights = [source.weight for source in data.train]
    if data.sampling == "proportional":
        shares = [weight * size for weight, size in zip(weights, sizes, strict=True)]
    else:
        power = data.alpha if data.sampling == "power" else 0.0
        parts = [weight * size**power for weight, size in zip(weights, sizes, strict=True)]
        shares = [part / sum(parts) * sum(sizes) for part in parts]
    return [max(1, round(share)) for share in shares]
