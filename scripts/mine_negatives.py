"""Mine hard negatives for training data, and have a teacher score them.

    python -m scripts.mine_negatives --data data/scifact --model runs/first/export --output-dir data/scifact-mined
    accelerate launch -m scripts.mine_negatives --data data/msmarco --model runs/first/export --retrievers model bm25 \\
        --ranks 10 200 --teacher cross-encoder/ms-marco-MiniLM-L6-v2 --percentage 0.95 --output-dir data/msmarco-mined

The output folder is training data (`data.train: [{path: ...}]`): train.jsonl with the passages inside and, from a teacher, their
scores. The same command after an interruption goes on where it stopped and ends with the same bytes.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from eval.arguments import at_least_one
from retriever.wording import counted


def main(arguments: Sequence[str] | None = None) -> None:
    """The command `python -m scripts.mine_negatives`."""
    given = _parser().parse_args(arguments)

    from eval.commands import launched_ranks, one_line_errors

    with one_line_errors(), launched_ranks(given.threads) as (ranks, device):
        mine(given, ranks, device)


def mine(given: argparse.Namespace, ranks: Any, device: Any) -> None:
    """Mines what the arguments ask for, on every rank. Raises ConfigError, DataError."""
    from retriever.config import ConfigError, SourceConfig
    from retriever.data.formats import open_source
    from retriever.encoder.bundle import load_encoder
    from scripts.mining.mine import Mining
    from scripts.mining.pool import Pool
    from scripts.mining.settings import MiningSettings
    from scripts.mining.teacher import CrossEncoder

    first, last = given.ranks
    settings = MiningSettings(
        tuple(given.retrievers), first, last, given.negatives, given.pick, given.margin, given.percentage, given.judged, given.seed
    )
    names = list(dict.fromkeys(given.teacher or []))
    asks_model = "model" in (*settings.retrievers, *names) or (settings.filters and not names)
    if asks_model and given.model is None:
        raise ConfigError("--model: expected a model, which --retrievers model, --teacher model and filters without a teacher ask for")
    path, columns = given.data, tuple(given.columns) if given.columns else None
    source = open_source(
        SourceConfig(path, given.name, given.revision, given.format, given.split, columns, given.corpus, given.queries, limit=given.limit)
    )
    output = Path(given.output_dir)
    work = given.work_dir or output.with_name(f"{output.name}.work")
    pool = Pool(source, given.title, given.title_separator, work / "pool", ranks)
    own = sum(query.prompt is not None for query in pool.queries)
    if own and ranks.rank == 0:
        print(f"note: {counted(own, 'query')} with a prompt that the search leaves out")
    bundle = load_encoder(given.model, precision=given.precision, attention=given.attention, device=device) if asks_model else None
    teachers = [
        name
        if name in ("bm25", "model")
        else CrossEncoder.load(name, max_tokens=given.teacher_max_tokens, precision=given.precision, device=device)
        for name in names
    ]
    mining = Mining(
        pool,
        settings,
        output,
        work,
        bundle,
        tuple(teachers),
        index=given.index,
        tokens_per_batch=given.teacher_batch,
        tokens_per_chunk=given.batch,
        threads=given.threads,
        ranks=ranks,
    )
    mining.run()
    if ranks.rank == 0 and mining.counts:
        print(f"{output}: " + ", ".join(f"{what} {count:,}" for what, count in mining.counts.items()), flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.mine_negatives", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    source = parser.add_argument_group("training source, as an entry of data.train")
    which = source.add_mutually_exclusive_group(required=True)
    which.add_argument("--data", help="a file or folder of any format that training reads")
    which.add_argument("--name", help="a Hugging Face dataset")
    for option in ("revision", "corpus", "queries"):
        source.add_argument(f"--{option}", help=f"data.train.<n>.{option}")
    formats = ("auto", "msmarco", "beir", "tevatron", "dpr", "flagembedding", "columns")
    source.add_argument("--format", default="auto", choices=formats, help="default: %(default)s")
    source.add_argument("--split", default="train", help="default: %(default)s")
    source.add_argument("--columns", nargs="+", metavar="NAME", help="anchor and positive of a columns file")
    source.add_argument("--limit", type=int, help="of queries that are read, the first ones")
    source.add_argument("--title", choices=("join", "drop"), default="join", help="as data.title (default: %(default)s)")
    source.add_argument("--title-separator", default=" ", help="as data.title_separator (default: one space)")

    search = parser.add_argument_group("candidates")
    search.add_argument("--retrievers", nargs="+", choices=("model", "bm25"), default=["model"], help="default: model")
    search.add_argument("--model", help="the present model: folder or Hugging Face name")
    search.add_argument("--ranks", nargs=2, type=int, default=(10, 100), metavar=("FIRST", "LAST"), help="of the search (default: 10 100)")
    search.add_argument("--negatives", type=int, default=8, help="a query, at most (default: %(default)s)")
    search.add_argument("--pick", choices=("random", "top"), default="random", help="inside the ranks (default: %(default)s)")
    search.add_argument("--seed", type=int, default=0, help="of --pick random (default: %(default)s)")
    search.add_argument("--index", default="flat", help="of the model's search (default: %(default)s)")

    judge = parser.add_argument_group("scores", "by the teachers; without one, filters use the model's own similarities")
    teachers = "a cross-encoder, bm25 or model; scores are written into the data, of several the mean of what each standardises a query"
    judge.add_argument("--teacher", nargs="+", metavar="NAME", help=teachers)
    judge.add_argument("--teacher-max-tokens", type=int, default=512, help="of a pair (default: %(default)s)")
    judge.add_argument(
        "--teacher-batch", type=at_least_one, default=16_384, metavar="TOKENS", help="padded tokens at once (default: %(default)s)"
    )
    judge.add_argument("--judged", type=int, help="candidates scored a query (default: twice --negatives with a filter, else as many)")
    judge.add_argument("--margin", type=float, help="drop what scores above the lowest positive's score less this")
    judge.add_argument("--percentage", type=float, help="drop what scores above this share of the lowest positive's score, as 0.95")

    parser.add_argument("--output-dir", required=True, type=Path, help="a new folder for the training data")
    kept = "passages, embeddings, searches and scores, to be used again (default: <output-dir>.work)"
    parser.add_argument("--work-dir", type=Path, help=kept)
    parser.add_argument("--precision", choices=("fp32", "bf16", "fp16"), default="fp32", help="of both models (default: %(default)s)")
    packed = "of the encoder: packed computes nothing for padding; auto: on a GPU, where the architecture can (default: %(default)s)"
    parser.add_argument("--attention", choices=("auto", "packed", "padded"), default="auto", help=packed)
    parser.add_argument("--batch", type=at_least_one, metavar="TOKENS", help="padded tokens the encoder sees at once (default: by device)")
    threads = "of a process, for FAISS (default: OMP_NUM_THREADS, else all cores) and BM25 (default: all cores)"
    parser.add_argument("--threads", type=at_least_one, help=threads)
    return parser


if __name__ == "__main__":
    main()
