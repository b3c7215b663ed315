"""The body of the evaluation commands: a run from a model, BM25 or a file; its measures; files and a table."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eval.arguments import label, load_bundle, output_folder
from retriever.wording import counted

if TYPE_CHECKING:
    from eval.collections.collection import Collection
    from eval.engines.faiss_build import GpuUse
    from eval.evaluate import EvalResult, Ranks


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Ends the command with the message alone where settings, data or shards cannot be used, or it is interrupted."""
    from retriever.config import ConfigError
    from retriever.data.records import DataError
    from retriever.shards import ShardError

    try:
        yield
    except (ConfigError, DataError, ShardError) as error:
        raise SystemExit(str(error)) from error
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        raise SystemExit(130) from None


@contextmanager
def launched_ranks(threads: int | None, faiss_gpu: GpuUse = "off") -> Iterator[tuple[Ranks, Any]]:
    """(ranks, device) of this process; outside `accelerate launch`, one rank. Leaves the process group at the end.

    Raises ConfigError where the FAISS that is installed cannot do what `faiss_gpu` asks.
    """
    from eval.engines.faiss_build import check_faiss_build
    from retriever.environment import check_environment

    check_environment()
    check_faiss_build(faiss_gpu)
    import faiss
    import torch
    from accelerate import PartialState

    from eval.evaluate import Ranks

    if threads:
        faiss.omp_set_num_threads(threads)
    state = PartialState(cpu=not torch.cuda.is_available())  # else accelerate leaves processes on CPUs each on its own
    try:
        yield Ranks(state.process_index, state.num_processes, state.wait_for_everyone), state.device
    finally:
        state.destroy_process_group()


def report_all(
    given: argparse.Namespace,
    work: Sequence[tuple[Collection, Sequence[str]]],
    ranks: Ranks,
    device: Any,
    *,
    msmarco: bool = False,
    check: Callable[[EvalResult], Sequence[str]] = lambda result: (),
) -> list[EvalResult]:
    """Evaluates what `--model`, `--bm25` or `--run` names on each collection with its measures; rank 0 writes, prints and returns it.

    `msmarco` writes runs in that format too; `check` adds notes on a result.

    Raises ConfigError for an unknown measure or index, a k or a relevance below 1, before anything is encoded.
    """
    from eval.evaluate import check_measures
    from eval.measures import check_relevance
    from eval.search import check_k
    from retriever.config import ConfigError

    try:
        check_k(given.k)
        for collection, metrics in work:
            check_relevance(collection.relevance)
            check_measures(metrics, given.k if not given.run else sys.maxsize)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    folder = output_folder(given)
    bundle = load_bundle(given, device) if given.model is not None else None
    if given.run is not None:
        work = _in_run(given.run, work) if ranks.rank == 0 else []
    results = []
    for collection, metrics in work:
        if bundle is not None:
            result = _of_model(given, bundle, collection, metrics, folder, ranks)
        elif ranks.rank == 0:
            result = _of_bm25(given, collection, metrics) if given.bm25 else _of_run(given, collection, metrics)
        else:
            result = None
        if result is not None:
            results.append(replace(result, notes=(*result.notes, *check(result))))
            _report(given, results[-1], folder, msmarco)
    return results


def _of_model(
    given: argparse.Namespace, bundle: Any, collection: Collection, metrics: Sequence[str], folder: Path, ranks: Ranks
) -> EvalResult | None:
    from eval.evaluate import SearchOptions, evaluate_collection

    search = SearchOptions(given.index, given.engine, given.memory_gib, given.faiss_gpu)
    return evaluate_collection(
        bundle, collection, metrics, given.k, folder, search=search, ranks=ranks, tokens_per_chunk=given.batch, progress=True
    )


def _of_bm25(given: argparse.Namespace, collection: Collection, metrics: Sequence[str]) -> EvalResult:
    from eval.engines.bm25 import bm25_run
    from eval.evaluate import EvalResult

    ids: list[str] = []

    def passages() -> Iterator[tuple[str, str]]:
        for passage_id, text in collection.passages(given.title or "join", " "):
            ids.append(passage_id)
            yield passage_id, text

    excluding, threads = collection.exclude_self, given.threads
    run = bm25_run(passages(), collection.queries, given.k, exclude_self=excluding, progress=True, threads=threads)
    return EvalResult(collection, collection.measure(run, metrics), run, len(ids), notes=collection.notes(ids))


def _in_run(path: Path, work: Sequence[tuple[Collection, Sequence[str]]]) -> list[tuple[Collection, Sequence[str]]]:
    """The part of the work that the run is about: zeros for the queries of another split would say nothing about it."""
    from eval.trec import read_run
    from retriever.data.records import DataError

    query_ids = read_run(path).keys()
    found = [(collection, metrics) for collection, metrics in work if not query_ids.isdisjoint(collection.qrels or collection.queries)]
    if not found:
        splits = ", ".join(collection.split for collection, _ in work)
        raise DataError(f"none of its queries ({len(query_ids):,}) is judged in {splits}; expected a run of that split (--split)", path)
    return found


def _of_run(given: argparse.Namespace, collection: Collection, metrics: Sequence[str]) -> EvalResult:
    from eval.evaluate import EvalResult
    from eval.trec import read_run

    run = read_run(given.run)
    asked = collection.qrels or collection.queries
    without = sum(query_id not in run for query_id in asked)
    notes = [f"{without:,} of {counted(len(asked), 'judged query')} not in the run, which count 0"] if without else []
    if collection.exclude_self and (own := [query_id for query_id, found in run.items() if query_id in found.passage_ids]):
        run |= {query_id: run[query_id].without(query_id) for query_id in own}
        notes.append(f"{counted(len(own), 'query')} with the passage of the same id left out (BEIR's rule; --no-exclude-self keeps it)")
    return EvalResult(collection, collection.measure(run, metrics), run, notes=tuple(notes))


def _report(given: argparse.Namespace, result: EvalResult, folder: Path, msmarco: bool) -> None:
    from eval.engines.bm25 import DESCRIPTION
    from eval.report import format_table, write_result

    source = {"model": given.model} if given.model else {"bm25": DESCRIPTION} if given.bm25 else {"run": str(given.run)}
    search = {"exclude_self": result.collection.exclude_self} | ({} if given.run else {"k": given.k, **result.index})
    path = write_result(result, folder, command=given.command, source=source, search=search, msmarco=msmarco)
    passages = f", {counted(result.n_passages, 'passage')}" if result.n_passages is not None else ""
    print(f"\n{result.collection.name} {result.collection.split}: {counted(result.n_queries, 'query')}{passages}; {path}")
    for note in result.notes:
        print(f"note: {note}")
    print(format_table({label(given): result.means}), flush=True)
