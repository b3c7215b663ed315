"""Every command refuses, is interrupted and is terminated in one way: its exit status, one line, and the traceback only
when asked.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from argparse import Namespace
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tqdm import tqdm

from retriever import encode
from retriever.command import Command, command, option
from retriever.errors import RankError, RefusedError, Verdict
from retriever.launch import launched
from tests.commands import assert_refused
from tests.workplace import ROOT, make_workplace

# Module, and arguments that it can run with; {out} is what it writes, the other names are what it reads.
_SEARCHED = "--bm25 --data {data} --output-dir {out}"
COMMANDS = {
    "retriever.train": "--config {run} run.output_dir={out}",
    "retriever.encode": "--model {model} --input {data} --side query --output {out}",
    "eval.beir": f"{_SEARCHED} --split dev",
    "eval.msmarco": "--bm25 --data {marco} --output-dir {out}",
    "eval.answers": f"{_SEARCHED} --questions {{questions}}",
    "eval.search": "--queries {queries} --passages {passages} --output {out}/run.trec",
    "eval.compare": "{first} {second} --qrels {qrels} --output {out}/comparison.json",
    "scripts.demo.__main__": "--smallest --config {demo} --output-dir {out}",
    "scripts.pipeline": "{loop} output_dir={out}",
    "scripts.mine_negatives": "--data {data} --retrievers bm25 --output-dir {out}",
    "scripts.make_pairs": "--output {out} --packages asyncio --test-queries 4 --dev-queries 2",
    "scripts.make_code_pairs": "--output {out} --packages asyncio --test-queries 4 --dev-queries 2",
    "scripts.study.__main__": "{study} output_dir={out}",
    "scripts.hold_out": "--data {undivided} --output {out} --queries 2",
    "scripts.train_tokenizer": "--data {data} --output {out}/new --vocab-size 200",
    "scripts.plan_cluster": "--batches 1",
    "scripts.merge": "{model} {model} --output {out}",
    "scripts.sweep": "--config {run} --output {out}",
    "scripts.serve.__main__": "{model} --data {data} --split dev --port 0 --output-dir {out}",
    "scripts.push_to_hub": "--model {model} --repo me/model",
    "scripts.report": "{logged} --output {out}/report.html",
    "scripts.train_cross_encoder": "--model {model} --data {mined} --output-dir {out}",
}
# They need further packages or a hub; their own tests run them.
TESTED_APART = ("eval.mteb", "scripts.export_onnx", "scripts.push_to_hub")
READERS = [name for name, arguments in COMMANDS.items() if re.search(r"{(?!out})", arguments)]
WRITERS = [name for name, arguments in COMMANDS.items() if "{out}" in arguments]


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What the commands read."""
    folder = make_workplace(tmp_path_factory.mktemp("commands"))
    marco = folder / "marco"
    marco.mkdir()
    for name, line in (
        ("collection", "p\ta river"),
        ("queries.dev.small", "q\triver"),
        ("qrels.dev.small", "q\t0\tp\t1"),
    ):
        (marco / f"{name}.tsv").write_text(line + "\n")
    (folder / "questions.csv").write_text("which river\t['river']\n")
    (folder / "qrels.tsv").write_text("query-id\tcorpus-id\tscore\nq\tp\t1\nr\tp\t1\n")
    for name, score in (("first", 1.0), ("second", 2.0)):
        (folder / f"{name}.trec").write_text(f"q Q0 p 1 {score} x\nr Q0 o 1 {score} x\n")
    mined: dict[str, Any] = {"query_id": "q", "query": "river"}
    mined |= {
        f"{kind}_passages": [{"docid": kind, "title": "", "text": "a river"}] for kind in ("positive", "negative")
    }
    (folder / "mined.jsonl").write_text(json.dumps(mined) + "\n")
    (folder / "study.yaml").write_text(
        f"{{train: {folder}/run.yaml, dev: {{path: {folder}/data}}, arms: [{{setting: optim.lr, values: [1]}}]}}"
    )
    (folder / "logged").mkdir()
    (folder / "logged" / "config.yaml").write_text("optim: {lr: 1.0}\n")
    (folder / "logged" / "metrics.jsonl").write_text('{"step": 1, "train/loss": 1.0}\n')
    shutil.copytree(folder / "data", folder / "undivided")
    (folder / "undivided" / "qrels" / "dev.tsv").unlink()
    model = f"{{name_or_path: {folder}/model}}"
    (folder / "loop.yaml").write_text(
        f"""
source: {{path: {folder}/data, format: beir}}
train: {{run: {{trackers: []}}, model: {model}, optim: {{precision: fp32}}, train: {{max_steps: 1}}}}
rounds: [{{name: only}}]
evaluate: {{data: {folder}/data, options: {{split: [dev], metrics: ["nDCG@10"]}}}}
"""
    )
    for side, name in (("query", "queries"), ("passage", "passages")):
        texts = [
            "--model",
            str(folder / "model"),
            "--input",
            str(folder / "data"),
            "--side",
            side,
            "--output",
            str(folder / name),
        ]
        assert encode.main(texts) == 0
    found = {name: folder / name for name in ("model", "data", "undivided", "marco", "queries", "passages", "logged")}
    files = (
        "run.yaml",
        "loop.yaml",
        "study.yaml",
        "questions.csv",
        "qrels.tsv",
        "first.trec",
        "second.trec",
        "mined.jsonl",
    )
    return found | {name.partition(".")[0]: folder / name for name in files} | {"demo": ROOT / "configs" / "demo.yaml"}


def words(name: str, places: dict[str, Path], out: Path) -> list[str]:
    """The arguments of a command."""
    return [word.format(**places, out=out) for word in COMMANDS[name].split()]


def main_of(name: str) -> Command:
    """The command."""
    found = importlib.import_module(name).main
    assert isinstance(found, Command)
    return found


def test_the_table_has_every_command() -> None:
    """But for the benchmarks, and what prints docs/settings.md, which reads and writes nothing."""
    files = (
        path
        for package in ("retriever", "eval", "scripts")
        for path in (ROOT / package).rglob("*.py")
        if "bench" not in path.parts and path.name != "config_help.py"
    )
    mains = {
        path
        for path in files
        if re.search("^(def main\\(|if __name__ ==)", path.read_text(encoding="utf-8"), re.MULTILINE)
    }
    assert mains == {ROOT / f"{name.replace('.', '/')}.py" for name in (*COMMANDS, *TESTED_APART)}


def test_console_commands_are_commands(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Each calls itself by its own name."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert len(project["scripts"]) >= 10
    for name, entry in project["scripts"].items():
        module, _, attribute = entry.partition(":")
        monkeypatch.setattr(sys, "argv", [f"/usr/bin/{name}"])
        assert attribute == "main" and main_of(module)(["--help"]) == 0
        assert capsys.readouterr().out.startswith(f"usage: {name} [-h]")


@pytest.mark.parametrize("name", COMMANDS)
def test_an_unknown_option_is_refused(name: str, places: dict[str, Path], tmp_path: Path) -> None:
    assert_refused(
        main_of(name), [*words(name, places, tmp_path), "--no-such-option"], "unrecognized arguments: --no-such-option"
    )


@pytest.mark.parametrize("name", READERS)
def test_a_missing_file_is_refused(name: str, places: dict[str, Path], tmp_path: Path) -> None:
    nowhere = dict.fromkeys(places, tmp_path / "nowhere")
    assert_refused(main_of(name), words(name, nowhere, tmp_path / "out"), str(tmp_path / "nowhere"))


@pytest.mark.parametrize("name", WRITERS)
def test_a_file_where_a_folder_should_be_written_is_refused(name: str, places: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    assert_refused(main_of(name), words(name, places, tmp_path / "out"), str(tmp_path / "out"))
    assert (tmp_path / "out").read_text() == ""


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (OSError(28, "No space left on device", "a/file"), 2, "a/file: No space left"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
    ids=["OSError", "KeyboardInterrupt"],
)
def test_an_error_inside_is_one_line(
    name: str, error: BaseException, status: int, message: str, places: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    def fails(_: Namespace) -> None:
        raise error

    monkeypatch.setattr(main_of(name), "body", fails)
    assert_refused(main_of(name), words(name, places, tmp_path), f"error: {message}", status)
    assert main_of(name)(["--debug", *words(name, places, tmp_path)]) == status
    said = capsys.readouterr().err
    assert said.count("Traceback") == 1 and said.count("\nerror: ") == 1


@pytest.mark.parametrize(
    "script", ["retriever/train.py", "retriever/encode.py", "-m eval.compare", "-m scripts.plan_cluster"]
)
def test_a_command_of_its_own_process_ends_with_the_status(script: str) -> None:
    ended = subprocess.run(
        [sys.executable, *script.split(), "--no-such-option"], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert (ended.returncode, ended.stdout, ended.stderr.count("\n")) == (2, "", 1), ended.stderr
    assert ended.stderr.startswith("error: ")


def _run(body: Callable[[Namespace], None], *arguments: str) -> int:
    return command("command", None, option("--at-once"), lower="--at-once")(body)(arguments)


def _run_words(body: Callable[[Namespace], None], words: Sequence[str]) -> int:
    return _run(body, *words)


def _raiser(error: BaseException) -> Callable[[Namespace], None]:
    def fails(_: Namespace) -> None:
        raise error

    return fails


def test_the_line_stands_below_the_progress_bars(capsys: pytest.CaptureFixture[str]) -> None:
    """Also where nothing else closes them."""
    bars = []

    def fails(_: Namespace) -> None:
        bars.append(tqdm(total=3, mininterval=0))
        bars[0].update()
        raise RefusedError("no more")

    assert _run(fails) == 2
    assert re.search(r"1/3 \[[^\n]*\nerror: no more\n$", capsys.readouterr().err)


@pytest.mark.parametrize(
    "error",
    [MemoryError("Unable to allocate 3.0 GiB"), torch.OutOfMemoryError("CUDA out of memory. Tried 2 GiB. GPU 0")],
)
def test_memory_that_runs_out_is_told_with_what_to_lower(error: BaseException) -> None:
    assert_refused(
        partial(_run_words, _raiser(error)), [], r"error: out of memory: lower --at-once \((Unable|CUDA).* GiB\)$"
    )


def test_a_bug_keeps_its_traceback() -> None:
    with pytest.raises(ZeroDivisionError):
        _run(lambda _: print(1 // 0))


def test_the_command_is_told_as_it_was_typed() -> None:
    seen: list[Namespace] = []
    assert _run(seen.append, "--at-once", "two words") == 0
    assert seen[0].command == "command --at-once 'two words'"


def test_ranks_other_than_a_nodes_first_are_silent_but_of_what_fails_them_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert (_run(_raiser(RefusedError("no"))), _run(print, "--no-such-option"), _run(_raiser(KeyboardInterrupt()))) == (
        2,
        2,
        130,
    )
    assert capsys.readouterr().err == ""
    assert_refused(partial(_run_words, _raiser(OSError(28, "full", "disk"))), [], "disk: full")


def test_a_lost_rank_ends_the_process_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """An ordinary end would wait for the rank that is no more."""
    ended: list[int] = []
    monkeypatch.setattr("retriever.command.os._exit", ended.append)
    error = RankError(Verdict(2, 1, "rank 2 hangs"), 0)
    assert_refused(partial(_run_words, _raiser(error)), [], "error: rank 2 hangs. The same command goes on", 3)
    assert ended == [3]


def test_a_command_hands_the_status_of_another_on(capsys: pytest.CaptureFixture[str]) -> None:
    """One that it ran in its own process has said why already; of one in a process of its own it says which."""
    assert _run(lambda _: sys.exit(_run(_raiser(KeyboardInterrupt())))) == 130
    assert capsys.readouterr().err == "error: interrupted\n"
    for code, status in (("raise SystemExit(3)", 3), ("import os; os.kill(os.getpid(), 15)", 143)):
        failed = subprocess.CalledProcessError(
            subprocess.run([sys.executable, "-c", code]).returncode, ["a", "command"]
        )
        assert_refused(partial(_run_words, _raiser(failed)), [], "a command … ended with status", status)


def test_a_reader_that_has_enough_is_no_error(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    replaced: list[int] = []
    monkeypatch.setattr("retriever.command.os.dup2", lambda _, descriptor: replaced.append(descriptor))
    assert _run(_raiser(BrokenPipeError(32, "Broken pipe"))) == 141
    assert capfd.readouterr().err == "" and replaced == [sys.stdout.fileno()]


def test_a_worker_that_is_forked_ends_quietly(capfd: pytest.CaptureFixture[str]) -> None:
    """It inherits the handler of SIGTERM, and its parent ends it so."""

    def body(_: Namespace) -> None:
        ready, says_ready = os.pipe()
        if (worker := os.fork()) == 0:
            os.write(says_ready, b"!")
            time.sleep(30)
            os._exit(0)
        os.read(ready, 1)
        os.kill(worker, signal.SIGTERM)
        assert os.waitstatus_to_exitcode(os.waitpid(worker, 0)[1]) == 143

    assert _run(body) == 0
    assert capfd.readouterr().err == ""


def test_launched_is_one_rank_without_a_launcher() -> None:
    with launched() as world:
        assert (world.rank, world.size) == (0, 1)
