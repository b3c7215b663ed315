"""The models of the page, each with the collection as it has encoded it."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from eval.arguments import options_of
from eval.collections.collection import Collection
from eval.commands import model_label
from eval.evaluate import EvalOptions, evaluate_collection
from retriever.encoder.bundle import EncoderBundle, load_encoder
from retriever.lock import working_in
from retriever.shards import EmbeddingShards, open_shards

MEASURES = ("nDCG@10", "MRR@10", "Recall@100")
DEPTH = 100  # passages a query, the deepest of MEASURES


@dataclass(frozen=True)
class Model:
    """An encoder, the passages that it has encoded, and how well it finds those that are judged relevant."""

    name: str
    bundle: EncoderBundle
    passages: EmbeddingShards
    means: Mapping[str, float]
    per_query: Mapping[str, float]  # query id -> the first of MEASURES


def open_models(
    names: Sequence[str], folders: Sequence[str], collection: Collection, args: argparse.Namespace
) -> list[Model]:
    """Loads the models and evaluates them on the collection; embeddings of an earlier evaluation are reused."""
    labels = [model_label(folder).replace("/", "-") for folder in folders]
    if len(set(labels)) < len(labels):  # two folders of one name must not share embeddings
        labels = [f"{label}-{number}" for number, label in enumerate(labels, start=1)]
    return [
        _open(name, folder, args.output_dir / label / collection.name, collection, args)
        for name, folder, label in zip(names, folders, labels, strict=True)
    ]


def _open(name: str, folder: str, shards: Path, collection: Collection, args: argparse.Namespace) -> Model:
    bundle = load_encoder(folder, precision=args.precision, attention=args.attention)
    options = options_of(EvalOptions, args, k=DEPTH, progress=True)
    with working_in(shards):
        result = evaluate_collection(bundle, collection, MEASURES, shards, options)
    assert result is not None  # only ranks other than the first get none
    scores = result.scores
    per_query = dict(zip(scores.query_ids, map(float, scores.per_query[MEASURES[0]]), strict=True))
    return Model(name, bundle, open_shards(shards / "passages"), result.means, per_query)


def texts_of(collection: Collection, model: Model) -> dict[str, str]:
    """Passage id -> text, as the model reads it."""
    settings = model.bundle.settings
    return dict(collection.passages(settings.title, settings.title_separator))
