"""Encoding a corpus: passages per second for every way to run the encoder, beside sentence-transformers' own `encode`.

    python -m scripts.bench.encode --output docs/bench/encode.json

BERT-base, or another `--model`, with random weights, mean pooling, unit vectors, bf16, passages of MS MARCO's lengths.
`ids` measures from token ids to embeddings in host memory. `text` measures from text to shards on disk, tokenising
included; for sentence-transformers, to host memory. Every method is compared with the padded fp32 encoder first, and
not timed if its embeddings differ. sentence-transformers is measured first. `scripts.bench.report` makes the page.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from retriever.command import command, option
from retriever.data.text_table import TokenRows
from retriever.data.tokens import TokenTemplate, tokenize_flat
from retriever.encode_shards import ShardOptions, encode_to_shards
from retriever.encoder.bundle import EncoderBundle, load_encoder
from retriever.encoder.dual_encoder import DualEncoder
from retriever.encoder.text_batches import BATCH_TEXTS, Arriving, BatchEncoder, inference
from scripts.bench.flash import provide
from scripts.bench.measure import timed
from scripts.bench.passages import random_passages, word_tokenizer
from scripts.bench.step_methods import MODELS, random_model, resized
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


def load(folder: Path, mode: str, precision: str, device: torch.device) -> EncoderBundle:
    """The encoder in one of MODES."""
    bundle = load_encoder(
        folder,
        passage_max_tokens=_MAX_TOKENS,
        attention="padded",
        pooling="mean",
        precision=precision,  # type: ignore[arg-type]
        device=device,
    )
    for change in MODES[mode]:
        change(bundle.encoder)
    return bundle


def from_ids(bundle: EncoderBundle, batches: Sequence[TokenRows], tokens_per_chunk: int) -> None:
    """Embeds `batches` one after another. Each one's embeddings are copied to the host while the next is encoded."""
    template = TokenTemplate.from_tokenizer(bundle.tokenizer)
    encoder = BatchEncoder(bundle.encoder, bundle.tokenizer, "passage", "", _MAX_TOKENS, tokens_per_chunk)
    behind: deque[Arriving] = deque()
    with inference(bundle.encoder):
        for batch in batches:
            behind.append(encoder.encode_tokens(batch, template, lambda count: None))
            if len(behind) > 1:
                behind.popleft().wait()
    behind.popleft().wait()


def worst_cosine(found: np.ndarray, expected: np.ndarray) -> float:
    """The lowest cosine between a row of `found` and the same row of `expected`, both [n, D], in float64."""
    a, b = (torch.from_numpy(rows).double() for rows in (found, expected))
    return float(torch.nn.functional.cosine_similarity(a, b, eps=0.0).min())


@dataclass(frozen=True)
class EncodeBench:
    """The encoding benchmark: measures each method and adds its rows to the table."""

    table: Table
    folder: Path  # of the model
    texts: list[str]
    batches: list[TokenRows]  # of the texts' tokens, as many at a time as the command encodes
    reference: np.ndarray  # embeddings [n, D] of the first texts by the padded fp32 encoder
    args: argparse.Namespace

    def is_right(self, case: str, method: str, encode: Callable[[list[str]], np.ndarray]) -> bool:
        """Adds the worst cosine between `encode`'s embeddings and the reference; returns whether it is high enough."""
        worst = worst_cosine(encode(self.texts[: len(self.reference)]), self.reference)
        note = f"to our padded fp32, {len(self.reference)} passages"
        self.table.add(case, method, "cosine_min", worst, "", note)
        if not worst > _WRONG:
            self.table.add(case, method, "passages_per_s", None, "passages/s", "not timed: wrong")
        return worst > _WRONG

    def time(self, case: str, method: str, texts: int, call: Callable[[], object], note: str = "") -> None:
        """Adds the rate and the peak memory of `call`, which embeds `texts` texts and returns when the results are on
        the host.
        """
        (seconds,), peak_gib = timed(torch.device(self.args.device), call)
        self.table.add(case, method, "passages_per_s", texts / seconds, "passages/s", note)
        if peak_gib is not None:
            self.table.add(case, method, "peak_gib", peak_gib, "GiB")

    def ours(self, mode: str) -> None:
        """Measures one of MODES, from token ids and from text."""
        tokens_per_chunk, case = self.args.tokens_per_chunk, f"texts={self.args.texts},{mode}"
        with self.table.attempt(case, "bigbatch", "passages_per_s", "passages/s"):
            bundle = load(self.folder, mode, "bf16", torch.device(self.args.device))
            encode = partial(bundle.encode, side="passage", tokens_per_chunk=tokens_per_chunk)
            if not self.is_right(case, "bigbatch", encode):
                return
            batches = self.batches * 4
            from_ids(bundle, batches[:_WARM_UP_BATCHES], tokens_per_chunk)  # kernels are compiled, memory is there
            count = sum(map(len, batches))
            ids = partial(from_ids, bundle, batches, tokens_per_chunk)
            self.time(f"texts={count},{mode},ids", "bigbatch", count, ids)
            if mode in self.args.text_modes:
                pairs = ((str(row), self.texts[row % len(self.texts)]) for row in range(self.args.texts))
                options = ShardOptions(tokens_per_chunk=tokens_per_chunk, progress=False)
                with tempfile.TemporaryDirectory() as shards:
                    call = partial(encode_to_shards, bundle, pairs, "passage", shards, "random", options)
                    self.time(f"{case},text", "bigbatch", self.args.texts, call)

    def sentence_transformers(self, *, flash: bool) -> None:
        """Measures sentence-transformers' `encode` on the first `--peer-texts` texts, which it sorts by length.

        `flash` is the setup that its documentation recommends: flash attention over unpadded inputs.
        """
        method = "sentence-transformers-flash" if flash else "sentence-transformers"
        texts = self.texts[: self.args.peer_texts]
        with self.table.attempt(f"texts={len(texts)},text", method, "passages_per_s", "passages/s"):
            from sentence_transformers import SentenceTransformer

            note, kwargs = "", dict[str, Any](dtype=torch.bfloat16)
            if flash:
                note, kwargs = provide(), {**kwargs, "attn_implementation": "flash_attention_2"}
            model = SentenceTransformer(str(self.folder), device=self.args.device, model_kwargs=kwargs)
            model.max_seq_length = _MAX_TOKENS
            for size in self.args.peer_batches:
                encode = partial(model.encode, batch_size=size, normalize_embeddings=True, show_progress_bar=False)
                case = f"texts={len(texts)},batch={size}"
                if self.is_right(case, method, encode):
                    self.time(f"{case},text", method, len(texts), partial(encode, texts), note)


@command(
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
    option("--model", choices=MODELS, default="bert-base", help="whose shape is measured (default: %(default)s)"),
    option("--layers", type=int, help="fewer than the model has"),
    option("--device", default="cuda" if torch.cuda.is_available() else "cpu"),
)
def main(args: argparse.Namespace) -> None:
    """The command `python -m scripts.bench.encode`."""
    # cuDNN spends long on a plan for every new shape of padded texts, the peer's.
    torch.backends.cuda.enable_cudnn_sdp(False)
    table = Table.begin(args.command, _PACKAGES, args.output)
    texts = random_passages(min(args.distinct, args.texts))[0]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        torch.manual_seed(0)
        random_model(resized(MODELS[args.model](), num_hidden_layers=args.layers)).save_pretrained(folder)
        word_tokenizer(_MAX_TOKENS).save_pretrained(folder)
        exact = load(folder, "padded", "fp32", torch.device(args.device))
        reference = exact.encode(texts[:_SAMPLE], "passage", tokens_per_chunk=min(args.tokens_per_chunk, 16_384))
        parts = (
            tokenize_flat(exact.tokenizer, texts[at : at + BATCH_TEXTS]) for at in range(0, len(texts), BATCH_TEXTS)
        )
        batches = [TokenRows(tokens, np.concatenate([[0], counts]).cumsum()) for tokens, counts in parts]
        del exact
        bench = EncodeBench(table, folder, texts, batches, reference, args)
        for flash in (True, False) if args.peer_texts else ():
            bench.sentence_transformers(flash=flash)
        for mode in args.modes:
            bench.ours(mode)


if __name__ == "__main__":
    sys.exit(main())
