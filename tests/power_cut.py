"""What a power cut would leave of a folder: every state of the disk before an operation of `retriever.files`, and at
the end.

A file's content is durable as of its last sync; what was written since is on the disk, or zeros, or missing. A name
that was made, renamed or removed since the last sync of its folder has changed on the disk or not, each by itself.
(This is POSIX; journaling file systems promise more.) The content of asides is left out, for nobody reads it.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from retriever import files

_Change = list[
    tuple[int, str, int | None]
]  # what happens at once: folder, name and what it names from then on, by inode
_Tree = frozenset[tuple[str, bytes | None]]  # path, and content of a file
_FOLDER = None


class PowerCuts:
    """Watches `root` inside its `with` block; `left` yields the folders that power cuts would have left of it."""

    def __init__(self, root: Path) -> None:
        self.promised: Any = None  # what a cut from now on must leave; `left` hands it out again
        self._root = root
        self._held: dict[int, int] = {}  # inode -> descriptor: no inode is used twice
        self._folders = set[int]()
        self._pending: list[_Change] = []
        self._states: dict[tuple[_Tree, Any], None] = {}
        self._seen = self._look()
        self._durable = {folder: dict(names) for folder, names in self._seen.items()}
        self._synced = dict(self._contents)

    def __enter__(self) -> PowerCuts:
        self._before, files.before = files.before, self._observe
        return self

    def __exit__(self, *_: object) -> None:
        files.before = self._before
        self._observe("end", self._root)
        for descriptor in self._held.values():
            os.close(descriptor)

    def left(self, scratch: Path) -> Iterator[tuple[Path, Any]]:
        """Each state as a folder, valid until the next one, and what was promised then."""
        assert len(self._states) > 3, "hardly anything was recorded"
        for tree, promised in self._states:
            shutil.rmtree(scratch, ignore_errors=True)
            scratch.mkdir()
            for path, content in sorted(tree):
                if content is _FOLDER:
                    (scratch / path).mkdir()
                else:
                    (scratch / path).write_bytes(content)
            yield scratch, promised

    def _observe(self, operation: str, path: Path) -> None:
        now = self._look()
        self._pending += self._changes(now)
        self._seen = now
        self._record()
        if operation == "sync":
            inode = path.stat().st_ino
            self._synced |= {inode: self._contents[inode]} if inode in self._contents else {}
            done = [change for change in self._pending if any(folder == inode for folder, _, _ in change)]
            self._pending = [change for change in self._pending if change not in done]
            self._apply(done, self._durable)

    def _look(self) -> dict[int, dict[str, int]]:
        """Folder -> name -> what it names, by inode."""
        found: dict[int, dict[str, int]] = {}
        for folder, _, _ in os.walk(self._root):
            names = found[os.stat(folder).st_ino] = dict[str, int]()
            for entry in os.scandir(folder):
                names[entry.name] = entry.inode()
                if entry.inode() not in self._held:
                    self._held[entry.inode()] = os.open(entry.path, os.O_RDONLY)
        self._folders |= found.keys()
        held = ((inode, descriptor) for inode, descriptor in self._held.items() if inode not in self._folders)
        self._contents = {inode: os.pread(descriptor, os.fstat(descriptor).st_size, 0) for inode, descriptor in held}
        return found

    def _changes(self, now: dict[int, dict[str, int]]) -> list[_Change]:
        before, after = _flat(self._seen), _flat(now)
        gone = {inode: at for at, inode in before.items() if after.get(at) != inode}
        changes: list[_Change] = []
        for at, inode in after.items():
            if before.get(at) != inode:
                changes.append([(*gone[inode], None), (*at, inode)] if inode in gone else [(*at, inode)])
        renamed = {change[0][:2] for change in changes if len(change) == 2}
        return changes + [[(*at, None)] for at in before if at not in after and at not in renamed]

    def _record(self) -> None:
        changes = self._pending
        some = [changes, [], *([c] for c in changes), *(changes[:n] for n in range(len(changes)))]
        some += [changes[:n] + changes[n + 1 :] for n in range(len(changes))]
        unsynced = {inode for inode, content in self._contents.items() if content != self._synced.get(inode)}
        for happened in some:
            names = {folder: dict(entries) for folder, entries in self._durable.items()}
            self._apply(happened, names)
            kept = [unsynced, set[int](), *({i} for i in unsynced), *(unsynced - {i} for i in unsynced)]
            for on_disk in kept if happened is changes else kept[:2]:
                for filler in (b"\0", b""):
                    tree = frozenset(self._tree(names, self._root.stat().st_ino, "", unsynced - on_disk, filler))
                    self._states[tree, self.promised] = None

    def _tree(
        self, names: dict[int, dict[str, int]], folder: int, prefix: str, lost: set[int], filler: bytes
    ) -> Iterator[Any]:
        for name, inode in names.get(folder, {}).items():
            path, aside = f"{prefix}{name}", name.startswith((files._WRITING, files._REMOVING))
            if inode in self._folders:
                yield path, _FOLDER
                yield from () if aside else self._tree(names, inode, f"{path}/", lost, filler)
            elif aside:
                yield path, b""
            elif inode in lost:
                now, synced = self._contents[inode], self._synced.get(inode, b"")
                durable = synced if now.startswith(synced) else b""
                yield path, durable + filler * (len(now) - len(durable))
            else:
                yield path, self._contents[inode]

    @staticmethod
    def _apply(changes: list[_Change], names: dict[int, dict[str, int]]) -> None:
        for folder, name, inode in (part for change in changes for part in change):
            if inode is None:
                names.setdefault(folder, {}).pop(name, None)
            else:
                names.setdefault(folder, {})[name] = inode


def _flat(names: dict[int, dict[str, int]]) -> dict[tuple[int, str], int]:
    return {(folder, name): inode for folder, entries in names.items() for name, inode in entries.items()}
