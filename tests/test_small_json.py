"""The small JSON files of artefacts: whatever they hold is used, or refused in one line that names the file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from retriever.checksums import CHECKSUMS, damaged
from retriever.config import Config, ConfigError, RunConfig
from retriever.damage import read_state
from retriever.encoder.model_files import one_line
from retriever.files import read_json
from retriever.history import read_metrics
from retriever.run_folder import held
from retriever.shards import ShardError, open_shards

TEXTS = {
    "deep": "[" * 100_000,
    "digits": '{"step": ' + "9" * 5_000 + "}",
    "half a character": '{"taken": ["\\ud800"], "files": {"\\ud800": "1"}}',
    "no JSON": "{",
}


def _hold(folder: Path) -> None:
    with held(Config(run=RunConfig(output_dir=str(folder)))):
        pass


def _check(folder: Path) -> None:
    if problem := damaged(folder).get(CHECKSUMS):
        raise ConfigError(f"{CHECKSUMS} {problem}")


# Well-formed, but not what the file holds.
WRONG = {
    ".bigbatch": ['{"taken": ["export", 1.5]}', '{"taken": "export"}', '{"taken": 3}', "[]"],
    "metrics.jsonl": ['5\n{"step": 2}\n', '{}\n{"step": 2}\n', '{"step": "1"}\n{"step": 2}\n'],
    CHECKSUMS: [
        '{"algorithm": "xxh3_64", "files": {"a\\nb": "1"}}',
        '{"algorithm": "xxh3_64", "files": {"../b": "1"}}',
    ],
}

READERS: dict[str, Callable[[Path], Any]] = {
    ".bigbatch": _hold,
    "metrics.jsonl": lambda folder: read_metrics(folder / "metrics.jsonl"),
    "manifest.json": open_shards,
    "state.json": read_state,
    CHECKSUMS: _check,
}


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("name", READERS)
def test_what_cannot_be_used_is_refused_by_name(name: str, text: str, tmp_path: Path) -> None:
    folder = tmp_path / "step-00000001"
    folder.mkdir()
    last = '\n{"step": 2}\n' if name == "metrics.jsonl" else ""  # the last line may be cut short
    (folder / name).write_text(TEXTS[text] + last)
    with pytest.raises((ConfigError, ShardError), match=rf"(?s)^[^\n]*{name}[^\n]*$"):
        READERS[name](folder)


@pytest.mark.parametrize(("name", "text"), [(name, text) for name, texts in WRONG.items() for text in texts])
def test_what_is_not_expected_is_refused_by_name(name: str, text: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=rf"(?s)^[^\n]*{name}[^\n]*$"):
        READERS[name](tmp_path)


def test_values_are_read(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"ä": [1, "😀"]}', encoding="utf-8")
    assert read_json(tmp_path / "a.json") == {"ä": [1, "😀"]}


def test_a_panic_of_a_library_in_rust_is_an_error_of_the_file() -> None:
    class PanicException(BaseException):
        """As pyo3 defines it."""

    message = "tokenizer.json: expected a tokenizer"
    with pytest.raises(ConfigError, match=f"{message}: index out of bounds"), one_line(message):
        raise PanicException("index out of bounds")
    with pytest.raises(KeyboardInterrupt), one_line("tokenizer.json"):
        raise KeyboardInterrupt
