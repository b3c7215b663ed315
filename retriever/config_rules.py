"""Which values can be run together."""

from __future__ import annotations

import math
from dataclasses import asdict

from retriever.config import Config
from retriever.config_tree import flatten
from retriever.config_tree import require as _require

_YEAR_S = 365 * 24 * 3600
_MOST_TOKENS = 1 << 20  # of a text
_MOST_PASSES = 10_000
_COLDEST = 1e-12  # of float32 similarities over it


def validate(config: Config) -> None:
    """Raises ConfigError where the values cannot be run together."""
    model, loss, train = config.model, config.loss, config.train
    for key, number in flatten(asdict(config)).items():
        _require(not isinstance(number, float) or math.isfinite(number), key, "a finite number", number)
        _require(
            not isinstance(number, int) or -(2**63) <= number < 2**63, key, "a whole number of at most 63 bits", number
        )
    _require(config.run.seed >= 0, "run.seed", "0 or more", config.run.seed)
    _require(
        0 < config.run.timeout_s <= _YEAR_S,
        "run.timeout_s",
        "a number of seconds above 0 and at most a year",
        config.run.timeout_s,
    )
    _require(model.name_or_path != "", "model.name_or_path", "a model folder or Hugging Face name", "")
    _require(
        not (model.fused is True and model.attention == "padded"),
        "model.fused",
        "false or auto with model.attention=padded",
        True,
    )
    _require(
        not (model.fused is True and model.compile is True),
        "model.compile",
        "false or auto with model.fused=true",
        True,
    )
    uncompiled = not (model.compile is True and model.gradient_checkpointing)
    _require(uncompiled, "model.compile", "false or auto with model.gradient_checkpointing=true", True)
    unfused = not (model.fused is True and model.gradient_checkpointing)
    _require(unfused, "model.fused", "false or auto with model.gradient_checkpointing=true", True)
    cut = model.truncate_dim
    _require(
        cut in ("auto", None) or (isinstance(cut, int) and cut >= 1),
        "model.truncate_dim",
        "auto, null or at least 1",
        cut,
    )
    _check_lora(config)
    for key in ("query_max_tokens", "passage_max_tokens"):
        _require(
            4 <= getattr(model, key) <= _MOST_TOKENS, f"model.{key}", f"from 4 to {_MOST_TOKENS}", getattr(model, key)
        )
    _require(len(config.data.train) > 0, "data.train", "at least one source", [])
    for i, source in enumerate(config.data.train):
        key = f"data.train.{i}"
        _require((source.path is None) != (source.name is None), key, "exactly one of path and name", asdict(source))
        columns = source.columns or ()
        _require(len(set(columns)) == len(columns), f"{key}.columns", "names of different columns", list(columns))
        _require(
            0 < source.weight <= _MOST_PASSES,
            f"{key}.weight",
            f"above 0 and at most {_MOST_PASSES} passes an epoch",
            source.weight,
        )
        _require(source.limit is None or source.limit > 0, f"{key}.limit", "null or at least 1", source.limit)
    _require(config.data.negatives >= 0, "data.negatives", "0 or more", config.data.negatives)
    _require(
        config.batch.queries >= 2, "batch.queries", "at least 2: a batch of one has no negatives", config.batch.queries
    )
    if config.batch.tokens_per_chunk != "auto":
        longest = max(model.query_max_tokens, model.passage_max_tokens)
        _require(
            config.batch.tokens_per_chunk >= longest,
            "batch.tokens_per_chunk",
            f"auto or at least {longest}, the longest text of model.*_max_tokens",
            config.batch.tokens_per_chunk,
        )
    for key in ("retain", "retain_products"):
        retain = getattr(config.batch, key)
        _require(retain == "auto" or retain >= 0, f"batch.{key}", "auto, true, false or a number of tokens", retain)
    _require(loss.temperature >= _COLDEST, "loss.temperature", f"a number of at least {_COLDEST:g}", loss.temperature)
    _require(all(d >= 1 for d in loss.dims), "loss.dims", "numbers of at least 1", list(loss.dims))
    as_many = len(loss.dim_weights) in (0, len(loss.dims)) and all(weight > 0 for weight in loss.dim_weights)
    _require(
        as_many,
        "loss.dim_weights",
        f"[] or {len(loss.dims)} numbers above 0, one for each of loss.dims",
        list(loss.dim_weights),
    )
    _require(
        loss.workspace_mib == "auto" or loss.workspace_mib >= 1,
        "loss.workspace_mib",
        "auto or at least 1",
        loss.workspace_mib,
    )
    margin = loss.false_negative_margin
    _require(margin is None or margin >= 0, "loss.false_negative_margin", "null or 0 or more", margin)
    _check_distillation(config)
    _check_offload(config)
    _require(config.optim.lr > 0, "optim.lr", "a number above 0", config.optim.lr)
    _require(
        all(0 <= beta < 1 for beta in config.optim.betas),
        "optim.betas",
        "two numbers from 0 to below 1",
        list(config.optim.betas),
    )
    unused = config.optim.name == "adafactor" and tuple(config.optim.betas) != (0.9, 0.999)
    _require(
        not unused, "optim.betas", "its default with optim.name=adafactor, which has none", list(config.optim.betas)
    )
    _require(config.optim.weight_decay >= 0, "optim.weight_decay", "0 or more", config.optim.weight_decay)
    _require(config.optim.warmup >= 0, "optim.warmup", "0 or more", config.optim.warmup)
    _require(config.optim.max_grad_norm > 0, "optim.max_grad_norm", "a number above 0", config.optim.max_grad_norm)
    one = (train.max_steps is None) != (train.epochs is None)
    _require(
        one,
        "train",
        "exactly one of train.max_steps and train.epochs",
        f"max_steps: {train.max_steps}, epochs: {train.epochs}",
    )
    _require(train.max_steps is None or train.max_steps > 0, "train.max_steps", "at least 1", train.max_steps)
    _require(train.epochs is None or train.epochs > 0, "train.epochs", "a number above 0", train.epochs)
    for name in ("log_every", "save_every", "keep_last"):
        _require(getattr(train, name) >= 1, f"train.{name}", "at least 1", getattr(train, name))
    _require(train.eval_every >= 0, "train.eval_every", "0 or more", train.eval_every)
    _require(
        train.eval_every == 0 or config.eval is not None,
        "train.eval_every",
        "0 where there is no eval section",
        train.eval_every,
    )
    if config.eval is not None:
        _require(config.eval.k >= 1, "eval.k", "at least 1", config.eval.k)
        _require(len(config.eval.metrics) > 0, "eval.metrics", "at least one measure, such as nDCG@10", [])
        _require(config.eval.path != "", "eval.path", "a BEIR folder", "")
        _require(config.eval.index != "", "eval.index", "flat, ivf, ivfpq, hnsw or a FAISS factory string", "")


def check_sharded(config: Config) -> None:
    """Raises ConfigError where a run whose encoder is in shards (FSDP) asks for what it lacks."""
    refused = {
        "run.verify": (True,),
        "run.preflight": ("only",),
        "model.fused": (True,),
        "model.compile": (True,),
        "optim.name": ("adafactor",),
        "optim.precision": ("fp16",),
    }
    settings = flatten(asdict(config))
    for key, values in refused.items():
        _require(settings[key] not in values, key, "another value with FSDP", settings[key])
    for key in ("batch.retain", "batch.retain_products"):
        _require(settings[key] in ("auto", 0), key, "auto or false with FSDP", settings[key])


def _check_lora(config: Config) -> None:
    lora = config.model.lora
    if lora is None:
        return
    _require(lora.r >= 1, "model.lora.r", "at least 1", lora.r)
    _require(lora.alpha > 0, "model.lora.alpha", "a number above 0", lora.alpha)
    _require(0 <= lora.dropout < 1, "model.lora.dropout", "0 to below 1", lora.dropout)
    _require(config.model.fused is not True, "model.fused", "false or auto with model.lora", True)


def _check_distillation(config: Config) -> None:
    loss = config.loss
    weights = {name: getattr(loss, name) for name in ("contrastive_weight", "kl_weight", "margin_mse_weight")}
    for name, weight in weights.items():
        _require(weight >= 0, f"loss.{name}", "0 or more", weight)
    _require(any(weights.values()), "loss", "one of " + ", ".join(weights) + " above 0", weights)
    _require(
        loss.teacher_temperature >= _COLDEST,
        "loss.teacher_temperature",
        f"a number of at least {_COLDEST:g}",
        loss.teacher_temperature,
    )
    _require(
        not loss.distils or config.data.negatives >= 1,
        "data.negatives",
        "at least 1 where a teacher is distilled",
        config.data.negatives,
    )


def _check_offload(config: Config) -> None:
    loss = config.loss
    if not config.batch.offload:
        return
    _require(
        loss.strategy == "tiled",
        "loss.strategy",
        "tiled with batch.offload=true: the others hold a matrix of similarities",
        loss.strategy,
    )
    _require(
        loss.exchange != "gather",
        "loss.exchange",
        "auto or ring with batch.offload=true: nothing is gathered",
        loss.exchange,
    )
    for name in ("kl_weight", "margin_mse_weight"):
        weight = getattr(loss, name)
        _require(
            weight == 0,
            f"loss.{name}",
            "0 with batch.offload=true: a teacher's terms gather all passages on the device",
            weight,
        )
