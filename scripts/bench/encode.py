"""Encoding a corpus: passages a second of every way to run the encoder, beside sentence-transformers' own `encode`.

    python -m scripts.bench.encode --output docs/bench/encode.json

BERT-base of random weights, mean pooling, unit vectors, bf16; passages of MS MARCO's lengths (`passages`). `ids`: from
token ids to embeddings in host memory. `text`: from text to shards on disk, tokenised here; sentence-transformers ends
in host memory. A way whose embeddings are not those of the padded fp32 encoder is not timed. sentence-transformers
comes first. `scripts.bench.report` makes the page.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import BertConfig, BertModel

from retriever.command import command_parser, option, run
from retriever.data.text_table import TokenRows
from retriever.data.tokens import TokenTemplate, tokenize_flat
from retriever.encode_shards import ShardOptions, encode_to_shards
from retriever.encoder.bundle import EncoderBundle, load_encoder
from retriever.encoder.dual_encoder import DualEncoder
from retriever.encoder.text_batches import BATCH_TEXTS, Arriving, BatchEncoder, inference
from scripts.bench.flash import provide
from scripts.bench.measure import now, peak_gib, reset_peak
from scripts.bench.passages import random_passages, word_tokenizer
from scripts.bench.tables import Table

# What is done to a padded encoder; "fused" is what the command itself chooses for this model on a GPU.
MODES: dict[str, tuple[Callable[[DualEncoder], object], ...]] = {
    "padded": (),
    "packed": (DualEncoder.pack,),
    "packed,compiled": (DualEncoder.pack, DualEncoder.compile_layers),
    "packed,fused": (DualEncoder.pack, DualEncoder.fuse_layers),
}
_WRONG = 0.999  # a cosine to the fp32 embedding below this is another encoder
_SAMPLE = 2048
_WARM_UP_BATCHES = 2  # as many as are underway at a time, whose memory is there from then on
_MAX_TOKENS = 256
_PACKAGES = ("torch", "triton", "transformers", "sentence-transformers", "tokenizers")


def save_model(folder: Path, layers: int) -> None:
    """BertConfig()'s model, of random weights and `layers` layers, with a tokenizer of whole words."""
    torch.manual_seed(0)
    BertModel(BertConfig(num_hidden_layers=layers)).save_pretrained(folder)
    word_tokenizer(_MAX_TOKENS).save_pretrained(folder)


def load(folder: Path, mode: str, precision: str, device: torch.device) -> EncoderBundle:
    """The encoder in one of MODES."""
    bundle = load_encoder(
        folder,
        passage_max_tokens=_MAX_TOKENS,
        attention="padded",
        precision=precision,  # type: ignore[arg-type]
        device=device,
    )
    for change in MODES[mode]:
        change(bundle.encoder)
    return bundle


@cache
def _tokenized(texts: tuple[str, ...]) -> tuple[TokenRows, ...]:
    """The texts in batches of the size that the command encodes at a time."""
    batches = []
    for start in range(0, len(texts), BATCH_TEXTS):
        tokens, counts = tokenize_flat(word_tokenizer(_MAX_TOKENS), texts[start : start + BATCH_TEXTS])
        batches.append(TokenRows(tokens, np.concatenate([[0], counts]).cumsum()))
    return tuple(batches)


def from_ids(bundle: EncoderBundle, batches: Sequence[TokenRows], tokens_per_chunk: int) -> None:
    """Embeds batch after batch; each arrives while the next is encoded."""
    template = TokenTemplate.from_tokenizer(bundle.tokenizer)
    encoder = BatchEncoder(bundle.encoder, bundle.tokenizer, "passage", "", _MAX_TOKENS, tokens_per_chunk)
    behind: deque[Arriving] = deque()
    with inference(bundle.encoder):
        for batch in batches:
            behind.append(encoder.encode_tokens(batch, template, lambda count: None))
            if len(behind) > 1:
                behind.popleft().wait()
    behind.popleft().wait()


def cosines(found: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """Cosine [n] of each row to its counterpart, in float64."""
    a, b = found.astype(np.float64), expected.astype(np.float64)
    return (a * b).sum(axis=1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)


@contextmanager
def measured(table: Table, device: torch.device, case: str, method: str, texts: int, note: str = "") -> Iterator[None]:
    """Adds rate and peak memory of what happens inside; it ends with its results on the host."""
    reset_peak(device)
    started = now(device)
    yield
    table.add(case, method, "passages_per_s", texts / (now(device) - started), "passages/s", note)
    if (peak := peak_gib(device)) is not None:
        table.add(case, method, "peak_gib", peak, "GiB")


def measure(
    table: Table, folder: Path, mode: str, texts: list[str], reference: np.ndarray, args: argparse.Namespace
) -> None:
    """One way to run the encoder: its cosine to `reference`, then its rate from ids and from text."""
    device = torch.device(args.device)
    bundle = load(folder, mode, "bf16", device)
    case = f"texts={args.texts},{mode}"
    found = cosines(
        bundle.encode(texts[: len(reference)], "passage", tokens_per_chunk=args.tokens_per_chunk), reference
    )
    table.add(case, "bigbatch", "cosine_min", float(found.min()), "", f"to padded fp32, {len(reference)} passages")
    if not found.min() > _WRONG:
        table.add(case, "bigbatch", "passages_per_s", None, "passages/s", "not timed: wrong")
        return
    batches = _tokenized(tuple(texts)) * 4
    from_ids(bundle, batches[:_WARM_UP_BATCHES], args.tokens_per_chunk)  # kernels are compiled, memory is there
    count = sum(map(len, batches))
    with measured(table, device, f"texts={count},{mode},ids", "bigbatch", count):
        from_ids(bundle, batches, args.tokens_per_chunk)
    if mode not in args.text_modes:
        return
    pairs = ((str(row), texts[row % len(texts)]) for row in range(args.texts))
    with tempfile.TemporaryDirectory() as shards, measured(table, device, f"{case},text", "bigbatch", args.texts):
        options = ShardOptions(tokens_per_chunk=args.tokens_per_chunk, progress=False)
        encode_to_shards(bundle, pairs, "passage", shards, "random", options)


def sentence_transformers(
    table: Table, folder: Path, texts: list[str], reference: np.ndarray, args: argparse.Namespace, *, flash: bool
) -> None:
    """The peer: its own `encode`, which sorts all texts by length, on as many texts as take it a few seconds.

    With `flash` as its documentation recommends: flash attention, nothing padded.
    """
    method = "sentence-transformers-flash" if flash else "sentence-transformers"
    case = f"texts={min(len(texts), args.peer_texts)}"
    from sentence_transformers import SentenceTransformer

    note, kwargs = "", dict[str, Any](dtype=torch.bfloat16)
    if flash:
        note, kwargs = provide(), {**kwargs, "attn_implementation": "flash_attention_2"}
    model = SentenceTransformer(str(folder), device=args.device, model_kwargs=kwargs)
    model.max_seq_length = _MAX_TOKENS
    device = torch.device(args.device)

    def encode(some: list[str], size: int) -> np.ndarray:
        return model.encode(some, batch_size=size, normalize_embeddings=True, show_progress_bar=False).astype(
            np.float32
        )

    some = texts[: args.peer_texts]
    for size in args.peer_batches:
        found = cosines(encode(texts[: len(reference)], size), reference)
        table.add(
            f"{case},batch={size}",
            method,
            "cosine_min",
            float(found.min()),
            "",
            f"to our padded fp32, {len(reference)} passages",
        )
        with measured(table, device, f"{case},batch={size},text", method, len(some), note):
            encode(some, size)


def _encode(args: argparse.Namespace) -> None:
    torch.backends.cuda.enable_cudnn_sdp(
        False
    )  # it spends long on a plan for every new shape of padded texts, the peer's
    table = Table.begin(args.command, _PACKAGES)
    texts = random_passages(min(args.distinct, args.texts))[0]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_model(folder, args.layers)
        exact = load(folder, "padded", "fp32", torch.device(args.device))
        reference = exact.encode(texts[:_SAMPLE], "passage", tokens_per_chunk=min(args.tokens_per_chunk, 16_384))
        del exact
        for flash in (True, False) if args.peer_texts else ():
            method = "sentence-transformers-flash" if flash else "sentence-transformers"
            with table.attempt(f"texts={args.peer_texts},text", method, "passages_per_s", "passages/s"):
                sentence_transformers(table, folder, texts, reference, args, flash=flash)
            table.save(args.output)  # a run that is cut short keeps what it has
        for mode in args.modes:
            with table.attempt(f"texts={args.texts},{mode}", "bigbatch", "passages_per_s", "passages/s"):
                measure(table, folder, mode, texts, reference, args)
            table.save(args.output)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command `python -m scripts.bench.encode`."""
    parser = command_parser(
        "python -m scripts.bench.encode",
        __doc__,
        option("--output", type=Path, default=Path("docs/bench/encode.json")),
        option("--texts", type=int, default=393_216, help="that are encoded from text"),
        option("--distinct", type=int, default=65_536, help="texts that are made; they are repeated up to --texts"),
        option("--modes", nargs="*", choices=MODES, default=["packed,fused", "padded"]),
        option("--text-modes", nargs="*", choices=MODES, default=["packed,fused"], help="also from text"),
        option("--tokens-per-chunk", type=int, default=131_072),
        option("--peer-texts", type=int, default=16_384, help="of sentence-transformers; 0: none"),
        option("--peer-batches", type=int, nargs="+", default=[512, 2048], help="texts that it takes at once"),
        option("--layers", type=int, default=12),
        option("--device", default="cuda" if torch.cuda.is_available() else "cpu"),
    )
    return run(parser, arguments, _encode)


if __name__ == "__main__":
    sys.exit(main())
