"""Tables from Hugging Face `datasets`: by name, or from a folder of `save_to_disk`. No code of a data set is run."""

from __future__ import annotations

import hashlib
import tarfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from retriever.data.records import DataError, Record
from retriever.data.table_records import BATCH_ROWS, batch_records, first_line

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

# Endings of WebDataset's members that some versions of `datasets` unpickle.
_PICKLED = ("pyd", "pickle", "pkl", "pt", "pth")


@dataclass(frozen=True)
class DatasetTable:
    """The rows of one split as records."""

    dataset: Dataset | IterableDataset
    label: str  # the data set's name and split
    commit: str | None = None  # of what is streamed from the hub

    def records(self) -> Iterator[Record]:
        """The rows, numbered from 1."""
        return batch_records(self.dataset.with_format("arrow").iter(BATCH_ROWS), self.label, "a data set")

    def digest(self) -> str:
        """blake2b of the rows' Arrow data: the same content has the same digest wherever it was downloaded or saved. Of
        what is streamed from the hub, its commit, so that it comes over the network once.
        """
        import pyarrow as pa

        if self.commit is not None:
            return f"{self.label} {self.commit}"

        hasher = hashlib.blake2b(digest_size=16)
        for batch in self.dataset.with_format("arrow").iter(BATCH_ROWS):
            copy = batch.take(pa.array(range(len(batch))))  # a slice's buffers hold more than its rows
            table = copy.combine_chunks().replace_schema_metadata(None)
            sink = pa.BufferOutputStream()
            with pa.ipc.new_stream(sink, table.schema) as writer:
                writer.write_table(table)
            hasher.update(sink.getvalue())
        return hasher.hexdigest()


def is_saved_dataset(path: Path) -> bool:
    """Whether the folder was written by `datasets.save_to_disk`."""
    return (path / "state.json").is_file() or (path / "dataset_dict.json").is_file()


def saved_table(path: Path, split: str) -> DatasetTable:
    """A folder written by `save_to_disk`; of a DatasetDict, its `split`. Raises DataError where that is missing."""
    import datasets

    with loading(f"{path}: expected a folder of save_to_disk that is whole"):
        loaded = datasets.load_from_disk(str(path))
    if isinstance(loaded, datasets.DatasetDict):
        if split not in loaded:
            raise DataError(f"expected split {split!r} (data.train.<n>.split), found {', '.join(loaded)}", path)
        return DatasetTable(loaded[split], f"{path} [{split}]")
    return DatasetTable(loaded, str(path))


def named_table(
    name: str, revision: str | None = None, split: str | None = None, *, streaming: bool = False
) -> DatasetTable:
    """The data set `name` or `name:subset`. Without `split`, its only one. Raises DataError if it cannot be loaded.

    `streaming`: rows are read as they arrive, and no copy of them is kept.
    """
    import datasets
    import huggingface_hub

    repository, _, subset = name.partition(":")
    with loading(f"Hugging Face data set {name!r}, split {split!r}, revision {revision!r}"):
        _forget_pickles(datasets.load_dataset_builder(repository, subset or None, revision=revision))
        streams = {"streaming": True} if streaming else {}
        at_hub = streaming and not Path(repository).is_dir()
        commit = huggingface_hub.dataset_info(repository, revision=revision).sha if at_hub else None
        loaded: Any = datasets.load_dataset(
            repository, subset or None, revision=commit or revision, split=split, **streams
        )
    if split is None:
        if len(loaded) != 1:
            raise DataError(f"Hugging Face data set {name!r}: expected one split, found {', '.join(loaded)}")
        loaded = next(iter(loaded.values()))
    return DatasetTable(loaded, f"{name} [{split}]" if split else name, commit)


def is_collection(name: str, revision: str | None) -> bool:
    """Whether the data set has the subsets `corpus` and `queries`, as BEIR's have."""
    return {"corpus", "queries"} <= set(_subsets(name, revision))


def collection_tables(name: str, revision: str | None, split: str) -> tuple[DatasetTable, DatasetTable, DatasetTable]:
    """(corpus, queries, judgments of `split`) of a BEIR data set; judgments may be in `<name>-qrels`."""
    judgments = judgments_name(name, revision)
    own = judgments.startswith(f"{name}:")
    return (
        named_table(f"{name}:corpus", revision),
        named_table(f"{name}:queries", revision),
        named_table(judgments, revision if own else None, split),
    )


def judgments_name(name: str, revision: str | None = None) -> str:
    """The data set with a BEIR data set's judgments: its subset default or qrels, else `<name>-qrels`."""
    own = next((subset for subset in ("default", "qrels") if subset in _subsets(name, revision)), None)
    return f"{name}:{own}" if own else f"{name}-qrels"


def _subsets(name: str, revision: str | None) -> list[str]:
    import datasets

    with loading(f"Hugging Face data set {name!r}, revision {revision!r}"):
        return datasets.get_dataset_config_names(name.partition(":")[0], revision=revision)


def _forget_pickles(builder: Any) -> None:
    """Members of a WebDataset that hold pickled objects stay bytes, which are no text."""
    for ending in _PICKLED:
        getattr(type(builder), "DECODERS", {}).pop(ending, None)


_UNREADABLE = (OSError, ValueError, KeyError, TypeError, EOFError, RuntimeError, tarfile.TarError, zlib.error)


@contextmanager
def loading(what: str) -> Iterator[None]:
    """Makes a DataError of what libraries raise where data are missing, damaged, cannot be downloaded or need code."""
    from datasets.exceptions import DatasetsError

    try:
        yield
    except (*_UNREADABLE, DatasetsError) as error:
        cause = error.__cause__ if isinstance(error, DatasetsError) and error.__cause__ is not None else error
        raise DataError(f"{what}: {type(cause).__name__}: {first_line(cause)}") from error
