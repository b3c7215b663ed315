"""Texts to shards: by one process or several, interrupted or not, from files by the command, the embeddings are the
same.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from retriever import encode_shards as encode_module
from retriever.encode import main
from retriever.encode_shards import ShardOptions, encode_to_shards
from retriever.encoder.bundle import EncoderBundle, load_encoder
from retriever.encoder.dual_encoder import DualEncoder
from retriever.encoder.text_batches import inference, mode_of
from retriever.shards import ShardError, ShardWriter, open_shards
from tests.beir import write_beir
from tests.commands import RankAlone, assert_refused
from tests.starts import start
from tests.tiny import random_texts, save_tiny_model

TEXTS = [(f"p{i}", text) for i, text in enumerate(random_texts(23))]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def bundle(model: Path) -> EncoderBundle:
    return load_encoder(model, passage_prompt="find the ")


def _read(folder: Path) -> tuple[np.ndarray, list[str]]:
    parts = list(open_shards(folder))
    return np.concatenate([embeddings for embeddings, _ in parts]), [i for _, ids in parts for i in ids]


def _encode(bundle: EncoderBundle, folder: Path, **changed: Any) -> Path:
    named, world = changed.pop("texts_fingerprint", "abc"), changed.pop("world", None)
    options = ShardOptions(**{"shard_rows": 5, "progress": False} | changed)
    return encode_to_shards(bundle, iter(TEXTS), "passage", folder, named, options, world)


class _Counting(EncoderBundle):
    """Counts the texts it encodes, and may be stopped at a text."""

    texts = batches = 0
    stop_at = 10**9

    def encode_batches(self, batches: Any, *arguments: Any, **named: Any) -> Any:
        return super().encode_batches(self._counted(batches), *arguments, **named)

    def _counted(self, batches: Any) -> Iterator[Any]:
        for key, texts in batches:
            self.texts += len(texts)
            self.batches += 1
            if self.texts > self.stop_at:
                raise KeyboardInterrupt
            yield key, texts


def _counting(bundle: EncoderBundle, **changed: Any) -> _Counting:
    return _Counting(bundle.encoder, bundle.tokenizer, replace(bundle.settings, **changed))


@pytest.mark.parametrize("shard_rows", [5, 23, 100])
def test_shards_hold_the_embeddings_in_the_order_of_the_texts(
    bundle: EncoderBundle, tmp_path: Path, shard_rows: int
) -> None:
    folder = _encode(bundle, tmp_path / "shards", shard_rows=shard_rows)
    embeddings, ids = _read(folder)
    assert ids == [i for i, _ in TEXTS]
    np.testing.assert_allclose(embeddings, bundle.encode([text for _, text in TEXTS], "passage"), rtol=0, atol=1e-6)
    manifest = open_shards(folder).manifest
    wanted = {
        "rows": 23,
        "dimension": 32,
        "dtype": "float32",
        "side": "passage",
        "prompt": "find the ",
        "texts": "abc",
        "pooling": "mean",
    }
    assert manifest | wanted == manifest
    assert (manifest["model"], manifest["max_tokens"], len(manifest["shards"])) == (
        bundle.model_hash(),
        256,
        -(-23 // shard_rows),
    )


@pytest.mark.parametrize("batch", [1, 2, 5, 7])
def test_a_shard_may_be_encoded_in_several_batches(
    bundle: EncoderBundle, tmp_path: Path, batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each row comes back to its own place, and no shard is written before its last batch."""
    whole, ids = _read(_encode(bundle, tmp_path / "whole"))
    monkeypatch.setattr(encode_module, "BATCH_TEXTS", batch)
    counting = _counting(bundle)
    embeddings, found = _read(_encode(counting, tmp_path / "batches"))
    assert found == ids and counting.batches == sum(-(-rows // batch) for rows in (5, 5, 5, 5, 3))
    np.testing.assert_allclose(embeddings, whole, rtol=0, atol=1e-6)


def test_half_precision_shards_round_the_same_embeddings(bundle: EncoderBundle, tmp_path: Path) -> None:
    exact, _ = _read(_encode(bundle, tmp_path / "exact"))
    rounded, _ = _read(_encode(bundle, tmp_path / "rounded", dtype="float16"))
    assert rounded.dtype == np.float16
    np.testing.assert_array_equal(rounded, exact.astype(np.float16))


def test_ranks_write_disjoint_shards_that_one_rank_would_write(bundle: EncoderBundle, tmp_path: Path) -> None:
    """Three ranks, one after the other: a barrier that lets the next rank run is enough, for none needs another's
    result before the end.
    """
    alone = _encode(bundle, tmp_path / "alone")
    ranks = [_counting(bundle) for _ in range(3)]
    folder = tmp_path / "together"

    def run_from(rank: int) -> None:
        waits: Iterator[int] = iter(range(4))

        def barrier() -> None:
            if (
                rank == 0 and next(waits) == 2
            ):  # rank 0 has encoded its shards; now the others do, and come to their own end
                for other in (1, 2):
                    _encode(ranks[other], folder, world=RankAlone(other, 3))

        _encode(ranks[0], folder, world=RankAlone(0, 3, barrier))

    run_from(0)
    assert [rank.texts for rank in ranks] == [10, 8, 5]
    for file in sorted(alone.iterdir()):
        assert (folder / file.name).read_bytes() == file.read_bytes(), file.name


def test_no_rank_changes_the_folder_before_every_rank_has_looked(
    bundle: EncoderBundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a rank that is late finds the folder emptied for it, and refuses what the others begin, or begins what they
    refuse.
    """
    events: list[tuple[int, str]] = []
    now = [0]

    def recorded(name: str) -> Any:
        method = getattr(ShardWriter, name)

        def call(*given: Any, **named: Any) -> Any:
            events.append((now[0], name))
            return method(*given, **named)

        return call

    for name in ("finished", "check", "prepare", "write", "finish"):
        monkeypatch.setattr(ShardWriter, name, recorded(name))

    def wait(rank: int) -> None:
        events.append((rank, "wait"))
        if rank == 0 and events.count((0, "wait")) == 3:  # the other rank's turn
            now[0] = 1
            _encode(bundle, tmp_path, shard_rows=10, world=RankAlone(1, 2, lambda: wait(1)))
            now[0] = 0

    _encode(bundle, tmp_path, shard_rows=10, world=RankAlone(0, 2, lambda: wait(0)))
    orders = [[name for r, name in events if r == rank] for rank in (0, 1)]
    looked = ["finished", "check", "wait"]
    assert orders[0] == [*looked, "check", "prepare", "wait", "write", "write", "wait", "finish", "wait"]
    assert orders[1] == [*looked, "wait", "write", "wait", "wait"]


def test_what_is_there_is_not_encoded_again(bundle: EncoderBundle, tmp_path: Path) -> None:
    interrupted = _counting(bundle)
    interrupted.stop_at = 12
    with pytest.raises(KeyboardInterrupt):
        _encode(interrupted, tmp_path)
    with pytest.raises(ShardError, match="interrupted"):
        open_shards(tmp_path)
    resumed, again = _counting(bundle), _counting(bundle)
    _encode(resumed, tmp_path)
    assert resumed.texts == 13  # two of five shards were there
    _encode(again, tmp_path)
    assert again.texts == 0
    np.testing.assert_array_equal(_read(tmp_path)[0], _read(_encode(bundle, tmp_path / "fresh"))[0])


def test_shards_of_one_mode_are_not_taken_for_another_s(model: Path, tmp_path: Path) -> None:
    """Padded, packed and fused embeddings are told apart, so that comparing two of them compares two."""
    for attention, fused, mode in (("padded", False, "padded"), ("packed", False, "packed"), ("packed", True, "fused")):
        bundle = load_encoder(model, attention=attention, device="cpu")  # type: ignore[arg-type]
        if fused:
            bundle.encoder.fuse_layers()
        counting = _counting(bundle)
        assert open_shards(_encode(counting, tmp_path, overwrite=True)).manifest["mode"] == mode
        assert counting.texts == len(TEXTS)
        with inference(bundle.encoder):
            assert mode_of(bundle.encoder) == mode


@pytest.mark.parametrize(
    ("of_bundle", "of_call"),
    [
        ({"passage_prompt": "other "}, {}),
        ({"passage_max_tokens": 9}, {}),
        ({}, {"texts_fingerprint": "new"}),
        ({}, {"dtype": "float16"}),
    ],
)
def test_another_job_is_refused_or_encodes_everything_again(
    bundle: EncoderBundle, tmp_path: Path, of_bundle: dict[str, Any], of_call: dict[str, Any]
) -> None:
    _encode(bundle, tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    changed = _counting(bundle, **of_bundle)
    with pytest.raises(ShardError, match=r"another job.*--output.*--overwrite"):
        _encode(changed, tmp_path, **of_call)
    assert changed.texts == 0 and {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before
    _encode(changed, tmp_path, **of_call, overwrite=True)
    assert changed.texts == 23
    # Another query prompt is no other job on the passage side.
    same = _counting(changed, query_prompt="unseen ")
    _encode(same, tmp_path, **of_call)
    assert same.texts == 0


@pytest.fixture
def beir(tmp_path: Path) -> Path:
    passages = ({"_id": i, "title": "river" if n % 2 else "", "text": text} for n, (i, text) in enumerate(TEXTS))
    return write_beir(tmp_path / "beir", passages, {f"q{i}": text for i, text in TEXTS[:4]})


def test_the_command_reads_prompts_lengths_and_titles(
    model: Path, beir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ["--model", str(model), "--input", str(beir), "--pooling", "cls", "--max-tokens", "16", "--prompt", "a "]
    main(
        [
            *common,
            "--side",
            "passage",
            "--output",
            str(tmp_path / "p"),
            "--title-separator",
            " of ",
            "--shard-rows",
            "10",
        ]
    )
    said = f"{model}: padded texts, fp32, on cpu\n{tmp_path}/p: 23 embeddings of dimension 32, float32\n"
    assert capsys.readouterr().out == said
    main([*common, "--side", "query", "--output", str(tmp_path / "q")])
    (beir / "one").mkdir()
    (beir / "one" / "queries.jsonl").write_text('{"_id": "q", "text": "river"}')
    main([*common, "--side", "query", "--input", str(beir / "one"), "--output", str(tmp_path / "one")])
    assert capsys.readouterr().out.endswith(f"{tmp_path}/one: 1 embedding of dimension 32, float32\n")
    loaded = load_encoder(
        model,
        pooling="cls",
        passage_prompt="a ",
        query_prompt="a ",
        passage_max_tokens=16,
        query_max_tokens=16,
        device="cpu",
    )
    passages = [f"river of {text}" if n % 2 else text for n, (_, text) in enumerate(TEXTS)]
    embeddings, ids = _read(tmp_path / "p")
    assert ids == [i for i, _ in TEXTS]
    np.testing.assert_allclose(embeddings, loaded.encode(passages, "passage"), rtol=0, atol=1e-6)
    embeddings, ids = _read(tmp_path / "q")
    assert ids == [f"q{i}" for i, _ in TEXTS[:4]]
    np.testing.assert_allclose(embeddings, loaded.encode([text for _, text in TEXTS[:4]], "query"), rtol=0, atol=1e-6)


def test_the_command_reuses_shards_until_the_texts_change(
    model: Path, beir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fingerprints: list[str] = []
    whole = encode_module.encode_to_shards

    def recorded(*arguments: Any, **named: Any) -> Path:
        fingerprints.append(arguments[4])
        return whole(*arguments, **named)

    monkeypatch.setattr(encode_module, "encode_to_shards", recorded)
    arguments = ["--model", str(model), "--input", str(beir), "--side", "passage", "--output", str(tmp_path / "p")]
    main(arguments)
    main(arguments)
    assert_refused(main, [*arguments, "--title", "drop"], r"texts: .* there, .* asked for.*--overwrite")
    assert _read(tmp_path / "p")[1][-1] == "p22"
    arguments.append("--overwrite")
    main([*arguments, "--title", "drop"])
    (beir / "corpus.jsonl").write_text((beir / "corpus.jsonl").read_text().replace("p22", "p99"))
    main([*arguments, "--title", "drop"])
    assert fingerprints[0] == fingerprints[1] and fingerprints[2] == fingerprints[3] and len(set(fingerprints)) == 3
    assert _read(tmp_path / "p")[1][-1] == "p99"


def test_the_command_packs_and_compiles_when_told_to(
    model: Path, beir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Packed texts have the same embeddings; on a CPU neither is chosen without being asked for."""
    compiled: list[DualEncoder] = []
    monkeypatch.setattr(DualEncoder, "compile_layers", lambda encoder: compiled.append(encoder))
    arguments = ["--model", str(model), "--input", str(beir), "--side", "passage", "--shard-rows", "10", "--output"]
    main([*arguments, str(tmp_path / "padded")])
    assert not compiled
    main([*arguments, str(tmp_path / "packed"), "--attention", "packed", "--compile", "true"])
    assert len(compiled) == 1 and compiled[0].packed
    assert f"{model}: packed texts, fp32, on cpu\n" in capsys.readouterr().out
    np.testing.assert_allclose(_read(tmp_path / "packed")[0], _read(tmp_path / "padded")[0], rtol=0, atol=1e-6)


def test_two_ranks_share_the_shards(model: Path, beir: Path, tmp_path: Path) -> None:
    arguments = f"--model {model} --input {beir} --side passage --output p --shard-rows 5".split()
    ran = start(tmp_path, arguments, command="retriever.encode", ranks=2).wait()
    assert ran.finished, ran.said
    assert ran.said.count("23 embeddings of dimension 32") == 1, "only the first process reports"
    assert _read(tmp_path / "p")[1] == [i for i, _ in TEXTS]


@pytest.mark.parametrize(("side", "name"), [("passage", "corpus.jsonl"), ("query", "queries.jsonl")])
def test_an_input_without_a_text_is_refused(model: Path, tmp_path: Path, side: str, name: str) -> None:
    """And what is there stays, --overwrite or not."""
    texts, arguments = (
        tmp_path / name,
        ["--model", str(model), "--input", str(tmp_path / name), "--side", side, "--overwrite", "--output"],
    )
    texts.write_text(json.dumps({"_id": "1", "text": "a river"}) + "\n", encoding="utf-8")
    main([*arguments, str(tmp_path / "out")])
    texts.write_text("", encoding="utf-8")
    assert_refused(main, [*arguments, str(tmp_path / "out")], rf"{name}: no {side} in it")
    assert _read(tmp_path / "out")[1] == ["1"]
