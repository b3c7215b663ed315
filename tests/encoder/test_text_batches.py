"""Batch after batch: keys and order are kept, reading is one ahead, and the encoder is as it was afterwards."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch

from retriever.encoder.bundle import EncoderBundle, Precision, load_encoder
from retriever.encoder.text_batches import inference
from tests.tiny import random_texts, save_tiny_model

TEXTS = ["", *random_texts(16, longest=40), "the brain"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="module")
def bundle(folder: Path) -> EncoderBundle:
    return load_encoder(folder, query_prompt="find: ", query_max_tokens=12)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("attention", ["padded", "packed"])
def test_batches_are_the_whole_in_parts(
    folder: Path, bundle: EncoderBundle, attention: Literal["padded", "packed"], precision: Precision
) -> None:
    """Padded or packed, in chunks of few tokens: the padded fp32 embeddings, in bf16 to a cosine of 0.999."""
    whole = bundle.encode(TEXTS, "query")
    loaded = load_encoder(folder, query_prompt="find: ", query_max_tokens=12, attention=attention, precision=precision)
    counted: list[int] = []
    batches = [("a", TEXTS[:7]), ("b", TEXTS[7:8]), ("nothing", []), ("c", TEXTS[8:])]
    found = list(loaded.encode_batches(batches, "query", tokens_per_chunk=30, progress=counted.append))
    assert [key for key, _ in found] == [key for key, _ in batches]
    parts = [arriving.wait() for _, arriving in found]
    assert [len(part) for part in parts] == [7, 1, 0, 10] and sum(counted) == len(TEXTS)
    together = np.concatenate(parts)
    if precision == "fp32":
        np.testing.assert_allclose(together, whole, rtol=0, atol=1e-6)
    else:
        assert not np.allclose(together, whole, rtol=0, atol=1e-6)
        assert (together * whole).sum(axis=1).min() > 0.999


def test_the_next_batch_is_read_while_one_is_in_use(bundle: EncoderBundle) -> None:
    read: list[int] = []

    def batches() -> Iterator[tuple[int, Sequence[str]]]:
        for number in range(5):
            read.append(number)
            yield number, TEXTS[:3]

    with closing(bundle.encode_batches(batches(), "query")) as encoded:
        next(encoded)
        next(encoded)
    assert read == [0, 1, 2]


def test_the_encoder_is_as_it_was_when_encoding_ends_early(bundle: EncoderBundle) -> None:
    """Dropout and autocast come back where the reader stops, and where the texts cannot be read."""

    def unreadable() -> Iterator[tuple[int, Sequence[str]]]:
        yield 0, TEXTS[:3]
        raise OSError("disk")

    bundle.encoder.train()
    try:
        with closing(bundle.encode_batches([(0, TEXTS[:3]), (1, TEXTS[3:])], "query")) as encoded:
            next(encoded)
            assert not bundle.encoder.training and not torch.is_grad_enabled()
        assert bundle.encoder.training and torch.is_grad_enabled()
        with pytest.raises(OSError, match="disk"):
            list(bundle.encode_batches(unreadable(), "query"))
        assert bundle.encoder.training and torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu")
    finally:
        bundle.encoder.eval()


def test_modes_set_by_hand_outlive_an_encoding(folder: Path) -> None:
    """A dropout that was switched off by hand stays off, in fused embeddings and layers too, and no module is
    exchanged.
    """
    encoder = load_encoder(folder, attention="packed").encoder
    encoder.fuse_layers()
    encoder.train()
    tower: Any = encoder.passage_tower
    for dropout in (tower.embeddings.dropout, tower.encoder.layer[0].output.dropout):
        dropout.eval()
    before = {name: (module, module.training) for name, module in encoder.named_modules()}
    with inference(encoder):
        assert not any(module.training for module in encoder.modules())
    assert {name: (module, module.training) for name, module in encoder.named_modules()} == before
    assert [training for _, training in before.values()].count(False) == 2
