"""The arguments that the evaluation commands share, and what is made of them: the encoder and the output folder."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from retriever.encoder.bundle import EncoderBundle


def command_parser(prog: str, description: str, *, hub: bool = False, data: str | None = None) -> argparse.ArgumentParser:
    """A parser with the arguments of every evaluation command: where the run comes from, how texts are encoded, where results go.

    `hub`: --data may name a data set of Hugging Face. `data`: what --data is, where it may be left out.
    """
    parser = argparse.ArgumentParser(prog=prog, description=description)
    folder = "folder of the collection" + (", or hf:<name> of a Hugging Face data set of BEIR's form" if hub else "")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--model", help="model folder or Hugging Face name")
    source.add_argument("--run", type=Path, help="measure this TREC or MS MARCO run instead of a model")
    source.add_argument("--bm25", action="store_true", help="measure BM25 instead of a model")
    parser.add_argument("--data", required=data is None, type=Path, help=data or folder)
    parser.add_argument("--metrics", nargs="+", metavar="NAME", help="as nDCG@10 MRR@10 Recall@100 MAP")
    parser.add_argument("--k", type=int, default=1000, help="passages a query in the run (default: %(default)s)")
    parser.add_argument("--output-dir", type=Path, help="for runs, results and embeddings (default: evaluations/<model>/<data>)")
    add_search_arguments(parser)
    parser.add_argument("--batch", type=at_least_one, metavar="TOKENS", help="padded tokens the encoder sees at once (default: by device)")
    parser.add_argument("--precision", choices=("fp32", "bf16", "fp16"), default="fp32", help="of the encoder (default: %(default)s)")
    packed = "packed computes nothing for padding; auto: on a GPU, where the architecture can (default: %(default)s)"
    parser.add_argument("--attention", choices=("auto", "packed", "padded"), default="auto", help=packed)
    model = parser.add_argument_group("encoding", "each by default what the model folder says")
    model.add_argument("--query-prompt", help="put in front of every query")
    model.add_argument("--passage-prompt", help="put in front of every passage")
    model.add_argument("--pooling", choices=("cls", "mean", "last"))
    model.add_argument("--normalize", action=argparse.BooleanOptionalAction, help="unit vectors")
    model.add_argument("--max-tokens", type=int, help="of queries and passages, prompt and special tokens included")
    model.add_argument("--query-max-tokens", type=int, help="of queries, goes before --max-tokens")
    model.add_argument("--passage-max-tokens", type=int, help="of passages, goes before --max-tokens")
    model.add_argument("--title", choices=("join", "drop"), help="of a passage")
    return parser


def add_search_arguments(parser: argparse.ArgumentParser) -> None:
    """How passages are searched."""
    names = "flat (exact), ivf, ivfpq, hnsw, or a FAISS factory string, parameters after a blank: 'IVF4096,Flat nprobe=64'"
    parser.add_argument("--index", default="flat", help=f"{names} (default: %(default)s)")
    engines = "of flat: FAISS on the CPU, or torch on every rank's device; auto: torch on GPUs (default: %(default)s)"
    parser.add_argument("--engine", choices=("auto", "faiss", "torch"), default="auto", help=engines)
    parser.add_argument("--memory-gib", type=float, default=8.0, help="of each device, for torch's search (default: %(default)s)")
    gpus = "an index on all GPUs, its passages divided or copied; needs one of faiss-gpu's builds (default: %(default)s)"
    parser.add_argument("--faiss-gpu", choices=("off", "shard", "replicate"), default="off", help=gpus)
    parser.add_argument(
        "--threads", type=at_least_one, help="of FAISS (default: OMP_NUM_THREADS, else all cores) and of BM25 (default: all cores)"
    )


def at_least_one(text: str) -> int:
    """A whole number from 1 on, for argparse."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1; received {text!r}")
    return int(text)


def parsed(parser: argparse.ArgumentParser, arguments: Sequence[str] | None) -> argparse.Namespace:
    """The arguments, and in `command` the line that gave them, which goes into the result. Default: the process's own."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    given = parser.parse_args(words)
    given.command = f"{parser.prog} {shlex.join(words)}"
    return given


def load_bundle(given: argparse.Namespace, device: Any) -> EncoderBundle:
    """The encoder of `--model`, what is given on the command line going before what the model folder says. Raises ConfigError."""
    from retriever.encoder.bundle import load_encoder

    bundle = load_encoder(
        given.model,
        pooling=given.pooling,
        normalize=given.normalize,
        query_prompt=given.query_prompt,
        passage_prompt=given.passage_prompt,
        query_max_tokens=given.query_max_tokens or given.max_tokens,
        passage_max_tokens=given.passage_max_tokens or given.max_tokens,
        precision=given.precision,
        attention=given.attention,
        device=device,
    )
    if given.title is not None:
        bundle.settings = replace(bundle.settings, title=given.title)
    return bundle


def output_folder(given: argparse.Namespace) -> Path:
    """`--output-dir`, else evaluations/<what is evaluated>/<data folder>."""
    return given.output_dir or Path("evaluations") / label(given).replace("/", "-") / given.data.resolve().name


def label(given: argparse.Namespace) -> str:
    """A short name of what is evaluated: BM25, the hub name, or the last two names of a model folder's or a run file's path."""
    if given.bm25:
        return "BM25"
    path = Path(given.run or given.model)
    return "/".join(path.resolve().parts[-2:]) if path.exists() else str(path)
