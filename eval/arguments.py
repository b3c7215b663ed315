"""The arguments that the evaluation commands share, and the ranks that a search is launched on."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from retriever.command import (
    BATCH,
    ENCODER,
    Body,
    Command,
    Option,
    above_zero,
    at_least_one,
    command,
    group,
    one_of,
    option,
)

if TYPE_CHECKING:
    from retriever.parallel.world import World

Options = TypeVar("Options")

THREADS = option(
    "--threads",
    type=at_least_one,
    help="of FAISS (default: OMP_NUM_THREADS, else all cores) and of BM25 (default: all cores)",
)
SEARCH = (
    option(
        "--index",
        default="flat",
        help="flat (exact), ivf, ivfpq, hnsw, or a FAISS factory string, parameters after a blank: "
        "'IVF4096,Flat nprobe=64'",
    ),
    option(
        "--engine",
        choices=("auto", "faiss", "torch"),
        default="auto",
        help="of flat: FAISS on the CPU, or torch on every rank's device; auto: torch on GPUs",
    ),
    option("--memory-gib", type=above_zero, default=8.0, help="of each device, for torch's search"),
    option(
        "--faiss-gpu",
        choices=("off", "shard", "replicate"),
        default="off",
        help="an index on all GPUs, its passages divided or copied; needs one of faiss-gpu's builds",
    ),
    option(
        "--rescore",
        type=at_least_one,
        default=0,
        metavar="N",
        help="score the N best passages of an index again, exactly, from the shards; at least k are",
    ),
    option(
        "--verify",
        action="store_true",
        help="compare stored embeddings and indexes with their checksums though no file changed since last time",
    ),
    THREADS,
)
ENCODING = (
    option("--query-prompt", help="put in front of every query"),
    option("--passage-prompt", help="put in front of every passage"),
    option("--pooling", choices=("cls", "mean", "last")),
    option("--normalize", action=argparse.BooleanOptionalAction, help="unit vectors"),
    option("--max-tokens", type=at_least_one, help="of queries and passages, prompt and special tokens included"),
    option("--query-max-tokens", type=at_least_one, help="of queries, goes before --max-tokens"),
    option("--passage-max-tokens", type=at_least_one, help="of passages, goes before --max-tokens"),
    option("--title", choices=("join", "drop"), help="of a passage"),
)


def evaluation_command(
    prog: str, about: str, data: str, *options: Option, data_required: bool = True
) -> Callable[[Body], Command]:
    """As `command`, with the arguments of every evaluation (where the run comes from, how texts are encoded, where
    results go) and `options` of its own. `data` says what --data is.
    """
    return command(
        prog,
        about,
        one_of(
            option("--model", help="model folder or Hugging Face name"),
            option("--run", type=Path, help="measure this TREC or MS MARCO run instead of a model"),
            option("--bm25", action="store_true", help="measure BM25 instead of a model"),
        ),
        option("--data", required=data_required, type=Path, help=data),
        *options,
        option("--metrics", nargs="+", metavar="NAME", help="as nDCG@10 MRR@10 Recall@100 MAP"),
        option(
            "--dims",
            nargs="+",
            type=at_least_one,
            default=[],
            help="leading dimensions of the embeddings to measure too, as Matryoshka cuts",
        ),
        option(
            "--quantize",
            nargs="+",
            choices=("int8", "binary", "hamming"),
            default=[],
            help="measure embeddings of fewer bits too: passages of a byte or a bit a dimension, their queries in "
            "float32; hamming: queries of a bit too; int8 takes its ranges from the evaluation's shards, whose sizes "
            "differ from those of encode.py in collections below 262,144 passages",
        ),
        option("--k", type=at_least_one, default=1000, help="passages a query in the run"),
        option(
            "--output-dir", type=Path, help="for runs, results and embeddings (default: evaluations/<model>/<data>)"
        ),
        *SEARCH,
        BATCH,
        *ENCODER,
        group("encoding", *ENCODING, about="each by default what the model folder says"),
        lower="--batch",
    )


def options_of(kind: type[Options], args: argparse.Namespace, **more: Any) -> Options:
    """An instance of the dataclass `kind`: its fields are filled from the arguments of the same names and from
    `more`.
    """
    named = {f.name: getattr(args, f.name) for f in fields(kind) if hasattr(args, f.name)}  # type: ignore[arg-type]
    return kind(**named | more)


@contextmanager
def launched_search(args: argparse.Namespace) -> Iterator[World]:
    """The ranks that this process was launched with, and FAISS set up as `--threads` and `--faiss-gpu` say.

    Raises ConfigError where the FAISS that is installed cannot do what `--faiss-gpu` asks.
    """
    from eval.engines.faiss_gpu import check_faiss_build

    check_faiss_build(args.faiss_gpu)
    import faiss

    from retriever.launch import launched

    if args.threads:
        faiss.omp_set_num_threads(args.threads)
    with launched() as world:
        yield world
