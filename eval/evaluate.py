"""One evaluation from model to measures: encode the collection, search it, measure the run."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np

from eval.collections.collection import Collection, fingerprint, read_beir
from eval.engines.embeddings import Derived, check_cut, leading, load_queries, passage_ids
from eval.engines.faiss_index import check_index
from eval.engines.nearest import SearchOptions, search
from eval.engines.topk import PassageOrder
from eval.measures import Scores, parse_measure
from eval.trec import Run
from retriever.config import ConfigError
from retriever.data.tokens import Side
from retriever.encode_shards import SHARD_ROWS, ShardOptions, encode_to_shards
from retriever.encoder.bundle import EncoderBundle
from retriever.parallel.world import World
from retriever.quantized import quantize
from retriever.shard_files import Stored
from retriever.shards import EmbeddingShards, open_shards

_SMALL_CORPUS = 4 * SHARD_ROWS
_MANY_PASSAGES = 10_000_000  # where their number is not known yet
_NOT_OF_INTEREST = ("shards", "format_version", "side", "shard_rows", "cache")  # of a shard manifest, to a result


@dataclass(frozen=True)
class EvalOptions(SearchOptions):
    """Options of encoding and searching a collection; `exclude_self` is the collection's."""

    k: int = 1000  # passages a query
    batch: int | None = None  # tokens the encoder sees at once; None: by device
    dims: tuple[int, ...] = ()  # leading dimensions that are measured too
    on_result: Callable[[EvalResult], None] | None = None  # is called with each collection's, on the first rank
    quantize: tuple[str, ...] = ()  # int8, binary, hamming: measured too


@dataclass(frozen=True)
class EvalResult:
    """The measures of one run over one collection."""

    collection: Collection
    scores: Scores
    run: Run
    n_passages: int | None = None  # None where a run was measured without reading the corpus
    encoding: Mapping[str, Mapping[str, object]] = field(default_factory=dict)  # how the shards were made
    index: Mapping[str, object] = field(default_factory=dict)  # as `SearchOptions.describe` says it
    notes: tuple[str, ...] = ()  # what a reader of the figures should know
    at_dims: Mapping[int, Mapping[str, float]] = field(default_factory=dict)  # the means of cut embeddings
    quantized: Mapping[str, Mapping[str, float]] = field(default_factory=dict)  # the means of quantised ones

    @property
    def means(self) -> dict[str, float]:
        """Measure name -> mean over all judged queries."""
        return self.scores.means

    @property
    def n_queries(self) -> int:
        """The number of judged queries, over which the means are taken."""
        return len(self.scores.query_ids)


def check_measures(metrics: Sequence[str], k: int) -> None:
    """Raises RefusedError for an unknown measure, or one that looks deeper than the `k` passages a query that are
    kept.
    """
    for name in metrics:
        measure = parse_measure(name)
        if measure.cutoff is not None and measure.cutoff > k:
            raise ConfigError(
                f"{measure} needs {measure.cutoff} passages per query, but k={k}; raise k to {measure.cutoff}"
            )


_DEFAULTS = EvalOptions()


def evaluate(
    bundle: EncoderBundle,
    data_path: str | Path,
    split: str,
    metrics: Sequence[str],
    options: EvalOptions = _DEFAULTS,
    shards_dir: str | Path | None = None,
    world: World | None = None,
) -> EvalResult | None:
    """Measures an encoder, in memory or loaded, on one split of a BEIR folder; None on ranks other than the first.

    Every rank calls it. `shards_dir` keeps the embeddings for the next call, which reuses those that still fit; without
    it (one rank only) they go to a temporary folder. Raises RefusedError for an unknown measure, ConfigError for an
    unknown index, DataError.
    """
    for name in metrics:
        parse_measure(name)
    collection = read_beir(data_path, split)
    with kept_or_temporary(shards_dir, world) as folder:
        return evaluate_collection(bundle, collection, metrics, folder, options, world)


@contextmanager
def kept_or_temporary(shards_dir: str | Path | None, world: World | None) -> Iterator[Path]:
    """`shards_dir`, or for one rank without it a temporary folder."""
    if shards_dir is not None:
        yield Path(shards_dir)
        return
    if world is not None and world.size > 1:
        raise ValueError(f"shards_dir: {world.size} ranks need a folder that all of them share")
    with tempfile.TemporaryDirectory(prefix="embeddings-") as folder:
        yield Path(folder)


def evaluate_collection(
    bundle: EncoderBundle,
    collection: Collection,
    metrics: Sequence[str],
    shards_dir: Path,
    options: EvalOptions = _DEFAULTS,
    world: World | None = None,
) -> EvalResult | None:
    """As `evaluate`, for any collection: shards go to `shards_dir`/passages and `shards_dir`/queries-<split>."""
    world, settings = world or World(bundle.encoder.device), bundle.settings
    options = replace(options, exclude_self=collection.exclude_self)
    prints = collection.fingerprints()
    texts, count = _counted(collection.passages(settings.title, settings.title_separator))
    for dimension in (bundle.dimension, *options.dims):  # before anything is encoded
        check_cut(dimension, bundle.dimension)
        check_index(options.index, dimension, count or _MANY_PASSAGES)

    def encoded(side: Side, folder: str, texts: Iterable[tuple[str, str]], made_of: list[Any]) -> EmbeddingShards:
        stream, rows = _counted(texts)
        shards = ShardOptions(
            shard_rows=SHARD_ROWS if rows is None else max(256, -(-rows // 16)),  # so that several ranks share the work
            tokens_per_chunk=options.batch,
            cache=True,
            verify=options.verify,
            progress=options.progress,
            total=rows,
        )
        named = fingerprint([side, *made_of])
        return open_shards(encode_to_shards(bundle, stream, side, shards_dir / folder, named, shards, world))

    # the shorter work first: a folder that is somebody's own is refused before the longer one
    queries = encoded("query", f"queries-{collection.split}", collection.queries.items(), [prints["queries"]])
    made_of = [prints["corpus"], settings.title, settings.title_separator]
    passages = encoded("passage", "passages", texts, made_of)
    query_vectors, query_ids = load_queries(queries)
    order = PassageOrder(passage_ids(passages))
    run = search(query_vectors, query_ids, passages, options.k, options, world, order)

    def means(queries: np.ndarray, of: Callable[[Stored], Stored]) -> Mapping[str, float]:
        found = search(queries, query_ids, Derived(passages, of, queries.shape[1]), options.k, options, world, order)
        return collection.measure(found, metrics).means if world.is_first else {}

    at_dims = {}
    for dims in options.dims:  # cut after encoding: the same vectors as of an encoder with this truncate_dim
        cut = partial(leading, dimension=dims, unit_norm=settings.normalize)
        at_dims[dims] = means(cut(query_vectors), cut)
    quantized = {}
    for name in options.quantize:
        asked = quantize(query_vectors, "binary")[:] if name == "hamming" else query_vectors
        quantized[name] = means(asked, partial(quantize, to="int8" if name == "int8" else "binary"))
    if not world.is_first:
        return None
    encoding = {
        side: {key: value for key, value in shards.manifest.items() if key not in _NOT_OF_INTEREST}
        for side, shards in (("query", queries), ("passage", passages))
    }
    notes = collection.notes(passage_id for _, ids in passages for passage_id in ids)
    notes += options.shortage(run, passages, options.k)
    index = options.describe(passages, options.k)
    scores = collection.measure(run, metrics)
    result = EvalResult(collection, scores, run, passages.rows, encoding, index, notes, at_dims, quantized)
    if options.on_result is not None:
        options.on_result(result)
    return result


def _counted(texts: Iterable[tuple[str, str]]) -> tuple[Iterator[tuple[str, str]], int | None]:
    """The texts and their number; None for a large corpus, whose number is not known before it is read."""
    stream = iter(texts)
    head = list(islice(stream, _SMALL_CORPUS))
    return chain(head, stream), len(head) if len(head) < _SMALL_CORPUS else None
