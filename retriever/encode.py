"""The command that turns texts into embedding shards: `accelerate launch retriever/encode.py --help`."""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Literal

if not __package__:  # started as a file: the project's root belongs on the path, not this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from retriever.command import ENCODER, at_least_one, command, option
from retriever.data.collection import corpus_tables, once, query_tables
from retriever.data.formats import DataError, final_text, read_corpus, read_queries
from retriever.data.records import shortened_note
from retriever.errors import RefusedError
from retriever.files import read_json
from retriever.wording import counted

_TOLD = "(default: what the model says)"


@command(
    "retriever/encode.py",
    "texts -> embedding shards (npy, ids, manifest)",
    option("--model", required=True, help="model folder or Hugging Face name"),
    option(
        "--input",
        required=True,
        type=Path,
        help="corpus.jsonl, collection.tsv, queries.*, or a folder that holds one",
    ),
    option("--side", required=True, choices=("query", "passage")),
    option("--output", required=True, type=Path, help="folder for the shards; what is there of the same job is kept"),
    option(
        "--overwrite",
        action="store_true",
        help="replace what another job left in --output, removed first; else it is refused",
    ),
    option("--prompt", help=f"put in front of every text {_TOLD}"),
    option("--max-tokens", type=at_least_one, help=f"a text's length, prompt and special tokens included {_TOLD}"),
    option("--pooling", choices=("cls", "mean", "last"), help=_TOLD),
    option("--normalize", action=argparse.BooleanOptionalAction, help=f"unit vectors {_TOLD}"),
    option("--title", choices=("join", "drop"), help=f"of a passage {_TOLD}"),
    option("--title-separator", help=f"between title and text {_TOLD}"),
    *ENCODER,
    option(
        "--compile",
        choices=("auto", "true", "false"),
        default="auto",
        help="layers that have no fused version of ours; auto: of passages on a GPU",
    ),
    option(
        "--dtype",
        choices=("float32", "float16", "int8", "binary"),
        default="float32",
        help="of the shards; int8: a byte a dimension, binary: a bit",
    ),
    option(
        "--tokens-per-chunk",
        type=at_least_one,
        help="the encoder sees at once, padding included (default: 131072, on a CPU 8192)",
    ),
    option("--shard-rows", type=at_least_one, help="embeddings a shard (default: 65536)"),
    resumes="the same command goes on with the shards that are not there yet",
    lower="--tokens-per-chunk",
)
def main(args: argparse.Namespace) -> None:
    """The command `accelerate launch retriever/encode.py`, or `python -m retriever.encode`."""
    from retriever.encode_shards import SHARD_ROWS, ShardOptions, encode_to_shards
    from retriever.encoder.bundle import load_encoder
    from retriever.launch import launched

    if not args.input.exists():
        raise RefusedError(f"--input {args.input}: no such file or folder")
    with launched() as world:
        bundle = load_encoder(
            args.model,
            pooling=args.pooling,
            normalize=args.normalize,
            precision=args.precision,
            attention=args.attention,
            compiled=args.compile == "true"
            or (args.compile == "auto" and args.side == "passage" and world.device.type == "cuda"),
            device=world.device,
            **{f"{args.side}_prompt": args.prompt, f"{args.side}_max_tokens": args.max_tokens},
        )
        if world.is_first:
            layout = "packed" if bundle.encoder.packed else "padded"
            print(f"{args.model}: {layout} texts, {args.precision}, on {world.device}")
        title, separator = args.title or bundle.settings.title, args.title_separator
        separator = bundle.settings.title_separator if separator is None else separator
        texts = _read_texts(args.input, args.side, title, separator)
        named = _fingerprint(args.input, args.side, title, separator)
        options = ShardOptions(args.shard_rows or SHARD_ROWS, args.dtype, args.tokens_per_chunk, args.overwrite)
        folder = encode_to_shards(bundle, texts, args.side, args.output, named, options, world)
    if world.is_first:
        manifest = read_json(folder / "manifest.json")
        embeddings = counted(manifest["rows"], "embedding")
        print(f"{folder}: {embeddings} of dimension {manifest['dimension']}, {manifest['dtype']}")
        if note := shortened_note():
            print(note)


def _read_texts(path: Path, side: str, title: Literal["join", "drop"], separator: str) -> Iterator[tuple[str, str]]:
    """(id, text) of each. Raises DataError at once where there is none: before anything in the output folder is
    replaced.
    """
    if side == "query":
        texts: Iterator[tuple[str, str]] = iter(read_queries(path))
    else:
        texts = ((str(passage.id), final_text(passage, title, separator)) for passage in read_corpus(path))
    if (first := next(texts, None)) is None:
        raise DataError(f"no {side} in it, so there is nothing to encode", path)
    return once(chain([first], texts), path)


def _fingerprint(path: Path, side: str, title: str, separator: str) -> str:
    tables = query_tables(path) if side == "query" else corpus_tables(path)
    made_of = [side, [table.digest() for table in tables], *([title, separator] if side == "passage" else [])]
    return hashlib.blake2b(json.dumps(made_of).encode(), digest_size=16).hexdigest()


if __name__ == "__main__":
    sys.exit(main())
