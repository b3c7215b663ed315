"""One flipped bit and a zeroed half in every kind of file that a command reads back.

Each is named and refused, or made again as it was: never used as it is.
"""

from __future__ import annotations

import random
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from retriever.checksums import CHECKSUMS
from tests.starts import run
from tests.torture.kills import STEPS, Runs
from tests.torture.page import Row

HOW = ("a flipped bit", "a zeroed half")
_OUTCOMES = ("refused by name", "made again", "without effect")
_MANIFESTS = ("manifest.json", "job.json")


@dataclass(frozen=True)
class Kind:
    """An artefact: its files by patterns, and the command that reads them."""

    name: str
    patterns: tuple[str, ...]
    command: str
    arguments: Sequence[str]
    removed: tuple[str, ...] = ()  # from the copy, before the command


def damage(root: Path, seed: int) -> Iterator[Row]:
    """A row for each kind of artefact."""
    runs, draw = Runs(root), random.Random(seed)
    whole = _make(runs)
    for kind in _kinds(runs):
        files = sorted({path for pattern in kind.patterns for path in whole.glob(pattern) if path.is_file()})
        assert files, kind
        cases = [(file.relative_to(whole), how) for file in files for how in HOW]
        found = [_try(kind, whole, file, how, draw) for file, how in cases]
        counts = Counter(outcome for outcome in found if outcome in _OUTCOMES)
        seen = ", ".join(f"{counts[outcome]} {outcome}" for outcome in _OUTCOMES if counts[outcome])
        failures = [outcome for outcome in found if outcome not in _OUTCOMES]
        yield Row(f"{kind.name}: {len(files)} files, {' and '.join(HOW)}", len(cases), seen, failures)


def _make(runs: Runs) -> Path:
    """A finished run with its store, and beside it embeddings, an index and mined data."""
    whole = runs.undisturbed(1)
    data = str(runs.root / "data")
    for side in ("query", "passage"):
        encode = ("--model", str(runs.root / "model"), "--input", data, "--side", side, "--output", f"shards/{side}")
        _done(whole, "retriever.encode", encode)
    for command, arguments in (("eval.search", _SEARCH), ("scripts.mine_negatives", _mine(runs))):
        _done(whole, command, arguments)
    return whole


def _done(folder: Path, command: str, arguments: Sequence[str]) -> None:
    ended = run(folder, arguments, command=command)
    assert ended.finished, ended.said


_SEARCH = (
    *("--queries", "shards/query", "--passages", "shards/passage", "--k", "5"),
    *("--index", "IVF2,Flat nprobe=2", "--output", "found.trec"),
)


def _mine(runs: Runs) -> tuple[str, ...]:
    return ("--data", str(runs.root / "data"), "--retrievers", "bm25", "--ranks", "1", "20", "--output-dir", "mined")


def _kinds(runs: Runs) -> Iterator[Kind]:
    last, again = (
        f"run/checkpoints/step-{STEPS:08d}",
        [*runs.arguments, "train.max_steps=1", "eval=null", "train.eval_every=0"],
    )
    yield Kind("checkpoint", (f"{last}/*", f"{last}/export/*"), "retriever.train", runs.arguments)
    yield Kind("export", ("run/export/*",), "retriever.train", runs.arguments)
    yield Kind("best", ("run/best/*",), "retriever.train", runs.arguments)
    yield Kind("token store", ("cache/**/*",), "retriever.train", again, removed=("run",))
    yield Kind(
        "embedding shards", ("shards/*/*.npy", "shards/*/*.arrow", "shards/*/[cm]*.json"), "eval.search", _SEARCH
    )
    index = ("shards/passage/index-*/*",)
    yield Kind("FAISS index", index, "eval.search", _SEARCH, removed=("found.trec",))
    yield Kind("mined data", ("mined/*",), "scripts.mine_negatives", _mine(runs))


def _try(kind: Kind, whole: Path, file: Path, how: str, draw: random.Random) -> str:
    """How the command took the damaged file: one of the outcomes, or what is wrong.

    Of damaged checksums it may say that a file is not as they say. What a manifest says for people only has no effect.
    """
    folder = whole.with_name("damaged")
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(whole, folder)
    for name in ("log", "phases", *kind.removed):
        found = folder / name
        shutil.rmtree(found) if found.is_dir() else found.unlink()
    before = (folder / file).read_bytes()
    content = bytearray(before)
    if how == HOW[0]:
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    else:
        content[len(content) // 2 :] = bytes(len(content) - len(content) // 2)
    (folder / file).write_bytes(content)
    ended = run(folder, kind.arguments, command=kind.command)
    if ended.statuses == [2] and "Traceback" not in ended.said and (file.name in ended.said or file.name == CHECKSUMS):
        return "refused by name"
    if ended.finished and (folder / file).read_bytes() == before:
        return "made again"
    if ended.finished and file.name in _MANIFESTS and _rest(folder, file, kind) == _rest(whole, file, kind):
        return "without effect"
    return f"{file}, {how}: exit status {ended.statuses[0]}: {ended.said[-1500:]}"


def _rest(folder: Path, file: Path, kind: Kind) -> dict[Path, bytes]:
    """The other files of the artefact, and what the command wrote."""
    patterns = (*kind.patterns, "found.trec")
    files = {path.relative_to(folder): path for pattern in patterns for path in folder.glob(pattern) if path.is_file()}
    return {name: path.read_bytes() for name, path in files.items() if name != file}
