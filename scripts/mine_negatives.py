"""Mine hard negatives for training data, and score them by a teacher.

    python -m scripts.mine_negatives --data data/scifact --model runs/first/export --output-dir data/scifact-mined
    accelerate launch -m scripts.mine_negatives --data data/msmarco --model runs/first/export --retrievers model bm25 \
        --ranks 10 200 --teacher cross-encoder/ms-marco-MiniLM-L6-v2 --percentage 0.95 --output-dir data/msmarco-mined

The output folder is training data (`data.train: [{path: ...}]`): train.jsonl holds the passages and, from a teacher,
their scores. After an interruption the same command resumes and ends with the same bytes.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from eval.arguments import THREADS, launched_search, options_of
from retriever.command import (
    BATCH,
    ENCODER,
    TITLE,
    above_zero,
    at_least_one,
    command,
    group,
    number,
    one_of,
    option,
    seed,
)
from retriever.wording import counted

if TYPE_CHECKING:
    from retriever.parallel.world import World
    from scripts.mining.settings import MiningSettings


_FORMATS = ("auto", "msmarco", "beir", "tevatron", "dpr", "flagembedding", "columns")
_SOURCE = (
    one_of(
        option("--data", help="a file or folder of any format that training reads"),
        option("--name", help="a Hugging Face dataset"),
    ),
    *(option(f"--{name}", help=f"data.train.<n>.{name}") for name in ("revision", "corpus", "queries")),
    option("--format", default="auto", choices=_FORMATS, help="default: %(default)s"),
    option("--split", default="train", help="default: %(default)s"),
    option("--columns", nargs="+", metavar="NAME", help="anchor and positive of a columns file"),
    option("--limit", type=at_least_one, help="of queries that are read, the first ones"),
    *TITLE,
)
_CANDIDATES = (
    option("--retrievers", nargs="+", choices=("model", "bm25"), default=["model"], help="default: model"),
    option("--model", help="the present model: folder or Hugging Face name"),
    option(
        "--ranks",
        nargs=2,
        type=at_least_one,
        default=(10, 100),
        metavar=("FIRST", "LAST"),
        help="of the search (default: 10 100)",
    ),
    option("--negatives", type=at_least_one, default=8, help="a query, at most"),
    option("--pick", choices=("random", "top"), default="random", help="inside the ranks"),
    option("--seed", type=seed, default=0, help="of --pick random"),
    option("--index", default="flat", help="of the model's search"),
)
_TEACHERS = (
    "a cross-encoder, bm25 or model, whose scores are written into the data; "
    "of several the mean of their scores, each standardised within a query"
)
_SCORES = (
    option("--teacher", nargs="+", metavar="NAME", help=_TEACHERS),
    option("--teacher-max-tokens", type=at_least_one, default=512, help="of a pair"),
    option("--teacher-batch", type=at_least_one, default=16_384, metavar="TOKENS", help="padded tokens at once"),
    option(
        "--judged",
        type=at_least_one,
        help="candidates scored a query (default: twice --negatives with a filter, else as many)",
    ),
    option("--margin", type=number(), help="drop what scores above the lowest positive's score less this"),
    option(
        "--percentage",
        type=above_zero,
        help="drop what scores above this share of the lowest positive's score, as 0.95",
    ),
)
_KEPT = "passages, embeddings, searches and scores, to be used again (default: <output-dir>.work)"


@command(
    "python -m scripts.mine_negatives",
    __doc__,
    group("training source, as an entry of data.train", *_SOURCE),
    group("candidates", *_CANDIDATES),
    group("scores", *_SCORES, about="by the teachers; without one, filters use the model's own similarities"),
    option("--output-dir", required=True, type=Path, help="a new folder for the training data"),
    option("--work-dir", type=Path, help=_KEPT),
    *ENCODER,
    BATCH,
    THREADS,
    resumes="the same command goes on where it stopped",
    lower="--batch or --teacher-batch",
)
def main(args: argparse.Namespace) -> None:
    """The command `python -m scripts.mine_negatives`."""
    args.faiss_gpu = "off"
    with launched_search(args) as world:
        mine(args, world)


def mine(args: argparse.Namespace, world: World) -> None:
    """Mines what the arguments ask for, on every rank. Raises ConfigError, DataError."""
    from retriever.config import ConfigError, SourceConfig
    from retriever.data.formats import open_source
    from retriever.encoder.bundle import load_encoder
    from scripts.mining.mine import Mining, check_output
    from scripts.mining.pool import Pool
    from scripts.mining.settings import MiningSettings
    from scripts.mining.teacher import CrossEncoder

    first, last = args.ranks
    retrievers = tuple(args.retrievers)
    settings = options_of(MiningSettings, args, retrievers=retrievers, first_rank=first, last_rank=last)
    names = list(dict.fromkeys(args.teacher or []))
    asks_model = "model" in (*settings.retrievers, *names) or (settings.filters and not names)
    if asks_model and args.model is None:
        raise ConfigError(
            "--model: expected a model, which --retrievers model, --teacher model and filters without a teacher ask for"
        )
    output = Path(args.output_dir)
    check_output(output)
    columns = tuple(args.columns) if args.columns else None
    source = open_source(
        options_of(SourceConfig, args, path=args.data, columns=columns, negatives=SourceConfig.negatives)
    )
    work = args.work_dir or output.with_name(f"{output.name}.work")
    pool = Pool(source, args.title, args.title_separator, work / "pool", world)
    own = sum(query.prompt is not None for query in pool.queries)
    if own and world.is_first:
        print(f"note: {counted(own, 'query')} with a prompt that the search leaves out")
    bundle = (
        load_encoder(args.model, precision=args.precision, attention=args.attention, device=world.device)
        if asks_model
        else None
    )
    teachers = [
        name
        if name in ("bm25", "model")
        else CrossEncoder(name, max_tokens=args.teacher_max_tokens, precision=args.precision, device=world.device)
        for name in names
    ]
    mining = Mining(
        pool,
        settings,
        output,
        work,
        world,
        bundle,
        tuple(teachers),
        index=args.index,
        tokens_per_batch=args.teacher_batch,
        tokens_per_chunk=args.batch,
        threads=args.threads,
    )
    mining.run()
    if world.is_first and mining.counts:
        print(f"{output}: " + ", ".join(f"{what} {count:,}" for what, count in mining.counts.items()), flush=True)
        if not mining.counts["negatives"]:
            print(f"warning: {output}: {_no_negatives(mining.counts, settings)}", flush=True)


def _no_negatives(counts: Mapping[str, int], settings: MiningSettings) -> str:
    """Why a mining found nothing."""
    if counts["dropped by score"]:
        return "no negative: every candidate scores too close to a positive; lower --margin or raise --percentage"
    first, last, passages = settings.first_rank, settings.last_rank, counts["passages"]
    if first > passages:
        return f"no negative: --ranks begins at {first:,}, and there are only {passages:,} passages"
    return f"no negative: ranks {first:,} to {last:,} hold only known positives of a query; choose other --ranks"


if __name__ == "__main__":
    sys.exit(main())
