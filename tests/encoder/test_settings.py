"""What a model folder says of itself, in our own file, in those of sentence-transformers, or not at all."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

from retriever.config import Config, ConfigError, DataConfig, ModelConfig
from retriever.encoder import model_files as module
from retriever.encoder.dual_encoder import DualEncoder
from retriever.encoder.pooling import PoolingMode
from retriever.encoder.settings import EncoderSettings, read_settings, settings_of, tower_folder
from tests.tiny import MAX_POSITIONS, save_tiny_model


def _write(path: Path, content: Any) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content))


def _sentence_transformers(
    folder: Path, *kinds: str, pooling: dict[str, Any], described: dict[str, Any] | None = None
) -> Path:
    paths = {"Transformer": ""} | {kind: f"{i}_{kind}" for i, kind in enumerate(kinds) if i}
    _write(
        folder / "modules.json",
        [{"idx": i, "path": paths[k], "type": f"sentence_transformers.models.{k}"} for i, k in enumerate(kinds)],
    )
    _write(folder / "sentence_bert_config.json", {"max_seq_length": 60, "do_lower_case": False})
    _write(folder / "1_Pooling" / "config.json", {"word_embedding_dimension": 32, **pooling})
    _write(folder / "config_sentence_transformers.json", described or {})
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_tiny_model(tmp_path / "model")


def test_a_plain_folder_gets_the_defaults_of_its_architecture(folder: Path, tmp_path: Path) -> None:
    assert read_settings(folder) == EncoderSettings("mean", True, "", "", MAX_POSITIONS, MAX_POSITIONS)
    assert read_settings(save_tiny_model(tmp_path / "llama", "llama")).pooling == "last"


@pytest.mark.parametrize(
    ("pooling", "expected"),
    [
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, "cls"),
        ({"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True}, "mean"),
        ({"pooling_mode_lasttoken": True}, "last"),
        ({"pooling_mode": "lasttoken", "include_prompt": True}, "last"),
    ],
)
def test_sentence_transformers_files_are_read(folder: Path, pooling: dict[str, Any], expected: PoolingMode) -> None:
    described = {"prompts": {"query": "query: ", "passage": "find: "}, "similarity_fn_name": None}
    _sentence_transformers(folder, "Transformer", "Pooling", "Normalize", pooling=pooling, described=described)
    assert read_settings(folder) == EncoderSettings(expected, True, "query: ", "find: ", 60, 60)


def test_scores_are_cosines_where_a_module_says_so_or_nothing_says_otherwise(folder: Path) -> None:
    mean = {"pooling_mode_mean_tokens": True}
    for described, expected in (
        ({}, True),
        ({"similarity_fn_name": "dot"}, False),
        ({"similarity_fn_name": "cosine"}, True),
    ):
        _sentence_transformers(folder, "Transformer", "Pooling", pooling=mean, described=described)
        assert read_settings(folder).normalize is expected
    (folder / "config_sentence_transformers.json").unlink()
    assert read_settings(folder).normalize


@pytest.mark.parametrize(
    ("prompts", "expected"),
    [
        ({"query": "q: ", "document": "", "passage": "passage: "}, ("q: ", "")),  # no prompt is what it says
        ({"query": "q: ", "document": "d: ", "passage": "passage: "}, ("q: ", "d: ")),
        ({"query": None, "document": None, "passage": "passage: "}, ("", "passage: ")),
        ({"corpus": "c: ", "s2p_query": 7}, ("", "c: ")),  # prompts of other names are no side's
    ],
)
def test_prompts_are_those_of_the_first_name_that_is_there(
    folder: Path, prompts: dict[str, Any], expected: tuple[str, str]
) -> None:
    _sentence_transformers(
        folder, "Transformer", "Pooling", pooling={"pooling_mode": "mean"}, described={"prompts": prompts}
    )
    settings = read_settings(folder)
    assert (settings.query_prompt, settings.passage_prompt) == expected


def test_each_side_has_the_length_that_the_folder_gives_it(folder: Path) -> None:
    _sentence_transformers(folder, "Transformer", "Pooling", pooling={"pooling_mode": "mean"})
    _write(folder / "sentence_bert_config.json", {"query_length": 20, "document_length": 9999})
    settings = read_settings(folder)
    assert (settings.query_max_tokens, settings.passage_max_tokens) == (20, MAX_POSITIONS)


@pytest.mark.parametrize(
    ("kinds", "pooling", "message"),
    [
        (
            ("Transformer", "Pooling", "LayerNorm"),
            {"pooling_mode": "mean"},
            r"modules\.json: expected .*; received .*LayerNorm",
        ),
        (
            ("Transformer", "Normalize", "Pooling"),
            {"pooling_mode": "mean"},
            r"modules\.json: expected the modules Transformer, Pooling",
        ),
        (
            ("Transformer", "Pooling"),
            {"pooling_mode_max_tokens": True},
            r"1_Pooling/config\.json: .*received pooling_mode_max_tokens",
        ),
        (
            ("Transformer", "Pooling"),
            {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True},
            "received .*cls.*mean",
        ),
        (
            ("Transformer", "Pooling"),
            {"pooling_mode": "weightedmean"},
            "expected one of cls, mean, lasttoken; received weightedmean",
        ),
        (("Transformer", "Pooling"), {"pooling_mode": "mean", "include_prompt": False}, "include_prompt: false"),
        (("Transformer",), {}, "expected the modules Transformer, Pooling"),
    ],
)
def test_what_is_not_computed_is_refused(
    folder: Path, kinds: tuple[str, ...], pooling: dict[str, Any], message: str
) -> None:
    _sentence_transformers(folder, *kinds, pooling=pooling)
    with pytest.raises(ConfigError, match=message):
        read_settings(folder)


def test_training_may_start_from_a_folder_whose_pooling_it_replaces(folder: Path) -> None:
    """Its other modules are not trained; what else it says counts."""
    kinds, described = ("Transformer", "Pooling", "LayerNorm"), {"truncate_dim": 12}
    _sentence_transformers(folder, *kinds, pooling={"pooling_mode": "max"}, described=described)
    encoder = DualEncoder.from_pretrained(ModelConfig(str(folder), pooling="mean"))
    assert (encoder.pooling, encoder.dimension) == ("mean", 12)
    with pytest.raises(ConfigError, match=r"modules\.json: expected the modules"):
        DualEncoder.from_pretrained(ModelConfig(str(folder)))


def test_the_transformer_may_lie_in_a_sub_folder(tmp_path: Path) -> None:
    folder = tmp_path / "old"
    save_tiny_model(folder / "0_Transformer")
    _write(
        folder / "modules.json",
        [
            {"path": p, "type": f"sentence_transformers.models.{k}"}
            for p, k in (("0_Transformer", "Transformer"), ("1_Pooling", "Pooling"))
        ],
    )
    _write(folder / "1_Pooling" / "config.json", {"pooling_mode": "cls"})
    _write(folder / "0_Transformer" / "sentence_bert_config.json", {"max_seq_length": 40})
    assert tower_folder(folder, "query") == tower_folder(folder, "passage") == "0_Transformer"
    assert read_settings(folder) == EncoderSettings("cls", True, "", "", 40, 40)


def test_our_own_file_decides_over_all_others(folder: Path) -> None:
    config = Config(
        model=ModelConfig(
            query_prompt="q ", passage_prompt="p ", query_max_tokens=17, passage_max_tokens=99, normalize=False
        ),
        data=DataConfig(title="drop", title_separator=" | "),
    )
    settings = settings_of(config, "cls")
    _sentence_transformers(folder, "Transformer", "Pooling", pooling={"pooling_mode": "mean"})
    _write(folder / "bigbatch.json", {"format_version": 1, "config_sha256": "0", **vars(settings)})
    assert read_settings(folder) == settings == EncoderSettings("cls", False, "q ", "p ", 17, 99, "drop", " | ", True)
    assert (settings.similarity, settings.prompt("query"), settings.max_tokens("passage")) == ("dot", "q ", 99)


@pytest.mark.parametrize(
    ("folders", "message"),
    [
        ("", r"model \S+/named: there is no such folder \(model\.name_or_path"),
        ("named", "is no folder or Hugging Face name of a loadable model"),
        ("named/export", "did you mean .*named/export"),
        ("named/best", "did you mean .*named/best"),
    ],
)
def test_a_folder_without_a_model_is_named(tmp_path: Path, folders: str, message: str) -> None:
    (tmp_path / folders).mkdir(parents=True, exist_ok=True)
    with pytest.raises(ConfigError, match=message):
        read_settings(tmp_path / "named")


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The files asked of a hub that cannot be reached."""
    files: list[str] = []

    def unreached(_: str, file: str) -> str:
        files.append(file)
        raise LocalEntryNotFoundError("no network")

    monkeypatch.setattr(module, "hf_hub_download", unreached)
    module._hub_file.cache_clear()
    yield files
    module._hub_file.cache_clear()


def test_a_hub_that_is_not_reached_is_asked_once(asked: list[str]) -> None:
    with pytest.raises(
        ConfigError, match="'some/model' is no folder, .*the hub was not reached, and the model is not in the cache"
    ):
        tower_folder("some/model", "passage")
    assert asked == ["bigbatch.json"], "every question takes half a minute of retries"


def test_a_cached_model_whose_files_cannot_be_asked_for_is_told(
    asked: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its pooling may stand in a file that was never fetched."""
    monkeypatch.setattr(module, "try_to_load_from_cache", lambda name, file: str(folder / file))
    assert tower_folder("some/model", "passage") == ""
    assert asked == ["bigbatch.json", "modules.json"]
    assert "note: some/model: the hub was not reached; the cache has no modules.json" in capsys.readouterr().out
