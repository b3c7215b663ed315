"""Encoding a corpus: passages a second of every way to run the encoder, beside sentence-transformers' own `encode`.

    python -m scripts.bench.encode --output docs/bench/encode.json

BERT-base of random weights, mean pooling, unit vectors, bf16; passages of MS MARCO's lengths (`passages`). `ids`: from token ids to
embeddings in host memory. `text`: from text to shards on disk, tokenised here; sentence-transformers ends in host memory. A way whose
embeddings are not those of the padded fp32 encoder is not timed. sentence-transformers comes first. The table goes beside the JSON.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import BertConfig, BertModel

from retriever.data.text_table import TokenRows
from retriever.data.tokens import TokenTemplate, tokenize_flat
from retriever.encode import encode_to_shards
from retriever.encoder.bundle import EncoderBundle, load_encoder
from retriever.encoder.dual_encoder import DualEncoder
from retriever.encoder.slabs import SLAB_TEXTS, Arriving, SlabEncoder, inference
from scripts.bench.flash import provide
from scripts.bench.passages import passage_lengths, random_passages, word_tokenizer
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
_WARM_UP_SLABS = 2  # as many as are underway at a time, whose memory is there from then on
_MAX_TOKENS = 256
_PACKAGES = ("torch", "triton", "transformers", "sentence-transformers", "tokenizers")


def save_model(folder: Path, layers: int) -> None:
    """BertConfig()'s model, of random weights and `layers` layers, with a tokenizer of whole words."""
    torch.manual_seed(0)
    BertModel(BertConfig(num_hidden_layers=layers)).save_pretrained(folder)
    word_tokenizer(_MAX_TOKENS).save_pretrained(folder)


def load(folder: Path, mode: str, precision: str, device: torch.device) -> EncoderBundle:
    """The encoder in one of MODES."""
    bundle = load_encoder(folder, passage_max_tokens=_MAX_TOKENS, attention="padded", precision=precision, device=device)  # type: ignore[arg-type]
    for change in MODES[mode]:
        change(bundle.encoder)
    return bundle


@cache
def _tokenized(texts: tuple[str, ...]) -> tuple[TokenRows, ...]:
    """The texts in slabs of the size that the command encodes at a time."""
    slabs = []
    for start in range(0, len(texts), SLAB_TEXTS):
        tokens, counts = tokenize_flat(word_tokenizer(_MAX_TOKENS), texts[start : start + SLAB_TEXTS])
        slabs.append(TokenRows(tokens, np.concatenate([[0], counts]).cumsum()))
    return tuple(slabs)


def from_ids(bundle: EncoderBundle, slabs: Sequence[TokenRows], tokens_per_chunk: int) -> None:
    """Embeds slab after slab; each arrives while the next is encoded."""
    template = TokenTemplate.from_tokenizer(bundle.tokenizer)
    encoder = SlabEncoder(bundle.encoder, bundle.tokenizer, "passage", "", _MAX_TOKENS, tokens_per_chunk)
    behind: deque[Arriving] = deque()
    with inference(bundle.encoder):
        for slab in slabs:
            behind.append(encoder.encode_tokens(slab, template, lambda count: None))
            if len(behind) > 1:
                behind.popleft().wait()
    behind.popleft().wait()


def cosines(found: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """Cosine [n] of each row to its counterpart, in float64."""
    a, b = found.astype(np.float64), expected.astype(np.float64)
    return (a * b).sum(axis=1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)


@contextmanager
def measured(table: Table, case: str, method: str, texts: int, note: str = "") -> Iterator[None]:
    """Adds rate and peak memory of what happens inside; it ends with its results on the host."""
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    yield
    table.add(case, method, "passages_per_s", texts / (time.perf_counter() - started), "passages/s", note)
    if cuda:
        table.add(case, method, "peak_gib", torch.cuda.max_memory_allocated() / 2**30, "GiB")


def measure(table: Table, folder: Path, mode: str, texts: list[str], reference: np.ndarray, args: argparse.Namespace) -> None:
    """One way to run the encoder: its cosine to `reference`, then its rate from ids and from text."""
    device = torch.device(args.device)
    bundle = load(folder, mode, "bf16", device)
    case = f"texts={args.texts},{mode}"
    found = cosines(bundle.encode(texts[: len(reference)], "passage", tokens_per_chunk=args.tokens_per_chunk), reference)
    table.add(case, "bigbatch", "cosine_min", float(found.min()), "", f"to padded fp32, {len(reference)} passages")
    if not found.min() > _WRONG:
        table.add(case, "bigbatch", "passages_per_s", None, "passages/s", "not timed: wrong")
        return
    slabs = _tokenized(tuple(texts)) * 4
    from_ids(bundle, slabs[:_WARM_UP_SLABS], args.tokens_per_chunk)  # kernels are compiled, memory is there
    count = sum(map(len, slabs))
    with measured(table, f"texts={count},{mode},ids", "bigbatch", count):
        from_ids(bundle, slabs, args.tokens_per_chunk)
    if mode not in args.text_modes:
        return
    pairs = ((str(row), texts[row % len(texts)]) for row in range(args.texts))
    with tempfile.TemporaryDirectory() as shards, measured(table, f"{case},text", "bigbatch", args.texts):
        encode_to_shards(
            bundle, pairs, "passage", shards, texts_fingerprint="random", tokens_per_chunk=args.tokens_per_chunk, progress=False
        )


def sentence_transformers(
    table: Table, folder: Path, texts: list[str], reference: np.ndarray, args: argparse.Namespace, *, flash: bool
) -> None:
    """The peer: its own `encode`, which sorts all texts by length, on as many texts as take it a few seconds.

    With `flash` as its documentation recommends: flash attention, nothing padded.
    """
    method = "sentence-transformers-flash" if flash else "sentence-transformers"
    case = f"texts={min(len(texts), args.peer_texts)}"
    try:
        from sentence_transformers import SentenceTransformer

        note = provide() if flash else ""
        kwargs: dict[str, Any] = {"dtype": torch.bfloat16, **({"attn_implementation": "flash_attention_2"} if flash else {})}
        model = SentenceTransformer(str(folder), device=args.device, model_kwargs=kwargs)
    except ImportError as error:  # of the package, or of CUDA, which flash attention needs
        table.add(f"{case},text", method, "passages_per_s", None, "passages/s", f"does not run: {str(error)[:160]}")
        return
    model.max_seq_length = _MAX_TOKENS

    def encode(some: list[str], size: int) -> np.ndarray:
        return model.encode(some, batch_size=size, normalize_embeddings=True, show_progress_bar=False).astype(np.float32)

    some = texts[: args.peer_texts]
    for size in args.peer_batches:
        found = cosines(encode(texts[: len(reference)], size), reference)
        table.add(f"{case},batch={size}", method, "cosine_min", float(found.min()), "", f"to our padded fp32, {len(reference)} passages")
        with measured(table, f"{case},batch={size},text", method, len(some), note):
            encode(some, size)


def markdown(table: Table) -> str:
    """The result as a page."""
    peer = max(
        (row.value or 0 for row in table.rows if row.method.startswith("sentence-transformers") and row.unit == "passages/s"), default=0
    )
    lines = [
        "# Encoding a corpus",
        "",
        f"`{table.command}` at commit {table.commit[:12]}, {table.hardware}; "
        + ", ".join(f"{name} {version}" for name, version in table.versions.items())
        + ".",
        "",
        f"BERT-base, random weights, bf16; passages of {_lengths_in_words()}. From token ids to embeddings in host memory (ids), or from",
        "text to shards on disk (text; sentence-transformers: to host memory). Cosine: the worst passage of a sample against the padded",
        "fp32 encoder. Padded attention goes without cuDNN, which builds a plan for every new shape.",
        "",
        "| method | | passages/s | " + ("× sentence-transformers | " if peer else "") + "peak GiB | cosine |",
        "|---" * (6 if peer else 5) + "|",
    ]
    cosine_of = {(_way(row.case), row.method): row.value for row in table.rows if row.metric == "cosine_min"}
    for row in table.rows:
        if row.metric == "passages_per_s":
            cosine = cosine_of.get((_way(row.case), row.method))
            peak = table.get(row.case, row.method, "peak_gib")
            cells = [
                row.method,
                row.case + (f", {row.note}" if row.note and row.value is not None else ""),
                row.note if row.value is None else f"{row.value:,.0f}",
                *([f"{row.value / peer:.1f}" if row.value else "—"] if peer else []),
                "—" if peak is None else f"{peak:.1f}",
                "—" if cosine is None else f"{cosine:.6f}",
            ]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _way(case: str) -> str:
    """The case without the number of texts and where they came from."""
    return case.removesuffix(",ids").removesuffix(",text").partition(",")[2]


def _lengths_in_words() -> str:
    lengths = passage_lengths(100_000, np.random.default_rng(0))
    return f"{lengths.mean():.0f} tokens on average (lognormal(ln 70, 0.42) clipped to 16 … 256)"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("docs/bench/encode.json"))
    parser.add_argument("--texts", type=int, default=393_216, help="that are encoded from text (default: %(default)s)")
    parser.add_argument("--distinct", type=int, default=65_536, help="texts that are made; they are repeated up to --texts")
    parser.add_argument("--modes", nargs="*", choices=MODES, default=["packed,fused", "padded"])
    parser.add_argument("--text-modes", nargs="*", choices=MODES, default=["packed,fused"], help="also from text")
    parser.add_argument("--tokens-per-chunk", type=int, default=131_072)
    parser.add_argument("--peer-texts", type=int, default=16_384, help="of sentence-transformers; 0: none")
    parser.add_argument("--peer-batches", type=int, nargs="+", default=[512, 2048], help="texts that it takes at once")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    torch.backends.cuda.enable_cudnn_sdp(False)  # it spends long on a plan for every new shape of padded texts, the peer's
    table = Table.begin(_PACKAGES)
    texts = random_passages(min(args.distinct, args.texts))[0]

    def attempt(case: str, work: Callable[[], None]) -> None:
        try:
            work()
        except Exception as error:  # one way that does not run must not lose the figures of the others
            table.add(case, "bigbatch", "passages_per_s", None, "passages/s", f"fails: {type(error).__name__}: {str(error)[:160]}")
        table.save(args.output)  # a run that is cut short keeps what it has
        args.output.with_suffix(".md").write_text(markdown(table))

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_model(folder, args.layers)
        exact = load(folder, "padded", "fp32", torch.device(args.device))
        reference = exact.encode(texts[:_SAMPLE], "passage", tokens_per_chunk=min(args.tokens_per_chunk, 16_384))
        del exact
        if args.peer_texts:
            for flash in (True, False):
                peer = partial(sentence_transformers, table, folder, texts, reference, args, flash=flash)
                attempt("sentence-transformers", peer)
        for mode in args.modes:
            attempt(f"texts={args.texts},{mode}", lambda mode=mode: measure(table, folder, mode, texts, reference, args))  # type: ignore[misc]
    print(markdown(table))


if __name__ == "__main__":
    main()
