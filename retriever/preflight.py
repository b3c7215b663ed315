"""Before step 1: resolves `auto` values from the model and the machine, warns, checks the gradient."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from retriever import checkpoint
from retriever.config import Config, ConfigError, ModelConfig
from retriever.config_sources import hard_negatives, text_kinds
from retriever.data.batch import BatchLoader
from retriever.data.planner import Planner
from retriever.data.store import Store
from retriever.data.tokens import SIDES, TokenTemplate
from retriever.encoder.architectures import FLOAT32_NORMS
from retriever.encoder.batch_norm import batch_norms
from retriever.encoder.dual_encoder import DualEncoder
from retriever.encoder.execution import has_dropout
from retriever.loss.custom import CustomLoss
from retriever.parallel.cost import exchange_for
from retriever.parallel.world import World
from retriever.plan.report import size
from retriever.summary import checkpoint_bytes, cut_share, prompt_tokens
from retriever.verify import GradientCheck, gradient_error
from retriever.wording import counted

_WORKSPACE_MIB = 1024
_LARGE_BATCH = 8192  # queries
_VERIFY_QUERIES = 32
_VERIFY_BLOCK_ROWS = 12  # several blocks, the last one shorter
_VERIFY_BOUND, _VERIFY_BOUND_FLOAT32 = 1e-9, 1e-6  # the other one where norms round a gradient to float32
_VERIFY_TOKENS_PER_CHUNK = 256


def resolve(config: Config, encoder: DualEncoder, world: World) -> Config:
    """The configuration with each `auto` that needs no measuring replaced, the same on every rank.

    `plan.sizes` replaces those of `batch`: it measures the encoder as this configuration runs it.
    """
    for name, dims in (("loss.dims", config.loss.dims), ("eval.dims", config.eval.dims if config.eval else ())):
        if max(dims, default=0) > encoder.dimension:
            size = f"{encoder.dimension} dimensions of {config.model.name_or_path}"
            raise ConfigError(f"{name}: {max(dims)} is more than the {size}")
    _check_views(config, encoder)
    _check_batch_norms(config, encoder, world)
    return replace(
        config,
        model=replace(_modes(config.model, encoder, world), pooling=encoder.pooling, truncate_dim=encoder.truncate_dim),
        loss=replace(
            config.loss,
            exchange=exchange_for(config, encoder.dimension, world),
            workspace_mib=_workspace_mib(config, world),
        ),
    )


def _check_views(config: Config, encoder: DualEncoder) -> None:
    """Raises ConfigError where texts are their own positives and no dropout makes their two views differ."""
    key = next((f"data.train.{i}" for i, source in enumerate(config.data.train) if source.format == "texts"), None)
    adapted = config.model.lora is not None and config.model.lora.dropout > 0  # new adapters give zeros: unseen
    if key is not None and not adapted and not has_dropout(encoder):
        raise ConfigError(
            f"{key}.format: texts, but {config.model.name_or_path} has no dropout, so that both views of a text are "
            "equal; raise the dropout in its config.json (BERT's hidden_dropout_prob), or train on pairs"
        )


def _check_batch_norms(config: Config, encoder: DualEncoder, world: World) -> None:
    """Raises ConfigError where the model has batch normalisation, and what a chunk is, is not the user's choice."""
    name = next(iter(batch_norms(encoder)), None)
    if name is None:
        return
    has = f"{config.model.name_or_path} has batch normalisation ({name})"
    if config.batch.tokens_per_chunk == "auto":
        raise ConfigError(
            f"batch.tokens_per_chunk: auto, but {has}: each chunk normalises by its own rows, so the gradient depends "
            "on the size of chunks; set it to a number of tokens"
        )
    if world.size > 1:
        raise ConfigError(f"{has}, whose running values would differ among {world.size} ranks; train on one GPU")


def _modes(model: ModelConfig, encoder: DualEncoder, world: World) -> ModelConfig:
    """Resolves the execution of the towers: on a GPU packed if the architecture can, fused if it can, else compiled.

    An encoder in shards uses the library's layers, since only those gather their weights.
    """
    gpu, asked = world.device.type == "cuda", model
    if model.attention == "auto":
        packed = model.fused is True or (gpu and encoder.can_pack)
        model = replace(model, attention="packed" if packed else "padded")
    free = gpu and not model.gradient_checkpointing and not world.sharded
    if model.fused == "auto":
        fused = free and model.attention == "packed" and asked.compile is not True and encoder.can_fuse
        model = replace(model, fused=fused)
    if model.compile == "auto":
        model = replace(model, compile=free and not model.fused)
    return model


def warnings(
    config: Config,
    encoder: DualEncoder,
    tokenizer: PreTrainedTokenizerBase,
    store: Store,
    total: int,
    queries: int,
) -> list[str]:
    """Warnings about settings that are allowed but probably not meant; batches have up to `queries` queries.

    Nothing is changed.
    """
    optim, model, loss = config.optim, config.model, config.loss
    splits = [asked.split for asked in config.eval.collections] if config.eval is not None else []
    split = next((name for name in splits if name.startswith("test")), "")
    possible = [
        (
            optim.warmup >= total,
            f"optim.warmup={optim.warmup:g} steps of a run of {counted(total, 'step')}: the learning rate never "
            "reaches optim.lr; set a smaller number or a share below 1",
        ),
        (
            queries >= _LARGE_BATCH and optim.lr < 1e-4,
            f"optim.lr={optim.lr:g} is small for batches of {queries:,} queries: 1e-4 and more is usual at this size",
        ),
        (
            any(hard_negatives(config.data)) and not len(store.negatives.ids),
            f"data.negatives={config.data.negatives}, but no query of data.train has a hard negative: only "
            "other queries' passages are negatives. `python -m scripts.mine_negatives` finds hard ones; "
            "data.negatives=0 turns this warning off",
        ),
        (
            not model.normalize and loss.temperature < 0.1,
            f"model.normalize=false with loss.temperature={loss.temperature:g}: logits may be very large; "
            "loss.temperature=1 is usual there",
        ),
        (
            split != "",
            f"eval.split={split}: best/ is chosen on a test split, so its score there is no fair estimate any more; "
            "name a development split",
        ),
        (
            model.pooling == "last" and not TokenTemplate.from_tokenizer(tokenizer).suffix,
            "model.pooling=last, but the tokenizer appends nothing to a text, so its last word is what is pooled; "
            "model.append_eos=true appends the end-of-text token",
        ),
        *(
            (
                (share := cut_share(config, tokenizer, store, side)) > 0.5,
                f"model.{side}_max_tokens={getattr(model, f'{side}_max_tokens')} cuts {share:.0%} of the {plural}: "
                "raise it",
            )
            for side, plural in zip(SIDES, ("queries", "passages"), strict=True)
        ),
    ]
    return (
        [text for holds, text in possible if holds]
        + _prompt_warnings(config, tokenizer)
        + _disk_warning(config, encoder)
    )


def _prompt_warnings(config: Config, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Says which sources' prompts leave their texts less than half of their length."""
    found = []
    for side in SIDES:
        kinds = text_kinds(config, side)
        for kind in dict.fromkeys(kinds):
            length, of_model = prompt_tokens(tokenizer, kind.prompt), getattr(config.model, f"{side}_prompt")
            key = "model" if kind.prompt == of_model else f"data.train.{kinds.index(kind)}"
            if 2 * length > kind.max_tokens:
                found.append(
                    f"{key}.{side}_prompt takes {length} of the {kind.max_tokens} tokens of {side}_max_tokens: texts "
                    "are cut short; raise the length or shorten the prompt"
                )
    return found


def _disk_warning(config: Config, encoder: DualEncoder) -> list[str]:
    """Says where the checkpoints that are still to come may not fit on the disk."""
    folder, written = Path(config.run.output_dir).absolute(), checkpoint_bytes(config, encoder)
    free = shutil.disk_usage(next(parent for parent in (folder, *folder.parents) if parent.exists())).free
    more = config.train.keep_last + 1 - len(checkpoint.steps(folder / checkpoint.FOLDER))
    if written is None or more * written <= free:
        return []
    return [
        f"run.output_dir: {size(free)} are free, and {counted(more, 'checkpoint')} of {size(written)} will be written; "
        "free some space, choose another folder or lower train.keep_last"
    ]


def verify(
    config: Config,
    encoder: DualEncoder,
    store: Store,
    template: TokenTemplate,
    custom: CustomLoss | None = None,
) -> GradientCheck:
    """Compares the cached gradient with that of a whole-batch graph, on a small batch of this run's own data.

    Raises ConfigError if they differ. See `retriever.verify`.
    """
    small = replace(
        config,
        batch=replace(
            config.batch,
            queries=min(config.batch.queries, _VERIFY_QUERIES),
            tokens_per_chunk=max(
                _VERIFY_TOKENS_PER_CHUNK, config.model.query_max_tokens, config.model.passage_max_tokens
            ),
        ),
    )
    alone = World(encoder.device)
    batch = BatchLoader(store, Planner.from_config(store, small), template, small, alone).load(0)
    block_rows = _VERIFY_BLOCK_ROWS if config.batch.offload else None
    check = gradient_error(encoder, config.loss, batch, block_rows=block_rows, custom=custom)
    rounded = any(tower.config.model_type in FLOAT32_NORMS for tower in encoder.each_tower)
    bound = _VERIFY_BOUND_FLOAT32 if rounded else _VERIFY_BOUND
    if not max(check.gradient_error, check.loss_error) <= bound:
        raise ConfigError(f"run.verify: {check}; expected at most {bound:g}. Please report it; the run was not started")
    return check


def _workspace_mib(config: Config, world: World) -> int:
    """Up to 1 GiB of the memory that is free on every rank; a resumed run keeps the first choice."""
    if config.loss.workspace_mib != "auto":
        return config.loss.workspace_mib
    free_mib = torch.cuda.mem_get_info(world.device)[0] // 2**21 if world.device.type == "cuda" else _WORKSPACE_MIB
    return max(1, int(world.least(min(_WORKSPACE_MIB, free_mib))))
