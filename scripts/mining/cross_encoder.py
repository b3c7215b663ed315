"""Training of a cross-encoder on groups of a query, a positive and negatives, by the cross-entropy of the positive."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import BatchEncoding

from retriever.config import ConfigError, OptimConfig, SourceConfig
from retriever.data.formats import DataError, final_text, open_source
from retriever.data.records import is_blank
from retriever.encoder.bundle import AUTOCAST_DTYPES
from retriever.files import replace_folder
from retriever.optim import Optimizer
from retriever.rng import seed_step
from retriever.screen import Bar
from scripts.mining.teacher import check_pair_length, load_classifier


@dataclass(frozen=True)
class Group:
    """A query with the texts of its positives and of its negatives, at least one of each."""

    query: str
    positives: tuple[str, ...]
    negatives: tuple[str, ...]


@dataclass(frozen=True)
class Training:
    """Settings of a cross-encoder's training, apart from the optimizer."""

    negatives: int = 7  # beside each positive, at most
    queries: int = 32  # of an optimizer step
    epochs: float = 1.0
    max_tokens: int = 256  # of a pair
    seed: int = 0


def read_groups(path: str, title: Literal["join", "drop"], separator: str, limit: int | None = None) -> list[Group]:
    """The queries of training data that have both a positive and a negative, with texts. Raises DataError if there are
    none.
    """
    groups = []
    for example in open_source(SourceConfig(path=path, limit=limit)).examples():
        texts = (
            [final_text(passage, title, separator) for passage in passages]
            for passages in (example.positives, example.negatives)
        )
        positives, negatives = (tuple(text for text in found if not is_blank(text)) for found in texts)
        if positives and negatives:
            groups.append(Group(example.query, positives, negatives))
    if not groups:
        raise DataError(
            "no query has both a positive and a negative; expected mined negatives (scripts.mine_negatives)", path
        )
    return groups


def train_cross_encoder(
    name_or_path: str,
    groups: Sequence[Group],
    training: Training,
    optim: OptimConfig,
    output: Path,
    device: torch.device,
) -> tuple[float, float]:
    """Trains from the body of an encoder and writes the model and its tokenizer to `output`.

    Returns the mean loss and the share of queries whose positive scored highest, over the last tenth of the steps, each
    measured before the step's update. Within the first epoch these queries were not trained on yet. Deterministic in
    `training.seed`, up to the device's sums. Raises ConfigError if the model cannot be read, its body lacks a weight or
    `output` exists.
    """
    if output.exists():
        raise ConfigError(f"--output-dir {output}: exists already; expected a new folder")
    torch.manual_seed(training.seed)  # the head's first values
    model, tokenizer = load_classifier(name_or_path, "--model", new_head=True, num_labels=1)
    check_pair_length("--max-tokens", training.max_tokens, model, tokenizer)
    steps = list(_steps(len(groups), training))
    optimizer = Optimizer(optim, [model.to(device).train()], len(steps), device)
    autocast = AUTOCAST_DTYPES[optim.precision]
    seen = []
    for step, chosen in enumerate(Bar(steps, desc="train cross-encoder", unit=" steps", mininterval=2)):
        seed_step(training.seed, step, 0)
        inputs, sizes = _pairs([groups[i] for i in chosen], training, tokenizer)
        optimizer.set_learning_rate(step)
        with torch.autocast(device.type, autocast) if autocast is not None else nullcontext():
            logits = model(**inputs.to(device)).logits  # [pairs, 1]
        losses, first = first_among(logits[:, 0].float(), sizes)  # [G], [G]
        losses.mean().backward()
        optimizer.clip_and_step(step)
        seen.append(torch.stack([losses.detach(), first]))
    with replace_folder(output) as aside:
        model.save_pretrained(aside)
        tokenizer.save_pretrained(aside)
    loss, right = torch.cat(seen[-max(1, len(seen) // 10) :], dim=1).mean(dim=1).tolist()
    return loss, right


def first_among(scores: Tensor, sizes: Sequence[int]) -> tuple[Tensor, Tensor]:
    """(loss [G], whether the first score is the highest [G], 0 or 1) for G groups; loss = −log softmax of a group's
    first score.

    scores [Σ sizes], one group after another.
    """
    padded = pad_sequence(scores.split(list(sizes)), batch_first=True, padding_value=-torch.inf)  # [G, largest]
    return padded.logsumexp(dim=1) - padded[:, 0], (padded.argmax(dim=1) == 0).to(scores.dtype)


def _steps(count: int, training: Training) -> Iterator[np.ndarray]:
    """The queries of each step. Every epoch has an order of its own; the last step has what is left."""
    wanted, rng = max(1, round(count * training.epochs)), np.random.default_rng(training.seed)
    order = np.concatenate([rng.permutation(count) for _ in range(-(-wanted // count))])[:wanted]
    for first in range(0, wanted, training.queries):
        yield order[first : first + training.queries]


def _pairs(groups: Sequence[Group], training: Training, tokenizer: Any) -> tuple[BatchEncoding, list[int]]:
    """(tokens, pairs per query): each query with one drawn positive, then with drawn negatives, padded."""
    queries, passages, sizes = [], [], []
    for group in groups:
        positive = group.positives[int(torch.randint(len(group.positives), ()))]
        negatives = [group.negatives[i] for i in torch.randperm(len(group.negatives))[: training.negatives].tolist()]
        sizes.append(1 + len(negatives))
        queries += [group.query] * sizes[-1]
        passages += [positive, *negatives]
    cut = {"truncation": True, "max_length": training.max_tokens, "padding": True}
    return tokenizer(queries, passages, **cut, return_tensors="pt"), sizes
