"""An encoder with its tokenizer and settings: texts in, embeddings out."""

from __future__ import annotations

import hashlib
import json
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from retriever.config import ConfigError, ModelConfig
from retriever.data.tokens import Side
from retriever.encoder.architectures import check_lengths
from retriever.encoder.dual_encoder import DualEncoder, load_tower
from retriever.encoder.modes import use
from retriever.encoder.pooling import PoolingMode
from retriever.encoder.settings import EncoderSettings, read_model_config, read_settings
from retriever.encoder.text_batches import BATCH_TEXTS, Arriving, BatchEncoder, Key
from retriever.encoder.tokenizer import check_prompt, load_tokenizer

Precision = Literal["fp32", "bf16", "fp16"]
AUTOCAST_DTYPES: dict[Precision, torch.dtype | None] = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class EncoderBundle:
    """What turns texts into embeddings, loaded from a folder or taken from a running training."""

    encoder: DualEncoder
    tokenizer: PreTrainedTokenizerBase
    settings: EncoderSettings

    @property
    def dimension(self) -> int:
        """D, the length of an embedding."""
        return self.encoder.dimension

    @property
    def precision(self) -> Precision:
        """What the transformer computes in."""
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
        behind: deque[tuple[int, Arriving]] = deque()

        def fetch() -> None:
            start, arriving = behind.popleft()
            found = arriving.wait()
            embeddings[start : start + len(found)] = found

        with tqdm(total=len(texts), unit=" texts", desc=f"encode {side}", disable=progress is not True) as bar:
            done = progress if callable(progress) else bar.update
            with closing(
                self.encode_batches(batches, side, tokens_per_chunk=tokens_per_chunk, progress=done)
            ) as encoded:
                for batch in encoded:
                    behind.append(batch)
                    if len(behind) > 1:  # the device has the next batch to work on
                        fetch()
        while behind:
            fetch()
        return embeddings

    def encode_batches(
        self,
        batches: Iterable[tuple[Key, Sequence[str]]],
        side: Side,
        *,
        tokens_per_chunk: int | None = None,
        progress: Callable[[int], object] = lambda count: None,
    ) -> Generator[tuple[Key, Arriving], None, None]:
        """Embeddings of one batch of texts after another under the batches' own keys; `batches` is read in a thread, one
        batch ahead.

        A batch's texts are sorted by length and laid out, packed where the encoder is, in chunks of at most
        `tokens_per_chunk` tokens. Dropout is off while this runs; a text without any token gets the zero vector.
        """
        budget = tokens_per_chunk or (131_072 if self.encoder.device.type == "cuda" else 8_192)
        encoder = BatchEncoder(
            self.encoder, self.tokenizer, side, self.settings.prompt(side), self.settings.max_tokens(side), budget
        )
        return encoder.encode(batches, progress)

    def model_hash(self) -> str:
        """SHA-256 of what makes the embeddings besides prompts, lengths and precision: weights, architecture,
        tokenizer, pooling.
        """
        digest = hashlib.sha256()
        for name, tensor in sorted(self.encoder.state_dict().items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy())
        for tower in (self.encoder.query_tower, self.encoder.passage_tower):
            digest.update(
                _canonical(tower.config.to_diff_dict(), leave_out=("transformers_version", "_name_or_path", "dtype"))
            )
        digest.update(_tokenizer_bytes(self.tokenizer))
        pooled = {"pooling": self.encoder.pooling, "normalize": self.encoder.normalize}
        cut = {} if self.encoder.truncate_dim is None else {"truncate_dim": self.encoder.truncate_dim}
        digest.update(_canonical(pooled | cut))
        return digest.hexdigest()


def load_encoder(
    name_or_path: str | Path,
    *,
    pooling: PoolingMode | None = None,
    normalize: bool | None = None,
    query_prompt: str | None = None,
    passage_prompt: str | None = None,
    query_max_tokens: int | None = None,
    passage_max_tokens: int | None = None,
    precision: Precision = "fp32",
    attention: Literal["auto", "packed", "padded"] = "padded",
    compiled: bool = False,
    device: torch.device | str | None = None,
) -> EncoderBundle:
    """An encoder in eval mode from a Hugging Face name, a sentence-transformers folder or an export of ours.

    What is not given is what the model says of itself (`read_settings`). Default device: the first GPU where there is
    one. `attention: auto` packs texts on a GPU where the architecture can; an encoder that packs takes packed chunks
    only. Its layers run fused on a GPU where `fused_layers` knows them; `compiled` compiles the others, which takes
    about a minute of the first chunk. Raises ConfigError where there is no such model, it is not supported, or has
    fewer positions than asked for.
    """
    name = str(name_or_path)
    if precision not in AUTOCAST_DTYPES:
        raise ConfigError(f"precision is {precision!r}; expected one of {', '.join(AUTOCAST_DTYPES)}")
    given: dict[str, Any] = {
        "pooling": pooling,
        "normalize": normalize,
        "query_prompt": query_prompt,
        "passage_prompt": passage_prompt,
        "query_max_tokens": query_max_tokens,
        "passage_max_tokens": passage_max_tokens,
    }
    settings = replace(read_settings(name), **{key: value for key, value in given.items() if value is not None})
    check_lengths(read_model_config(name), settings.query_max_tokens, settings.passage_max_tokens)
    tokenizer = load_tokenizer(name)
    check_prompt(tokenizer, "query", settings.query_prompt, settings.query_max_tokens)
    check_prompt(tokenizer, "passage", settings.passage_prompt, settings.passage_max_tokens)
    passage_tower = load_tower(name, "passage")
    query_tower = passage_tower if settings.tied else load_tower(name, "query")
    encoder = DualEncoder(
        query_tower,
        passage_tower,
        pooling=settings.pooling,
        normalize=settings.normalize,
        truncate_dim=settings.truncate_dim,
        autocast_dtype=AUTOCAST_DTYPES[precision],
    )
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    encoder.to(device)
    _make_fast(encoder, attention, compiled)
    return EncoderBundle(encoder.eval(), tokenizer, settings)


def _make_fast(encoder: DualEncoder, attention: Literal["auto", "packed", "padded"], compiled: bool) -> None:
    """Packs, and puts in the layers that encode fastest; raises ConfigError where packed texts have other
    embeddings.
    """
    gpu = encoder.device.type == "cuda"
    packed = attention == "packed" or (attention == "auto" and gpu and encoder.can_pack)
    fused = packed and gpu and encoder.can_fuse
    use(encoder, ModelConfig(attention="packed" if packed else "padded", fused=fused, compile=compiled and not fused))


def _tokenizer_bytes(tokenizer: PreTrainedTokenizerBase) -> bytes:
    """The tokenizer's definition, without the padding and truncation that its last call left behind."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return _canonical({"class": type(tokenizer).__name__, "vocabulary": tokenizer.get_vocab()})
    return _canonical(json.loads(backend.to_str()), leave_out=("padding", "truncation"))


def _canonical(content: dict[str, Any], leave_out: Sequence[str] = ()) -> bytes:
    kept = {key: value for key, value in content.items() if key not in leave_out}
    return json.dumps(kept, sort_keys=True, default=str).encode()
