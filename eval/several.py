"""Evaluation while training: collections, held-out pairs, cut embeddings, and the figure that chooses best/."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from scipy.special import logsumexp

from eval.collections.collection import Collection, read_beir
from eval.collections.msmarco import SPLITS, read_msmarco
from eval.engines.faiss_index import check_index
from eval.evaluate import EvalOptions, check_measures, evaluate_collection, kept_or_temporary
from retriever.config import ConfigError, EvalCollectionConfig, EvalConfig, SourceConfig
from retriever.data.formats import DataError, Passage, final_text, open_source
from retriever.encoder.bundle import EncoderBundle
from retriever.parallel.world import World

_ANY_DIMENSION = 20_160  # before the model is known: divisible by every usual number of PQ codes


def check_evaluation(config: EvalConfig) -> dict[str, list[str]]:
    """Checks what `evaluate_all` needs, before hours of training. Returns the queries' texts under each one's name.

    Raises RefusedError for an unknown measure or index, a measure deeper than `k`, equal names or an unknown `best`;
    DataError where a collection lacks something or holds what `Collection.check` refuses.
    """
    check_measures(config.metrics, config.k)
    check_index(config.index, _ANY_DIMENSION)
    names = [name_of(asked) for asked in config.collections]
    if len(set(names)) < len(names):
        raise ConfigError(f"eval.also: expected collections of different names, received {', '.join(names)}; set name")
    if config.best not in ("mean", *names):
        raise ConfigError(f"eval.best: expected mean or one of {', '.join(names)}; received {config.best!r}")
    queries = {}
    for asked in config.collections:
        if asked.format == "pairs":
            queries[name_of(asked)] = _read_pairs(asked, config.candidates)[0]
        else:
            collection = read_collection(asked)
            collection.check()
            queries[name_of(asked)] = list(collection.queries.values())
    return queries


def name_of(asked: EvalCollectionConfig) -> str:
    """The name of a collection in the log."""
    return asked.name or Path(asked.path).resolve().name


def evaluate_all(
    bundle: EncoderBundle,
    config: EvalConfig,
    temperature: float,
    shards_dir: Path | None,
    options: EvalOptions,
    world: World,
) -> dict[str, float]:
    """Measure -> value over all collections; {} on ranks other than the first. Every rank calls it.

    The first measures are those that choose: of the collection that `config.best` names, or means over the collections
    with judgments. Where there are several, each one's own follow as `<name>/<measure>`, and those of cut embeddings as
    `<dimension>/<measure>` behind the name. Held-out pairs have an `accuracy` and, at `temperature`, a `loss`. Without
    `shards_dir` (one rank only) embeddings go to a temporary folder.
    """
    found: dict[str, dict[str, float]] = {}
    with kept_or_temporary(shards_dir, world) as folder:
        for asked in config.collections:
            found[name_of(asked)] = _measures(bundle, asked, config, temperature, folder, options, world)
    if not world.is_first:
        return {}
    if config.best != "mean":
        chosen: Mapping[str, float] = found[config.best]
    else:
        judged = [found[name_of(asked)] for asked in config.collections if asked.format != "pairs"]
        chosen = {measure: statistics.fmean(means[measure] for means in judged) for measure in judged[0]}
    each = {f"{name}/{measure}": value for name, means in found.items() for measure, value in means.items()}
    return {**chosen, **(each if config.also else {})}


def _measures(
    bundle: EncoderBundle,
    asked: EvalCollectionConfig,
    config: EvalConfig,
    temperature: float,
    shards_dir: Path,
    options: EvalOptions,
    world: World,
) -> dict[str, float]:
    """The measures of one collection."""
    if asked.format == "pairs":
        if not world.is_first:
            return {}
        queries, positives = _read_pairs(asked, config.candidates)
        title, separator = bundle.settings.title, bundle.settings.title_separator
        return pair_measures(bundle, queries, [final_text(p, title, separator) for p in positives], temperature)
    folder = shards_dir / name_of(asked) if config.also else shards_dir  # one collection has the folder itself
    result = evaluate_collection(bundle, read_collection(asked), config.metrics, folder, options, world)
    if result is None:
        return {}
    cuts = {f"{dims}/{measure}": v for dims, means in result.at_dims.items() for measure, v in means.items()}
    return {**result.means, **cuts}


def pair_measures(
    bundle: EncoderBundle, queries: list[str], passages: list[str], temperature: float
) -> dict[str, float]:
    """Of each query among all passages, its own at its position: `accuracy`, the share that is ranked first, and the
    mean InfoNCE `loss`. Passages of equal text are no negatives.
    """
    q, p = bundle.encode(queries, "query"), bundle.encode(passages, "passage")
    logits = q.astype(np.float64) @ p.astype(np.float64).T / temperature  # [n, n]
    _, text = np.unique(passages, return_inverse=True)
    own = np.arange(len(queries))
    equal = text[:, None] == text[None, :]
    equal[own, own] = False
    logits[equal] = -np.inf
    losses = logsumexp(logits, axis=1) - logits[own, own]
    return {"accuracy": float((logits.argmax(axis=1) == own).mean()), "loss": float(losses.mean())}


def read_collection(asked: EvalCollectionConfig) -> Collection:
    """The collection with judgments that is asked for. Raises DataError or ConfigError where it cannot be read."""
    if asked.format == "beir":
        return read_beir(asked.path, asked.split)
    if asked.split not in SPLITS:
        raise ConfigError(f"eval: {asked.path}: split: expected one of {', '.join(SPLITS)}; received {asked.split!r}")
    return read_msmarco(asked.path, asked.split)


def _read_pairs(asked: EvalCollectionConfig, candidates: int) -> tuple[list[str], list[Passage]]:
    """The first `candidates` queries of a training file and the first positive of each."""
    source = open_source(SourceConfig(path=asked.path, split=asked.split, limit=candidates))
    pairs: dict[str, tuple[str, Passage]] = {}
    for example in source.examples():
        if example.positives and example.positives[0].text is not None:
            pairs.setdefault(example.query_id, (example.query, example.positives[0]))
    if len(pairs) < candidates:
        expected = f"{candidates:,} queries with the text of a positive (eval.candidates)"
        raise DataError(f"expected {expected}, found {len(pairs):,}", asked.path)
    queries, positives = zip(*pairs.values(), strict=True)
    return [*queries], [*positives]
