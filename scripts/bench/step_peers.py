"""The peers of `scripts.bench.step` on the same pairs: sentence-transformers' cached loss, and the gradient cache as it was published."""

from __future__ import annotations

import gc
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize
from transformers import BertModel

from retriever.data.layout import pad_rows
from retriever.data.planner import Planner
from retriever.rng import RngState
from scripts.bench.passages import word_tokenizer
from scripts.bench.step_data import PASSAGE_MAX_TOKENS, QUERY_MAX_TOKENS, TEMPLATE
from scripts.bench.step_methods import Sample, Work, synchronize

Features = dict[str, Tensor]  # input_ids and attention_mask [n, width]


class MiniBatch(NamedTuple):
    """How much a peer encodes at once: so many texts, or so many tokens."""

    texts: int
    tokens: int | None = None

    def __str__(self) -> str:
        return f"{self.texts} texts" if self.tokens is None else f"{self.tokens} tokens"


PairStep = Callable[[Features, Features, MiniBatch], object]  # queries, their passages

_SCALE = 50.0  # temperature 0.02
_TRIED = 1 / 16  # of the batch, on which mini-batch sizes are compared
# What a peer may encode at once, in the data's order and sorted by length; what does not fit has lost.
MINI_BATCHES = {
    False: (MiniBatch(256), MiniBatch(512), MiniBatch(1024)),
    True: (MiniBatch(512), MiniBatch(1024), MiniBatch(512, tokens=65_536)),
}


def pairs_of(work: Work, queries: int, *, by_length: bool) -> tuple[Features, Features, int]:
    """One global batch on the device, each side padded to its longest, row i of one being row i's of the other; and its real tokens.

    In the data's order, or sorted by the passage's length, which keeps texts of like length together.
    """
    batch = Planner(work.store, queries=queries, negatives=0, seed=0).plan(0)
    sides = []
    for table, rows, longest in (
        (work.store.queries, batch.queries, QUERY_MAX_TOKENS),
        (work.store.passages, batch.targets, PASSAGE_MAX_TOKENS),
    ):
        sides.append([TEMPLATE.wrap(table.tokens(row), longest) for row in rows])
    if by_length:
        order = np.argsort([-len(text) for text in sides[1]], kind="stable")
        sides = [[texts[i] for i in order] for texts in sides]
    queries_, passages = (_features(pad_rows(texts, TEMPLATE.pad_id).map(lambda t: t.to(work.device))) for texts in sides)
    return queries_, passages, sum(len(text) for texts in sides for text in texts)


def _features(padded) -> Features:  # type: ignore[no-untyped-def]
    return {"input_ids": padded.input_ids, "attention_mask": padded.attention_mask}


def best_sample(
    work: Work, step: PairStep, queries: int, sizes: Sequence[MiniBatch], *, by_length: bool, seconds: float
) -> tuple[Sample, MiniBatch]:
    """The fastest of several mini-batch sizes, chosen on a part of the batch and timed on the whole of it, similarities in TF32.

    A size that does not fit loses. Raises torch.cuda.OutOfMemoryError where none fits.
    """
    a, b, _ = pairs_of(work, max(2, int(_TRIED * queries)), by_length=by_length)
    whole_a, whole_b, tokens = pairs_of(work, queries, by_length=by_length)
    with _tf32():
        times: dict[MiniBatch, float] = {}
        for size in sizes:
            # The longest texts of the whole batch come first where it is sorted: what does not fit shows here.
            first = partial(step, _head(whole_a, size.texts), _head(whole_b, size.texts), size)
            if _seconds(work, first) is not None and (seconds_ := _seconds(work, partial(step, a, b, size))) is not None:
                times[size] = seconds_
        for best in sorted(times, key=lambda size: times[size]):
            if work.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(work.device)
            spent: list[float] = []
            while not spent or sum(spent) + spent[-1] < seconds:
                if (took := _seconds(work, partial(step, whole_a, whole_b, best))) is None:
                    break
                spent.append(took)
            if spent:
                peak = torch.cuda.max_memory_allocated(work.device) / 2**30 if work.device.type == "cuda" else None
                return Sample(sum(spent) / len(spent), tokens, None, peak), best
    raise torch.cuda.OutOfMemoryError(f"none of {', '.join(map(str, sizes))} at once fits")


def _head(features: Features, n: int) -> Features:
    return {name: tensor[:n] for name, tensor in features.items()}


def _seconds(work: Work, call: Callable[[], object]) -> float | None:
    """What a call takes; None where memory does not suffice."""
    synchronize(work.device)
    started = time.perf_counter()
    try:
        call()
    except torch.cuda.OutOfMemoryError:
        fits = False
    else:
        fits = True
    synchronize(work.device)
    taken = time.perf_counter() - started
    if not fits:  # here and not above: the error holds on to what its call had allocated
        gc.collect()
        torch.cuda.empty_cache()
    return taken if fits else None


@contextmanager
def _tf32() -> Iterator[None]:
    """Products of fp32 matrices in TF32 meanwhile."""
    usual = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(usual)


def sentence_transformers_step(work: Work) -> PairStep:
    """CachedMultipleNegativesRankingLoss in bf16, and AdamW. Raises ImportError where the package is not installed."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Transformer
    from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss
    from sentence_transformers.sentence_transformer.modules import Pooling

    with tempfile.TemporaryDirectory() as folder:
        work.tower().save_pretrained(folder)
        word_tokenizer(PASSAGE_MAX_TOKENS, work.model.vocab_size).save_pretrained(folder)
        transformer = Transformer(folder, max_seq_length=PASSAGE_MAX_TOKENS)
        pooling = Pooling(work.model.hidden_size, "mean")
        model = SentenceTransformer(modules=[transformer, pooling], device=str(work.device)).train()
    # As its trainer does it: bf16 inside the model, the similarities in fp32.
    model.forward = torch.autocast(work.device.type, dtype=torch.bfloat16)(model.forward)  # type: ignore[method-assign]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=work.device.type == "cuda")

    def step(queries: Features, passages: Features, size: MiniBatch) -> None:
        budget: dict[str, Any] = {} if size.tokens is None else {"mini_batch_num_tokens": size.tokens}  # unknown to versions before 6.1
        loss = CachedMultipleNegativesRankingLoss(model, scale=_SCALE, mini_batch_size=size.texts, **budget)
        labels = torch.arange(len(queries["input_ids"]), device=work.device)
        loss([dict(queries), dict(passages)], labels).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def gradient_cache_step(work: Work) -> PairStep:
    """The loop of Gao et al. 2021 (arXiv:2101.06983) as it was published: chunks of so many texts in the batch's order, each padded to its
    longest, a dense similarity matrix, one vector product per chunk pulled back; bf16 autocast and AdamW."""
    tower = work.tower()
    optimizer = torch.optim.AdamW(tower.parameters(), lr=1e-5, fused=work.device.type == "cuda")

    def step(queries: Features, passages: Features, size: MiniBatch) -> None:
        chunks = [list(_chunks(side, size.texts)) for side in (queries, passages)]
        states: list[RngState] = []
        representations = []
        for side in chunks:  # 1: representations of all chunks, without graphs
            found = []
            for chunk in side:
                states.append(RngState.capture(work.device))
                with torch.no_grad():
                    found.append(_embed(tower, chunk))
            representations.append(torch.cat(found).requires_grad_())
        logits = _SCALE * representations[0] @ representations[1].T  # 2: the loss and its gradient at the representations
        cross_entropy(logits, torch.arange(len(logits), device=work.device)).backward()
        del logits
        remembered = iter(states)
        for side, whole in zip(chunks, representations, strict=True):  # 3: every chunk again, with its graph
            assert whole.grad is not None
            for chunk, gradient in zip(side, whole.grad.split(size.texts), strict=True):
                with next(remembered).restored():
                    output = _embed(tower, chunk)
                torch.dot(output.flatten(), gradient.flatten()).backward()
        torch.nn.utils.clip_grad_norm_(tower.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def _chunks(side: Features, size: int) -> Iterator[Features]:
    for ids, mask in zip(side["input_ids"].split(size), side["attention_mask"].split(size), strict=True):
        width = int(mask.sum(dim=1).max())
        yield {"input_ids": ids[:, :width], "attention_mask": mask[:, :width]}


def _embed(tower: BertModel, chunk: Features) -> Tensor:
    """Mean-pooled unit vectors [n, D] float32."""
    with torch.autocast(chunk["input_ids"].device.type, dtype=torch.bfloat16):
        hidden = tower(**chunk).last_hidden_state.float()  # [n, width, D]
    mask = chunk["attention_mask"][..., None]
    return normalize((hidden * mask).sum(dim=1) / mask.sum(dim=1), dim=-1)


PEERS: dict[str, Callable[[Work], PairStep]] = {"sentence-transformers": sentence_transformers_step, "gradcache": gradient_cache_step}
