"""Signals that end a run: it finishes its step, saves, and exits with 128 + the signal's number.

A thread reads the signals, because the main thread handles none while it waits inside a collective or for the device.
In a notebook or at a prompt the process outlives the run: there Ctrl-C alone ends it, and the process never exits.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import Literal

import torch

from retriever.errors import REFUSED, RESUMES, Stopped, Verdict
from retriever.lock import release_all
from retriever.parallel.world import World

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
GRACE_S = 20.0  # for the step at hand; launchers kill their processes 30 s after they ask them to end
_SAME_S = 2.0  # a terminal and a launcher each send one Ctrl-C to the process
_OTHERS_READ_S = 2.5  # the watch of each rank looks every second
_DIES_WITH_PARENT = 1  # PR_SET_PDEATHSIG


class StopSignals:
    """Inside, SIGINT, SIGTERM or SIGUSR1 on any rank stops the run; a second Ctrl-C ends the process at once.

    During a step the run stops after it: `agreed` says so on every rank. If the step takes longer than `grace_s`, or
    the signal arrives between steps, a thread of the first rank calls `save`, which saves the last update and returns
    its step, and then ends all ranks. At a prompt the step is waited for instead, and a second Ctrl-C raises
    KeyboardInterrupt. Enter it in the main thread.
    """

    def __init__(self, world: World, save: Callable[[], int], grace_s: float = GRACE_S) -> None:
        self._world, self._save, self._grace_s = world, save, grace_s
        self._signal, self._at_prompt = 0, hasattr(sys, "ps1")
        self._state: Literal["stepping", "between", "stopping"] = "stepping"
        self._changed = threading.Condition()

    def ask(self, number: int) -> None:
        """Asks the run to stop because some rank received signal `number`. Only the first call has an effect."""
        with self._changed:
            if self._signal:
                return
            self._signal = number
        if not self._at_prompt:
            threading.Thread(target=self._wait, name="grace", daemon=True).start()
        if self._world.watch is not None:
            self._world.watch.pass_on_signal(number)
        if os.environ.get("LOCAL_RANK", "0") == "0":
            name = signal.Signals(number).name
            _say(f"{name}: stopping after this step; Ctrl-C again stops at once and saves nothing")

    def agreed(self, asked: bool) -> tuple[int, bool]:
        """The signal that some rank received, 0 for none, and whether some rank `asked`; the same on every rank.

        Every rank calls it after every step. After a signal the caller saves and ends the run.
        """
        found, stops = self._signal, int(asked)
        if self._world.size > 1:
            found, stops = self._world.max(torch.tensor([found, stops], device=self._world.device)).tolist()
        if found:
            self._set_state("stopping")
        return found, bool(stops)

    @contextmanager
    def between_steps(self) -> Iterator[None]:
        """Inside, all is saved or about to be: a signal ends the process without waiting for a step."""
        before = self._state
        if before == "stepping":
            self._set_state("between")
        try:
            yield
        finally:
            self._set_state(before)

    def _set_state(self, state: Literal["stepping", "between", "stopping"]) -> None:
        with self._changed:
            self._state = state
            self._changed.notify()

    def __enter__(self) -> StopSignals:
        self._reading, self._writing = os.pipe()
        os.set_blocking(self._writing, False)
        # A shell's background job ignores Ctrl-C.
        stopping = (signal.SIGINT,) if self._at_prompt else STOPPING
        heeded = [number for number in stopping if signal.getsignal(number) is not signal.SIG_IGN]
        self._before = {number: signal.signal(number, self._handle) or signal.SIG_DFL for number in heeded}
        if not self._at_prompt:
            self._wakeup = signal.set_wakeup_fd(self._writing, warn_on_full_buffer=False)
        if self._world.watch is not None:
            self._world.watch.on_signal = self.ask
        self._thread = threading.Thread(target=self._listen, name="signals", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._at_prompt:
            signal.set_wakeup_fd(self._wakeup)
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._set_state("stopping")
        os.close(self._writing)  # ends the thread
        self._thread.join()
        os.close(self._reading)

    def _handle(self, number: int, frame: object) -> None:
        if not self._at_prompt:
            return  # the thread reads it
        if self._signal:
            raise KeyboardInterrupt
        self.ask(number)

    def _listen(self) -> None:
        """Reads the numbers of this process's signals until the pipe closes."""
        first_s: float | None = None  # when this process received its first one
        while received := os.read(self._reading, 1):
            number = received[0]
            if first_s is not None and number == signal.SIGINT and time.monotonic() - first_s > _SAME_S:
                self._exit(
                    f"Ctrl-C after {signal.Signals(self._signal).name}: stopped at once; {RESUMES}", 128 + number
                )
            if number in STOPPING:
                first_s = first_s or time.monotonic()
                self.ask(number)

    def _wait(self) -> None:
        """Ends the run from this thread if the step takes too long, or no step is under way."""
        with self._changed:
            in_time = self._changed.wait_for(lambda: self._state != "stepping", self._grace_s)
            if self._state == "stopping":
                return
        # The first rank ends the others. No rank can save an encoder in shards alone, so its step goes on.
        if not self._world.is_first or (self._world.sharded and not in_time):
            return
        try:
            message, status = str(Stopped(self._signal, self._save())), 128 + self._signal
        except Exception as error:  # this thread is the last that could say so
            name = signal.Signals(self._signal).name
            message, status = f"error: {name}: the last update could not be saved: {error}", REFUSED
        self._exit(message, status)

    def _exit(self, message: str, status: int) -> None:
        _say(message)
        if self._world.watch is not None:
            self._world.watch.announce(Verdict(self._world.rank, self._world.rank, message, status))
            time.sleep(_OTHERS_READ_S)  # the store ends with this process, and the others have yet to read why
        release_all()
        sys.stdout.flush()
        os._exit(status)


def die_with_launcher() -> None:
    """Asks the kernel for SIGTERM when accelerate's launcher of one process ends, which does not end its trainer.

    Call it before `launch.join`, which removes the variable by which the launcher is known.
    """
    alone = "ACCELERATE_MIXED_PRECISION" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) == 1
    if alone and sys.platform == "linux":
        launcher = os.getppid()
        ctypes.CDLL(None, use_errno=True).prctl(_DIES_WITH_PARENT, signal.SIGTERM)
        if os.getppid() != launcher:  # it ended meanwhile
            signal.raise_signal(signal.SIGTERM)


def _say(message: str) -> None:
    with suppress(OSError):  # whoever read it has ended, perhaps by the same Ctrl-C
        print(f"\n{message}", file=sys.stderr, flush=True)
