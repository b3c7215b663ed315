"""Rules about settings that depend on each other."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from retriever.config import Config, DataConfig, LossConfig, OptimConfig, SourceConfig, flat, from_dict, to_dict
from retriever.config_sources import hard_negatives, prompt_names, text_kinds
from retriever.config_tree import require

_AUTO_OR_FALSE = ("auto", False)
_OPTIMIZERS = ("adamw", "adafactor", "adafactor_momentum")
_WEIGHTS = "contrastive_weight", "kl_weight", "margin_mse_weight", "cosent_weight", "embedding_weight"
_TEACHER = "a teacher's terms gather all passages on the device"


def validate(config: Config) -> None:
    """Raises ConfigError where a value is of a wrong type or out of its range, or values cannot be run together."""
    from_dict(to_dict(config))
    for key, number in flat(config).items():
        require(not isinstance(number, float) or math.isfinite(number), key, "a finite number", number)
        in_63_bits = not isinstance(number, int) or -(2**63) <= number < 2**63
        require(in_63_bits, key, "a whole number of at most 63 bits", number)
    model, batch, loss = config.model, config.batch, config.loss
    require(model.name_or_path != "", "model.name_or_path", "a model folder or Hugging Face name", "")
    _check_together(config, _beside_each_other(config))
    _check_data(config)
    if batch.tokens_per_chunk != "auto":
        longest = max(model.query_max_tokens, model.passage_max_tokens)
        least = f"auto or at least {longest}, the longest text of model.*_max_tokens"
        require(batch.tokens_per_chunk >= longest, "batch.tokens_per_chunk", least, batch.tokens_per_chunk)
    weights = f"[] or {len(loss.dims)} numbers, one for each of loss.dims"
    require(len(loss.dim_weights) in (0, len(loss.dims)), "loss.dim_weights", weights, list(loss.dim_weights))
    terms = {name: getattr(loss, name) for name in _WEIGHTS}
    require(any(terms.values()), "loss", f"one of {', '.join(terms)} above 0", terms)
    known, name = " | ".join(_OPTIMIZERS), config.optim.name
    path = f"{known}, or an import path such as torch.optim.NAdam"
    none = f"null with optim.name={name}, which has its own settings"
    require(config.optim.arguments is None or "." in name, "optim.arguments", none, config.optim.arguments)
    require(name in _OPTIMIZERS or re.fullmatch(r"\w+(\.\w+)+", name) is not None, "optim.name", path, name)
    _check_directions(config)
    given = (loss.teacher is None) == (loss.embedding_weight == 0)
    require(given, "loss.embedding_weight", "above 0 with loss.teacher, else 0", loss.embedding_weight)
    _check_length_and_evaluation(config)


def check_sharded(config: Config) -> None:
    """Raises ConfigError where a run whose encoder is in shards (FSDP) asks for what it lacks."""
    fsdp = "FSDP"
    _check_together(
        config,
        [
            ("run.verify", (False,), fsdp),
            ("run.preflight", ("auto", "off"), fsdp),
            ("model.fused", _AUTO_OR_FALSE, fsdp),
            ("model.compile", _AUTO_OR_FALSE, fsdp),
            ("loss.bank", ("none", "contaccum"), fsdp),
            ("model.projection", (None,), fsdp),
            ("optim.name", ("adamw",), fsdp),
            ("optim.precision", ("bf16", "fp32"), fsdp),
            ("batch.retain", _AUTO_OR_FALSE, fsdp),
            ("batch.retain_products", _AUTO_OR_FALSE, fsdp),
        ],
    )


Rule = tuple[str, Sequence[Any], str]  # a key, the values that it may have, and beside what


def _check_together(config: Config, rules: Iterable[Rule]) -> None:
    settings = flat(config)
    for key, allowed, beside in rules:
        words = " or ".join(str(value).lower() for value in allowed)
        require(settings[key] in allowed, key, f"{words} with {beside}", settings[key])


def _beside_each_other(config: Config) -> list[Rule]:
    """Rules between pairs of settings of one configuration."""
    model, loss, optim, offload = config.model, config.loss, config.optim, "batch.offload=true"
    one, two = ["query_to_passage"], ["query_to_passage", "passage_to_query"]
    custom, default = loss.custom is not None, LossConfig()
    data, betas = config.data, [*OptimConfig().betas]
    rules: list[tuple[bool, Rule]] = [
        (model.attention == "padded", ("model.fused", _AUTO_OR_FALSE, "model.attention=padded")),
        (model.gradient_checkpointing, ("model.fused", _AUTO_OR_FALSE, "model.gradient_checkpointing=true")),
        (model.from_scratch, ("model.lora", (None,), "model.from_scratch=true, where all weights are trained")),
        (
            model.lora is not None and model.lora.dropout > 0,
            ("model.fused", _AUTO_OR_FALSE, "a dropout of model.lora above 0"),
        ),
        (model.fused is True, ("model.compile", _AUTO_OR_FALSE, "model.fused=true")),
        (model.gradient_checkpointing, ("model.compile", _AUTO_OR_FALSE, "model.gradient_checkpointing=true")),
        (optim.name == "adafactor", ("optim.betas", (betas,), "optim.name=adafactor, which has none")),
        ("." in optim.name, ("optim.betas", (betas,), f"optim.name={optim.name}, whose are in optim.arguments")),
        (optim.schedule != "wsd", ("optim.decay", (OptimConfig().decay,), f"optim.schedule={optim.schedule}")),
        (data.sampling != "power", ("data.alpha", (DataConfig().alpha,), f"data.sampling={data.sampling}")),
        (
            data.sampling == "round_robin",
            ("batch.one_source", (True,), "data.sampling=round_robin, where sources take turns by the batch"),
        ),
        (loss.symmetric, ("loss.directions", (one,), "loss.symmetric=true")),
        (len(loss.directions) > 1, ("loss.strategy", ("tiled",), "several of loss.directions")),
        (loss.hardness != "none", ("loss.strategy", ("tiled",), f"loss.hardness={loss.hardness}")),
        (loss.guide is not None, ("loss.strategy", ("tiled",), "loss.guide")),
        (loss.guide is None, ("loss.guide_margin", (default.guide_margin,), "loss.guide=null")),
        (loss.guide is None, ("loss.guide_margin_kind", (default.guide_margin_kind,), "loss.guide=null")),
        (loss.bank == "none", ("loss.bank_steps", (default.bank_steps,), "loss.bank=none")),
        (loss.bank != "moco", ("loss.bank_momentum", (default.bank_momentum,), f"loss.bank={loss.bank}")),
        (loss.positives > 1, ("loss.strategy", ("tiled",), "several loss.positives")),
        (loss.positives > 1, ("loss.mask_known_positives", (True,), "several loss.positives")),
        (loss.positives > 1, ("loss.symmetric", (False,), "several loss.positives")),
        (
            loss.positives > 1,
            ("loss.directions", (one, ["query_to_passage", "passage_to_passage"]), "several loss.positives"),
        ),
        (config.batch.offload, ("loss.guide", (None,), offload)),
        (config.batch.offload, ("loss.directions", (one, two, two[::-1]), offload)),
        (config.batch.offload, ("loss.strategy", ("tiled",), f"{offload}: the others hold a matrix of similarities")),
        (config.batch.offload, ("loss.exchange", ("auto", "ring"), f"{offload}: nothing is gathered")),
        (custom, ("batch.offload", (False,), "loss.custom")),
        (custom, ("loss.strategy", ("tiled",), "loss.custom, which takes its place")),
        (custom, ("loss.symmetric", (False,), "loss.custom, which takes its place")),
        (custom, ("loss.directions", (one,), "loss.custom, which takes its place")),
        (custom, ("loss.hardness", ("none",), "loss.custom, which takes its place")),
        (custom, ("loss.positives", (1,), "loss.custom")),
        (custom, ("loss.learn_temperature", (False,), "loss.custom, whose own parameters are trained")),
        (config.batch.offload, ("loss.kl_weight", (0,), f"{offload}: {_TEACHER}")),
        (loss.positives > 1, ("loss.cosent_weight", (0,), "several loss.positives")),
        (config.batch.offload, ("loss.cosent_weight", (0,), f"{offload}: {_TEACHER}")),
        (config.batch.offload, ("loss.margin_mse_weight", (0,), f"{offload}: {_TEACHER}")),
    ]
    if any(source.negatives == "own" for source in config.data.train):
        rules += [(True, rule) for rule in _beside_own_negatives()]
    if loss.bank != "none":
        rules += [(True, rule) for rule in _beside_a_bank(loss)]
    return [rule for holds, rule in rules if holds]


def _beside_own_negatives() -> list[Rule]:
    """Rules for a source of negatives=own, whose rows have InfoNCE over a query's group alone."""
    own = "negatives=own of a source, whose queries see their own negatives alone"
    return [
        ("loss.custom", (None,), own),
        ("loss.guide", (None,), own),
        ("loss.false_negative_margin", (None,), own),
        ("loss.hardness", ("none", "in_batch"), own),
        ("loss.symmetric", (False,), own),
        ("loss.directions", (["query_to_passage"],), own),
    ]


def _beside_a_bank(loss: LossConfig) -> list[Rule]:
    """Rules for a memory bank, whose rows carry their ids and known positives only."""
    bank, one, two = f"loss.bank={loss.bank}", ["query_to_passage"], ["query_to_passage", "passage_to_query"]
    weights = ("kl_weight", "margin_mse_weight", "cosent_weight", "embedding_weight")
    return [
        *((f"loss.{weight}", (0,), bank) for weight in weights),
        ("loss.teacher_margin", (None,), bank),
        ("loss.custom", (None,), bank),
        ("loss.directions", (one, two, two[::-1]), bank),
        ("loss.positives", (1,), bank),
        ("loss.hardness", ("none",), bank),
        ("loss.guide", (None,), bank),
        ("batch.pool", (None,), bank),
    ]


def _check_directions(config: Config) -> None:
    loss = config.loss
    distinct = "query_to_passage" in loss.directions and len(set(loss.directions)) == len(loss.directions)
    require(distinct, "loss.directions", "query_to_passage and others, each once", list(loss.directions))
    strong = (loss.hardness == "none") == (loss.hardness_strength == 0)
    require(strong, "loss.hardness_strength", "above 0 with loss.hardness, else 0", loss.hardness_strength)


def _check_data(config: Config) -> None:
    require(len(config.data.train) > 0, "data.train", "at least one source", [])
    for i, source in enumerate(config.data.train):
        key, columns = f"data.train.{i}", source.columns or ()
        given = {"path": source.path, "name": source.name}
        require((source.path is None) != (source.name is None), key, "exactly one of path and name", given)
        streams = f"{key}.streaming", "false for a path", source.streaming
        require(source.name is not None or not source.streaming, *streams)
        require(len(set(columns)) == len(columns), f"{key}.columns", "names of different columns", list(columns))
        if source.format == "texts":
            require(len(columns) < 2, f"{key}.columns", "one name with format texts", list(columns))
            longest, shown = (text_kinds(config, side)[i].max_tokens for side in ("passage", "query"))
            views = f"the passages' length with {key}.format=texts"
            require(shown == longest, "model.query_max_tokens", f"{longest}, {views}", shown)
        _check_policy(config, source, key)
    names = prompt_names(config)
    require(len(set(names)) == len(names), "data.train", "sources of different prompt_name", names)
    most = max(hard_negatives(config.data))
    pool, least = config.batch.pool, 2 * (config.loss.positives + most)
    room = f"null or at least {least}, so that a pool holds what two queries bring (data.negatives)"
    require(pool is None or pool >= least, "batch.pool", room, pool)
    teaches = not config.loss.compares_negatives or most >= 1
    require(teaches, "data.negatives", "at least 1 where a teacher is distilled", config.data.negatives)


def _check_policy(config: Config, source: SourceConfig, key: str) -> None:
    """Rules for a source's own settings."""
    for name in ("query_max_tokens", "passage_max_tokens"):
        own, most = getattr(source, name), getattr(config.model, name)
        require(own is None or own <= most, f"{key}.{name}", f"null or at most {most} (model.{name})", own)
    number = hard_negatives(replace(config.data, train=(source,)))[0]
    some = "at least 1 with negatives=own (or data.negatives)"
    require(source.negatives != "own" or number >= 1, f"{key}.hard_negatives", some, number)
    offload = "in_batch or none with batch.offload=true: own negatives are gathered on the device"
    require(source.negatives != "own" or not config.batch.offload, f"{key}.negatives", offload, source.negatives)
    taught = "in_batch or own: every teacher's weight in section loss is 0, so that nothing else would be learned"
    teaches = config.loss.distils or config.loss.embedding_weight > 0
    require(source.negatives != "none" or teaches, f"{key}.negatives", taught, source.negatives)
    fixed = "null where batch.one_source=false, loss.learn_temperature=true or loss.bank is set: one for a batch"
    one = config.batch.one_source and not config.loss.learn_temperature and config.loss.bank == "none"
    require(source.temperature is None or one, f"{key}.temperature", fixed, source.temperature)
    banked = "in_batch, and apart false, with loss.bank: its rows are contrasted with whole batches"
    plain = source.negatives == "in_batch" and not source.apart
    require(config.loss.bank == "none" or plain, f"{key}.negatives", banked, source.negatives)
    mixed = "false with batch.one_source=true, where sources never meet"
    require(not source.apart or not config.batch.one_source, f"{key}.apart", mixed, source.apart)


def _check_length_and_evaluation(config: Config) -> None:
    train, evaluation = config.train, config.eval
    given = f"max_steps: {train.max_steps}, epochs: {train.epochs}"
    one = (train.max_steps is None) != (train.epochs is None)
    require(one, "train", "exactly one of train.max_steps and train.epochs", given)
    if evaluation is None:
        require(train.eval_every == 0, "train.eval_every", "0 where there is no eval section", train.eval_every)
        return
    require(len(evaluation.metrics) > 0, "eval.metrics", "at least one measure, such as nDCG@10", [])
    require(evaluation.path != "", "eval.path", "a BEIR folder", "")
    require(all(asked.path for asked in evaluation.also), "eval.also", "a path for each", [*evaluation.also])
    require(evaluation.index != "", "eval.index", "flat, ivf, ivfpq, hnsw or a FAISS factory string", "")
