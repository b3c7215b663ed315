"""What every command shares: its parser, errors in one line, and the exit status.

    @command("python -m scripts.hold_out", __doc__, option("--data", required=True, help="a BEIR folder"))
    def main(args: argparse.Namespace) -> None:
        hold_out(args.data, …)

    if __name__ == "__main__":
        sys.exit(main())

Exit status: 0 finished; 2 refused (arguments, configuration, data, files, memory, a loss that is not finite); 3 another
rank was lost; 130 interrupted; 143 terminated; 138 stopped by SIGUSR1. A subprocess that failed hands its own status
on. Every other error is a bug and keeps its traceback. This module imports neither torch nor anything else that takes
long: what is wrong is told before they are loaded.
"""

from __future__ import annotations

import argparse
import math
import os
import shlex
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from retriever.environment import check_environment
from retriever.errors import PIPE_CLOSED, TERMINATED, RankError, RefusedError, Stopped, Terminated, speaks, told
from retriever.screen import shown_as

_CONSOLE = "bigbatch-"  # how the console commands of pyproject.toml begin
Option = Callable[[argparse._ActionsContainer], object]  # adds itself to a parser, or to a group of one


def option(*names: str, **settings: Any) -> Option:
    """One argument, in the words of `add_argument`. Its default is added to its help, unless that speaks of one."""
    return lambda parser: parser.add_argument(*names, **settings)


def group(title: str, *options: Option, about: str | None = None) -> Option:
    """Options under a title of their own in the help."""
    return lambda parser: _add(parser.add_argument_group(title, about), options)


def one_of(*options: Option, required: bool = True) -> Option:
    """Options of which one may be given, or must."""
    return lambda parser: _add(parser.add_mutually_exclusive_group(required=required), options)


def _add(parser: argparse._ActionsContainer, options: Iterable[Option]) -> None:
    for add in options:
        add(parser)


class _Help(argparse.RawDescriptionHelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> str:
        told = action.help or ""
        silent = (
            type(action.default) not in (int, float, str) or action.default == argparse.SUPPRESS or "default" in told
        )
        return told if silent else f"{told} (default: %(default)s)"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise RefusedError(f"{message} (see {self.prog} --help)")


def whole(least: int, most: int = 10**9) -> Callable[[str], int]:
    """Reads a whole number from `least` to `most`, for argparse."""

    def read(text: str) -> int:
        plain = text.isascii() and text.isdecimal() and len(text) < 20
        if not plain or not least <= int(text) <= most:
            bound = (
                f"at most {most}" if text.isdecimal() and (len(text) >= 20 or int(text) > most) else f"at least {least}"
            )
            raise argparse.ArgumentTypeError(f"expected a whole number of {bound}; received {text[:40]!r}")
        return int(text)

    return read


def number(least: float = 0.0, *, above: bool = False) -> Callable[[str], float]:
    """Reads a finite number of at least `least`, or `above` it, for argparse."""

    def read(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not least <= value < math.inf or (above and value == least):
            raise argparse.ArgumentTypeError(
                f"expected a number {'above' if above else 'of at least'} {least:g}; received {text[:40]!r}"
            )
        return value

    return read


at_least_one, zero_or_more, seed = whole(1), whole(0), whole(0, 2**63 - 1)
above_zero = number(above=True)


BATCH = option(
    "--batch", type=at_least_one, metavar="TOKENS", help="padded tokens the encoder sees at once (default: by device)"
)
TITLE = (
    option("--title", choices=("join", "drop"), default="join", help="as data.title"),
    option("--title-separator", default=" ", help="as data.title_separator (default: one space)"),
)
ENCODER = (
    option("--precision", choices=("fp32", "bf16", "fp16"), default="fp32", help="of the encoder"),
    option(
        "--attention",
        choices=("auto", "packed", "padded"),
        default="auto",
        help="packed computes nothing for padding; auto: on a GPU, where the architecture can",
    ),
)


Body = Callable[[argparse.Namespace], None]


@dataclass
class Command:
    """A command. `resumes` says how it goes on after an interruption, `lower` what to lower where memory runs out."""

    parser: argparse.ArgumentParser
    body: Body
    resumes: str
    lower: str

    def __call__(self, arguments: Sequence[str] | None = None) -> int:
        """Calls `body` with the parsed arguments (default: the process's own) and returns the exit status; tells an
        error in one line.

        `args.command` is the command as it was typed. After a lost rank the process ends here.
        """
        words = list(sys.argv[1:] if arguments is None else arguments)
        usual, typed = self.parser.prog, Path(sys.argv[0]).name
        if typed.startswith(_CONSOLE):
            self.parser.prog = typed
        try:
            with _terminable():
                args = self.parser.parse_intermixed_args(words)
                args.command = f"{self.parser.prog} {shlex.join(words)}"
                check_environment()
                with shown_as("json" if getattr(args, "log_json", False) else "quiet" if args.quiet else None):
                    self.body(args)
        except SystemExit as ended:  # --help, or a command that this one ran: it has said why
            if not isinstance(ended.code, int):
                raise
            return ended.code
        except BrokenPipeError:  # as of `| head`, which has read enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return PIPE_CLOSED
        except BaseException as error:
            status, message = told(error, self.resumes, self.lower)
            if not status:
                raise
            if "--debug" in words:
                traceback.print_exception(error)
            if speaks(error):
                tell(message, "" if isinstance(error, Stopped) else "error: ")
            if isinstance(error, RankError):
                os._exit(status)  # an ordinary end would wait for the rank that is no more
            return status
        finally:
            self.parser.prog = usual
        return 0


def command(
    prog: str, about: str | None, *options: Option, resumes: str = "", lower: str = "the sizes that it was given"
) -> Callable[[Body], Command]:
    """Makes the function below it the body of a command that is started as `prog`; the others are `Command`'s."""
    parser = _Parser(prog=prog, description=about, formatter_class=_Help)
    shared = (
        option("--quiet", action="store_true", help="show warnings, results and errors alone: no bars, no remarks"),
        option("--debug", action="store_true", help="print the traceback of an error too"),
    )
    _add(parser, (*options, *shared))
    return lambda body: Command(parser, body, resumes, lower)


def tell(message: str, prefix: str = "error: ") -> None:
    """Prints a message to stderr, on a line of its own below the progress bars, which are closed."""
    for bar in list(getattr(getattr(sys.modules.get("tqdm"), "tqdm", None), "_instances", ())):
        bar.close()
    sys.stdout.flush()
    print(f"{prefix}{message}", file=sys.stderr, flush=True)


@contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM ends the command as Ctrl-C does, files closed and temporary folders removed.

    Not on one rank of several: it may wait in a collective, where Python handles no signal, and should end at once.
    """
    alone = os.environ.get("WORLD_SIZE", "1") == "1" and threading.current_thread() is threading.main_thread()
    if not alone:
        yield
        return
    owner = os.getpid()

    def terminate(*_: object) -> None:
        if os.getpid() != owner:  # a forked worker, which its parent ends
            os._exit(TERMINATED)
        raise Terminated

    previous = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous or signal.SIG_DFL)
