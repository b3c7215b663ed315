"""Texts -> embedding shards, read, encoded and written at once."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path
from typing import NamedTuple

import numpy as np

from retriever.data.tokens import Side
from retriever.encoder.bundle import EncoderBundle
from retriever.encoder.text_batches import BATCH_TEXTS, Arriving, mode_of
from retriever.lock import working_in
from retriever.parallel.world import World
from retriever.screen import Bar
from retriever.shards import Dtype, ShardJob, ShardWriter

SHARD_ROWS = 65_536
_WRITES_BEHIND = 2  # shards that wait to be written, at most


@dataclass(frozen=True)
class ShardOptions:
    """Options of encoding into a folder that are not the encoder's own."""

    shard_rows: int = SHARD_ROWS
    dtype: Dtype = "float32"
    tokens_per_chunk: int | None = None  # None: by device
    overwrite: bool = False  # replace shards of another job
    cache: bool = False  # replace shards of another cache, and let another replace these
    verify: bool = False  # compare shards that are there with their checksums again
    progress: bool = True
    total: int | None = None  # texts, where their number is known, for the bar


_DEFAULTS = ShardOptions()


def encode_to_shards(
    bundle: EncoderBundle,
    texts: Iterable[tuple[str, str]],
    side: Side,
    folder: str | Path,
    texts_fingerprint: str,
    options: ShardOptions = _DEFAULTS,
    world: World | None = None,
) -> Path:
    """Embeds (id, text) pairs into `folder`, which `retriever.shards.open_shards` opens. Returns the folder.

    Every rank of `world` calls it with the same texts in the same order; rank r encodes shards r, r + world.size, … and
    rank 0 writes the manifest when all are done. Shards of the same job (model, prompt, length, precision, mode,
    `texts_fingerprint`, …) that are already there are kept, whatever the number of ranks that wrote them; where all
    are, nothing is encoded. Those of another job are replaced or refused as `options` says: a ShardError names what
    differs. A folder is written by one command at a time (LockedError). Texts are sorted by length within a batch of
    texts, of which a shard has several. While one batch is encoded, threads read and tokenise the next and write the
    shards before.
    """
    world = world or World(bundle.encoder.device)
    job = ShardJob(
        side=side,
        model=bundle.model_hash(),
        prompt=bundle.settings.prompt(side),
        max_tokens=bundle.settings.max_tokens(side),
        pooling=bundle.encoder.pooling,
        normalize=bundle.encoder.normalize,
        precision=bundle.precision,
        mode=mode_of(bundle.encoder),
        dimension=bundle.dimension,
        dtype=options.dtype,
        texts=texts_fingerprint,
        shard_rows=options.shard_rows,
    )
    writer = ShardWriter(folder, job, cache=options.cache)
    finished = writer.finished(verify=options.verify)
    if not finished:
        writer.check(overwrite=options.overwrite)
    world.barrier()  # no rank may change the folder before every rank has looked at it
    if finished:
        return writer.folder
    with ExitStack() as stack:
        if world.is_first:
            stack.enter_context(working_in(writer.folder))
            writer.check(overwrite=options.overwrite)  # another command may have been there in between
            writer.prepare()
        world.barrier()
        reading = _Reading(
            texts, job.shard_rows, lambda shard: shard % world.size == world.rank and not writer.has(shard)
        )
        silent = not (options.progress and world.is_first)
        mine = None if options.total is None else -(-options.total // world.size)
        with Bar(total=mine, unit=" texts", desc=f"encode {side}", disable=silent) as bar:
            encoded = bundle.encode_batches(
                reading.batches(), side, tokens_per_chunk=options.tokens_per_chunk, progress=bar.update
            )
            with closing(encoded):
                _write(writer, encoded)
        world.barrier()
        if world.is_first:
            writer.finish(reading.rows)
    world.barrier()
    return writer.folder


def _write(writer: ShardWriter, encoded: Iterable[tuple[_Part, Arriving]]) -> None:
    """Writes each shard in a thread once its embeddings have arrived, while the next are encoded."""

    def write(part: _Part, embeddings: Sequence[Arriving]) -> None:
        writer.write(part.shard, np.concatenate([batch.wait() for batch in embeddings]), part.ids)

    behind: deque[Future[None]] = deque()
    batches: list[Arriving] = []  # of the present shard
    with ThreadPoolExecutor(1, thread_name_prefix="write") as thread:
        for part, embeddings in encoded:
            batches.append(embeddings)
            if not part.last:
                continue
            behind.append(thread.submit(write, part, batches))
            batches = []
            if len(behind) > _WRITES_BEHIND:
                behind.popleft().result()
        for written in behind:
            written.result()


class _Part(NamedTuple):
    """The texts of one batch."""

    shard: int
    ids: tuple[str, ...]  # of the whole shard
    last: bool  # of the shard's batches


class _Reading:
    """Reads (id, text) pairs shard by shard, counts them, and hands on those of `wanted` shards in batches."""

    def __init__(self, texts: Iterable[tuple[str, str]], shard_rows: int, wanted: Callable[[int], bool]) -> None:
        self._texts, self._shard_rows, self._wanted = iter(texts), shard_rows, wanted
        self.rows = 0  # read so far

    def batches(self) -> Iterator[tuple[_Part, tuple[str, ...]]]:
        """The texts of each wanted shard."""
        for shard in count():
            pairs = list(islice(self._texts, self._shard_rows))
            self.rows += len(pairs)
            if not pairs:
                return
            if self._wanted(shard):
                ids, contents = zip(*pairs, strict=True)
                for start in range(0, len(contents), BATCH_TEXTS):
                    stop = start + BATCH_TEXTS
                    yield _Part(shard, ids, stop >= len(contents)), contents[start:stop]
