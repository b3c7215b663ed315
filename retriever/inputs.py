"""Turns Python objects that are handed to a run into a configuration of files.

A model, texts or an evaluation in memory are written into `data.cache_dir`/objects once, under a digest of their
content, and read from there as any other files are: fingerprints, resuming and the batches do not depend on the process
that made them. Every rank hands over the same.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

from retriever import config_file
from retriever.config import Config, ConfigError, EvalCollectionConfig, EvalConfig, SourceConfig
from retriever.environment import check_environment
from retriever.files import make_folder, replace_folder
from retriever.lock import locked

Train = str | Path | SourceConfig | Iterable[Any]
Judgments = Mapping[str, Mapping[str, int] | Iterable[str]]  # query id -> its relevant passages, with grades or without
Collection = tuple[Mapping[str, str], Mapping[str, str | Mapping[str, str]], Judgments]  # queries, corpus, judgments
Eval = str | Path | Mapping[str, Collection]

_RECORDS = "train.jsonl"
_PIECE = 1 << 20  # bytes that are hashed at once


def configuration(
    config: str | Path | Config | None,
    overrides: Sequence[str] = (),
    *,
    model: Any = None,
    train: Train | None = None,
    evaluation: Eval | None = None,
    loss: Any = None,
) -> Config:
    """The checked configuration of `config` and `overrides`, with what else is given in its sections.

    `model`: a name, a folder, or anything with sentence-transformers' `save_pretrained`. `train`: sources, or records
    as dicts of one of the formats of docs/data.md. `evaluation`: a BEIR folder, or names, each with the texts of
    queries and corpus by id (a passage may be a dict of title and text) and the judgments. `loss`: a function or
    module, of which the name is kept. Raises RefusedError.
    """
    check_environment()
    read = config_file.read(config, overrides)
    objects = Path(read.data.cache_dir).expanduser() / "objects"
    if model is not None:
        name = str(model) if isinstance(model, (str, Path)) else str(_keep(objects, _writes_model(model)))
        read = replace(read, model=replace(read.model, name_or_path=name))
    if train is not None:
        read = replace(read, data=replace(read.data, train=_sources(train, objects)))
    if evaluation is not None:
        read = replace(read, eval=_evaluation(read.eval or EvalConfig(), evaluation, objects))
    if loss is not None:
        named = loss if hasattr(loss, "__qualname__") else type(loss)
        read = replace(read, loss=replace(read.loss, custom=f"{named.__module__}:{named.__qualname__}"))
    config_file.check(read)
    return read


def _sources(train: Train, objects: Path) -> tuple[SourceConfig, ...]:
    if isinstance(train, SourceConfig):
        return (train,)
    if isinstance(train, (str, Path)):
        return (SourceConfig(path=str(train)),)
    if isinstance(train, Mapping):
        raise ConfigError(
            f"train: expected sources or records, received a mapping of {', '.join(map(str, train))[:80]}"
        )
    if isinstance(train, Sequence) and train and not isinstance(train[0], Mapping):
        return tuple(source for entry in train for source in _sources(entry, objects))
    kept = _keep(objects, lambda folder: _write_lines(folder / _RECORDS, train))
    return (SourceConfig(path=str(kept / _RECORDS)),)


def _evaluation(asked: EvalConfig, given: Eval, objects: Path) -> EvalConfig:
    if isinstance(given, (str, Path)):
        return replace(asked, path=str(given))
    if not given:
        raise ConfigError("eval: expected at least one collection, received none")
    first, *others = (str(_keep_collection(objects, name, asked.split, given[name])) for name in given)
    also = (EvalCollectionConfig(path=path, split=asked.split) for path in others)
    return replace(asked, path=first, also=(*also, *asked.also))


def _keep_collection(objects: Path, name: str, split: str, collection: Collection) -> Path:
    """The BEIR folder of a collection, which has its name."""
    if Path(name).name != name:
        raise ConfigError(f"eval: expected names that a folder can have, received {name!r}")
    queries, corpus, judgments = collection

    def write(place: Path) -> None:
        folder = place / name
        (folder / "qrels").mkdir(parents=True)
        _write_lines(folder / "queries.jsonl", ({"_id": id_, "text": text} for id_, text in queries.items()))
        _write_lines(folder / "corpus.jsonl", ({"_id": id_, "title": "", **_fields(p)} for id_, p in corpus.items()))
        lines = (f"{query}\t{id_}\t{grade}\n" for query, found in judgments.items() for id_, grade in _graded(found))
        with (folder / "qrels" / f"{split}.tsv").open("w", encoding="utf-8") as stream:
            stream.writelines(chain(["query-id\tcorpus-id\tscore\n"], lines))

    return _keep(objects, write) / name


def _fields(passage: str | Mapping[str, str]) -> Mapping[str, str]:
    return {"text": passage} if isinstance(passage, str) else passage


def _graded(found: Mapping[str, int] | Iterable[str]) -> Iterable[tuple[str, int]]:
    return found.items() if isinstance(found, Mapping) else ((id_, 1) for id_ in sorted(found))


def _writes_model(model: Any) -> Callable[[Path], None]:
    if not hasattr(model, "save_pretrained") or not hasattr(model, "encode"):
        raise ConfigError(f"model: expected a name, a folder or a SentenceTransformer; received {type(model).__name__}")
    return lambda folder: model.save_pretrained(str(folder), create_model_card=False)


def _write_lines(path: Path, records: Iterable[Any]) -> None:
    with path.open("w", encoding="utf-8", newline="\n") as stream:
        for number, record in enumerate(records, start=1):
            if not isinstance(record, Mapping):
                raise ConfigError(f"train: expected dicts, received as number {number} {type(record).__name__}")
            try:
                stream.write(json.dumps(record, ensure_ascii=False) + "\n")
            except (TypeError, ValueError) as error:
                raise ConfigError(f"train: record {number} is no JSON: {error}") from error


def _keep(objects: Path, write: Callable[[Path], None]) -> Path:
    """The folder in `objects` of what `write` fills a folder with, made if it is not there yet."""
    with tempfile.TemporaryDirectory(prefix="bigbatch-") as place:
        written = Path(place) / "written"
        written.mkdir()
        write(written)
        kept = objects / _digest(written)
        make_folder(objects)
        with locked(kept.with_suffix(".lock"), str(kept), wait=True):
            if not kept.exists():
                with replace_folder(kept) as empty:
                    shutil.copytree(written, empty, dirs_exist_ok=True)
    return kept


def _digest(folder: Path) -> str:
    """A hash of the files of a folder and their names."""
    digest = hashlib.blake2b(digest_size=16)
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        digest.update(f"{file.relative_to(folder).as_posix()}\0{file.stat().st_size}\0".encode())
        with file.open("rb") as stream:
            while piece := stream.read(_PIECE):
                digest.update(piece)
    return digest.hexdigest()
