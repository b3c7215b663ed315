"""What a command shows while it works: bars on a terminal, lines from time to time elsewhere, or lines of JSON.

    with Bar(texts, desc="encode query", unit=" texts") as bar:
    say("data.cache_dir is read-only")

Bars and remarks go to stderr and stdout. `shown_as` makes a command quiet, or makes each of its remarks a line of JSON.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

from tqdm import tqdm

# A quiet command shows warnings, evaluations and how a run ended.
Kind = Literal["remark", "summary", "warning", "step", "evaluation", "end"]
Mode = Literal["all", "quiet", "json"]

_SHORT_S = 2.0  # a stage that is over sooner has no bar
_LINE_S, _LONGEST_LINE_S = 10.0, 60.0  # between two lines where there is no terminal: a twentieth of the time so far
_LEFT = ", {remaining} left"
_LINE = "{desc}: {percentage:.0f}% ({n_fmt} of {total_fmt}{unit}), {rate_fmt}, {elapsed} so far" + _LEFT + "{postfix}"
_LINE_WITHOUT_TOTAL = "{desc}: {n_fmt}{unit}, {rate_fmt}, {elapsed} so far{postfix}"

_mode: Mode = "all"


@contextmanager
def shown_as(mode: Mode | None) -> Iterator[None]:
    """Inside, everything is shown as `mode` says: all of it, quietly, or as JSON; None: as it is outside."""
    global _mode
    before, _mode = _mode, mode or _mode
    try:
        yield
    finally:
        _mode = before


def is_json() -> bool:
    """Whether remarks are lines of JSON."""
    return _mode == "json"


def is_terminal() -> bool:
    """Whether bars are drawn: on a terminal and in a notebook."""
    return sys.stderr.isatty() or "ipykernel" in sys.modules


def say(text: str, kind: Kind = "remark", **values: Any) -> None:
    """Prints `text` above the bars. As JSON it is `{"time": …, "kind": …, "text": …}` with `values`."""
    if _mode == "json":
        told = {"time": round(time.time(), 3), "kind": kind, "text": text, **values}
        tqdm.write(json.dumps(told, ensure_ascii=False))
    elif _mode == "all" or kind in ("warning", "evaluation", "end"):
        tqdm.write(text)
    sys.stdout.flush()


class Bar(tqdm):
    """A bar of tqdm's on a terminal, once a stage takes longer than two seconds; elsewhere a line from time to time.

    `disable`: nothing is shown, as on ranks other than the first. No thread watches it.
    """

    monitor_interval = 0
    start_t: float
    last_print_t: float

    def __init__(self, items: Any = None, desc: str = "", *, disable: bool = False, **options: Any) -> None:
        self._by_lines = not is_terminal()
        self._line_at = _SHORT_S
        if self._by_lines:
            sized = options.get("total") is not None or hasattr(items, "__len__")
            self._line = _LINE if sized else _LINE_WITHOUT_TOTAL
            options |= {"bar_format": self._line, "delay": _SHORT_S}
        usual = {"delay": _SHORT_S, "miniters": 1, "dynamic_ncols": True, "leave": None}  # a bar inside another goes
        super().__init__(items, desc, disable=disable or _mode != "all", **(usual | options))

    @staticmethod
    def format_meter(*args: Any, **options: Any) -> str:
        """The text of a bar; units begin with a space, which belongs before `s/` where a step takes seconds."""
        return str(tqdm.format_meter(*args, **options)).replace("s/ ", " s/")

    def display(self, msg: str | None = None, pos: int | None = None) -> Any:
        """Draws the bar, or prints its line if it is time."""
        if not self._by_lines:
            return super().display(msg, pos)
        elapsed = self._time() - self.start_t
        if msg is None and elapsed >= self._line_at:
            self._line_at = elapsed + min(_LONGEST_LINE_S, max(_LINE_S, elapsed / 20))
            self._print_line()
        return True

    def clear(self, nolock: bool = False) -> None:
        """Takes the bar off the terminal while something else is printed."""
        if not self._by_lines:
            super().clear(nolock)

    def close(self) -> None:
        """Draws the last state."""
        if self._by_lines and not self.disable:
            self.bar_format = self._line.replace(_LEFT, "")
            if self.leave is not False and self._time() - self.start_t >= _SHORT_S:
                self._print_line()
            self.sp = None  # nothing is left to be drawn
        super().close()

    def leave_out(self, seconds: float) -> None:
        """Takes a pause out of the rate and the time so far."""
        if not self.disable:
            self.start_t, self.last_print_t = self.start_t + seconds, self.last_print_t + seconds

    def _print_line(self) -> None:
        self.fp.write(f"{self}\n")
        self.fp.flush()
