"""An encoder with its tokenizer and settings: texts in, embeddings out."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any, Literal, TypedDict, Unpack

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from retriever.config import ConfigError, ModelConfig
from retriever.data.tokens import SIDES, Side, described_tokenizer
from retriever.encoder.architectures import check_lengths
from retriever.encoder.dual_encoder import DualEncoder
from retriever.encoder.execution import apply_execution
from retriever.encoder.lora import LoraLinear
from retriever.encoder.pooling import PoolingMode
from retriever.encoder.projection import Dense, load_projections
from retriever.encoder.settings import EncoderSettings, read_model_config, read_settings
from retriever.encoder.text_batches import BATCH_TEXTS, Arriving, BatchEncoder, Key
from retriever.encoder.tokenizer import check_prompt, load_tokenizer
from retriever.encoder.towers import load_tower
from retriever.screen import Bar

Precision = Literal["fp32", "bf16", "fp16"]
AUTOCAST_DTYPES: dict[Precision, torch.dtype | None] = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class EncoderBundle:
    """Encoder, tokenizer and settings that turn texts into embeddings, from a folder or a training run."""

    encoder: DualEncoder
    tokenizer: PreTrainedTokenizerBase
    settings: EncoderSettings

    @property
    def dimension(self) -> int:
        """D, the length of an embedding."""
        return self.encoder.dimension

    @property
    def precision(self) -> Precision:
        """The dtype in which the transformer computes."""
        return next(name for name, dtype in AUTOCAST_DTYPES.items() if dtype == self.encoder.autocast_dtype)

    def encode(
        self,
        texts: Sequence[str],
        side: Side,
        *,
        tokens_per_chunk: int | None = None,
        progress: bool | Callable[[int], object] = False,
    ) -> np.ndarray:
        """Embeddings [n, D] float32 of texts (without prompt: the settings' own is put in front), in the texts' order.

        As `encode_batches`, of one sequence. `progress` shows a bar, or is called with the number of texts just queued.
        """
        embeddings = np.zeros((len(texts), self.dimension), dtype=np.float32)
        batches = ((start, texts[start : start + BATCH_TEXTS]) for start in range(0, len(texts), BATCH_TEXTS))
        with Bar(total=len(texts), unit=" texts", desc=f"encode {side}", disable=progress is not True) as bar:
            done = progress if callable(progress) else bar.update
            with closing(
                self.encode_batches(batches, side, tokens_per_chunk=tokens_per_chunk, progress=done)
            ) as encoded:
                queued = None  # fetched once the next batch is queued, so that the device has work meanwhile
                for following in chain(encoded, [None]):
                    if queued is not None:
                        start, found = queued[0], queued[1].wait()
                        embeddings[start : start + len(found)] = found
                    queued = following
        return embeddings

    def encode_batches(
        self,
        batches: Iterable[tuple[Key, Sequence[str]]],
        side: Side,
        *,
        tokens_per_chunk: int | None = None,
        progress: Callable[[int], object] = lambda count: None,
    ) -> Generator[tuple[Key, Arriving], None, None]:
        """Embeddings of one batch of texts after another, with the batches' keys. A thread reads `batches` one ahead.

        A batch's texts are sorted by length and laid out, packed where the encoder is, in chunks of at most
        `tokens_per_chunk` tokens. Dropout is off while this runs; a text without any token gets the zero vector.
        """
        budget = tokens_per_chunk or (131_072 if self.encoder.device.type == "cuda" else 8_192)
        encoder = BatchEncoder(
            self.encoder, self.tokenizer, side, self.settings.prompt(side), self.settings.max_tokens(side), budget
        )
        return encoder.encode(batches, progress)

    def model_hash(self) -> str:
        """SHA-256 of weights, architecture, tokenizer and pooling: all that the embeddings depend on but prompts,
        lengths and precision.
        """
        digest = hashlib.sha256()
        for name, tensor in sorted(self.encoder.state_dict().items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy())
        for tower in (self.encoder.query_tower, self.encoder.passage_tower):
            config = tower.config.to_diff_dict()
            digest.update(_canonical(config, leave_out=("transformers_version", "_name_or_path", "dtype")))
        tokenizer = described_tokenizer(self.tokenizer)
        digest.update(_canonical(tokenizer, leave_out=("padding", "truncation", "special")))
        pooled = {"pooling": self.encoder.pooling, "normalize": self.encoder.normalize}
        cut = {} if self.encoder.truncate_dim is None else {"truncate_dim": self.encoder.truncate_dim}
        digest.update(_canonical(pooled | cut))
        for name, module in self.encoder.named_modules():  # what their tensors do not tell
            if isinstance(module, LoraLinear):
                digest.update(_canonical({"name": name, "scale": module.scale}))
            elif isinstance(module, Dense):
                digest.update(_canonical({"name": name, "activation": str(module.activation)}))
        return digest.hexdigest()


class SettingsOverrides(TypedDict, total=False):
    """Settings that replace those of a model folder. None: as the folder says."""

    pooling: PoolingMode | None
    normalize: bool | None
    query_prompt: str | None
    passage_prompt: str | None
    query_max_tokens: int | None
    passage_max_tokens: int | None


def load_encoder(
    name_or_path: str | Path,
    *,
    precision: Precision = "fp32",
    attention: Literal["auto", "packed", "padded"] = "padded",
    compiled: bool = False,
    device: torch.device | str | None = None,
    **overrides: Unpack[SettingsOverrides],
) -> EncoderBundle:
    """An encoder in eval mode from a Hugging Face name, a sentence-transformers folder or an export of ours.

    `overrides` replace what the model says of itself (`read_settings`). Default device: the first GPU where there is
    one. `attention: auto` packs texts on a GPU where the architecture can; an encoder that packs takes packed chunks
    only. Its layers run fused on a GPU where `fused_layers` knows them; `compiled` compiles the others, which takes
    about a minute of the first chunk. Raises ConfigError where there is no such model, it is not supported, or has
    fewer positions than asked for.
    """
    name = str(name_or_path)
    if precision not in AUTOCAST_DTYPES:
        raise ConfigError(f"precision is {precision!r}; expected one of {', '.join(AUTOCAST_DTYPES)}")
    replaced: Any = {key: value for key, value in overrides.items() if value is not None}
    settings = replace(read_settings(name), **replaced)
    check_lengths(read_model_config(name), settings.query_max_tokens, settings.passage_max_tokens)
    tokenizer = load_tokenizer(name)
    for side in SIDES:
        check_prompt(tokenizer, side, settings.prompt(side), settings.max_tokens(side))
    passage_tower = load_tower(name, "passage")
    query_tower = passage_tower if settings.tied else load_tower(name, "query")
    pooled: Any = {key: getattr(settings, key) for key in ("pooling", "normalize", "truncate_dim")}
    encoder = DualEncoder(query_tower, passage_tower, **pooled, autocast_dtype=AUTOCAST_DTYPES[precision])
    encoder.projections.update(load_projections(name, encoder.towers))
    encoder.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    gpu = encoder.device.type == "cuda"
    packed = attention == "packed" or (attention == "auto" and gpu and encoder.can_pack)
    fused = packed and gpu and encoder.can_fuse
    execution = ModelConfig(attention="packed" if packed else "padded", fused=fused, compile=compiled and not fused)
    apply_execution(encoder, execution)
    return EncoderBundle(encoder.eval(), tokenizer, settings)


def _canonical(content: dict[str, Any], leave_out: Sequence[str] = ()) -> bytes:
    kept = {key: value for key, value in content.items() if key not in leave_out}
    return json.dumps(kept, sort_keys=True, default=str).encode()
