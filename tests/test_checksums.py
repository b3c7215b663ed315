"""Checksums: a change of any file is found, and what was read once is read again only where it changed or on
request.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from retriever import checksums
from retriever.checksums import checksum, damaged, write_checksums


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("BIGBATCH_CACHE", str(tmp_path / "memory"))
    folder = tmp_path / "artefact"
    (folder / "sub").mkdir(parents=True)
    (folder / "a").write_bytes(b"a" * 100)
    (folder / "sub" / "b").write_bytes(b"b" * 100)
    write_checksums(folder)
    return folder


def _flip(file: Path) -> None:
    """Changes one bit as a disk does: neither size nor time tell."""
    times, content = file.stat(), bytearray(file.read_bytes())
    content[50] ^= 4
    file.write_bytes(content)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))


def _is_flipped(found: dict[str, str]) -> bool:
    return list(found) == ["sub/b"] and found["sub/b"].startswith("is damaged (its checksum is ")


def test_the_checksum_is_xxh3(tmp_path: Path) -> None:
    """The values that the algorithm's authors publish for no byte, and over several reads."""
    (tmp_path / "empty").touch()
    assert checksum(tmp_path / "empty") == "2d06800538d394c2"
    (tmp_path / "long").write_bytes(bytes(9 << 20))
    assert checksum(tmp_path / "long") == checksums.xxhash.xxh3_64_hexdigest(bytes(9 << 20))


def test_what_changed_is_named(folder: Path) -> None:
    assert damaged(folder) == {}
    (folder / "a").unlink()
    (folder / "sub" / "b").write_bytes(b"c" * 100)
    found = damaged(folder)
    assert found.pop("a") == "is missing" and _is_flipped(found)


def test_what_was_read_is_read_again_only_on_request(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a process that started after it was read; those that started together read it once."""
    assert damaged(folder) == {}
    _flip(folder / "sub" / "b")
    assert damaged(folder) == {} == damaged(folder, again=True)
    assert _is_flipped(damaged(folder, remembered=False))
    monkeypatch.setattr(checksums, "_STARTED", time.time())
    assert damaged(folder) == {}
    assert _is_flipped(damaged(folder, again=True))
    assert _is_flipped(damaged(folder)), "damage was forgotten"


def test_another_machine_reads_for_itself(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert damaged(folder) == {}
    _flip(folder / "sub" / "b")
    here = os.uname()
    monkeypatch.setattr(os, "uname", lambda: os.uname_result((here.sysname, "elsewhere", *here[2:])))
    assert _is_flipped(damaged(folder))


def test_a_memory_that_cannot_be_used_is_told_and_costs_a_reading(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("BIGBATCH_CACHE", str(tmp_path / "artefact" / "a"))
    for _ in range(2):
        assert damaged(folder) == {}
    said = capsys.readouterr().out
    assert said.startswith("note: cannot remember which files were verified (") and said.count("note") == 1
    _flip(folder / "sub" / "b")
    assert _is_flipped(damaged(folder))


def test_a_memory_that_another_process_forgets_meanwhile_is_no_hindrance(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As an entry of the folder whose file is gone."""
    assert damaged(folder) == {}
    (memory,) = (tmp_path / "memory").rglob("*.json")
    (memory.parent / "forgotten.json").symlink_to(tmp_path / "gone")
    assert damaged(folder) == {}
    assert capsys.readouterr().out == ""
    assert (memory.parent / "forgotten.json").is_symlink()


def test_a_memory_that_a_kill_cut_short_is_made_anew(folder: Path, tmp_path: Path) -> None:
    assert damaged(folder) == {}
    (memory,) = (tmp_path / "memory").rglob("*.json")
    memory.write_text(memory.read_text()[:20])
    _flip(folder / "sub" / "b")
    assert _is_flipped(damaged(folder))
