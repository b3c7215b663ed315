"""The peers of `scripts.bench.step` on the same pairs: sentence-transformers' cached loss and the published gradient
cache.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize
from transformers import PreTrainedModel

from kernels.matmul import float32_products
from retriever.data.layout import pad_rows
from retriever.data.planner import Planner
from retriever.rng import RngState
from scripts.bench.flash import provide
from scripts.bench.measure import Timing, free_memory, timed
from scripts.bench.passages import word_tokenizer
from scripts.bench.step_data import PASSAGE_MAX_TOKENS, QUERY_MAX_TOKENS, TEMPLATE
from scripts.bench.step_methods import Work

Texts = list[np.ndarray]  # token ids of each text, special tokens included
Features = dict[
    str, Any
]  # of n texts: input_ids and attention_mask [n, width], or what sentence-transformers' own collator gives


class MiniBatch(NamedTuple):
    """The mini-batch of a peer: a number of texts, or a number of tokens."""

    texts: int
    tokens: int | None = None

    def __str__(self) -> str:
        return f"{self.texts} texts" if self.tokens is None else f"{self.tokens} tokens"


class Peer(NamedTuple):
    """Another implementation of the training step, over random weights."""

    step: Callable[[Features, Features, MiniBatch], object]  # queries, their passages
    features: Callable[[Texts], Features]  # on the device
    note: str


_SCALE = 50.0  # temperature 0.02
# What a peer may encode at once; what does not fit has lost.
_PADDED = (MiniBatch(256), MiniBatch(512), MiniBatch(1024), MiniBatch(512, tokens=65_536))
MINI_BATCHES: dict[str, tuple[MiniBatch, ...]] = {
    "sentence-transformers-flash": (MiniBatch(1024), *(MiniBatch(512, tokens=n) for n in (32_768, 65_536, 131_072))),
    "sentence-transformers": _PADDED,
    "sentence-transformers-bigbatch": (MiniBatch(512, tokens=65_536), MiniBatch(512, tokens=131_072)),
    "gradcache": _PADDED[:3],
}


def pairs_of(work: Work, queries: int, *, by_length: bool) -> tuple[Texts, Texts]:
    """One global batch as (queries, passages); row i of both is one pair.

    The pairs are in the data's order, or sorted by the length of the passage, longest first.
    """
    batch = Planner(work.store, queries=queries, negatives=0, seed=0).plan(0)
    sides = []
    for table, rows, longest in (
        (work.store.queries, batch.queries, QUERY_MAX_TOKENS),
        (work.store.passages, batch.targets, PASSAGE_MAX_TOKENS),
    ):
        tokens, lengths = TEMPLATE.wrap(*table.gather(rows, longest - TEMPLATE.special_tokens))
        sides.append(np.split(tokens, lengths.cumsum()[:-1]))
    pairs = [*zip(*sides, strict=True)]
    if by_length:
        pairs.sort(key=lambda pair: -len(pair[1]))
    return [query for query, _ in pairs], [passage for _, passage in pairs]


def padded_features(work: Work, texts: Texts) -> Features:
    """The texts, padded to the longest."""
    padded = pad_rows(texts, TEMPLATE.pad_id).map(lambda t: t.to(work.device))
    return {"input_ids": padded.input_ids, "attention_mask": padded.attention_mask}


def best_timing(
    work: Work, peer: Peer, texts: tuple[Texts, Texts], sizes: Sequence[MiniBatch], seconds: float
) -> tuple[Timing, MiniBatch]:
    """Times each mini-batch size for about `seconds`, similarities in TF32; returns the times and the size of the
    fastest step.

    A size that does not fit in memory is left out. Raises torch.cuda.OutOfMemoryError if none fits.
    """
    queries, passages = (peer.features(side) for side in texts)
    found: dict[MiniBatch, Timing] = {}
    for size in sizes:
        try:
            with float32_products("tf32"):
                step = partial(peer.step, queries, passages, size)
                step()  # kernels are compiled, memory is there
                found[size] = timed(work.device, step, seconds)
        except torch.cuda.OutOfMemoryError:
            pass
        free_memory(work.device)  # here and not above: the error holds on to what its call had allocated
    if not found:
        raise torch.cuda.OutOfMemoryError(f"none of {', '.join(map(str, sizes))} at once fits")
    best = min(found, key=lambda size: min(found[size].seconds))
    return found[best], best


def sentence_transformers(work: Work, *, flash: bool = False, ours: bool = False) -> Peer:
    """CachedMultipleNegativesRankingLoss in bf16 with AdamW. `flash` is the setup that its documentation recommends:
    flash attention over unpadded inputs. `ours` changes the line that makes the loss to `bigbatch.st`.

    Raises ImportError if the package is missing or, for flash attention, CUDA.
    """
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Transformer
    from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss
    from sentence_transformers.sentence_transformer.modules import Pooling

    note, kwargs = "padded", dict[str, Any]()
    if flash:
        note, kwargs = f"flash attention, unpadded; {provide()}", {"attn_implementation": "flash_attention_2"}
    with tempfile.TemporaryDirectory() as folder:
        work.tower().save_pretrained(folder)
        word_tokenizer(PASSAGE_MAX_TOKENS, work.model.vocab_size).save_pretrained(folder)
        transformer = Transformer(folder, max_seq_length=PASSAGE_MAX_TOKENS, model_kwargs=kwargs)
    pooling = Pooling(work.model.hidden_size, "mean")
    model = SentenceTransformer(modules=[transformer, pooling], device=str(work.device)).train()
    # As its trainer does it: bf16 inside the model, the similarities in fp32.
    model.forward = torch.autocast(work.device.type, dtype=torch.bfloat16)(model.forward)  # type: ignore[method-assign]
    update = _updates(model)
    loss_class: Any = CachedMultipleNegativesRankingLoss
    if ours:
        from bigbatch.st import InfoNCELoss, unpad

        note, loss_class = "its loop with bigbatch.st", partial(InfoNCELoss, precision="bf16")
        unpad(model)

    def step(queries: Features, passages: Features, size: MiniBatch) -> None:
        # Versions before 6.1 know no budget of tokens.
        budget: dict[str, Any] = {} if size.tokens is None else {"mini_batch_num_tokens": size.tokens}
        loss = loss_class(model, scale=_SCALE, mini_batch_size=size.texts, **budget)
        no_labels = torch.empty(0)  # a query's own passage is its positive
        loss([dict(queries), dict(passages)], no_labels).backward()
        update()

    def flattened(texts: Texts) -> Features:
        features = transformer.data_collator([{"input_ids": text.tolist()} for text in texts])
        del features["labels"]
        return {name: x.to(work.device) if isinstance(x, Tensor) else x for name, x in features.items()}

    return Peer(step, flattened if flash else partial(padded_features, work), note)


def gradient_cache(work: Work) -> Peer:
    """The published loop of Gao et al. 2021 (arXiv:2101.06983): chunks of a number of texts in the batch's order, each
    padded to its longest text, a dense similarity matrix, and one vector product per chunk for backward; bf16 autocast,
    AdamW.
    """
    tower = work.tower()
    update = _updates(tower)

    def step(queries: Features, passages: Features, size: MiniBatch) -> None:
        chunks = [chunk for side in (queries, passages) for chunk in _chunks(side, size.texts)]
        states: list[RngState] = []
        found: list[Tensor] = []
        for chunk in chunks:  # 1: representations of all chunks, without graphs
            states.append(RngState.capture(work.device))
            with torch.no_grad():
                found.append(_embed(tower, chunk))
        representations = torch.cat(found).requires_grad_()  # [2n, D]
        query_rows, passage_rows = representations.chunk(2)
        logits = _SCALE * query_rows @ passage_rows.T  # 2: the loss and its gradient at the representations
        cross_entropy(logits, torch.arange(len(logits), device=work.device)).backward()
        del logits
        assert representations.grad is not None
        gradients = representations.grad.split([len(rows) for rows in found])
        for chunk, state, gradient in zip(chunks, states, gradients, strict=True):  # 3: each again, with its graph
            with state.restored():
                output = _embed(tower, chunk)
            torch.dot(output.flatten(), gradient.flatten()).backward()
        update()

    return Peer(step, partial(padded_features, work), "padded")


def _updates(model: torch.nn.Module) -> Callable[[], None]:
    """The end of a peer's step: clipping, AdamW, and gradients set to None."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=next(model.parameters()).is_cuda)

    def update() -> None:
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return update


def _chunks(side: Features, size: int) -> Iterator[Features]:
    for ids, mask in zip(side["input_ids"].split(size), side["attention_mask"].split(size), strict=True):
        width = int(mask.sum(dim=1).max())
        yield {"input_ids": ids[:, :width], "attention_mask": mask[:, :width]}


def _embed(tower: PreTrainedModel, chunk: Features) -> Tensor:
    """Mean-pooled unit vectors [n, D] float32."""
    with torch.autocast(chunk["input_ids"].device.type, dtype=torch.bfloat16):
        hidden = tower(**chunk).last_hidden_state.float()  # [n, width, D]
    mask = chunk["attention_mask"][..., None]
    return normalize((hidden * mask).sum(dim=1) / mask.sum(dim=1), dim=-1)


PEERS: dict[str, Callable[[Work], Peer]] = {
    "sentence-transformers-flash": partial(sentence_transformers, flash=True),
    "sentence-transformers": sentence_transformers,
    "sentence-transformers-bigbatch": partial(sentence_transformers, ours=True),
    "gradcache": gradient_cache,
}
