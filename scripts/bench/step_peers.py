"""The peers of `scripts.bench.step` on the same pairs: sentence-transformers' cached loss, and the gradient cache as it
was published.
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
from transformers import BertModel

from kernels.matmul import float32_products
from retriever.data.layout import pad_rows
from retriever.data.planner import Planner
from retriever.rng import RngState
from scripts.bench.flash import provide
from scripts.bench.measure import free_memory, peak_gib, reset_peak, timed
from scripts.bench.passages import word_tokenizer
from scripts.bench.step_data import PASSAGE_MAX_TOKENS, QUERY_MAX_TOKENS, TEMPLATE
from scripts.bench.step_methods import Sample, Work

Texts = list[np.ndarray]  # token ids of each text, special tokens included
Features = dict[
    str, Any
]  # of n texts: input_ids and attention_mask [n, width], or what sentence-transformers' own collator gives


class MiniBatch(NamedTuple):
    """How much a peer encodes at once: so many texts, or so many tokens."""

    texts: int
    tokens: int | None = None

    def __str__(self) -> str:
        return f"{self.texts} texts" if self.tokens is None else f"{self.tokens} tokens"


PairStep = Callable[[Features, Features, MiniBatch], object]  # queries, their passages


class Peer(NamedTuple):
    """Another implementation of the step, over random weights."""

    step: PairStep
    features: Callable[[Texts], Features]  # on the device
    note: str

    def pair(self, queries: Texts, passages: Texts) -> tuple[Features, Features]:
        """Both sides' features."""
        return self.features(queries), self.features(passages)


_SCALE = 50.0  # temperature 0.02
_TRIED = 1 / 4  # of the batch, on which mini-batch sizes are compared
# What a peer may encode at once, in the data's order and sorted by length; what does not fit has lost.
_PADDED: dict[bool, tuple[MiniBatch, ...]] = {
    False: (MiniBatch(256), MiniBatch(512), MiniBatch(1024)),
    True: (MiniBatch(512), MiniBatch(1024), MiniBatch(512, tokens=65_536)),
}
_FLATTENED = (MiniBatch(1024), *(MiniBatch(512, tokens=n) for n in (32_768, 65_536, 131_072)))
MINI_BATCHES: dict[str, dict[bool, tuple[MiniBatch, ...]]] = {
    "sentence-transformers-flash": {False: _FLATTENED, True: _FLATTENED},
    "sentence-transformers": _PADDED,
    "gradcache": _PADDED,
}


def pairs_of(work: Work, queries: int, *, by_length: bool) -> tuple[Texts, Texts]:
    """One global batch, row i of one side being row i's of the other.

    In the data's order, or sorted by the passage's length, which keeps texts of like length together.
    """
    batch = Planner(work.store, queries=queries, negatives=0, seed=0).plan(0)
    sides = []
    for table, rows, longest in (
        (work.store.queries, batch.queries, QUERY_MAX_TOKENS),
        (work.store.passages, batch.targets, PASSAGE_MAX_TOKENS),
    ):
        tokens, lengths = TEMPLATE.wrap(*table.gather(rows, longest - TEMPLATE.special_tokens))
        sides.append(np.split(tokens, lengths.cumsum()[:-1]))
    if by_length:
        order = np.argsort([-len(text) for text in sides[1]], kind="stable")
        sides = [[texts[i] for i in order] for texts in sides]
    return sides[0], sides[1]


def padded_features(work: Work, texts: Texts) -> Features:
    """Texts padded to the longest."""
    padded = pad_rows(texts, TEMPLATE.pad_id).map(lambda t: t.to(work.device))
    return {"input_ids": padded.input_ids, "attention_mask": padded.attention_mask}


def best_sample(
    work: Work, peer: Peer, queries: int, sizes: Sequence[MiniBatch], *, by_length: bool, seconds: float
) -> tuple[Sample, MiniBatch]:
    """The fastest of several mini-batch sizes, chosen on a part of the batch and timed on the whole of it, similarities
    in TF32.

    The whole is timed for `seconds`, at least twice where one step takes less; the fastest step counts. A size that
    does not fit loses. Raises torch.cuda.OutOfMemoryError where none fits.
    """
    part = peer.pair(*pairs_of(work, max(2, int(_TRIED * queries)), by_length=by_length))
    texts = pairs_of(work, queries, by_length=by_length)
    whole = peer.pair(*texts)
    times: dict[MiniBatch, float] = {}
    with float32_products("tf32"):
        for size in sizes:
            # The longest texts of the whole batch come first where it is sorted: what does not fit shows here.
            first = peer.pair(texts[0][: size.texts], texts[1][: size.texts])
            if _seconds(work, partial(peer.step, *first, size)) and (
                taken := _seconds(work, partial(peer.step, *part, size))
            ):
                times[size] = taken[0]
        for best in sorted(times, key=lambda size: times[size]):
            reset_peak(work.device)
            if taken := _seconds(work, partial(peer.step, *whole, best), seconds):
                return Sample(
                    min(taken), sum(len(text) for side in texts for text in side), None, peak_gib(work.device)
                ), best
    raise torch.cuda.OutOfMemoryError(f"none of {', '.join(map(str, sizes))} at once fits")


def _seconds(work: Work, call: Callable[[], object], seconds: float = 0.0) -> list[float]:
    """What calls take (`timed`); nothing where memory does not suffice."""
    try:
        return timed(work.device, call, seconds)
    except torch.cuda.OutOfMemoryError:
        pass
    free_memory(work.device)  # here and not above: the error holds on to what its call had allocated
    return []


def sentence_transformers(work: Work, *, flash: bool = False) -> Peer:
    """CachedMultipleNegativesRankingLoss in bf16, and AdamW; with `flash` as its documentation recommends: flash
    attention, nothing padded.

    Raises ImportError where the package, or (flash attention) CUDA, is missing.
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
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=work.device.type == "cuda")

    def step(queries: Features, passages: Features, size: MiniBatch) -> None:
        budget: dict[str, Any] = (
            {} if size.tokens is None else {"mini_batch_num_tokens": size.tokens}
        )  # unknown to versions before 6.1
        loss = CachedMultipleNegativesRankingLoss(model, scale=_SCALE, mini_batch_size=size.texts, **budget)
        no_labels = torch.empty(0)  # a query's own passage is its positive
        loss([dict(queries), dict(passages)], no_labels).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def flattened(texts: Texts) -> Features:
        features = transformer.data_collator([{"input_ids": text.tolist()} for text in texts])
        del features["labels"]
        return {name: x.to(work.device) if isinstance(x, Tensor) else x for name, x in features.items()}

    return Peer(step, flattened if flash else partial(padded_features, work), note)


def gradient_cache(work: Work) -> Peer:
    """The loop of Gao et al. 2021 (arXiv:2101.06983) as it was published: chunks of so many texts in the batch's order,
    each padded to its longest, a dense similarity matrix, one vector product per chunk pulled back; bf16 autocast and
    AdamW."""
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
        logits = (
            _SCALE * representations[0] @ representations[1].T
        )  # 2: the loss and its gradient at the representations
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

    return Peer(step, partial(padded_features, work), "padded")


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


PEERS: dict[str, Callable[[Work], Peer]] = {
    "sentence-transformers-flash": partial(sentence_transformers, flash=True),
    "sentence-transformers": sentence_transformers,
    "gradcache": gradient_cache,
}
