"""Embedding shards: what is written is read, what is damaged is named, what belongs to another job is not taken for
this one's.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pytest

from retriever.shards import ShardError, ShardJob, ShardWriter, open_shards
from tests.commands import change_unseen

JOB = ShardJob("passage", "hash", "", 144, "mean", True, "fp32", "padded", 3, "float32", "texts", shard_rows=4)


def _embeddings(rows: int = 10) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(rows, JOB.dimension)).astype(np.float32)


def _write(writer: ShardWriter, shard: int, embeddings: np.ndarray) -> None:
    start = shard * writer.job.shard_rows
    part = embeddings[start : start + writer.job.shard_rows]
    writer.write(shard, part, [f"p{start + i}" for i in range(len(part))])


def _fill(folder: Path, job: ShardJob = JOB, rows: int = 10, *, cache: bool = False) -> np.ndarray:
    embeddings, writer = _embeddings(rows), ShardWriter(folder, job, cache=cache)
    writer.prepare()
    for shard in range(-(-rows // job.shard_rows)):
        _write(writer, shard, embeddings)
    writer.finish(rows)
    return embeddings


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_what_is_written_is_read(tmp_path: Path, dtype: Literal["float32", "float16"]) -> None:
    embeddings = _fill(tmp_path, replace(JOB, dtype=dtype))
    shards = open_shards(tmp_path)
    for _ in range(2):  # any number of times
        parts, ids = zip(*shards, strict=True)
        assert [len(part) for part in parts] == [4, 4, 2]
        assert all(isinstance(part, np.memmap) and part.dtype == dtype for part in parts)
        np.testing.assert_array_equal(np.concatenate(parts), embeddings.astype(dtype))
        assert sum(ids, []) == [f"p{i}" for i in range(10)]
    assert (shards.rows, shards.dimension, shards.manifest["side"]) == (10, 3, "passage")
    assert sorted(p.suffix for p in tmp_path.iterdir()) == [".arrow"] * 3 + [".json"] * 3 + [".npy"] * 3


def test_no_text_is_no_shard(tmp_path: Path) -> None:
    _fill(tmp_path, rows=0)
    assert list(open_shards(tmp_path)) == []
    assert open_shards(tmp_path).rows == 0


def test_an_unfinished_folder_is_not_taken_for_a_finished_one(tmp_path: Path) -> None:
    with pytest.raises(ShardError, match="not a folder of embedding shards"):
        open_shards(tmp_path / "nowhere")
    writer = ShardWriter(tmp_path, JOB)
    writer.prepare()
    writer.write(0, np.zeros((4, 3)), list("abcd"))
    with pytest.raises(ShardError, match="its encoding was interrupted; run it again"):
        open_shards(tmp_path)
    with pytest.raises(ShardError, match="1 of 2 shards are missing, 00001 first"):
        writer.finish(6)


def test_shards_of_the_same_job_are_kept_and_others_go(tmp_path: Path) -> None:
    _fill(tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    assert ShardWriter(tmp_path, JOB).finished()
    other = ShardWriter(tmp_path, replace(JOB, prompt="passage: "))
    assert not other.finished() and not ShardWriter(tmp_path, replace(JOB, mode="fused")).finished()
    (tmp_path / "00001.npy").unlink()
    same = ShardWriter(tmp_path, JOB)
    assert not same.finished()
    same.prepare()
    assert [same.has(shard) for shard in range(3)] == [True, False, True]
    other.prepare()
    assert not any(other.has(shard) for shard in range(3))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["job.json", "notes.txt"]


def test_a_folder_of_another_job_is_refused_in_one_line(tmp_path: Path) -> None:
    """By what differs; a job of which nothing is kept yet, and a folder of other things, are in nobody's way."""
    other = replace(JOB, model="another", prompt="a\nb")
    ShardWriter(tmp_path, JOB).check()
    started = ShardWriter(tmp_path, JOB)
    started.prepare()
    ShardWriter(tmp_path, other).check()
    started.write(0, np.zeros((4, 3)), list("abcd"))
    (tmp_path / "notes.txt").write_text("mine")
    started.check()

    def refused(*named: str) -> None:
        with pytest.raises(ShardError) as stopped:
            ShardWriter(tmp_path, other).check()
        said = str(stopped.value)
        assert "\n" not in said and said.startswith(f"{tmp_path} ") and all(name in said for name in named), said

    differing = (
        "model: 'hash' there, 'another' asked for",
        "prompt: '' there, 'a\\nb' asked for",
        "--output",
        "--overwrite",
    )
    refused(*differing)
    _fill(tmp_path)
    refused(*differing)
    (tmp_path / "job.json").unlink()
    ShardWriter(tmp_path, JOB).check()
    refused(*differing)
    (tmp_path / "manifest.json").unlink()
    refused("has 00000.ids.arrow and no job.json", "--output", "--overwrite")


_FOREIGN: tuple[dict[str, object], ...]
_FOREIGN = ({"format_version": 4, "rows": 7}, {"stage": "encode", "model": {"model": "hash"}, "dtype": "float32"}, {})


@pytest.mark.parametrize("name", ["manifest.json", "job.json"])
@pytest.mark.parametrize("content", _FOREIGN)
def test_a_folder_that_is_no_folder_of_shards_is_refused(tmp_path: Path, name: str, content: dict[str, object]) -> None:
    """Token stores, searches and stages have such files too, some with a key of ours among theirs; `prepare` would
    remove them.
    """
    (tmp_path / name).write_text(json.dumps(content))
    for _ in ("alone", "beside shards"):
        with pytest.raises(ShardError, match=rf"has a {name} that is not of embedding shards; .*--output"):
            ShardWriter(tmp_path, JOB).check()
        np.save(tmp_path / "00000.npy", np.zeros(3))


def test_shards_of_an_earlier_format_are_shards_of_another_job(tmp_path: Path) -> None:
    """The first format did not say how the encoder computed."""
    _fill(tmp_path)
    for name in ("manifest.json", "job.json"):
        content = json.loads((tmp_path / name).read_text())
        del content["mode"]
        (tmp_path / name).write_text(json.dumps(content | ({"format_version": 1} if name == "manifest.json" else {})))
    with pytest.raises(ShardError, match=r"embeddings of another job \(mode: None there, 'padded' asked for\)"):
        ShardWriter(tmp_path, JOB).check()


@pytest.mark.parametrize("part", ["embeddings", "ids"])
def test_an_interrupted_shard_is_written_again(tmp_path: Path, part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = ShardWriter(tmp_path, JOB)
    writer.prepare()
    name = {"embeddings": "00000.npy", "ids": "00000.ids.arrow"}[part]

    def killed(source: object, target: Path) -> None:
        if Path(target).name == name:
            raise KeyboardInterrupt
        Path(str(source)).rename(target)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr("retriever.files.os.replace", killed)
        writer.write(0, np.zeros((2, 3)), ["a", "b"])
    assert not writer.has(0)
    writer.write(0, np.ones((2, 3)), ["a", "b"])
    writer.finish(2)
    [(embeddings, ids)] = list(open_shards(tmp_path))
    assert np.asarray(embeddings).all() and ids == ["a", "b"]


@pytest.mark.parametrize("name", ["00001.npy", "00001.ids.arrow"])
@pytest.mark.parametrize("kept", [0, 100])
def test_a_damaged_shard_is_written_again(tmp_path: Path, name: str, kept: int) -> None:
    """A finished folder is no more finished then, and the other shards stay."""
    _fill(tmp_path)
    writer = ShardWriter(tmp_path, JOB)
    assert writer.finished()
    with (tmp_path / name).open("r+b") as stream:
        stream.truncate(kept)
    assert not writer.finished() and writer.has(0) and not writer.has(1)
    writer.check()
    writer.prepare()
    assert writer.has(0) and not writer.has(1)


def test_a_file_in_place_of_the_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ShardError, match="file is a file; choose another folder"):
        ShardWriter(tmp_path / "file", JOB).check()


@pytest.mark.parametrize("name", ["00001.npy", "00001.ids.arrow"])
def test_a_changed_bit_is_named_and_its_shard_written_again(tmp_path: Path, name: str) -> None:
    """A file that can be read and holds other values; the other shards stay."""
    _fill(tmp_path)
    file, before = tmp_path / name, dict(_files(tmp_path))
    content = bytearray(file.read_bytes())
    at = content.index(b"p4") if name.endswith("arrow") else -3
    content[at] ^= 1
    file.write_bytes(content)
    (tmp_path / "checksums.json").rename(tmp_path / "kept")
    assert len(list(open_shards(tmp_path))) == 3, "it is seen without checksums too"
    (tmp_path / "kept").rename(tmp_path / "checksums.json")
    with pytest.raises(ShardError) as refused:
        open_shards(tmp_path)
    assert str(refused.value).startswith(f"{file} is damaged (its checksum is ") and "writes that shard again" in str(
        refused.value
    )
    writer = ShardWriter(tmp_path, JOB)
    assert not writer.finished() and writer.has(1)
    writer.prepare()
    assert [writer.has(shard) for shard in range(3)] == [True, False, True]
    _write(writer, 1, _embeddings())
    writer.finish(10)
    open_shards(tmp_path)
    assert dict(_files(tmp_path)) == before


def test_a_changed_bit_that_the_time_does_not_tell_is_found_on_request(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _fill(tmp_path)
    change_unseen(tmp_path / "00001.npy", monkeypatch)
    open_shards(tmp_path)
    with pytest.raises(ShardError, match=r"00001\.npy is damaged"):
        open_shards(tmp_path, again=True)


def _files(folder: Path) -> Iterator[tuple[str, bytes]]:
    return ((file.name, file.read_bytes()) for file in folder.iterdir())


def test_a_cache_gives_way_to_another_and_what_was_encoded_on_purpose_to_none(tmp_path: Path) -> None:
    """And nobody's files of the same names are removed, --overwrite or not."""
    other = replace(JOB, model="another")
    _fill(tmp_path / "cache", cache=True)
    ShardWriter(tmp_path / "cache", other, cache=True).check()
    with pytest.raises(ShardError, match="another job.*--overwrite"):
        ShardWriter(tmp_path / "cache", other).check()
    _fill(tmp_path / "own")
    with pytest.raises(ShardError, match="another job.*--output-dir.*remove it"):
        ShardWriter(tmp_path / "own", other, cache=True).check()
    assert ShardWriter(tmp_path / "own", JOB, cache=True).finished(), "the same embeddings are reused"
    (tmp_path / "own" / "manifest.json").write_text('{"name": "mine"}')
    for name in ("own", "cache"):
        (tmp_path / name / "job.json").write_text('{"name": "mine"}')
        with pytest.raises(ShardError, match="has a job.json that is not of embedding shards"):
            ShardWriter(tmp_path / name, other, cache=True).check(overwrite=True)


def _bytes(name: str, change: Callable[[bytes], bytes]) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(change((folder / name).read_bytes()))


def _manifest(change: Callable[[dict[str, Any]], dict[str, Any]]) -> Callable[[Path], object]:
    """Entries replaced; those of `...` left out."""

    def changed(content: bytes) -> bytes:
        manifest = json.loads(content)
        return json.dumps(
            {key: value for key, value in (manifest | change(manifest)).items() if value is not ...}
        ).encode()

    return _bytes("manifest.json", changed)


_OTHER_SHARDS = "its shards are not 00000, "
DAMAGES: list[tuple[Callable[[Path], object], str]] = [
    (_bytes("00000.npy", lambda content: content[:-8]), r"00000\.npy: not readable as npy"),
    (lambda folder: (folder / "00000.npy").unlink(), r"00000\.npy: not readable as npy .*No such file"),
    (
        lambda folder: np.save(folder / "00000.npy", np.array([{}], dtype=object), allow_pickle=True),
        r"00000\.npy: not readable as npy",
    ),
    (
        lambda folder: np.save(folder / "00000.npy", np.zeros((4, 2), dtype=np.float32)),
        r"00000\.npy: holds \(4, 2\) float32; its manifest says \(4, 3\) float32",
    ),
    (_bytes("00001.ids.arrow", lambda content: content[:20]), r"00001\.ids\.arrow: not readable as an Arrow file"),
    (
        lambda folder: shutil.copy(folder / "00002.ids.arrow", folder / "00001.ids.arrow"),
        r"00001\.ids\.arrow: holds 2 rows with columns \['id'\]; expected 4 rows",
    ),
    (_bytes("manifest.json", lambda _: b'{"rows": '), r"manifest\.json: not readable as JSON"),
    (_manifest(lambda _: {"format_version": 7}), "format_version is 7; expected 2"),
    (_manifest(lambda _: {"rows": 11}), "add up to its 11 rows, 4 each"),
    (
        _manifest(lambda _: {"rows": -1}),
        "expected a whole number of rows and a list of shards; received rows -1",
    ),
    (_manifest(lambda _: {"rows": "10"}), "received rows '10'"),
    (_manifest(lambda _: {"rows": 10**30}), "add up to its 1000000000000000000000000000000 rows"),
    (_manifest(lambda _: {"shards": 3}), "and a list of shards"),
    (_manifest(lambda _: {"shards": [3, -1, None]}), _OTHER_SHARDS),
    (_manifest(lambda found: {"shards": found["shards"][:2]}), _OTHER_SHARDS),
    (_manifest(lambda found: {"shards": [s | {"file": "../secret.npy"} for s in found["shards"]]}), _OTHER_SHARDS),
    (_manifest(lambda found: {"shards": [s | {"ids": "/etc/passwd"} for s in found["shards"]]}), _OTHER_SHARDS),
    (_manifest(lambda _: {"dimension": "three"}), "dimension: expected a whole number, received 'three'"),
    (_manifest(lambda _: {"shard_rows": 0}), "shard_rows is 0; expected at least 1"),
    (_manifest(lambda _: {"side": "both"}), r"side: expected query \| passage, received 'both'"),
    (
        _manifest(lambda _: {"dtype": "int4"}),
        r"dtype: expected float32 \| float16 \| int8 \| binary, received 'int4'",
    ),
    (
        _manifest(lambda _: {"dtype": "int8"}),
        r"00000\.npy: holds \(4, 3\) float32; its manifest says \(4, 3\) int8",
    ),
    (_manifest(lambda _: {"prompt": None}), "prompt: expected text, received None"),
    (_manifest(lambda _: {"pooling": ..., "model": ...}), "model, pooling missing"),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGES, ids=[message for _, message in DAMAGES])
def test_damage_of_shards_without_checksums_names_its_file(
    tmp_path: Path, damage: Callable[[Path], object], message: str
) -> None:
    """As earlier versions wrote them."""
    _fill(tmp_path)
    (tmp_path / "checksums.json").unlink()
    damage(tmp_path)
    with pytest.raises(ShardError, match=message):
        list(open_shards(tmp_path))
    if "JSON" not in message:  # which a writer refuses too
        assert not ShardWriter(tmp_path, JOB).finished()


def test_embeddings_that_cannot_be_stored_are_refused(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, replace(JOB, dtype="float16"))
    writer.prepare()
    with pytest.raises(ShardError, match=r"embeddings are \(2, 4\); expected \(2, 3\)"):
        writer.write(0, np.zeros((2, 4)), ["a", "b"])
    with pytest.raises(ShardError, match="the embedding of 'b' is not finite in float16"):
        writer.write(0, np.array([[0, 0, 0], [1e6, 0, 0]]), ["a", "b"])


def test_ids_that_are_null_are_refused(tmp_path: Path) -> None:
    """They would stand in a run file as None."""
    _fill(tmp_path)
    file = tmp_path / "00000.ids.arrow"
    with pa.memory_map(str(file)) as source:
        count = len(pa.ipc.open_file(source).read_all())
    schema = pa.schema([("id", pa.string())])
    with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        writer.write_batch(pa.record_batch([pa.array([None, *map(str, range(count - 1))], pa.string())], schema=schema))
    (tmp_path / "checksums.json").unlink()  # as in an earlier version's
    with pytest.raises(ShardError, match=rf"00000\.ids\.arrow: 1 of {count} ids are null"):
        list(open_shards(tmp_path))


def test_a_kill_while_embeddings_are_replaced_is_in_nobodys_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next start of an evaluation goes on."""
    _fill(tmp_path, cache=True)
    other, unlink = ShardWriter(tmp_path, replace(JOB, prompt="passage: "), cache=True), Path.unlink

    def killed(path: Path, missing_ok: bool = False) -> None:
        if path.name == "00001.npy":
            raise KeyboardInterrupt
        unlink(path, missing_ok)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Path, "unlink", killed)
        other.prepare()
    assert (tmp_path / "00001.npy").exists()
    other.check()
    other.prepare()
    assert not list(tmp_path.glob("0*"))
