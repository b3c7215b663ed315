"""Bigbatch from Python.

Run         a training run, and a training loop of your own
Config      its settings
Encoder     a trained model: texts in, embeddings out; `load_encoder` opens one
infonce     the loss as a differentiable function of embeddings; `InfoNCE` as a module
st          the loss for sentence-transformers' trainer; `import bigbatch.st`
"""

import retriever  # noqa: F401  its `kernels` package is then the one that is found
from bigbatch.loss import InfoNCE, infonce
from retriever.callbacks import Callback
from retriever.config import Config
from retriever.encoder.bundle import EncoderBundle as Encoder
from retriever.encoder.bundle import load_encoder
from retriever.run import Run

__all__ = ["Callback", "Config", "Encoder", "InfoNCE", "Run", "infonce", "load_encoder"]
