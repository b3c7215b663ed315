"""Ranks watch one another: if one dies, fails or hangs, the run ends on all of them and names it.

Each rank counts the collectives that it enters. A thread of it publishes that count and a beat in the ranks' common
store, and reads the next rank's: O(1) work per rank and second for any number of ranks. The first rank that finds
something wrong writes a verdict, and all ranks end with it.
"""

from __future__ import annotations

import json
import os
import re
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict

import torch
import torch.distributed as dist

from retriever.errors import INTERRUPTED, LOST, RESUMES, RankError, Verdict
from retriever.lock import release_all

_VERDICT, _SIGNAL = "verdict", "signal"
_SLOWEST_INTERVAL_S = 1.0


class Watch:
    """Rank `rank` watches rank `rank + 1`, which may keep the others waiting in a collective for `timeout_s`."""

    def __init__(self, store: dist.Store, rank: int, size: int, timeout_s: float) -> None:
        self._store, self._rank, self._size, self._timeout_s = store, rank, size, timeout_s
        self._interval_s = min(_SLOWEST_INTERVAL_S, timeout_s / 10)
        self._limit_s = timeout_s - 4 * self._interval_s  # leaves time to write the verdict, to read it and to end
        self._entered = self._beat = 0
        self._stopped, self._closing = threading.Event(), False
        self._known: Verdict | None = None  # once read, it needs no store
        self.before_leaving: Callable[[], None] = lambda: None  # called before the process ends wherever it is
        self.on_signal: Callable[[int], None] = lambda number: None  # on the first rank, for a signal of any rank
        self._thread = threading.Thread(target=self._look, name="watch", daemon=True)
        self._publish()

    def start(self) -> None:
        """Begins to watch. Every rank's Watch must exist by then."""
        self._thread.start()

    def close(self) -> None:
        """From here on the other ranks may end."""
        self._closing = True

    def stop(self) -> None:
        """Ends the thread."""
        self._stopped.set()
        if self._thread.is_alive():
            self._thread.join()

    def enter(self) -> None:
        """Counts a collective that this rank enters."""
        self._entered += 1

    def announce(self, verdict: Verdict) -> Verdict:
        """Ends the run on every rank; the first verdict is the one that counts, and is returned."""
        try:
            return Verdict(**json.loads(self._store.compare_set(_VERDICT, "", json.dumps(asdict(verdict)))))
        except dist.DistError:  # the store went with the rank that held it
            return verdict

    def pass_on_signal(self, number: int) -> None:
        """Tells the first rank that this one received a signal: its `on_signal` is called."""
        with suppress(dist.DistError):  # the first rank is gone; the thread finds that out
            self._store.set(_SIGNAL, str(number))

    def blame(self, error: RuntimeError) -> RankError:
        """The error to raise for a failed collective; it names the rank that announced its end or stopped beating."""
        still, verdict = self._still(), self._verdict()
        if verdict is None:
            # gloo begins with its own file and line
            reason = re.sub(r"^\[.*?\] ", "", str(error).strip().splitlines()[0])
            lost = (
                f"rank {still[0]} ended without a word" if still else f"rank {self._rank} could not reach another rank"
            )
            verdict = self.announce(
                Verdict(still[0] if still else self._rank, self._rank, f"{lost}, and a collective failed ({reason})")
            )
        return RankError(verdict, self._rank)

    def tell(self, error: BaseException) -> BaseException:
        """Tells the other ranks that `error` ends this one. Returns the error to raise: `error`, or a RankError if
        another rank caused it.
        """
        cause = error
        # Memory that runs out is a rank's own failure, and often several ranks' at once: no collective failed.
        own = (RankError, torch.OutOfMemoryError)
        led = error if isinstance(error, RuntimeError) and not isinstance(error, own) else None
        if isinstance(error, KeyboardInterrupt):
            self.announce(Verdict(self._rank, self._rank, f"interrupted: {RESUMES}", INTERRUPTED))
        elif led and (self._still() or self._verdict()):
            cause = self.blame(led)  # torch's own collectives, of an encoder in shards, ask nobody else
        elif not isinstance(error, RankError):
            what = f"{type(error).__name__}: {error}".strip().splitlines()[0]
            verdict = self.announce(Verdict(self._rank, self._rank, f"rank {self._rank} ended with {what}"))
            if led and verdict.rank != self._rank:
                cause = RankError(verdict, self._rank)
        if self._rank == 0:  # it may hold the store, where the others have yet to read why
            time.sleep(2 * self._interval_s)
        return cause

    def _publish(self) -> None:
        self._beat += 1
        self._store.set(str(self._rank), f"{self._beat} {self._entered}")

    def _still(self) -> list[int]:
        """The other ranks whose beat stops while this one waits; it does not wait if there is a verdict already."""
        before = self._states()
        if self._verdict() is None:
            time.sleep(3 * self._interval_s)
        return [r for r, state in enumerate(self._states()) if r != self._rank and state == before[r]]

    def _states(self) -> list[bytes]:
        try:
            return [self._store.get(str(rank)) for rank in range(self._size)]
        except dist.DistError:
            return [b""] * self._size

    def _verdict(self) -> Verdict | None:
        try:
            if self._known is None and self._store.check([_VERDICT]):
                self._known = Verdict(**json.loads(self._store.get(_VERDICT)))
        except dist.DistError:
            gone = "the store of the ranks' rendezvous is gone, and rank 0 or its launcher with it"
            self._known = Verdict(0, self._rank, gone)
        return self._known

    def _look(self) -> None:
        """Beats, and looks at the next rank until a verdict is there."""
        following = (self._rank + 1) % self._size
        beat, entered = b"", -1
        beating = behind = time.monotonic()
        while not self._stopped.wait(self._interval_s):
            try:
                self._publish()
                state, now = self._store.get(str(following)), time.monotonic()
            except dist.DistError:
                return None if self._closing else self._leave(self._verdict())
            if verdict := self._verdict():
                return self._leave(verdict)
            if self._rank == 0 and self._store.check([_SIGNAL]):
                self.on_signal(int(self._store.get(_SIGNAL)))
            theirs = int(state.split()[1])
            if state != beat:
                beating = now
            if theirs != entered or theirs >= self._entered:
                behind = now
            beat, entered = state, theirs
            if now - beating > self._limit_s:
                silent = f"gives no sign of life since {now - beating:.0f} s"
                self._accuse(following, f"{silent}: it was killed or stopped, or its node is gone")
            elif now - behind > self._limit_s:
                waited = f"the others have waited for it for {now - behind:.0f} s"
                self._accuse(following, f"hangs, or works on something too long: {waited}")

    def _accuse(self, rank: int, what: str) -> None:
        self.announce(Verdict(rank, self._rank, f"rank {rank} {what} (run.timeout_s={self._timeout_s:g})"))

    def _leave(self, verdict: Verdict | None) -> None:
        """Ends the process unless the main thread does so soon: it may wait for ever for a rank that is gone."""
        if verdict is None or self._stopped.wait(2 * self._interval_s):
            return
        self.before_leaving()
        release_all()
        error = RankError(verdict, self._rank)
        if error.speaks:
            print(f"\n{'error: ' if verdict.status == LOST else ''}{error}", file=sys.stderr)
        if verdict.status == LOST and verdict.rank == self._rank:
            frame = sys._current_frames()[threading.main_thread().ident or 0]
            print(f"rank {self._rank} is here:\n{''.join(traceback.format_stack(frame))}", file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(verdict.status)
