"""An encoder with its tokenizer and settings: texts in, embeddings out."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from tqdm import tqdm
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from retriever.config import ConfigError
from retriever.data.chunks import plan_chunks
from retriever.data.layout import pad_rows
from retriever.data.tokens import Side, TokenTemplate, tokenize_batch
from retriever.encoder.architectures import check_lengths
from retriever.encoder.dual_encoder import DualEncoder, load_tower
from retriever.encoder.pooling import PoolingMode
from retriever.encoder.settings import EncoderSettings, read_model_config, read_settings, tower_folder

Precision = Literal["fp32", "bf16", "fp16"]
AUTOCAST_DTYPES: dict[Precision, torch.dtype | None] = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}

_TEXTS_AHEAD = 16_384  # tokenised while the texts before them are encoded


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

        Texts are sorted by length and padded into chunks of at most `tokens_per_chunk` tokens. Dropout is off while this runs;
        a text without any token gets the zero vector. `progress` shows a bar, or is called with the number of texts just done.
        """
        budget = tokens_per_chunk or (65_536 if self.encoder.device.type == "cuda" else 8_192)
        embeddings = np.zeros((len(texts), self.dimension), dtype=np.float32)
        template = TokenTemplate.from_tokenizer(self.tokenizer)
        with _inference(self.encoder), tqdm(total=len(texts), unit="text", desc=f"encode {side}", disable=progress is not True) as bar:
            done = progress if callable(progress) else bar.update
            start = 0
            for rows in self._tokenize_ahead(texts, side, template):
                embeddings[start : start + len(rows)] = self._encode_rows(rows, side, budget, template.pad_id, done)
                start += len(rows)
        return embeddings

    def model_hash(self) -> str:
        """SHA-256 of what makes the embeddings besides prompts, lengths and precision: weights, architecture, tokenizer, pooling."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.encoder.state_dict().items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy())
        for tower in (self.encoder.query_tower, self.encoder.passage_tower):
            digest.update(_canonical(tower.config.to_diff_dict(), leave_out=("transformers_version", "_name_or_path", "dtype")))
        digest.update(_tokenizer_bytes(self.tokenizer))
        digest.update(_canonical({"pooling": self.encoder.pooling, "normalize": self.encoder.normalize}))
        return digest.hexdigest()

    def _tokenize_ahead(self, texts: Sequence[str], side: Side, template: TokenTemplate) -> Iterator[list[np.ndarray]]:
        """Slabs of texts as the encoder sees them (prompt, special tokens, truncated), the next one made in a thread meanwhile."""
        prompt, max_tokens = self.settings.prompt(side), self.settings.max_tokens(side)

        def tokenize(start: int) -> list[np.ndarray]:
            slab = tokenize_batch(self.tokenizer, texts[start : start + _TEXTS_AHEAD], prompt)
            return [template.wrap(np.asarray(tokens, dtype=np.int64), max_tokens) for tokens in slab]

        starts = range(0, len(texts), _TEXTS_AHEAD)
        with ThreadPoolExecutor(max_workers=1) as thread:
            upcoming = thread.submit(tokenize, 0)
            for following in [*starts[1:], None]:
                rows = upcoming.result()
                if following is not None:
                    upcoming = thread.submit(tokenize, following)
                yield rows

    def _encode_rows(self, rows: Sequence[np.ndarray], side: Side, budget: int, pad_id: int, done: Callable[[int], object]) -> np.ndarray:
        """Embeddings [n, D] of texts of the given tokens; one chunk at a time is on the device."""
        lengths = np.array([len(row) for row in rows], dtype=np.int64)
        found = torch.zeros(len(rows), self.dimension, device=self.encoder.device)
        filled = np.flatnonzero(lengths)
        for positions in plan_chunks(lengths[filled], max(budget, int(lengths.max(initial=1)))):
            chunk = filled[positions]
            tokens = pad_rows([rows[i] for i in chunk], pad_id).map(lambda t: t.to(found.device))
            found[torch.from_numpy(chunk).to(found.device)] = self.encoder(side, tokens).float()  # [n, D]
            done(len(chunk))
        done(len(rows) - len(filled))
        return found.cpu().numpy()


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
    device: torch.device | str | None = None,
) -> EncoderBundle:
    """An encoder in eval mode from a Hugging Face name, a sentence-transformers folder or an export of ours.

    What is not given is what the model says of itself (`read_settings`). Default device: the first GPU where there is one.
    Raises ConfigError where there is no such model, it is not supported, or has fewer positions than asked for.
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
    passage_tower = load_tower(name, "passage")
    query_tower = passage_tower if settings.tied else load_tower(name, "query")
    encoder = DualEncoder(
        query_tower,
        passage_tower,
        pooling=settings.pooling,
        normalize=settings.normalize,
        autocast_dtype=AUTOCAST_DTYPES[precision],
    )
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return EncoderBundle(encoder.to(device).eval(), load_tokenizer(name), settings)


def load_tokenizer(name_or_path: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder or Hugging Face name; both towers of a folder share one. Raises ConfigError."""
    name = str(name_or_path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, subfolder=tower_folder(name, "passage"), trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ConfigError(f"model.name_or_path: {name} has no tokenizer that can be loaded: {error}") from error
    # Without any tokenizer file transformers makes up an empty tokenizer of the architecture's class.
    if len(tokenizer) <= len(tokenizer.all_special_ids):
        raise ConfigError(f"model.name_or_path: {name} has no tokenizer that knows a word; expected its tokenizer files beside the weights")
    return tokenizer


@contextmanager
def _inference(encoder: DualEncoder) -> Iterator[None]:
    """Eval mode without graphs; every module's own mode comes back afterwards."""
    modes = [(module, module.training) for module in encoder.modules()]
    encoder.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


def _tokenizer_bytes(tokenizer: PreTrainedTokenizerBase) -> bytes:
    """The tokenizer's definition, without the padding and truncation that its last call left behind."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return _canonical({"class": type(tokenizer).__name__, "vocabulary": tokenizer.get_vocab()})
    return _canonical(json.loads(backend.to_str()), leave_out=("padding", "truncation"))


def _canonical(content: dict[str, Any], leave_out: Sequence[str] = ()) -> bytes:
    kept = {key: value for key, value in content.items() if key not in leave_out}
    return json.dumps(kept, sort_keys=True, default=str).encode()
