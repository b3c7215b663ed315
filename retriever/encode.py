"""The command that turns texts into embedding shards: `accelerate launch retriever/encode.py --help`."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from itertools import chain, count, islice
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
from tqdm import tqdm

if not __package__:  # run as a script, Python looks for modules in this folder first, and not in the project
    _HERE = Path(__file__).resolve().parent
    sys.path[:] = [str(_HERE.parent), *(entry for entry in sys.path if Path(entry).resolve() != _HERE)]

if TYPE_CHECKING:
    from retriever.data.tokens import Side
    from retriever.encoder.bundle import EncoderBundle
    from retriever.encoder.slabs import Arriving
    from retriever.shards import ShardWriter

SHARD_ROWS = 65_536
_WRITES_BEHIND = 2  # shards that wait to be written, at most


def encode_to_shards(
    bundle: EncoderBundle,
    texts: Iterable[tuple[str, str]],
    side: Side,
    folder: str | Path,
    *,
    texts_fingerprint: str,
    rank: int = 0,
    world_size: int = 1,
    barrier: Callable[[], None] | None = None,
    shard_rows: int = SHARD_ROWS,
    dtype: Literal["float32", "float16"] = "float32",
    tokens_per_chunk: int | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> Path:
    """Embeds (id, text) pairs into `folder`, which `retriever.shards.open_shards` opens. Returns the folder.

    All ranks see the same texts in the same order; rank r encodes shards r, r + world_size, … and rank 0 writes the manifest
    when all are done, so more than one rank needs `barrier`, a function that returns once every rank has called it.
    Shards of the same job (model, prompt, length, precision, mode, `texts_fingerprint`, …) that are already there are kept, whatever
    the number of ranks that wrote them; where all are, nothing is encoded. Those of another job are replaced with `overwrite`,
    else refused: a ShardError names what differs. Texts are sorted by length within a shard, a slab of it at a time. While one
    slab is encoded, threads read and tokenise the next and write the shards before.
    """
    from retriever.encoder.slabs import mode_of
    from retriever.shards import ShardJob, ShardWriter

    if world_size > 1 and barrier is None:
        raise ValueError(f"world_size is {world_size} without a barrier; expected a function that waits for all ranks")
    wait = barrier or (lambda: None)
    job = ShardJob(
        side=side,
        model=bundle.model_hash(),
        prompt=bundle.settings.prompt(side),
        max_tokens=bundle.settings.max_tokens(side),
        pooling=bundle.encoder.pooling,
        normalize=bundle.encoder.normalize,
        precision=bundle.precision,
        mode=mode_of(bundle.encoder),
        dimension=bundle.dimension,
        dtype=dtype,
        texts=texts_fingerprint,
        shard_rows=shard_rows,
    )
    writer = ShardWriter(folder, job)
    finished = writer.finished()
    if not finished and not overwrite:
        writer.check()
    wait()  # no rank may change the folder before every rank has looked at it
    if finished:
        return writer.folder
    if rank == 0:
        writer.prepare()
    wait()
    reading = _Reading(texts, shard_rows, lambda shard: shard % world_size == rank and not writer.has(shard))
    with tqdm(unit=" texts", desc=f"encode {side}", disable=not progress or rank != 0) as bar:
        encoded = bundle.encode_slabs(reading.slabs(), side, tokens_per_chunk=tokens_per_chunk, progress=bar.update)
        with closing(encoded):
            _write(writer, encoded)
    wait()
    if rank == 0:
        writer.finish(reading.rows)
    wait()
    return writer.folder


def main(arguments: Sequence[str] | None = None) -> None:
    """The command `accelerate launch retriever/encode.py`, or `python -m retriever.encode`."""
    given = _parser().parse_args(arguments)

    from retriever.environment import check_environment

    check_environment()
    import torch
    from accelerate import PartialState

    os.environ.pop("ACCELERATE_USE_FSDP", None)  # every rank encodes with the whole model; transformers would leave weights out

    from retriever.config import ConfigError
    from retriever.data.formats import DataError
    from retriever.encoder.bundle import load_encoder
    from retriever.shards import ShardError
    from retriever.wording import counted

    state = PartialState(cpu=not torch.cuda.is_available())  # not told so, accelerate runs processes on CPUs as strangers to each other
    try:
        bundle = load_encoder(
            given.model,
            pooling=given.pooling,
            normalize=given.normalize,
            precision=given.precision,
            attention=given.attention,
            compiled=given.compile == "true" or (given.compile == "auto" and given.side == "passage" and state.device.type == "cuda"),
            device=state.device,
            **{f"{given.side}_prompt": given.prompt, f"{given.side}_max_tokens": given.max_tokens},
        )
        if state.is_main_process:
            print(f"{given.model}: {'packed' if bundle.encoder.packed else 'padded'} texts, {given.precision}, on {state.device}")
        title, separator = given.title or bundle.settings.title, given.title_separator
        separator = bundle.settings.title_separator if separator is None else separator
        folder = encode_to_shards(
            bundle,
            _read_texts(given.input, given.side, title, separator),
            given.side,
            given.output,
            texts_fingerprint=_fingerprint(given.input, given.side, title, separator),
            rank=state.process_index,
            world_size=state.num_processes,
            barrier=state.wait_for_everyone,
            shard_rows=given.shard_rows,
            dtype=given.dtype,
            tokens_per_chunk=given.tokens_per_chunk,
            overwrite=given.overwrite,
        )
    except (ConfigError, DataError, ShardError) as error:
        raise SystemExit(f"{error}") from error
    except KeyboardInterrupt:
        print("\ninterrupted: the same command goes on with the shards that are not there yet", file=sys.stderr)
        raise SystemExit(130) from None
    finally:
        state.destroy_process_group()
    if state.is_main_process:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        print(f"{folder}: {counted(manifest['rows'], 'embedding')} of dimension {manifest['dimension']}, {manifest['dtype']}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="retriever/encode.py", description="texts -> embedding shards (npy, ids, manifest)")
    parser.add_argument("--model", required=True, help="model folder or Hugging Face name")
    parser.add_argument("--input", required=True, type=Path, help="corpus.jsonl, collection.tsv, queries.*, or a folder that holds one")
    parser.add_argument("--side", required=True, choices=("query", "passage"))
    parser.add_argument("--output", required=True, type=Path, help="folder for the shards; what is there of the same job is kept")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace what another job left in --output, which is removed first; else it is refused"
    )
    told = "(default: what the model says)"
    parser.add_argument("--prompt", help=f"put in front of every text {told}")
    parser.add_argument("--max-tokens", type=int, help=f"a text's length, prompt and special tokens included {told}")
    parser.add_argument("--pooling", choices=("cls", "mean", "last"), help=told)
    parser.add_argument("--normalize", action=argparse.BooleanOptionalAction, help=f"unit vectors {told}")
    parser.add_argument("--title", choices=("join", "drop"), help=f"of a passage {told}")
    parser.add_argument("--title-separator", help=f"between title and text {told}")
    parser.add_argument(
        "--attention",
        choices=("auto", "packed", "padded"),
        default="auto",
        help="packed computes nothing for padding; auto: on a GPU, where the architecture can (default: %(default)s)",
    )
    parser.add_argument(
        "--compile",
        choices=("auto", "true", "false"),
        default="auto",
        help="layers that have no fused version of ours; auto: of passages on a GPU (default: %(default)s)",
    )
    parser.add_argument("--precision", choices=("fp32", "bf16", "fp16"), default="fp32", help="of the encoder (default: %(default)s)")
    parser.add_argument("--dtype", choices=("float32", "float16"), default="float32", help="of the shards (default: %(default)s)")
    parser.add_argument("--tokens-per-chunk", type=int, help="the encoder sees at once, padding included (default: 131072, on a CPU 8192)")
    parser.add_argument("--shard-rows", type=int, default=SHARD_ROWS, help="embeddings a shard (default: %(default)s)")
    return parser


def _read_texts(path: Path, side: Side, title: Literal["join", "drop"], separator: str) -> Iterator[tuple[str, str]]:
    """(id, text) of each. Raises DataError at once where there is none: before anything in the output folder is replaced."""
    from retriever.data.formats import DataError, final_text, read_corpus, read_queries

    if side == "query":
        texts: Iterator[tuple[str, str]] = iter(read_queries(path))
    else:
        texts = ((str(passage.id), final_text(passage, title, separator)) for passage in read_corpus(path))
    if (first := next(texts, None)) is None:
        raise DataError(f"{path}: no {side} in it, so there is nothing to encode")
    return chain([first], texts)


def _fingerprint(path: Path, side: Side, title: str, separator: str) -> str:
    from retriever.data.collection import corpus_tables, query_tables

    tables = query_tables(path) if side == "query" else corpus_tables(path)
    made_of = [side, [table.digest() for table in tables], *([title, separator] if side == "passage" else [])]
    return hashlib.blake2b(json.dumps(made_of).encode(), digest_size=16).hexdigest()


def _write(writer: ShardWriter, encoded: Iterable[tuple[_Part, Arriving]]) -> None:
    """Writes shard after shard in a thread, as their embeddings arrive, while the next are encoded."""

    def write(part: _Part, embeddings: Sequence[Arriving]) -> None:
        writer.write(part.shard, np.concatenate([slab.wait() for slab in embeddings]), part.ids)

    behind: deque[Future[None]] = deque()
    slabs: list[Arriving] = []  # of the present shard
    with ThreadPoolExecutor(1, thread_name_prefix="write") as thread:
        for part, embeddings in encoded:
            slabs.append(embeddings)
            if not part.last:
                continue
            behind.append(thread.submit(write, part, slabs))
            slabs = []
            if len(behind) > _WRITES_BEHIND:
                behind.popleft().result()
        for written in behind:
            written.result()


class _Part(NamedTuple):
    """Which texts a slab holds."""

    shard: int
    ids: tuple[str, ...]  # of the whole shard
    last: bool  # of the shard's slabs


class _Reading:
    """Reads (id, text) pairs shard by shard and hands on the shards that `wanted` says in slabs, counting all rows."""

    def __init__(self, texts: Iterable[tuple[str, str]], shard_rows: int, wanted: Callable[[int], bool]) -> None:
        self._texts, self._shard_rows, self._wanted = iter(texts), shard_rows, wanted
        self.rows = 0  # read so far

    def slabs(self) -> Iterator[tuple[_Part, tuple[str, ...]]]:
        """The texts of each wanted shard."""
        from retriever.encoder.slabs import SLAB_TEXTS

        for shard in count():
            pairs = list(islice(self._texts, self._shard_rows))
            self.rows += len(pairs)
            if not pairs:
                return
            if self._wanted(shard):
                ids, contents = zip(*pairs, strict=True)
                for start in range(0, len(contents), SLAB_TEXTS):
                    stop = start + SLAB_TEXTS
                    yield _Part(shard, ids, stop >= len(contents)), contents[start:stop]


if __name__ == "__main__":
    main()
