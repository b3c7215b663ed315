"""Averaged models: the weights' mean, loaded by sentence-transformers and by us with the same embeddings."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer

from retriever.config import Config, DataConfig, ModelConfig
from retriever.encoder.bundle import load_encoder
from retriever.encoder.dual_encoder import DualEncoder
from retriever.encoder.tokenizer import training_tokenizer
from retriever.export import Probe, export
from retriever.model_card import evaluation_section
from scripts import merge
from tests.commands import assert_refused
from tests.tiny import save_tiny_model
from tests.workplace import make_workplace


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two exports of one form, the second one a checkpoint's."""
    root, folders = tmp_path_factory.mktemp("models"), []
    for seed, place in enumerate(("a", "step-00000003/export")):
        model = ModelConfig(str(save_tiny_model(root / f"start{seed}", seed=seed)), query_max_tokens=16)
        config, tokenizer = Config(model=model, data=DataConfig()), training_tokenizer(model)
        encoder = DualEncoder.from_pretrained(model).eval()
        folders.append(export(encoder, tokenizer, config, root / place, Probe.of(encoder, tokenizer, config, ["a b"])))
        with (folders[-1] / "README.md").open("a") as card:
            card.write(evaluation_section(config, 7, {"nDCG@10": 0.5}))
    return folders


def test_the_mean_of_weights_is_written_and_evaluated(
    models: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    work, output = make_workplace(tmp_path), tmp_path / "merged"
    command = [str(models[0]), str(models[1].parent), "--output", str(output), "--weights", "1", "3"]
    assert merge.main([*command, "--data", str(work / "data"), "--metrics", "MRR@10"]) == 0
    said = capsys.readouterr().out
    assert "the mean of 2 models" in said and said.count("\n") == 5 and str(output) in said.splitlines()[-1]
    first, second, found = (load_file(folder / "model.safetensors") for folder in (*models, output))
    assert found.keys() == first.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, 0.25 * first[name] + 0.75 * second[name])
    cards = [(folder / "README.md").read_text() for folder in (models[0], output)]
    kept = cards[0].partition("## Training")[0]
    assert "After step 7" in cards[0] and "```python" in kept
    mean = "The weights are the mean over 2 models of one form, with the shares 0.25, 0.75."
    assert cards[1] == f"{kept}## Training\n\n{mean}\n"
    texts = ["river and mountain", "a question"]
    theirs = SentenceTransformer(str(output), device="cpu").encode(texts, prompt_name="document")
    np.testing.assert_allclose(load_encoder(output, device="cpu").encode(texts, "passage"), theirs, atol=1e-5)


def test_a_starting_model_is_taken_in_the_form_of_an_export(models: list[Path], tmp_path: Path) -> None:
    """The mean lies between the weights that training began with and those that it ended with."""
    start, output = models[0].parent / "start0", tmp_path / "merged"
    moved = shutil.copytree(models[1], tmp_path / "trained")
    command = [str(start), str(moved), "--output", str(output), "--weights", "1", "3"]
    assert merge.main(command) == 0
    first, second, found = (load_file(folder / "model.safetensors") for folder in (start, moved, output))
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, 0.25 * first[name] + 0.75 * second[name])
    assert sorted(path.name for path in output.iterdir()) == sorted(path.name for path in models[0].iterdir())
    assert_refused(merge.main, [str(start), str(start), "--output", str(tmp_path / "no")], "it has no bigbatch.json")


def test_what_cannot_be_averaged_is_refused(models: list[Path], tmp_path: Path) -> None:
    wider = shutil.copytree(models[0], tmp_path / "wider")
    weights = load_file(wider / "model.safetensors")
    save_file({**weights, "embeddings.word_embeddings.weight": torch.zeros(3, 32)}, wider / "model.safetensors")
    other = shutil.copytree(models[0], tmp_path / "other")
    (other / "tokenizer.json").write_text((other / "tokenizer.json").read_text().replace('"river"', '"rivers"'))
    for second, message in (
        (tmp_path, "expected an exported model, a checkpoint or, beside one"),
        (other, "other/tokenizer.json differs from that of"),
        (wider, "weight 'embeddings.word_embeddings.weight': expected one shape"),
    ):
        output = tmp_path / "merged"
        assert_refused(merge.main, [str(models[0]), str(second), "--output", str(output)], message)
        assert not output.exists()
    assert_refused(merge.main, [str(models[0]), "--output", str(tmp_path / "x")], "two or more models")
    assert_refused(merge.main, [*map(str, models), "--output", str(wider)], "exists; expected the name of a new folder")
