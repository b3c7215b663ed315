"""Texts to embeddings, one batch of texts after another, without a wait between them.

Threads read and tokenise the next batch while this one is encoded, sorted by length, and the one before it travels back
from the device. A batch is as large as its texts' lengths have to be sorted well, and no larger: nothing is encoded
before the first is tokenised.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Literal, TypeAlias, TypeVar

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from retriever.data.chunks import Chunking, Chunks
from retriever.data.text_table import TokenRows
from retriever.data.tokens import Side, TokenTemplate, tokenize_flat
from retriever.encoder.dual_encoder import DualEncoder
from retriever.encoder.fused_layers import FusedLayers

BATCH_TEXTS = 32_768
_TEXTS_AT_ONCE = 4096  # handed to the tokenizer; two such calls at a time keep all cores busy

Item = TypeVar("Item")
Key = TypeVar("Key")
_Tokens: TypeAlias = tuple[np.ndarray, np.ndarray]  # of texts one behind another, and how many each has


class Arriving:
    """Embeddings [n, D] float32 on their way from the device, which goes on working meanwhile."""

    def __init__(self, found: Tensor, filled: np.ndarray, count: int) -> None:
        self._filled, self._count = filled, count
        self._arrived: torch.cuda.Event | None = None
        self._embeddings = found  # [texts with a token, D]
        if found.device.type == "cuda":
            self._embeddings = torch.empty(found.shape, dtype=found.dtype, pin_memory=True)
            self._embeddings.copy_(found, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record(torch.cuda.current_stream(found.device))

    def wait(self) -> np.ndarray:
        """The embeddings in the texts' order, once they are here; a text without any token has the zero vector."""
        if self._arrived is not None:
            self._arrived.synchronize()
        embeddings = self._embeddings.numpy()
        if len(self._filled) == self._count:
            return embeddings
        whole = np.zeros((self._count, embeddings.shape[1]), dtype=embeddings.dtype)
        whole[self._filled] = embeddings
        return whole


@dataclass(frozen=True)
class BatchEncoder:
    """Embeds the texts of one side."""

    encoder: DualEncoder
    tokenizer: PreTrainedTokenizerBase
    side: Side
    prompt: str
    max_tokens: int
    tokens_per_chunk: int

    def encode(
        self, batches: Iterable[tuple[Key, Sequence[str]]], done: Callable[[int], object]
    ) -> Generator[tuple[Key, Arriving], None, None]:
        """Each batch's key and the embeddings of its texts, in their order; `batches` is read in a thread, one ahead.

        Dropout is off, and no graph is kept, until the generator ends or is closed. `done` hears the number of texts
        that were just queued.
        """
        template = TokenTemplate.from_tokenizer(self.tokenizer)
        pool = ThreadPoolExecutor(2, thread_name_prefix="tokenise")
        try:
            with inference(self.encoder), closing(_one_ahead(map(partial(self._tokenize, pool), batches))) as tokenized:
                for key, parts in tokenized:
                    yield key, self.encode_tokens(_joined(parts), template, done)
        finally:
            pool.shutdown(cancel_futures=True)

    def _tokenize(
        self, pool: ThreadPoolExecutor, batch: tuple[Key, Sequence[str]]
    ) -> tuple[Key, list[Future[_Tokens]]]:
        """Queues a batch in the pool behind the one before it, so that the cores stay busy between batches."""
        key, texts = batch
        parts = [texts[start : start + _TEXTS_AT_ONCE] for start in range(0, len(texts), _TEXTS_AT_ONCE)]
        return key, [pool.submit(self._tokens, part) for part in parts]

    def _tokens(self, texts: Sequence[str]) -> _Tokens:
        return tokenize_flat(self.tokenizer, [self.prompt + text for text in texts] if self.prompt else texts)

    def encode_tokens(self, texts: TokenRows, template: TokenTemplate, done: Callable[[int], object]) -> Arriving:
        """Queues the texts of one batch, whose tokens are known; to be called within `inference`."""
        lengths, device = template.lengths(texts.lengths, self.max_tokens), self.encoder.device
        filled = np.flatnonzero(lengths)
        budget = max(self.tokens_per_chunk, int(lengths.max(initial=1)))
        chunking = Chunking(self.side, texts, template, self.max_tokens, budget, self.encoder.packed)
        found = torch.empty(len(filled), self.encoder.dimension, dtype=torch.float32, device=device)
        for chunk in Chunks(chunking.builders(filled), device):
            found.index_copy_(0, chunk.rows, self.encoder(self.side, chunk.tokens).float())  # [n, D]
            done(len(chunk.rows))
        done(len(texts) - len(filled))
        return Arriving(found, filled, len(texts))


def _joined(parts: Sequence[Future[_Tokens]]) -> TokenRows:
    found = [part.result() for part in parts]
    tokens = np.concatenate([np.empty(0, np.uint32), *(tokens for tokens, _ in found)])
    offsets = np.concatenate([np.zeros(1, np.int64), *(counts for _, counts in found)]).cumsum()
    return TokenRows(tokens, offsets)


def mode_of(encoder: DualEncoder) -> Literal["padded", "packed", "fused"]:
    """How `encoder` computes within `inference`; in half precision the embeddings of one mode are not those of
    another.
    """
    if any(isinstance(module, FusedLayers) for module in encoder.modules()):
        return "fused"
    return "packed" if encoder.packed else "padded"


@contextmanager
def inference(encoder: DualEncoder) -> Iterator[None]:
    """Runs in eval mode without graphs, and restores every module's mode afterwards.

    Weights are cast for autocast once, not once a chunk.
    """
    dtype = encoder.autocast_dtype
    modes = [(module, module.training) for module in encoder.modules()]
    fused = [module for module in encoder.modules() if isinstance(module, FusedLayers)]
    encoder.eval()
    try:
        for layers in fused:
            layers.only_encodes = True
        with torch.no_grad(), torch.autocast(encoder.device.type, dtype=dtype, enabled=dtype is not None):
            yield
    finally:
        for module, training in modes:
            module.training = training
        for layers in fused:
            layers.only_encodes = False


def _one_ahead(items: Iterable[Item]) -> Generator[Item, None, None]:
    """Yields the items; a thread makes the next one while one is in use."""
    stream = iter(items)
    take = partial(next, stream, None)
    with ThreadPoolExecutor(1, thread_name_prefix="batches") as thread:
        coming = thread.submit(take)
        while (item := coming.result()) is not None:
            coming = thread.submit(take)
            yield item
