"""The arguments that the evaluation commands share, and what is made of them: the encoder and the output folder."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from retriever.encoder.bundle import EncoderBundle


def command_parser(prog: str, description: str) -> argparse.ArgumentParser:
    """A parser with the arguments of every evaluation command: where the run comes from, how texts are encoded, where results go."""
    parser = argparse.ArgumentParser(prog=prog, description=description)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--model", help="model folder or Hugging Face name")
    source.add_argument("--run", type=Path, help="measure this TREC or MS MARCO run instead of a model")
    source.add_argument("--bm25", action="store_true", help="measure BM25 instead of a model")
    parser.add_argument("--data", required=True, type=Path, help="folder of the collection")
    parser.add_argument("--metrics", nargs="+", metavar="NAME", help="as nDCG@10 MRR@10 Recall@100 MAP")
    parser.add_argument("--k", type=int, default=1000, help="passages a query in the run (default: %(default)s)")
    parser.add_argument("--output-dir", type=Path, help="for runs, results and embeddings (default: evaluations/<model>/<data>)")
    parser.add_argument("--index", default="flat", help="flat: exact, FAISS IndexFlatIP (default: %(default)s)")
    parser.add_argument("--threads", type=int, help="FAISS threads (default: OMP_NUM_THREADS, else all cores)")
    parser.add_argument("--batch", type=int, metavar="TOKENS", help="padded tokens the encoder sees at once (default: by device)")
    parser.add_argument("--precision", choices=("fp32", "bf16", "fp16"), default="fp32", help="of the encoder (default: %(default)s)")
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
        device=device,
    )
    if given.title is not None:
        bundle.settings = replace(bundle.settings, title=given.title)
    return bundle


def output_folder(given: argparse.Namespace) -> Path:
    """`--output-dir`, else evaluations/<model, bm25 or run>/<data folder>; a model folder is known by its last two names."""
    if given.output_dir is not None:
        return given.output_dir
    if given.model is None:
        name = "bm25" if given.bm25 else given.run.name.removesuffix(".gz").rpartition(".")[0] or given.run.name
    else:
        folder = Path(given.model)
        name = "-".join(folder.resolve().parts[-2:]) if folder.exists() else given.model.replace("/", "--")
    return Path("evaluations") / name / given.data.resolve().name
