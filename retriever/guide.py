"""A guide model: its vectors of all training texts, computed once and kept beside the token store."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from kernels.infonce.rules import guide_vectors
from retriever.checksums import damaged, own_cache, write_checksums
from retriever.config import Config
from retriever.data.guide import FILES, GuideVectors
from retriever.data.store import Store, build_or_open, made_once
from retriever.data.text_table import TokenRows
from retriever.data.tokens import SIDES, Side, TokenTemplate
from retriever.encoder.bundle import EncoderBundle, load_encoder
from retriever.encoder.text_batches import BATCH_TEXTS, BatchEncoder, inference, mode_of
from retriever.files import make_folder, replace_folder, write_json


def vectors_of(config: Config, store: Store) -> GuideVectors:
    """The vectors that `config.loss.guide` has of every text of `store`, in the guide's own prompts and lengths.

    They are kept beside the store, or in the user's own cache if nothing can be written there, under a fingerprint of
    the guide and the store. Of several processes one encodes, and the others wait. Call it before any process group
    exists. Raises ConfigError where there is no such model.
    """
    name = config.loss.guide
    assert name is not None
    gpu = torch.cuda.is_available()
    bundle = load_encoder(name, precision="bf16" if gpu else "fp32", attention="auto")
    fingerprint = _fingerprint(bundle, store)
    folder = store.folder.with_name(f"guide-{fingerprint}")
    if not folder.exists() and not os.access(folder.parent, os.W_OK):
        folder = own_cache() / "guide" / folder.name
        make_folder(folder.parent)

    def problem() -> str | None:
        if not folder.exists():
            return " is missing"
        return next((f"/{file} {what}" for file, what in damaged(folder, again=config.data.verify).items()), None)

    made_once(folder, problem, lambda: _encode(bundle, config, folder))
    return GuideVectors(folder)


def _encode(bundle: EncoderBundle, config: Config, folder: Path) -> None:
    """Writes the vectors of every text, whose rows are those of the run's own store: it is made of the same texts."""
    prompts = {f"{side}_prompt": bundle.settings.prompt(side) for side in SIDES}
    lengths = {f"{side}_max_tokens": bundle.settings.max_tokens(side) for side in SIDES}
    texts = build_or_open(replace(config, model=replace(config.model, **prompts, **lengths)), bundle.tokenizer)
    with replace_folder(folder) as building:
        for side, table, file in zip(SIDES, (texts.queries, texts.passages), FILES, strict=True):
            shape = (len(table), bundle.dimension)
            out = np.lib.format.open_memmap(building / file, mode="w+", dtype=np.float16, shape=shape)
            for start, vectors in _vectors(bundle, table, side):
                out[start : start + len(vectors)] = vectors
            out.flush()
        write_json(building / "manifest.json", {"guide": config.loss.guide, "settings": asdict(bundle.settings)})
        write_checksums(building)


def _vectors(bundle: EncoderBundle, texts: TokenRows, side: Side) -> Iterator[tuple[int, np.ndarray]]:
    """(first row, vectors [n, G]) of one batch of texts after another."""
    budget = 131_072 if bundle.encoder.device.type == "cuda" else 8_192
    max_tokens, template = bundle.settings.max_tokens(side), TokenTemplate.from_tokenizer(bundle.tokenizer)
    encoder = BatchEncoder(bundle.encoder, bundle.tokenizer, side, "", max_tokens, budget)
    with inference(bundle.encoder), tqdm(total=len(texts), unit=" texts", desc=f"guide: {side}") as bar:
        for start in range(0, len(texts), BATCH_TEXTS):
            rows = np.arange(start, min(start + BATCH_TEXTS, len(texts)))
            tokens, counts = texts.gather(rows, max_tokens, keep_end=template.keep_end)
            batch = TokenRows(tokens, np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)]))
            found = encoder.encode_tokens(batch, template, bar.update).wait()
            yield start, guide_vectors(torch.from_numpy(found)).numpy()


def _fingerprint(bundle: EncoderBundle, store: Store) -> str:
    """Of all that the vectors depend on."""
    made_of = {
        "store": store.fingerprint,
        "model": bundle.model_hash(),
        "settings": asdict(bundle.settings),
        "precision": bundle.precision,
        "mode": mode_of(bundle.encoder),
    }
    return hashlib.blake2b(json.dumps(made_of, sort_keys=True).encode(), digest_size=16).hexdigest()
