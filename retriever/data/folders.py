"""Finds the files of a data set in its folder, and the split in a file's name."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from retriever.data.files import KINDS, kind_of, stem_of
from retriever.data.records import DataError

SPLITS = ("train", "dev", "test", "validation", "valid", "val", "eval")
_TRACKS = dict.fromkeys(("2019qrels", "2020qrels", "dl19", "dl20"), "test")  # TREC's names of MS MARCO judgments
_NOT_EXAMPLES = frozenset(
    [
        "corpus",
        "collection",
        "queries",
        "qrels",
        "topics",
        "manifest",
        "source",
        "config",
        "dataset_info",
        "dataset_infos",
    ]
)


def data_files(folder: Path, stem: str | None = None) -> list[Path]:
    """The data files of a folder by name. With `stem`, the files `stem.*`; where there are none, `stem.more.*`."""
    if not folder.is_dir():
        return []
    files = sorted(f for f in folder.iterdir() if f.is_file() and kind_of(f) in KINDS)
    if stem is None:
        return files
    return [f for f in files if stem_of(f) == stem] or [f for f in files if stem_of(f).startswith(f"{stem}.")]


def split_of(path: Path) -> str | None:
    """The split in a file's name: `train` for qidpidtriples.train.full.2.tsv. None where the name has none."""
    words = stem_of(path).lower().replace("-", ".").replace("_", ".").split(".")
    return next((_TRACKS.get(word, word) for word in words if word in SPLITS or word in _TRACKS), None)


def find_texts(folder: Path, stems: Sequence[str], what: str) -> list[Path]:
    """The one file of the first of `stems` that has any, or the files in the folder of that name.

    Raises DataError where there is none, or more than one file.
    """
    for stem in stems:
        files = data_files(folder, stem)
        if len(files) > 1:
            names = ", ".join(file.name for file in files)
            hint = f"name the file itself (data.train.<n>.{what}, or the path)"
            raise DataError(f"expected one {what} file, found {names}; {hint}", folder)
        if files := files or data_files(folder / stem):
            return files
    raise DataError(f"expected a {what} file ({' or '.join(f'{stem}.*' for stem in stems)})", folder)


def find_qrels(folder: Path, split: str) -> Path:
    """The judgments of one split: `qrels/<split>.*` (BEIR) or `qrels.<split>.*` (MS MARCO).

    Raises DataError naming the files that are there where there is not one.
    """
    found = data_files(folder / "qrels", split) or data_files(folder, f"qrels.{split}")
    if len(found) == 1:
        return found[0]
    there = found or [*data_files(folder / "qrels"), *data_files(folder, "qrels")]
    names = ", ".join(f.relative_to(folder).as_posix() for f in there) or "no qrels"
    another = "; name another split" if there else ""
    raise DataError(f"expected one file qrels/{split}.tsv or qrels.{split}.tsv, found {names}{another}", folder)


def example_files(path: Path, split: str) -> list[Path]:
    """`path` itself, or the files of folder `path` (or its `data` folder) that hold examples of `split`.

    If no name speaks of a split, all are taken. Raises DataError where none fits or they are of several kinds.
    """
    if not path.is_dir():
        return [path]
    there = data_files(path) or data_files(path / "data")
    files = [f for f in there if stem_of(f).lower().split(".")[0] not in _NOT_EXAMPLES]
    if any(map(split_of, files)):
        files = [file for file in files if split_of(file) == split]
    if not files:
        expected = f"data files of split {split!r} (one of {', '.join(SPLITS)} in a name is its split)"
        raise DataError(f"expected {expected}, found none", path)
    if len(set(map(kind_of, files))) > 1:
        names = ", ".join(f.name for f in files)
        raise DataError(f"expected files of one kind, found {names}; name one in data.train.<n>.path", path)
    return files
