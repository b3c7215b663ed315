"""The summary of a run before step 1: what is trained, on what data, in which batches, for how long."""

from __future__ import annotations

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from retriever.config import Config, LossConfig, ModelConfig
from retriever.data.planner import Planner
from retriever.data.relations import Csr
from retriever.data.store import Store
from retriever.data.tokens import SIDES, Side, TokenTemplate, tokenize_flat
from retriever.encoder.batch_norm import batch_norms
from retriever.encoder.dual_encoder import DualEncoder
from retriever.parallel.world import World
from retriever.plan.report import layers_of, size
from retriever.wording import counted

_STATE_BYTES = {"adamw": 8, "adafactor": 0, "adafactor_momentum": 2}  # of a trained parameter


def summary(
    config: Config,
    encoder: DualEncoder,
    tokenizer: PreTrainedTokenizerBase,
    store: Store,
    planner: Planner,
    total: int,
    world: World,
) -> str:
    """Five lines on the run: model, data, tokens, batch, length and output."""
    model, loss = config.model, config.loss
    where = torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else "CPU"
    sources = ", ".join(f"{s.name} ({s.last - s.first:,})" for s in store.sources)
    lists = f"a query has {_each(store.positives, 'positive')} and {_each(store.negatives, 'hard negative')}"
    written = checkpoint_bytes(config, encoder)
    by_chunk = (
        " (batch normalisation computes by their rows: the gradient depends on them)" if batch_norms(encoder) else ""
    )
    return "\n".join(
        (
            f"model   {model.name_or_path}: {_parameters(encoder)}, {'tied' if encoder.tied else 'untied'} towers, "
            f"{encoder.pooling} pooling, {encoder.dimension} dimensions"
            + (f", in shards on {world.size} ranks" if world.sharded else "")
            + f"; {modes(model, encoder)}",
            f"data    queries of {sources}; {len(store.passages):,} passages{_equal(store)}; {lists}",
            f"tokens  {'; '.join(_tokens(config, tokenizer, store, side) for side in SIDES)}",
            f"batch   {_queries(planner, config.batch.queries)} in chunks of at most {config.batch.tokens_per_chunk:,} "
            f"tokens{by_chunk}, {counted(len(planner.plan(0).passages), 'passage')} in the first batch; {loss.title}, "
            f"temperature {loss.temperature:g}{' (learned)' if loss.learn_temperature else ''}{_bank(loss)}",
            f"run     {counted(total, 'step')} ({planner.steps_per_epoch:,} an epoch) on {world.size} × {where}, "
            f"{config.optim.precision}; output in {config.run.output_dir}"
            + (f", {size(written)} a checkpoint" if written is not None else ""),
        )
    )


def modes(model: ModelConfig, encoder: DualEncoder) -> str:
    """The execution of the towers, and why layers of packed texts are not fused, unless a setting says so."""
    reason = encoder.unfused_because if model.attention == "packed" and not model.fused else None
    return f"{model.attention} texts, {layers_of(model)}" + (f" (not fused: {reason})" if reason else "")


def checkpoint_bytes(config: Config, encoder: DualEncoder) -> int | None:
    """About how much a checkpoint with its export takes on disk; None with a bank, or an optimizer by import path."""
    if config.optim.name not in _STATE_BYTES or config.loss.bank != "none":
        return None
    average = 4 if config.optim.ema is not None else 0
    trained, every = _counts(encoder)
    return 4 * every + (4 + _STATE_BYTES[config.optim.name] + average) * trained


def prompt_tokens(tokenizer: PreTrainedTokenizerBase, prompt: str) -> int:
    """The number of tokens of a prompt."""
    return len(tokenize_flat(tokenizer, [prompt])[0])


def cut_share(config: Config, tokenizer: PreTrainedTokenizerBase, store: Store, side: Side) -> float:
    """The share of a side's texts that are longer than their source's length."""
    texts = store.queries if side == "query" else store.passages
    special_tokens = TokenTemplate.from_tokenizer(tokenizer).special_tokens
    return float(np.mean(texts.lengths + special_tokens > store.limits(config, side)))


def _tokens(config: Config, tokenizer: PreTrainedTokenizerBase, store: Store, side: Side) -> str:
    """A side's length, how many of its texts are cut there or at their source's length, and its prompt."""
    model = config.model
    cut = cut_share(config, tokenizer, store, side)
    prompt = prompt_tokens(tokenizer, getattr(model, f"{side}_prompt"))
    many = "none is" if cut == 0 else f"{cut:.1%} are" if cut >= 0.001 else "less than 0.1% are"
    asked = f", with a prompt of {prompt}" if prompt else ""
    return f"at most {getattr(model, f'{side}_max_tokens')} a {side}{asked} ({many} cut)"


def _counts(encoder: DualEncoder) -> tuple[int, int]:
    """Parameters that are trained, and all of them."""
    sizes = [(p.numel(), p.requires_grad) for p in encoder.parameters()]
    return sum(count for count, trained in sizes if trained), sum(count for count, _ in sizes)


def _parameters(encoder: DualEncoder) -> str:
    trained, every = _counts(encoder)
    found = f"{every / 1e6:.1f}M parameters"
    return f"{found}, all trained" if trained == every else f"{found}, {trained / 1e6:.2f}M of them trained"


def _each(lists: Csr, noun: str) -> str:
    """Passages per query: one number, or the least, the most and the mean."""
    counts = np.diff(lists.ptr)
    least, most = int(counts.min()), int(counts.max())
    if least == most:
        return counted(most, noun) if most else f"no {noun}"
    return f"{least:,} to {counted(most, noun)} ({counts.mean():.1f} on average)"


def _queries(planner: Planner, asked: int) -> str:
    """The real number of queries in the batches."""
    least, most = planner.batch_queries
    found = f"{most:,} queries" if least == most else f"{least:,} to {most:,} queries"
    if planner.steps_per_epoch == 1 and most < asked:
        return f"{found}, all there are (batch.queries={asked})"
    return (
        found if most == asked else f"{found} (batch.queries={asked}: a source is divided into batches of equal size)"
    )


def _bank(loss: LossConfig) -> str:
    return "" if loss.bank == "none" else f"; bank {loss.bank} of {counted(loss.bank_steps, 'step')}"


def _equal(store: Store) -> str:
    """The number of texts with the tokens of an earlier one."""
    found = [("query", "sharing its positives"), ("passage", "taken for it")]
    counts = zip(found, (store.equal["queries"], store.equal["passages"]), strict=True)
    said = ", ".join(f"{counted(count, name)} {what}" for (name, what), count in counts if count)
    return f"; with the tokens of an earlier one {said}" if said else ""
