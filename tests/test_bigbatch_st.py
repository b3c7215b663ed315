"""`bigbatch.st.InfoNCELoss` in place of sentence-transformers' cached loss: the same losses and the same gradient."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss, MatryoshkaLoss
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from sentence_transformers.util import dot_score
from torch import Tensor, nn
from torch.nn.functional import normalize

import bigbatch
from bigbatch.st import InfoNCELoss, _sorted_by_length, unpad
from retriever.parallel.world import World
from tests.distributed.processes import run_on_ranks
from tests.tiny import random_texts, save_tiny_model

SYMMETRIC = {"directions": ("query_to_doc", "doc_to_query"), "partition_mode": "per_direction"}
CASES: dict[str, tuple[int, dict[str, Any]]] = {  # columns, arguments of both losses
    "pairs": (2, {"scale": 20.0, "mini_batch_size": 3}),
    "negatives": (4, {"scale": 50.0, "mini_batch_size": 5}),
    "tokens": (3, {"mini_batch_num_tokens": 40}),
    "dot products": (2, {"scale": 0.5, "similarity_fct": dot_score, "mini_batch_size": 4}),
    "symmetric": (3, SYMMETRIC),
    "every direction": (4, {"directions": ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")}),
    "hard negatives": (4, {"hardness_mode": "hard_negatives", "hardness_strength": 5.0, "mini_batch_size": 5}),
    "hard and symmetric": (3, SYMMETRIC | {"hardness_mode": "in_batch_negatives", "hardness_strength": 9.0}),
}

# A training script as sentence-transformers' documentation has it.
SCRIPT = """
from datasets import Dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.base.sampler import BatchSamplers
from sentence_transformers.sentence_transformer import losses
from tests.tiny import random_texts

model = SentenceTransformer(folder, device="cpu")
texts = random_texts(240, longest=30, seed=3)
train_dataset = Dataset.from_dict({"anchor": texts[:80], "positive": texts[80:160], "negative": texts[160:]})
loss = losses.CachedMultipleNegativesRankingLoss(model, scale=20.0, mini_batch_size=4)
arguments = SentenceTransformerTrainingArguments(
    output_dir, max_steps=10, per_device_train_batch_size=16, learning_rate=1e-3, logging_steps=1, report_to="none",
    batch_sampler=BatchSamplers.NO_DUPLICATES, save_strategy="no", use_cpu=True, disable_tqdm=True,
    prompts={"anchor": "query: ", "positive": "passage: ", "negative": "passage: "},
)
trainer = SentenceTransformerTrainer(model=model, args=arguments, train_dataset=train_dataset, loss=loss)
trainer.train()
losses_of_steps = [record["loss"] for record in trainer.state.log_history if "loss" in record]
"""
THEIRS = "losses.CachedMultipleNegativesRankingLoss("


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sentence-transformers model without dropout."""
    place = tmp_path_factory.mktemp("st")
    save_tiny_model(place / "bert", num_hidden_layers=1, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    transformer = Transformer(str(place / "bert"))
    SentenceTransformer(modules=[transformer, Pooling(transformer.get_embedding_dimension())], device="cpu").save(
        str(place / "model")
    )
    return place / "model"


def _gradient(model: SentenceTransformer, loss: nn.Module, columns: int) -> tuple[Tensor, Tensor]:
    """Of a batch of 13."""
    texts = random_texts(13 * columns, longest=30, seed=2)
    return _gradient_of(model, loss, [texts[13 * i : 13 * (i + 1)] for i in range(columns)])


def _gradient_of(model: SentenceTransformer, loss: nn.Module, texts: list[list[str]]) -> tuple[Tensor, Tensor]:
    """(the loss of these columns, all parameters' gradients in one vector)."""
    features = [model.preprocess(column) for column in texts]
    model.zero_grad()
    value = loss(features, None)
    value.backward()
    return value.detach(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("matryoshka", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_the_gradient_is_that_of_the_loss_it_replaces(folder: Path, case: str, matryoshka: bool) -> None:
    columns, arguments = CASES[case]
    model = SentenceTransformer(str(folder), device="cpu").double()
    wrap: Callable[[nn.Module], nn.Module] = (
        (lambda loss: MatryoshkaLoss(model, loss, [32, 8])) if matryoshka else (lambda loss: loss)
    )  # noqa: E731
    theirs, expected = _gradient(model, wrap(CachedMultipleNegativesRankingLoss(model, **arguments)), columns)
    ours, found = _gradient(model, wrap(InfoNCELoss(model, **arguments)), columns)
    assert expected.norm() > 1e-3
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-10)


def test_a_script_changed_in_one_line_has_the_same_losses(folder: Path, tmp_path: Path) -> None:
    def run(script: str) -> list[float]:
        names: dict[str, Any] = {"folder": str(folder), "output_dir": str(tmp_path / "out")}
        exec(compile(script, "script.py", "exec"), names)
        found: list[float] = names["losses_of_steps"]
        return found

    changed = ("import bigbatch.st\n" + SCRIPT).replace(THEIRS, "bigbatch.st.InfoNCELoss(")
    assert changed.count("bigbatch.st.InfoNCELoss") == 1
    expected, found = run(SCRIPT), run(changed)
    assert len(expected) == 10 and max(expected) - min(expected) > 0.1
    assert found == pytest.approx(expected, abs=1e-5)


def _gathered(world: World, folder: Path) -> list[float]:
    """Differences of this rank's loss and gradient to theirs, both over the documents of all ranks; its own hard
    negatives count more.
    """
    model = SentenceTransformer(str(folder / "model"), device="cpu").double()
    texts = random_texts(21, longest=30, seed=world.rank)
    found = []
    for kind in (CachedMultipleNegativesRankingLoss, InfoNCELoss):
        harder: dict[str, Any] = {"hardness_mode": "hard_negatives", "hardness_strength": 5.0}
        loss = kind(model, mini_batch_size=3, gather_across_devices=True, **harder)
        value, gradient = _gradient_of(model, loss, [texts[:7], texts[7:14], texts[14:]])
        found.append((value, gradient))
    (theirs, expected), (ours, gradient) = found
    assert expected.norm() > 1e-3
    return [float((ours - theirs).abs()), float((gradient - expected).norm() / expected.norm())]


def test_documents_of_all_ranks_are_negatives(folder: Path) -> None:
    for difference, error in run_on_ranks(_gathered, 2, folder.parent):
        assert difference < 1e-9 and error < 1e-7


def test_evaluation_needs_no_gradient(folder: Path) -> None:
    model = SentenceTransformer(str(folder), device="cpu").eval()
    features = [model.preprocess(random_texts(6, seed=seed)) for seed in (1, 2)]
    with torch.no_grad():
        value = InfoNCELoss(model, mini_batch_size=2)([dict(f) for f in features])
        expected = CachedMultipleNegativesRankingLoss(model, mini_batch_size=2)([dict(f) for f in features], None)
    torch.testing.assert_close(value, expected)


@pytest.mark.parametrize("architecture", ["bert", "roberta", "qwen3"])
def test_an_unpadded_encoder_is_the_same_function(architecture: str, tmp_path: Path) -> None:
    """With dropout too, which the second pass draws again. What is saved is what was saved before."""
    save_tiny_model(tmp_path / "tower", architecture, num_hidden_layers=2)
    transformer = Transformer(str(tmp_path / "tower"))
    padded = SentenceTransformer(modules=[transformer, Pooling(transformer.get_embedding_dimension())], device="cpu")
    padded.save(str(tmp_path / "before"))
    unpadded = unpad(unpad(SentenceTransformer(str(tmp_path / "before"), device="cpu")))
    unpadded.save(str(tmp_path / "after"))
    for file in ("config.json", "modules.json", "model.safetensors"):
        assert (tmp_path / "before" / file).read_bytes() == (tmp_path / "after" / file).read_bytes(), file
    theirs, expected = _gradient(padded.double().eval(), CachedMultipleNegativesRankingLoss(padded), 3)
    ours, found = _gradient(unpadded.double().eval(), InfoNCELoss(unpadded, mini_batch_size=4), 3)
    torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=0)  # the library's rotary positions are float32
    assert (found - expected).norm() < 1e-6 * expected.norm()

    unpadded.train()
    texts = [random_texts(6, longest=30, seed=seed) for seed in (1, 2)]
    columns = [_sorted_by_length(unpadded.preprocess(column))[0] for column in texts]
    gradients = []
    for cached in (True, False):
        torch.manual_seed(0)
        unpadded.zero_grad()
        if cached:
            loss = InfoNCELoss(unpadded, mini_batch_size=6)([dict(f) for f in columns])
        else:
            queries, passages = (normalize(unpadded(dict(f))["sentence_embedding"]) for f in columns)
            loss = bigbatch.infonce(queries, passages, temperature=1 / 20)
        loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in unpadded.parameters() if p.grad is not None]))
    torch.testing.assert_close(*gradients, rtol=1e-6, atol=1e-8)


def test_an_unpadded_encoder_is_adapted_before(folder: Path) -> None:
    """Checkpointing that is on already is kept, by layers that are not fused."""
    columns = [random_texts(4, longest=30, seed=seed) for seed in (1, 2)]
    for early in (True, False):
        model = SentenceTransformer(str(folder), device="cpu").train()
        tower: Any = model[0].model
        model = model if early else unpad(model)
        tower.activation_checkpointing_enable()
        model = unpad(model) if early else model
        if early:
            assert _gradient_of(model, InfoNCELoss(model), columns)[1].norm() > 1e-3
            continue
        with pytest.raises(RuntimeError, match="gradient checkpointing: expected it off, received on; .*unpad"):
            _gradient_of(model, InfoNCELoss(model), columns)
        tower.activation_checkpointing_disable()
        assert _gradient_of(model, InfoNCELoss(model), columns)[1].norm() > 1e-3


def test_the_module_is_imported_when_it_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(bigbatch, "st")
    assert bigbatch.st.InfoNCELoss is InfoNCELoss
    with pytest.raises(AttributeError, match="'bigbatch' has no attribute 'sth'"):
        _ = bigbatch.sth


def test_what_cannot_be_unpadded_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected weights in torch.float32, received torch.bfloat16"):
        unpad(SentenceTransformer(str(folder), device="cpu").bfloat16())
    save_tiny_model(tmp_path / "mpnet", "mpnet")
    with pytest.raises(ValueError, match="expected a model of albert, bert.*, received 'mpnet'"):
        unpad(SentenceTransformer(modules=[Transformer(str(tmp_path / "mpnet"))], device="cpu"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"similarity_fct": lambda a, b: a @ b.T}, "similarity_fct: expected"),
        (SYMMETRIC | {"gather_across_devices": True}, "gather_across_devices: expected False"),
    ],
)
def test_what_is_not_available_is_refused(folder: Path, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        InfoNCELoss(SentenceTransformer(str(folder), device="cpu"), **arguments)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_gradients_are_rounded_once(dtype: torch.dtype) -> None:
    """Also by a loss scale that makes up for what half precision cannot hold."""
    torch.manual_seed(0)
    queries, passages = (torch.randn(1000, 8).to(dtype).requires_grad_() for _ in range(2))
    scaled = torch.autograd.grad(65536 * bigbatch.infonce(queries, passages, temperature=1.0), queries)[0]
    wide = queries.detach().double().requires_grad_()
    exact = nn.functional.cross_entropy(wide @ passages.detach().double().T, torch.arange(1000))
    expected = torch.autograd.grad(65536 * exact, wide)[0]
    assert expected.norm() > 1
    torch.testing.assert_close(scaled.double(), expected, rtol=2e-2, atol=2e-3 * float(expected.abs().max()))


def test_arguments_by_position_and_directions_in_any_order(folder: Path) -> None:
    model = SentenceTransformer(str(folder), device="cpu")
    loss = InfoNCELoss(
        model, 30.0, dot_score, 5, directions=("doc_to_query", "query_to_doc"), partition_mode="per_direction"
    )
    assert (loss.scale, loss.mini_batch_size, loss.similarity_fct) == (30.0, 5, dot_score)


def test_the_function_ignores_rows_and_checks_its_arguments() -> None:
    queries = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    passages = torch.randn(7, 4, dtype=torch.float64, requires_grad=True)
    targets = torch.tensor([3, -1, 0, 6, 2])
    value = bigbatch.infonce(queries, passages, targets, temperature=0.5)
    logits = queries @ passages.T / 0.5
    expected = nn.functional.cross_entropy(logits, targets, ignore_index=-1, reduction="sum") / 5
    torch.testing.assert_close(value, expected)
    for found, right in zip(
        torch.autograd.grad(3 * value, [queries, passages]),
        torch.autograd.grad(3 * expected, [queries, passages]),
        strict=True,
    ):
        torch.testing.assert_close(found, right)
    with pytest.raises(ValueError, match="temperature above 0, received -1"):
        bigbatch.infonce(queries, passages, temperature=-1)
    with pytest.raises(ValueError, match="at least 7 passages, one for each query, received 5"):
        bigbatch.infonce(passages, queries)
