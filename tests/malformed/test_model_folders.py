"""Model folders that cannot be used: one line that names the file and the field, and exit status 2, from every
command.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from retriever.encoder.settings import EncoderSettings
from tests.beir import write_beir
from tests.commands import assert_refused
from tests.tiny import random_texts, save_tiny_model

COMMANDS = ("train", "encode", "beir")
Damage = Callable[[Path], object]
WEIGHTS, OWN, MODULES, POOLING = "model.safetensors", "bigbatch.json", "modules.json", "1_Pooling/config.json"
DESCRIBED, TRANSFORMER, INDEX = (
    "config_sentence_transformers.json",
    "sentence_bert_config.json",
    "model.safetensors.index.json",
)


def _text(file: str, text: str | bytes) -> Damage:
    return lambda folder: (folder / file).write_bytes(text if isinstance(text, bytes) else text.encode())


def _set(file: str, **values: Any) -> Damage:
    """Entries of an object in JSON replaced."""

    def damage(folder: Path) -> None:
        found = json.loads((folder / file).read_text()) if (folder / file).exists() else {}
        (folder / file).write_text(json.dumps(found | values))

    return damage


def _own(**values: Any) -> Damage:
    """A folder that a training run of ours wrote, entries of bigbatch.json replaced; those of None are left out."""
    said = {"format_version": 1, **vars(EncoderSettings("mean", True, "", "", 24, 40))} | values
    return _text(OWN, json.dumps({key: value for key, value in said.items() if value is not ...}))


def _modules(*modules: Any) -> Damage:
    return _text(MODULES, json.dumps(modules))


def _module(kind: str, path: Any = "") -> dict[str, Any]:
    return {"type": f"sentence_transformers.models.{kind}", "path": path}


def _without(file: str) -> Damage:
    return lambda folder: (folder / file).unlink()


def _cut(file: str, share: float) -> Damage:
    return lambda folder: (folder / file).write_bytes((data := (folder / file).read_bytes())[: int(share * len(data))])


def _weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Damage:
    def damage(folder: Path) -> None:
        weights = load_file(folder / WEIGHTS)
        change(weights)
        save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})

    return damage


def _of_another_model(folder: Path) -> None:
    save_file({"unrelated": torch.ones(2)}, folder / WEIGHTS, metadata={"format": "pt"})


def _pickled(folder: Path) -> None:
    torch.save(load_file(folder / WEIGHTS), folder / "pytorch_model.bin")
    (folder / WEIGHTS).unlink()


def _sharded(index: Any) -> Damage:
    def damage(folder: Path) -> None:
        (folder / WEIGHTS).rename(folder / "model-00001-of-00001.safetensors")
        (folder / INDEX).write_text(json.dumps(index))

    return damage


def _tokenizer(**changes: Any) -> Damage:
    def damage(folder: Path) -> None:
        tokenizer = json.loads((folder / "tokenizer.json").read_text())
        (folder / "tokenizer.json").write_text(json.dumps(tokenizer | changes))

    return damage


def _without_unknown(folder: Path) -> None:
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"]["[other]"] = tokenizer["model"]["vocab"].pop("[UNK]")
    tokenizer["added_tokens"] = [token for token in tokenizer["added_tokens"] if token["content"] != "[UNK]"]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))


def _added_token(folder: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["zebra", "yak"])
    tokenizer.save_pretrained(folder)


ROWS: dict[str, tuple[Damage, str]] = {
    # bigbatch.json
    "own: a list": (_text(OWN, "[1]"), r"/bigbatch\.json: expected an object"),
    "own: null": (_text(OWN, "null"), r"/bigbatch\.json: expected an object or a list, received null"),
    "own: text": (_text(OWN, '"x"'), r"/bigbatch\.json: expected an object"),
    "own: empty": (_text(OWN, ""), r"/bigbatch\.json: expected JSON"),
    "own: cut": (_text(OWN, '{"format_version": 1,'), r"/bigbatch\.json: expected JSON"),
    "own: not UTF-8": (_text(OWN, b"\xff\xfe{}"), r"/bigbatch\.json: expected JSON"),
    "own: deep": (_text(OWN, '{"a":' * 100_000), r"/bigbatch\.json: expected JSON"),
    "own: long number": (_text(OWN, f'{{"format_version": {"9" * 5000}}}'), r"/bigbatch\.json: expected JSON"),
    "own: no version": (_own(format_version=...), r"/bigbatch\.json: 'format_version' is missing"),
    "own: version as text": (
        _own(format_version="1"),
        r"/bigbatch\.json: format_version: expected a whole number, received '1'",
    ),
    "own: another version": (_own(format_version=2), r"/bigbatch\.json: format_version is 2; .* reads 1"),
    "own: unknown pooling": (
        _own(pooling="max"),
        r"/bigbatch\.json: pooling: expected cls \| mean \| last, received 'max'",
    ),
    "own: pooling of a number": (_own(pooling=1), r"/bigbatch\.json: pooling: expected"),
    "own: no pooling": (_own(pooling=...), r"/bigbatch\.json: 'pooling' is missing"),
    "own: normalize as text": (
        _own(normalize="yes"),
        r"/bigbatch\.json: normalize: expected true or false, received 'yes'",
    ),
    "own: normalize a number": (_own(normalize=1), r"/bigbatch\.json: normalize: expected true or false"),
    "own: prompt null": (_own(passage_prompt=None), r"/bigbatch\.json: passage_prompt: expected text, received None"),
    "own: prompt a list": (_own(query_prompt=["q"]), r"/bigbatch\.json: query_prompt: expected text"),
    "own: title": (_own(title="x"), r"/bigbatch\.json: title: expected join \| drop, received 'x'"),
    "own: no title": (_own(title=...), r"/bigbatch\.json: 'title' is missing"),
    "own: separator": (_own(title_separator=None), r"/bigbatch\.json: title_separator: expected text"),
    "own: tied as text": (_own(tied="no"), r"/bigbatch\.json: tied: expected true or false, received 'no'"),
    "own: two towers that are not there": (_own(tied=False), r"has no passage/config\.json"),
    "own: length as text": (_own(query_max_tokens="24"), r"/bigbatch\.json: query_max_tokens: expected a whole number"),
    "own: length 0": (
        _own(query_max_tokens=0),
        r"/bigbatch\.json: query_max_tokens: expected from 4 to 256, .*; received 0",
    ),
    "own: length beyond": (_own(passage_max_tokens=99999), r"/bigbatch\.json: passage_max_tokens: .*; received 99999"),
    "own: a broken length": (
        _own(query_max_tokens=24.5),
        r"/bigbatch\.json: query_max_tokens: expected a whole number",
    ),
    "own: truncate_dim 0": (_own(truncate_dim=0), r"/bigbatch\.json: truncate_dim: expected at least 1; received 0"),
    # modules.json
    "modules: cut": (_cut(MODULES, 0.5), r"/modules\.json: expected JSON"),
    "modules: an object": (_text(MODULES, "{}"), r"/modules\.json: expected a list of modules"),
    "modules: numbers": (_modules(1, 2), r"/modules\.json: module 0: expected an object"),
    "modules: none": (_modules(), r"/modules\.json: expected the modules Transformer, Pooling, .*received none"),
    "modules: no type": (_modules({"path": ""}), r"/modules\.json: module 0: 'type' is missing"),
    "modules: type a number": (_modules({"type": 3}), r"/modules\.json: module 0: type: expected text, received 3"),
    "modules: path null": (_modules(_module("Transformer", None)), r"/modules\.json: module 0: path: expected text"),
    "modules: path up": (
        _modules(_module("Transformer", "../x")),
        r"/modules\.json: module 0: path: expected a folder inside",
    ),
    "modules: path from the root": (
        _modules(_module("Transformer", "/x")),
        r"/modules\.json: module 0: path: expected a folder inside",
    ),
    "modules: a class of one's own": (
        _modules({"type": "custom.Transformer"}, _module("Pooling")),
        r"received custom\.Transformer",
    ),
    "modules: another module": (
        _modules(_module("Transformer"), _module("Pooling"), _module("LayerNorm")),
        r"received .*LayerNorm",
    ),
    "modules: two poolings": (
        _modules(_module("Transformer"), _module("Pooling"), _module("Pooling")),
        r"/modules\.json: expected the",
    ),
    "modules: no transformer there": (
        _modules(_module("Transformer", "0_T"), _module("Pooling", "1_Pooling")),
        r"has no 0_T/config\.json",
    ),
    # other files of sentence-transformers
    "pooling: missing": (_without(POOLING), r"/1_Pooling/config\.json: is missing"),
    "pooling: a list": (_text(POOLING, "[]"), r"/1_Pooling/config\.json: expected an object"),
    "pooling: no mode": (_text(POOLING, "{}"), r"/1_Pooling/config\.json: pooling_mode: .*received none"),
    "pooling: mode a list": (
        _set(POOLING, pooling_mode=["mean", "cls"]),
        r"/1_Pooling/config\.json: pooling_mode: expected",
    ),
    "pooling: unknown mode": (
        _set(POOLING, pooling_mode="max"),
        r"/1_Pooling/config\.json: pooling_mode: .*received max",
    ),
    "pooling: prompt": (
        _set(POOLING, include_prompt="no"),
        r"/1_Pooling/config\.json: include_prompt: expected true or false",
    ),
    "described: a list": (_text(DESCRIBED, "[]"), r"/config_sentence_transformers\.json: expected an object"),
    "described: cut": (_text(DESCRIBED, "{"), r"/config_sentence_transformers\.json: expected JSON"),
    "described: prompts a list": (_set(DESCRIBED, prompts=["q"]), r"_transformers\.json: prompts: expected a mapping"),
    "described: prompt a number": (
        _set(DESCRIBED, prompts={"query": 1}),
        r"_transformers\.json: prompts: query: expected text, received 1",
    ),
    "described: euclidean": (
        _set(DESCRIBED, similarity_fn_name="euclidean"),
        r"similarity_fn_name: expected .*, received 'euclidean'",
    ),
    "described: manhattan": (
        _set(DESCRIBED, similarity_fn_name="manhattan"),
        r"similarity_fn_name: expected .*, received 'manhattan'",
    ),
    "described: similarity a number": (_set(DESCRIBED, similarity_fn_name=1), r"similarity_fn_name: expected"),
    "described: truncate_dim 0": (
        _set(DESCRIBED, truncate_dim=0),
        r"_transformers\.json: truncate_dim: expected at least 1",
    ),
    "described: truncate_dim as text": (
        _set(DESCRIBED, truncate_dim="64"),
        r"_transformers\.json: truncate_dim: expected",
    ),
    "transformer: a list": (_text(TRANSFORMER, "[]"), r"/sentence_bert_config\.json: expected an object"),
    "transformer: length as text": (
        _set(TRANSFORMER, max_seq_length="60"),
        r"/sentence_bert_config\.json: max_seq_length: expected",
    ),
    "transformer: length 0": (
        _set(TRANSFORMER, max_seq_length=0),
        r"/sentence_bert_config\.json: max_seq_length: expected at least 4",
    ),
    "transformer: lower-case": (
        _set(TRANSFORMER, do_lower_case=True),
        r"/sentence_bert_config\.json: do_lower_case: True is not supported",
    ),
    "transformer: other processing": (
        _set(TRANSFORMER, processing_kwargs={"text": {"max_length": 9}}),
        r"processing_kwargs: .* not supported",
    ),
    # config.json
    "config: missing": (_without("config.json"), r"has no config\.json"),
    "config: cut": (_cut("config.json", 0.5), r"/config\.json: expected JSON"),
    "config: a list": (_text("config.json", "[]"), r"/config\.json: expected an object, received list"),
    "config: empty object": (_text("config.json", "{}"), r"/config\.json: no configuration"),
    "config: unknown architecture": (
        _set("config.json", model_type="nonesuch"),
        r"/config\.json: no configuration .*nonesuch",
    ),
    "config: architecture not verified": (
        _text("config.json", '{"model_type": "convbert"}'),
        r"is a 'convbert' model, an architecture on which",
    ),
    "config: architecture a number": (_set("config.json", model_type=3), r"/config\.json: no configuration"),
    "config: 63 dimensions": (_set("config.json", hidden_size=63), r"/config\.json: no bert model can be built"),
    "config: 64 dimensions": (
        _set("config.json", hidden_size=64),
        rf"/{WEIGHTS}: .* has shape .*; expected .*64.*, by .*/config\.json",
    ),
    "config: 0 dimensions": (
        _set("config.json", hidden_size=0),
        r"/config\.json: no bert model can be built|has shape",
    ),
    "config: layers as text": (_set("config.json", num_hidden_layers="two"), r"/config\.json: .*num_hidden_layers"),
    "config: a layer too many": (
        _set("config.json", num_hidden_layers=3),
        r"lacks 16 weights of its passage tower, encoder\.layer\.2",
    ),
    "config: a million layers": (
        _set("config.json", num_hidden_layers=10**6),
        r"/config\.json: num_hidden_layers: 1000000 layers, but",
    ),
    "config: a large vocabulary": (
        _set("config.json", vocab_size=206),
        rf"/{WEIGHTS}: .*word_embeddings.* \[198, 32\]; expected \[206, 32\]",
    ),
    "config: a huge vocabulary": (_set("config.json", vocab_size=10**11), rf"/{WEIGHTS}: .*word_embeddings"),
    "config: a small vocabulary": (
        _set("config.json", vocab_size=100),
        r"/tokenizer\.json: token .* has the id 197, but vocab_size .* is 100",
    ),
    "config: vocabulary as text": (_set("config.json", vocab_size="198"), r"/config\.json: .*vocab_size"),
    "config: negative vocabulary": (
        _set("config.json", vocab_size=-1),
        r"vocab_size in config\.json is -1|/config\.json",
    ),
    "config: positions as text": (
        _set("config.json", max_position_embeddings="many"),
        r"/config\.json: .*max_position_embeddings",
    ),
    "config: fewer positions": (
        _set("config.json", max_position_embeddings=128),
        r"position_embeddings.* \[256, 32\]; expected \[128, 32\]",
    ),
    "config: unknown activation": (
        _set("config.json", hidden_act="sine"),
        r"/config\.json: no bert model can be built from it: .*sine",
    ),
    "config: attention of the hub": (
        _set("config.json", attn_implementation="user/code"),
        r"/config\.json: attn_implementation: .*user/code",
    ),
    "config: attention of the hub, inside": (
        _set("config.json", _attn_implementation={"": "user/code"}),
        r"_attn_implementation: .*user/code",
    ),
    "config: other weights": (
        _set("config.json", transformers_weights="evil.bin"),
        r"/config\.json: transformers_weights: expected none",
    ),
    "config: quantised": (
        _set("config.json", quantization_config={"bits": 4}),
        r"/config\.json: quantization_config: expected none",
    ),
    # weights
    "weights: missing": (_without(WEIGHTS), r": there is no model\.safetensors$"),
    "weights: pickled": (
        _pickled,
        r": there is no model\.safetensors; pytorch_model\.bin is pickled, which is not read",
    ),
    "weights: cut": (_cut(WEIGHTS, 0.5), rf"/{WEIGHTS}: no complete safetensors file"),
    "weights: cut in the header": (_cut(WEIGHTS, 0.01), rf"/{WEIGHTS}: no complete safetensors file"),
    "weights: empty": (_text(WEIGHTS, ""), rf"/{WEIGHTS}: no complete safetensors file"),
    "weights: garbage": (_text(WEIGHTS, b"\x93" * 4000), rf"/{WEIGHTS}: no complete safetensors file"),
    "weights: a huge header": (
        _text(WEIGHTS, b"\xff" * 7 + b"\x7f" + b"{}"),
        rf"/{WEIGHTS}: no complete safetensors file",
    ),
    "weights: not finite": (
        _weights(lambda w: w["encoder.layer.1.output.dense.weight"][0].fill_(torch.nan)),
        r"layer\.1.* not finite",
    ),
    "weights: of another model": (_of_another_model, r"lacks \d+ weights of its passage tower"),
    "weights: a layer lost": (
        _weights(lambda w: w.pop("encoder.layer.0.output.dense.bias")),
        r"lacks 1 weights .*, encoder\.layer\.0\.output",
    ),
    "index: a list": (_sharded([1]), rf"/{INDEX}: expected an object"),
    "index: no map": (_sharded({}), rf"/{INDEX}: 'weight_map' is missing"),
    "index: numbers": (_sharded({"weight_map": {"x": 3}}), rf"/{INDEX}: weight_map: expected files .*received '3'"),
    "index: pickled": (
        _sharded({"weight_map": {"x": "evil.bin"}}),
        rf"/{INDEX}: weight_map: expected files .*received 'evil\.bin'",
    ),
    "index: outside": (
        _sharded({"weight_map": {"x": "../other.safetensors"}}),
        r"weight_map: .*received '\.\./other\.safetensors'",
    ),
    "index: a file that is not there": (
        _sharded({"weight_map": {"x": "model-2.safetensors"}}),
        r"/model-2\.safetensors: no complete",
    ),
    "adapters beside the model": (
        _text("adapter_config.json", "{}"),
        r"/adapter_config\.json: adapters beside a model are not read",
    ),
    # the tokenizer
    "tokenizer: cut": (_cut("tokenizer.json", 0.5), r"/tokenizer\.json: expected JSON"),
    "tokenizer: a list": (_text("tokenizer.json", "[]"), r"/tokenizer\.json: no tokenizer that can be loaded"),
    "tokenizer: another format": (
        _tokenizer(model={"type": "Nonesuch"}),
        r"/tokenizer\.json: no tokenizer that can be loaded",
    ),
    "tokenizer: no unknown token": (_without_unknown, r"/tokenizer\.json: no tokenizer that can be loaded: .*UNK"),
    "tokenizer: its settings cut": (_cut("tokenizer_config.json", 0.5), r"/tokenizer_config\.json: expected JSON"),
    "tokenizer: its settings a list": (_text("tokenizer_config.json", "[]"), r"/tokenizer"),
    "tokenizer: truncation": (
        _set("tokenizer_config.json", truncation_side="middle"),
        r"/tokenizer\.json: no tokenizer .*middle",
    ),
    "tokenizer: tokens that the model does not know": (
        _added_token,
        r"/tokenizer\.json: token 'yak' has the id 199, but vocab_size .* 198",
    ),
}


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder as sentence-transformers writes it, and data; every command accepts them."""
    folder = tmp_path_factory.mktemp("sound")
    model = save_tiny_model(folder / "model")
    (model / "1_Pooling").mkdir()
    _modules(_module("Transformer"), _module("Pooling", "1_Pooling"))(model)
    _text(POOLING, '{"pooling_mode": "mean"}')(model)
    texts = random_texts(6)
    corpus, queries = (
        [{"_id": f"p{i}", "text": text} for i, text in enumerate(texts)],
        {f"q{i}": text for i, text in enumerate(texts)},
    )
    judged = {f"q{i}": {f"p{i}": 1} for i in range(6)}
    write_beir(folder / "data", corpus, queries, train=judged, test=judged)
    return folder


def _started(command: str, model: Path, folder: Path) -> list[str]:
    """The command's arguments to use `model` on the data, with outputs in `folder`."""
    data = model.parent / "data"
    if command == "train":
        lengths = (
            "model.query_max_tokens=24",
            "model.passage_max_tokens=40",
            "batch.queries=4",
            "optim.precision=fp32",
        )
        places = (
            f"run.output_dir={folder}/run",
            f"data.cache_dir={folder}/cache",
            "run.trackers=[]",
            "train.max_steps=1",
        )
        return [f"model.name_or_path={model}", f"data.train=[{{path: {data}}}]", *places, *lengths]
    if command == "encode":
        return ["--model", str(model), "--input", str(data), "--side", "query", "--output", f"{folder}/shards"]
    return ["--model", str(model), "--data", str(data), "--output-dir", f"{folder}/evaluation", "--k", "100"]


def _main(command: str) -> Callable[[Sequence[str]], int]:
    from eval import beir
    from retriever import encode, train

    return {"train": train.main, "encode": encode.main, "beir": beir.main}[command]


@pytest.mark.parametrize("command", COMMANDS)
def test_the_sound_folder_is_accepted(sound: Path, tmp_path: Path, command: str) -> None:
    assert _main(command)(_started(command, sound / "model", tmp_path)) == 0


@pytest.mark.parametrize(("row", "command"), [(row, COMMANDS[i % len(COMMANDS)]) for i, row in enumerate(ROWS)])
def test_one_line_names_the_file_and_the_field(sound: Path, tmp_path: Path, row: str, command: str) -> None:
    """From one of the commands, in turns."""
    damage, expected = ROWS[row]
    shutil.copytree(sound, tmp_path / "sound")
    model = tmp_path / "sound" / "model"
    damage(model)
    assert_refused(_main(command), _started(command, model, tmp_path), expected)
    assert not any((tmp_path / output).exists() for output in ("run", "shards", "evaluation"))


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("row", ["own: a list", "weights: cut", "tokenizer: tokens that the model does not know"])
def test_every_command_says_it(sound: Path, tmp_path: Path, row: str, command: str) -> None:
    damage, expected = ROWS[row]
    shutil.copytree(sound, tmp_path / "sound")
    damage(tmp_path / "sound" / "model")
    assert_refused(_main(command), _started(command, tmp_path / "sound" / "model", tmp_path), expected)
