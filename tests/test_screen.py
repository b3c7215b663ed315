"""What is shown on a terminal, without one, quietly, and as JSON."""

from __future__ import annotations

import json

import pytest

from retriever import screen
from retriever.screen import Bar, say, shown_as


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("tqdm.std.time", clock)
    return clock


def _work(clock: Clock, seconds: float, total: int | None = 100) -> None:
    """A stage of 100 texts."""
    with Bar(total=total, desc="encode query", unit=" texts") as bar:
        for _ in range(100):
            clock.now += seconds / 100
            bar.update()


def test_without_a_terminal_a_stage_is_told_in_lines(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    """The first after two seconds, then every ten, then every minute at least; a short stage in none."""
    _work(clock, 1.5)
    assert capsys.readouterr().err == ""
    _work(clock, 40)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("encode query: 6% (6 of 100 texts),  2.50 texts/s, 00:02 so far, 00:37 left")
    assert lines[-1] == "encode query: 100% (100 of 100 texts),  2.50 texts/s, 00:40 so far" and len(lines) == 5
    _work(clock, 40, total=None)
    assert capsys.readouterr().err.splitlines()[-1] == "encode query: 100 texts,  2.50 texts/s, 00:40 so far"
    _work(clock, 6000)
    assert len(capsys.readouterr().err.splitlines()) == 101, "each text takes a minute"


def test_on_a_terminal_a_stage_has_a_bar_after_two_seconds(
    clock: Clock, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(screen, "is_terminal", lambda: True)
    _work(clock, 1.5)
    assert capsys.readouterr().err == ""
    _work(clock, 40)
    assert "\rencode query:  50%|" in capsys.readouterr().err


@pytest.mark.parametrize(("mode", "shown"), [("all", ["a", "b", "c"]), ("quiet", ["b", "c"])])
def test_a_quiet_command_shows_warnings_and_its_end(
    mode: screen.Mode, shown: list[str], clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    with shown_as(mode):
        say("a")
        say("b", "warning")
        say("c", "end", best=1)
        _work(clock, 40)
    printed = capsys.readouterr()
    assert printed.out.splitlines() == shown and (printed.err == "") == (mode == "quiet")


def test_remarks_as_json(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with shown_as("json"):
        say("a\nb", "summary")
        say("step 2", "step", **{"step": 2, "train/loss": 1.5})
        _work(clock, 40)
    say("later")
    printed = capsys.readouterr()
    first, second = map(json.loads, printed.out.splitlines()[:2])
    assert (first["kind"], first["text"]) == ("summary", "a\nb") and printed.err == ""
    assert (second["kind"], second["step"], second["train/loss"]) == ("step", 2, 1.5)
    assert printed.out.splitlines()[2:] == ["later"]
