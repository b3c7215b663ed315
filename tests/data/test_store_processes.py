"""Several processes and killed ones: a store is built once, whole, or not at all."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

from retriever.config import Config, DataConfig, ModelConfig, SourceConfig
from retriever.data.store import Store, build_or_open
from tests.tiny import random_texts, tiny_tokenizer

ROOT = Path(__file__).parents[2]


def write_pairs(path: Path) -> Path:
    """40 pairs in one columns file, and beside it the tokenizer's folder: a process that loads it from there needs no
    torch.
    """
    tiny_tokenizer().save_pretrained(path.parent / "tokenizer")
    texts = random_texts(80, longest=60, seed=3)
    pairs = [{"anchor": f"{texts[i]} {i}", "positive": f"{texts[40 + i]} {i}"} for i in range(40)]
    path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    return path


def built(cache: Path, source: SourceConfig) -> Store:
    config = Config(model=ModelConfig(query_prompt="find: "), data=DataConfig(train=(source,), cache_dir=str(cache)))
    return build_or_open(config, tiny_tokenizer(), progress=False)


# A process that builds a store once it is told to, says what it is about to do, and leaves time to be killed there.
_BUILD = """
import os, sys, time
from retriever.config import Config, DataConfig, ModelConfig, SourceConfig
from retriever.data import text_table
from retriever.data.store import build_or_open
from transformers import PreTrainedTokenizerFast

def announced(name, function):
    def call(*arguments):
        print(name, *(a for a in arguments[:1] if name == "RENAME"), flush=True)
        time.sleep(0.05)
        return function(*arguments)
    return call

text_table._BATCH_TEXTS = 4
text_table.tokenize_flat = announced("BATCH", text_table.tokenize_flat)
os.replace = announced("RENAME", os.replace)
data = DataConfig(train=(SourceConfig(path=sys.argv[1]),), cache_dir=sys.argv[2])
config = Config(model=ModelConfig(query_prompt="find: "), data=data)
print("READY", flush=True)
sys.stdin.readline()
store = build_or_open(config, PreTrainedTokenizerFast.from_pretrained(sys.argv[3]), progress=False)
print("OPENED", store.fingerprint, len(store.passages), int(store.passages.lengths.sum()), flush=True)
"""


def start_build(pairs: Path, cache: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", _BUILD, str(pairs), str(cache), str(pairs.parent / "tokenizer")]
    environment = {name: value for name, value in os.environ.items() if name != "TOKENIZERS_PARALLELISM"}
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "READY\n"
    return process


def go(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("go\n")
    process.stdin.flush()


def test_a_build_killed_at_any_moment_leaves_nothing_that_is_taken_for_finished(tmp_path: Path) -> None:
    pairs, cache = write_pairs(tmp_path / "pairs.jsonl"), tmp_path / "cache"
    undisturbed = built(tmp_path / "undisturbed", SourceConfig(path=str(pairs)))
    name = undisturbed.folder.name
    (cache / f"{name}.building").mkdir(parents=True)  # as an earlier version left it
    (cache / f"{name}.lock").touch()
    for moment in (
        "BATCH\n",
        f".writing-{name}/.writing-manifest.json\n",
        f"/.writing-{name}\n",
    ):  # tokenising, then the renames
        with start_build(pairs, cache) as process:
            go(process)
            assert process.stdout is not None
            assert any(line.endswith(moment) for line in process.stdout)
            process.send_signal(signal.SIGKILL)
        assert process.returncode == -signal.SIGKILL
        assert {f".writing-{name}", f"{name}.lock"} == {path.name for path in cache.iterdir()} - {f"{name}.building"}
    built(cache, SourceConfig(path=str(pairs), limit=5))  # another store's build clears it away
    assert not [path for path in cache.iterdir() if path.suffix == ".building" or path.name.startswith(".")]
    store = built(cache, SourceConfig(path=str(pairs)))
    assert store.fingerprint == undisturbed.fingerprint
    files = [path.relative_to(store.folder) for path in store.folder.rglob("*.npy")]
    assert len(files) == 10
    assert all((store.folder / file).read_bytes() == (undisturbed.folder / file).read_bytes() for file in files)


def test_two_processes_at_once_build_once(tmp_path: Path) -> None:
    pairs, cache = write_pairs(tmp_path / "pairs.jsonl"), tmp_path / "cache"
    with start_build(pairs, cache) as first, start_build(pairs, cache) as second:
        go(first)
        go(second)
        outputs = [process.communicate(timeout=60)[0] for process in (first, second)]
    assert [first.returncode, second.returncode] == [0, 0]
    opened = [output.splitlines()[-1] for output in outputs]
    assert opened[0] == opened[1] and opened[0].startswith("OPENED")
    assert sorted("BATCH" in output for output in outputs) == [False, True]
    assert sum("waiting for it" in output for output in outputs) == 1
