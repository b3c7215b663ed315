"""The body of the evaluation commands: a run from a model, BM25 or a file; its measures; files and a table."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import torch

from eval.arguments import options_of
from eval.collections.collection import Collection
from eval.engines.bm25 import DESCRIPTION, bm25_run
from eval.evaluate import EvalOptions, EvalResult, check_measures, evaluate_collection
from eval.report import format_table, refuse_foreign_results, write_result
from eval.trec import read_run
from retriever.data.records import DataError
from retriever.encoder.bundle import EncoderBundle, load_encoder
from retriever.errors import RefusedError
from retriever.lock import working_in
from retriever.parallel.world import World
from retriever.wording import counted

Work = Sequence[tuple[Collection, Sequence[str]]]  # collections, each with its measures


def report_all(
    args: argparse.Namespace,
    work: Work,
    world: World,
    *,
    msmarco: bool = False,
    check: Callable[[Collection, int | None], Sequence[str]] = lambda collection, n_passages: (),
) -> list[EvalResult]:
    """Evaluates what `--model`, `--bm25` or `--run` names on each collection with its measures; rank 0 writes, prints
    and returns it.

    `msmarco` writes runs in that format too; `check` returns notes on a collection and its number of passages.

    Raises RefusedError for an unknown measure or index, files in the output folder that no evaluation wrote, and where
    another process works there, before anything is encoded.
    """
    for name in ("dims", "quantize"):
        if (asked := getattr(args, name)) and args.model is None:
            raise RefusedError(f"--{name} {' '.join(map(str, asked))}: expected --model, whose embeddings are changed")
    for _, metrics in work:
        check_measures(metrics, args.k if not args.run else sys.maxsize)
    said = {} if args.run else {labels: one.check() for labels, one in {c.labels: c for c, _ in work}.items()}
    folder = output_folder(args)
    refuse_foreign_results(folder, *(collection.split for collection, _ in work))
    bundle = load_bundle(args, world.device) if args.model is not None else None
    if bundle is None and not world.is_first:
        return []
    if args.run is not None:
        work = _in_run(args.run, work)
    results = []
    with working_in(folder) if world.is_first else nullcontext():
        for collection, metrics in work:
            if bundle is not None:
                options = options_of(EvalOptions, args, progress=True)
                result = evaluate_collection(bundle, collection, metrics, folder, options, world)
            else:
                result = (_of_bm25 if args.bm25 else _of_run)(args, collection, metrics)
            if result is not None:
                notes = (*result.notes, *said.get(collection.labels, ()), *check(collection, result.n_passages))
                results.append(replace(result, notes=notes))
                _report(args, results[-1], folder, msmarco)
    return results


def _of_bm25(args: argparse.Namespace, collection: Collection, metrics: Sequence[str]) -> EvalResult:
    ids: list[str] = []

    def passages() -> Iterator[tuple[str, str]]:
        for passage_id, text in collection.passages(args.title or "join", " "):
            ids.append(passage_id)
            yield passage_id, text

    excluding, threads = collection.exclude_self, args.threads
    run = bm25_run(passages(), collection.queries, args.k, exclude_self=excluding, progress=True, threads=threads)
    notes = collection.notes(ids)
    if unmatched := sum(not found.passage_ids for found in run.values()):
        notes = (*notes, f"{unmatched:,} of {counted(len(run), 'query')} without a word of any passage, which count 0")
    return EvalResult(collection, collection.measure(run, metrics), run, len(ids), notes=notes)


def _in_run(path: Path, work: Work) -> Work:
    """The collections with a query in the run. Raises DataError where there is none: it is a run of another split."""
    query_ids = read_run(path).keys()
    found = [
        (collection, metrics)
        for collection, metrics in work
        if not query_ids.isdisjoint(collection.qrels or collection.queries)
    ]
    if not found:
        splits = ", ".join(collection.split for collection, _ in work)
        raise DataError(
            f"none of the run's {len(query_ids):,} queries is judged in {splits}; choose the run's split with --split",
            path,
        )
    return found


def _of_run(args: argparse.Namespace, collection: Collection, metrics: Sequence[str]) -> EvalResult:
    run = read_run(args.run)
    asked = collection.qrels or collection.queries
    without = sum(query_id not in run for query_id in asked)
    notes = [f"{without:,} of {counted(len(asked), 'judged query')} not in the run, which count 0"] if without else []
    if collection.exclude_self and (
        own := [query_id for query_id, found in run.items() if query_id in found.passage_ids]
    ):
        run |= {query_id: run[query_id].without(query_id) for query_id in own}
        notes.append(
            f"{counted(len(own), 'query')} with the passage of the same id left out "
            "(BEIR's rule; --no-exclude-self keeps it)"
        )
    return EvalResult(collection, collection.measure(run, metrics), run, notes=tuple(notes))


def _report(args: argparse.Namespace, result: EvalResult, folder: Path, msmarco: bool) -> None:
    source = {"model": args.model} if args.model else {"bm25": DESCRIPTION} if args.bm25 else {"run": str(args.run)}
    search = {"exclude_self": result.collection.exclude_self} | ({} if args.run else {"k": args.k, **result.index})
    path = write_result(result, folder, command=args.command, source=source, search=search, msmarco=msmarco)
    passages = f", {counted(result.n_passages, 'passage')}" if result.n_passages is not None else ""
    print(
        f"\n{result.collection.name} {result.collection.split}: {counted(result.n_queries, 'query')}{passages}; {path}"
    )
    for note in result.notes:
        print(f"note: {note}")
    cuts = {f"{label(args)}, {dims} dimensions": means for dims, means in result.at_dims.items()}
    fewer_bits = {f"{label(args)}, {name}": means for name, means in result.quantized.items()}
    print(format_table({label(args): result.means, **cuts, **fewer_bits}), flush=True)


def load_bundle(args: argparse.Namespace, device: torch.device) -> EncoderBundle:
    """The encoder of `--model`. Options of the command line override the settings of the model folder. Raises
    ConfigError.
    """
    named = ("pooling", "normalize", "query_prompt", "passage_prompt", "precision", "attention")
    bundle = load_encoder(
        args.model,
        query_max_tokens=args.query_max_tokens or args.max_tokens,
        passage_max_tokens=args.passage_max_tokens or args.max_tokens,
        device=device,
        **{name: getattr(args, name) for name in named},
    )
    if args.title is not None:
        bundle.settings = replace(bundle.settings, title=args.title)
    return bundle


def output_folder(args: argparse.Namespace) -> Path:
    """`--output-dir`, else evaluations/<what is evaluated>/<data folder>."""
    return args.output_dir or Path("evaluations") / label(args).replace("/", "-") / args.data.resolve().name


def label(args: argparse.Namespace) -> str:
    """A short name of what is evaluated: BM25, the hub name, or the last two names of a model folder's or a run file's
    path.
    """
    return "BM25" if args.bm25 else model_label(args.run or args.model)


def model_label(name: str | Path) -> str:
    """The last two names of a path that exists, as `demo/export`; else the name itself, which the hub knows."""
    return "/".join(Path(name).resolve().parts[-2:]) if Path(name).exists() else str(name)
