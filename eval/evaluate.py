"""One evaluation from model to measures: encode the collection, search it, measure the run."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING

from eval.collections.collection import Collection, fingerprint, read_beir
from eval.engines.embeddings import load_queries
from eval.engines.faiss_build import GpuUse
from eval.engines.faiss_index import check_index, describe
from eval.engines.nearest import Engine
from eval.engines.nearest import search as search_passages
from eval.measures import Scores, parse_measure
from eval.trec import Run
from retriever.config import ConfigError
from retriever.encode_shards import SHARD_ROWS, encode_to_shards
from retriever.parallel.world import World
from retriever.shards import open_shards

if TYPE_CHECKING:
    from retriever.encoder.bundle import EncoderBundle

_SMALL_CORPUS = 4 * SHARD_ROWS
_ANY_DIMENSION = 20_160  # before the model is known: divisible by every usual number of PQ codes


@dataclass(frozen=True)
class SearchOptions:
    """How passages are searched, in the words of `eval.engines.nearest.search`."""

    index: str = "flat"
    engine: Engine = "auto"
    memory_gib: float = 8.0
    faiss_gpu: GpuUse = "off"


@dataclass(frozen=True)
class EvalResult:
    """The measures of one run over one collection."""

    collection: Collection
    scores: Scores
    run: Run
    n_passages: int | None = None  # None where a run was measured without reading the corpus
    encoding: Mapping[str, Mapping[str, object]] = field(default_factory=dict)  # how the shards were made
    index: Mapping[str, object] = field(default_factory=dict)  # as `eval.engines.faiss_index.describe` says it
    notes: tuple[str, ...] = ()  # what a reader of the figures should know

    @property
    def means(self) -> dict[str, float]:
        """Measure name -> mean over all judged queries."""
        return self.scores.means

    @property
    def n_queries(self) -> int:
        """Judged queries, the number the means are over."""
        return len(self.scores.query_ids)


def check_evaluation(data_path: str | Path, split: str, metrics: Sequence[str], k: int, *, index: str = "flat") -> None:
    """Finds out now, not after hours of training, whether `evaluate` could run.

    Raises RefusedError for an unknown measure or index or a measure deeper than `k`, DataError where the collection
    lacks something or holds what `Collection.check` refuses.
    """
    check_measures(metrics, k)
    if index != "flat":
        check_index(index, _ANY_DIMENSION)
    read_beir(data_path, split).check()


def check_measures(metrics: Sequence[str], k: int) -> None:
    """Raises RefusedError for an unknown measure, or one that looks deeper than the `k` passages a query that are
    kept.
    """
    for name in metrics:
        measure = parse_measure(name)
        if measure.cutoff is not None and measure.cutoff > k:
            raise ConfigError(f"{measure} looks at {measure.cutoff} passages a query, of which k={k} are kept; raise k")


def evaluate(
    bundle: EncoderBundle,
    data_path: str | Path,
    split: str,
    metrics: Sequence[str],
    k: int = 1000,
    *,
    index: str = "flat",
    shards_dir: str | Path | None = None,
    world: World | None = None,
    progress: bool = False,
) -> EvalResult | None:
    """Measures an encoder, in memory or loaded, on one split of a BEIR folder; None on ranks other than the first.

    Every rank calls it. `shards_dir` keeps the embeddings for the next call, which reuses those that still fit; without
    it (one rank only) they go to a temporary folder. Raises RefusedError for an unknown measure, ConfigError for an
    unknown index, DataError.
    """
    for name in metrics:
        parse_measure(name)
    collection, options = read_beir(data_path, split), SearchOptions(index)
    if shards_dir is not None:
        return evaluate_collection(
            bundle, collection, metrics, k, Path(shards_dir), search=options, world=world, progress=progress
        )
    if world is not None and world.size > 1:
        raise ValueError(f"{world.size} ranks without shards_dir; expected a folder that all of them share")
    with tempfile.TemporaryDirectory(prefix="embeddings-") as folder:
        return evaluate_collection(bundle, collection, metrics, k, Path(folder), search=options, progress=progress)


def evaluate_collection(
    bundle: EncoderBundle,
    collection: Collection,
    metrics: Sequence[str],
    k: int,
    shards_dir: Path,
    *,
    search: SearchOptions | None = None,
    world: World | None = None,
    tokens_per_chunk: int | None = None,
    progress: bool = False,
) -> EvalResult | None:
    """As `evaluate`, for any collection: shards go to `shards_dir`/passages and `shards_dir`/queries-<split>."""
    world, settings, options = world or World(bundle.encoder.device), bundle.settings, search or SearchOptions()
    check_index(options.index, bundle.dimension)  # an index that FAISS cannot build is refused before the encoding
    prints = collection.fingerprints()
    texts = {
        "passage": (collection.passages(settings.title, settings.title_separator), "passages"),
        "query": (iter(collection.queries.items()), f"queries-{collection.split}"),
    }
    identity = {"passage": [prints["corpus"], settings.title, settings.title_separator], "query": [prints["queries"]]}
    folders = {}
    for side in (
        "query",
        "passage",
    ):  # the shorter work first: a folder that is somebody's own is refused before the longer one
        stream, shard_rows = _sized(texts[side][0])
        folders[side] = encode_to_shards(
            bundle,
            stream,
            side,
            shards_dir / texts[side][1],
            texts_fingerprint=fingerprint([side, *identity[side]]),
            world=world,
            shard_rows=shard_rows,
            tokens_per_chunk=tokens_per_chunk,
            cache=True,
            progress=progress,
        )
    passages = open_shards(folders["passage"])
    queries, query_ids = load_queries(open_shards(folders["query"]))
    run = search_passages(
        queries, query_ids, passages, k, exclude_self=collection.exclude_self, progress=progress, world=world, **asdict(options)
    )  # fmt: skip
    if not world.is_first:
        return None
    scores = collection.measure(run, metrics)
    encoding = {
        "query": _of_interest(open_shards(folders["query"]).manifest),
        "passage": _of_interest(passages.manifest),
    }
    notes = collection.notes(passage_id for _, ids in passages for passage_id in ids)
    found = describe(options.index, passages.rows, passages.dimension, k)
    return EvalResult(collection, scores, run, passages.rows, encoding, found, notes)


def _sized(texts: Iterable[tuple[str, str]]) -> tuple[Iterator[tuple[str, str]], int]:
    """The texts and the rows of a shard: a small collection is cut into about 16, so that several ranks share the
    work.
    """
    stream = iter(texts)
    head = list(islice(stream, _SMALL_CORPUS))
    rows = SHARD_ROWS if len(head) == _SMALL_CORPUS else max(256, -(-len(head) // 16))
    return chain(head, stream), rows


def _of_interest(manifest: dict[str, object]) -> dict[str, object]:
    return {
        key: value
        for key, value in manifest.items()
        if key not in ("shards", "format_version", "side", "shard_rows", "cache")
    }
