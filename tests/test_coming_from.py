"""Runs of other trainers as configurations of ours: the same losses on the same batches."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize
from transformers import AutoModel, AutoTokenizer, Trainer, TrainingArguments

from bigbatch import Run
from retriever.config_file import load
from retriever.data.formats import open_source
from tests.tiny import random_texts, save_tiny_model
from tests.workplace import ROOT

QUERIES, NEGATIVES, STEPS = 8, 2, 10


class _Peer(nn.Module):
    """A dense retriever as Tevatron trains it: last token, normalised, each query against all passages of its step."""

    def __init__(self, folder: Path, temperature: float) -> None:
        super().__init__()
        self.encoder, self.temperature = AutoModel.from_pretrained(folder), temperature

    def forward(self, query: dict[str, Tensor], passage: dict[str, Tensor]) -> dict[str, Tensor]:
        """The loss; a query's positive is the first of its group of passages."""
        queries, passages = self._encode(query), self._encode(passage)
        targets = torch.arange(len(queries)) * (len(passages) // len(queries))
        return {"loss": cross_entropy(queries @ passages.T / self.temperature, targets)}

    def _encode(self, tokens: dict[str, Tensor]) -> Tensor:
        hidden = self.encoder(**tokens).last_hidden_state
        last = tokens["attention_mask"].sum(1) - 1
        return normalize(hidden[torch.arange(len(hidden)), last], dim=1)


def _records() -> list[dict[str, Any]]:
    group = 1 + NEGATIVES
    texts = random_texts(QUERIES * STEPS * group, shortest=6, longest=40, seed=4)
    return [
        {
            "query_id": str(i),
            "query": " ".join(texts[group * i].split()[:4]),
            "positive_passages": [{"docid": f"{i}", "title": "a", "text": texts[group * i]}],
            "negative_passages": [
                {"docid": f"{i}-{j}", "title": "b", "text": texts[group * i + j]} for j in range(1, group)
            ],
        }
        for i in range(QUERIES * STEPS)
    ]


def test_tevatrons_example_has_the_losses_of_transformers_trainer(tmp_path: Path) -> None:
    """Without dropout and LoRA, in float32, by the data's own order of our batches."""
    save_tiny_model(tmp_path / "model", num_hidden_layers=1, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    records = _records()
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    run = Run(
        ROOT / "configs" / "from_tevatron.yaml",
        [
            *(f"run.output_dir={tmp_path / 'run'}", f"data.cache_dir={tmp_path / 'cache'}", "run.trackers=[]"),
            *("model.lora=null", "optim.precision=fp32", "loss.precision=fp32"),
            *(f"batch.queries={QUERIES}", f"data.negatives={NEGATIVES}", "optim.lr=1e-3"),
        ],
        model=tmp_path / "model",
        train=tmp_path / "train.jsonl",
    )
    ours, order = [], list[int]()
    with run:
        assert run.total == STEPS
        for batch in run.batches():
            positives = batch.targets.passage_ids[batch.targets.positives]
            order += (positives // (1 + NEGATIVES)).tolist()  # rows of the store are in the order of reading
            run.forward_backward(batch)
            ours.append(run.optimizer_step().loss)
    assert sorted(order) == list(range(len(records)))

    config, tokenizer = run.config, AutoTokenizer.from_pretrained(tmp_path / "model")

    def collate(groups: list[dict[str, Any]]) -> dict[str, Any]:
        def tokens(prompt: str, texts: list[str], longest: int) -> Any:
            whole = [prompt + text for text in texts]
            return dict(tokenizer(whole, padding=True, truncation=True, max_length=longest, return_tensors="pt"))

        passages = [p for group in groups for p in (*group["positive_passages"], *group["negative_passages"])]
        texts = [f"{p['title']} {p['text']}" for p in passages]
        return {
            "query": tokens("Query: ", [g["query"] for g in groups], 32),
            "passage": tokens("Passage: ", texts, 156),
        }

    arguments = TrainingArguments(
        str(tmp_path / "peer"),
        per_device_train_batch_size=QUERIES,
        num_train_epochs=1,
        learning_rate=config.optim.lr,
        train_sampling_strategy="sequential",
        remove_unused_columns=False,
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = Trainer(
        model=_Peer(tmp_path / "model", 0.01),
        args=arguments,
        train_dataset=[records[i] for i in order],
        data_collator=collate,
    )
    trainer.train()
    theirs = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert len(theirs) == STEPS and max(theirs) - min(theirs) > 0.1
    assert ours == pytest.approx(theirs, abs=1e-5)


def test_flagembeddings_data_is_read_as_its_example_says(tmp_path: Path) -> None:
    """Scores and all; the prompt of a line replaces the query's."""
    line = {
        "query": "q",
        "pos": ["p"],
        "neg": ["n", "m"],
        "pos_scores": [0.9],
        "neg_scores": [0.1, 0.2],
        "prompt": "x: ",
    }
    (tmp_path / "train.jsonl").write_text(json.dumps(line) + "\n")
    config = load(ROOT / "configs" / "from_flagembedding.yaml", [f"data.train.0.path={tmp_path / 'train.jsonl'}"])
    (example,) = open_source(config.data.train[0]).examples()
    assert (example.prompt, example.positive_scores, example.negative_scores) == ("x: ", (0.9,), (0.1, 0.2))
    assert config.data.negatives == 7 and config.loss.temperature == 0.02
