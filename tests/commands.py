"""What tests of commands share: what one says that refuses its arguments, and a rank without the others."""

from __future__ import annotations

import io
import os
import re
import time
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr
from pathlib import Path

import pytest
import torch

from retriever.parallel.world import World


def assert_refused(
    main: Callable[[Sequence[str]], int], arguments: Sequence[str], message: str, status: int = 2
) -> None:
    """The command ends with `status` and one `error: ` line, in which the pattern `message` is found."""
    with redirect_stderr(io.StringIO()) as stream:
        found = main(arguments)
    said = stream.getvalue()
    assert found == status, said
    (line,) = (line for line in re.split("[\r\n]", said) if line.startswith("error: "))  # \r: a bar that was wiped out
    assert re.search(message, line) and "Traceback" not in said, said


def change_unseen(file: Path, monkeypatch: pytest.MonkeyPatch) -> bytes:
    """Changes a bit of a file and keeps its size and time, in a process that has verified nothing yet; returns the
    content before.
    """
    times, content = file.stat(), file.read_bytes()
    file.write_bytes(content[:-3] + bytes([content[-3] ^ 1]) + content[-2:])
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    monkeypatch.setattr("retriever.checksums._STARTED", time.time())
    return content


class RankAlone(World):
    """Rank `rank` of `size` without a process group: where it would wait for the others, it calls `wait`."""

    def __init__(self, rank: int, size: int, wait: Callable[[], None] = lambda: None) -> None:
        super().__init__(torch.device("cpu"), rank)
        self.size, self._wait = size, wait

    def barrier(self) -> None:
        """Calls `wait`."""
        self._wait()
