"""Bigbatch from Python.

Run         a training run, and a training loop of your own
Callback    what hears a run's events
Config      its settings
Encoder     a trained model: texts in, embeddings out; `load_encoder` opens one
batch_loss  marks a loss of your own that takes the whole batch; `LossTargets` is what a loss is given
infonce     the loss as a differentiable function of embeddings; `InfoNCE` as a module; `Negatives`, of other directions
st          the loss for sentence-transformers' trainer; imported when it is first used, as it needs that package
"""

from importlib import import_module
from typing import Any

import retriever  # noqa: F401  its `kernels` package is then the one that is found
from bigbatch.loss import InfoNCE, Negatives, infonce
from retriever.callbacks import Callback
from retriever.config import Config
from retriever.encoder.bundle import EncoderBundle as Encoder
from retriever.encoder.bundle import load_encoder
from retriever.loss.custom import LossTargets, batch_loss
from retriever.run import Run

__all__ = [
    "Callback", "Config", "Encoder", "InfoNCE", "LossTargets", "Negatives", "Run", "batch_loss", "infonce",
    "load_encoder",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name == "st":
        return import_module("bigbatch.st")
    raise AttributeError(f"module 'bigbatch' has no attribute {name!r}")
