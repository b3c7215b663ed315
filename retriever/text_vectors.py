"""Another model's vectors of all training texts, computed once and kept beside the token store."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from kernels.infonce.rules import guide_vectors
from retriever.checksums import damaged, own_cache, write_checksums
from retriever.config import Config
from retriever.config_sources import kind_numbers, text_kinds
from retriever.data.store import Store, build_or_open, made_once
from retriever.data.text_table import TokenRows
from retriever.data.text_vectors import FILES, TextVectors
from retriever.data.tokens import SIDES, Side, TokenTemplate
from retriever.encoder.bundle import EncoderBundle, Precision, load_encoder
from retriever.encoder.text_batches import BATCH_TEXTS, BatchEncoder, inference
from retriever.files import make_folder, replace_folder, write_json
from retriever.screen import Bar


def vectors_of(config: Config, store: Store, kind: Literal["guide", "teacher"]) -> TextVectors:
    """The vectors that the guide or teacher of `config.loss` has of every text of `store`, with its own prompts and
    lengths; a guide's are rounded by `guide_vectors`.

    They are kept beside the store, or in the user's own cache if nothing can be written there, under a fingerprint of
    the model and the store. Of several processes one encodes, and the others wait. Call it before any process group
    exists. Raises ConfigError where there is no such model.
    """
    name: str = getattr(config.loss, kind)
    precision: Precision = "bf16" if torch.cuda.is_available() else "fp32"
    bundle = load_encoder(name, precision=precision, device="cpu")  # only the process that encodes takes GPU memory
    fingerprint = _fingerprint(bundle, store)
    folder = store.folder.with_name(f"{kind}-{fingerprint}")
    if not folder.exists() and not os.access(folder.parent, os.W_OK):
        folder = own_cache() / kind / folder.name
        make_folder(folder.parent)

    def problem() -> str | None:
        if not folder.exists():
            return " is missing"
        return next((f"/{file} {what}" for file, what in damaged(folder, again=config.data.verify).items()), None)

    made_once(folder, problem, lambda: _encode(config, kind, precision, folder))
    return TextVectors(folder)


def _encode(config: Config, kind: str, precision: Precision, folder: Path) -> None:
    """Writes the vectors of every text, whose rows are those of the run's own store: it is made of the same texts, and
    where sources have passages in several prompts or lengths, a text has as many rows here. Lengths that differ by the
    number of the kind see to that; they cut nothing.
    """
    name = getattr(config.loss, kind)
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if torch.cuda.is_available() else None
    bundle = load_encoder(name, precision=precision, attention="auto", device=device)
    settings = bundle.settings
    model = replace(
        config.model,
        query_prompt=settings.query_prompt,
        passage_prompt=settings.passage_prompt,
        query_max_tokens=settings.query_max_tokens,
        passage_max_tokens=settings.passage_max_tokens,
    )
    sources = []
    for source, number in zip(config.data.train, kind_numbers(text_kinds(config, "passage")), strict=True):
        length = settings.passage_max_tokens + number
        plain = replace(source, query_prompt=None, passage_prompt=None, query_max_tokens=None)
        sources.append(replace(plain, passage_max_tokens=length))
    data = replace(config.data, train=tuple(sources), cache_dir=str(folder.parent))
    texts = build_or_open(replace(config, model=model, data=data), bundle.tokenizer)
    with replace_folder(folder) as building:
        for side, table, file in zip(SIDES, (texts.queries, texts.passages), FILES, strict=True):
            shape = (len(table), bundle.dimension)
            out = np.lib.format.open_memmap(building / file, mode="w+", dtype=np.float16, shape=shape)
            for start, vectors in _vectors(bundle, table, side):
                rounded = guide_vectors(vectors) if kind == "guide" else vectors.half()
                out[start : start + len(vectors)] = rounded.numpy()
            out.flush()
        write_json(building / "manifest.json", {"model": name, "settings": asdict(settings)})
        write_checksums(building)


def _vectors(bundle: EncoderBundle, texts: TokenRows, side: Side) -> Iterator[tuple[int, Tensor]]:
    """(first row, vectors [n, G]) of one batch of texts after another."""
    budget = 131_072 if bundle.encoder.device.type == "cuda" else 8_192
    max_tokens, template = bundle.settings.max_tokens(side), TokenTemplate.from_tokenizer(bundle.tokenizer)
    encoder = BatchEncoder(bundle.encoder, bundle.tokenizer, side, "", max_tokens, budget)
    with inference(bundle.encoder), Bar(total=len(texts), unit=" texts", desc=f"encode {side}") as bar:
        for start in range(0, len(texts), BATCH_TEXTS):
            rows = np.arange(start, min(start + BATCH_TEXTS, len(texts)))
            tokens, counts = texts.gather(rows, max_tokens, keep_end=template.keep_end)
            batch = TokenRows(tokens, np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)]))
            found = encoder.encode_tokens(batch, template, bar.update).wait()
            yield start, torch.from_numpy(found)


def _fingerprint(bundle: EncoderBundle, store: Store) -> str:
    """A hash of everything that the vectors depend on."""
    made_of = {
        "store": store.fingerprint,
        "model": bundle.model_hash(),
        "settings": asdict(bundle.settings),
        "precision": bundle.precision,
    }
    return hashlib.blake2b(json.dumps(made_of, sort_keys=True).encode(), digest_size=16).hexdigest()
