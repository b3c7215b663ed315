"""Search at corpus scale: exact streaming search of random unit vectors, checked in float64, and approximate indexes
over clustered vectors.

    python -m scripts.bench.search   # 8,841,823 passages of dimension 768; one GPU, 16 cores, 14 GB of memory or disk
    python -m scripts.bench.search --passages 20000 --queries 50 --dimension 32 --k 100 --ann-passages 12000
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import torch
from torch import Tensor

from eval.engines.faiss_index import index_spec, open_index
from eval.engines.nearest import SearchOptions, search
from eval.trec import Ranking
from retriever.command import command, option
from retriever.parallel.world import World
from retriever.shards import EmbeddingShards, ShardJob, ShardWriter, open_shards
from scripts.bench.measure import timed
from scripts.bench.tables import Table

_SHARD_ROWS = 65_536
_PACKAGES = ("torch", "numpy", "faiss-cpu", "faiss-gpu-cu12", "pyarrow")
_WRITERS = 8  # threads
_IN_MEMORY = Path("/dev/shm")  # files there are page cache and nothing else


def unit_vectors(n: int, dimension: int, seed: int, device: torch.device) -> Tensor:
    """Random unit vectors [n, dimension] float32, uniform over the sphere."""
    generator = torch.Generator(device).manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(n, dimension, generator=generator, device=device))


def write_shards(
    folder: Path, rows: int, dimension: int, dtype: str, vectors: Callable[[int, int], Tensor]
) -> EmbeddingShards:
    """Writes `vectors`(rows of a shard, its number from 1) as a finished folder of shards."""
    named: dict[str, Any] = {
        "dimension": dimension,
        "dtype": dtype,
        "texts": f"random {rows}",
        "shard_rows": _SHARD_ROWS,
    }
    job = ShardJob("passage", "random", "", 1, "mean", True, "fp32", "padded", **named)
    writer = ShardWriter(folder, job)
    writer.prepare()

    def write(shard: int) -> None:
        first, last = shard * _SHARD_ROWS, min(rows, (shard + 1) * _SHARD_ROWS)
        stored = vectors(last - first, shard + 1).to(getattr(torch, dtype))
        writer.write(shard, stored.cpu().numpy(), list(map(str, range(first, last))))

    with ThreadPoolExecutor(_WRITERS) as pool:
        list(pool.map(write, range(-(-rows // _SHARD_ROWS))))  # list: raises what a thread raised
    writer.finish(rows)
    return open_shards(folder)


def disagreement(
    queries: np.ndarray, found: list[Ranking], passages: EmbeddingShards, device: torch.device
) -> tuple[float, float]:
    """(share of the true k best that `found` has, largest error of a score). Ties at rank k count as equal.

    The truth is a matrix product in float64. A score within one part in 2^23 of the k-th best counts as a tie, which is
    float32's precision.
    """
    k = len(found[0].passage_ids)
    wide = torch.from_numpy(queries).to(device).double()  # [S, D]
    scores = torch.cat(
        [wide @ torch.from_numpy(np.array(part)).to(device).double().T for part, _ in passages], dim=1
    )  # [S, N]
    kth = scores.topk(k, dim=1).values[:, -1:]  # [S, 1]
    positions = torch.tensor([[int(i) for i in ranking.passage_ids] for ranking in found], device=device)  # [S, k]
    of_found = scores.gather(1, positions)
    distinct = all(len(set(ranking.passage_ids)) == k for ranking in found)
    right = (of_found >= kth - kth.abs() * 2.0**-23).double().mean() if distinct else 0.0
    stated = torch.from_numpy(np.stack([ranking.scores for ranking in found])).to(device)
    return float(right), float((stated - of_found).abs().max())


def measure_exact(table: Table, args: argparse.Namespace, device: torch.device) -> None:
    """Adds time, memory and exactness of the exact search. Raises ArithmeticError if it is not exact."""
    case = f"{args.passages:,} × {args.dimension} {args.dtype}, {args.queries:,} queries, k {args.k:,}"
    add = partial(table.add, case, "exact, torch")
    bytes_needed = args.passages * args.dimension * np.dtype(args.dtype).itemsize
    in_memory = _IN_MEMORY.is_dir() and shutil.disk_usage(_IN_MEMORY).free > 2 * bytes_needed
    with tempfile.TemporaryDirectory(
        prefix="search-", dir=args.folder or (_IN_MEMORY if in_memory else None)
    ) as folder:

        def vectors(rows: int, seed: int) -> Tensor:
            return unit_vectors(rows, args.dimension, seed, device)

        write = partial(write_shards, Path(folder), args.passages, args.dimension, args.dtype, vectors)
        table.add(case, "shards", "written", timed(device, write).seconds[0], "s")
        passages = open_shards(folder)
        queries = unit_vectors(args.queries, args.dimension, 0, device).cpu().numpy()
        found: dict[str, Ranking] = {}
        query_ids, options = (
            list(map(str, range(args.queries))),
            SearchOptions(engine="torch", memory_gib=args.memory_gib),
        )
        ask = partial(search, queries, query_ids, passages, args.k, options, World(device))
        for repeat in range(args.repeats):
            (taken,), peak_gib = timed(device, lambda: found.update(ask()))
            add(f"time, run {repeat + 1}", taken, "s", "ids to rankings")
        add("device memory", peak_gib, "GiB", f"--memory-gib {args.memory_gib:g}")
        add("host memory, peak", _status_gib("VmHWM"), "GiB", "of the process, mapped shards included")
        add("host memory, own", _status_gib("RssAnon"), "GiB", "at the end, without mapped shards")
        sample = np.linspace(0, args.queries - 1, min(args.sample, args.queries)).astype(int)
        right, error = disagreement(queries[sample], [found[str(i)] for i in sample], passages, device)
    add("agreement with fp64", 100 * right, "%", f"{len(sample)} queries, up to ties")
    add("largest score error", error, "")
    if right < 1.0 or error > 2.0**-23:
        raise ArithmeticError(
            f"the search is not exact: {100 * right}% of the float64 result, scores off by up to {error}"
        )


class InMemory:
    """Embeddings [N, D] float32 in memory; a row's id is its number."""

    def __init__(self, vectors: np.ndarray) -> None:
        self.vectors = vectors
        self.rows, self.dimension = vectors.shape

    def __iter__(self) -> Iterator[tuple[np.ndarray, list[str]]]:
        yield self.vectors, list(map(str, range(len(self.vectors))))


def clustered(rows: int, dimension: int, device: torch.device) -> np.ndarray:
    """Unit vectors [rows, dimension] around random centres, 100 vectors per centre on average. The noise is as long as
    the centre.
    """
    centres = unit_vectors(max(1, rows // 100), dimension, 1, device)
    generator = torch.Generator(device).manual_seed(2)
    chosen = torch.randint(len(centres), (rows,), generator=generator, device=device)
    vectors = centres[chosen] + unit_vectors(rows, dimension, 3, device)
    return torch.nn.functional.normalize(vectors).cpu().numpy()


def measure_indexes(table: Table, args: argparse.Namespace, device: torch.device) -> None:
    """Adds recall@100 against exact search and queries per second of FAISS's indexes on the CPU, at several search
    depths.
    """
    vectors = clustered(args.ann_passages + args.ann_queries, args.ann_dimension, device)
    data, queries = InMemory(vectors[: args.ann_passages]), vectors[args.ann_passages :]
    case = f"{data.rows:,} × {data.dimension} clustered, {len(queries):,} queries"
    query_ids = list(map(str, range(len(queries))))
    exact = search(queries, query_ids, data, 100, SearchOptions(engine="torch"), World(device))
    nearest = np.array([[int(i) for i in ranking.passage_ids] for ranking in exact.values()])  # [Q, 100]
    for name, parameter, depths in (
        ("Flat", "", (0,)),
        ("ivf", "nprobe", (16, 64, 256)),
        ("ivfpq", "nprobe", (64, 256)),
        (f"hnsw efConstruction={args.ef_construction}", "efSearch", (128, 256, 512)),
    ):
        started = time.perf_counter()
        index = open_index(data, name, 100)
        method = f"{name} ({index_spec(name, data.rows, data.dimension, 100).factory})"
        table.add(case, method, "built", time.perf_counter() - started, "s", f"{faiss.omp_get_max_threads()} threads")
        for depth in depths:
            setting = f"{parameter}={depth}" if depth else ""
            if setting:
                faiss.ParameterSpace().set_index_parameters(index, setting)  # type: ignore[arg-type]
            index.search(queries[:16], 100)  # threads started
            started = time.perf_counter()
            _, positions = index.search(queries, 100)
            rate = len(queries) / (time.perf_counter() - started)
            recall = np.mean([len(np.intersect1d(a, b)) / 100 for a, b in zip(nearest, positions, strict=True)])
            table.add(case, f"{method} {setting}".strip(), "recall@100", float(recall), "")
            table.add(case, f"{method} {setting}".strip(), "queries/s", rate, "1/s")


def measure_from_disk(table: Table, args: argparse.Namespace) -> None:
    """Adds an index over float16 shards on disk whose best passages are scored again from there: seconds, recall@100
    against exact search, queries per second, and the host's memory.
    """
    case = f"{args.disk_passages:,} × {args.dimension} float16 on disk, clustered, {args.ann_queries:,} queries"
    cpu = torch.device("cpu")
    centres = unit_vectors(max(1, args.disk_passages // 100), args.dimension, 1, cpu)

    def vectors(rows: int, seed: int) -> Tensor:
        chosen = torch.randint(len(centres), (rows,), generator=torch.Generator().manual_seed(seed))
        return torch.nn.functional.normalize(centres[chosen] + unit_vectors(rows, args.dimension, seed, cpu))

    with tempfile.TemporaryDirectory(prefix="search-", dir=args.folder) as folder:
        passages = write_shards(Path(folder), args.disk_passages, args.dimension, "float16", vectors)
        queries, query_ids = vectors(args.ann_queries, 0).numpy(), list(map(str, range(args.ann_queries)))
        exact = search(queries, query_ids, passages, 100)
        add = partial(table.add, case, args.disk_index)
        _forget_peak()
        started = time.perf_counter()
        open_index(passages, args.disk_index, 100)
        add("built", time.perf_counter() - started, "s", f"{faiss.omp_get_max_threads()} threads")
        add("host memory, peak", _status_gib("VmHWM"), "GiB", "of the process, mapped shards included")
        for rescore in (0, *args.rescore):
            options = SearchOptions(index=args.disk_index, rescore=rescore)
            started = time.perf_counter()
            found = search(queries, query_ids, passages, 100, options)
            rate = len(queries) / (time.perf_counter() - started)
            common = [len({*found[i].passage_ids} & {*exact[i].passage_ids}) / 100 for i in query_ids]
            add(f"recall@100, rescore {rescore}", float(np.mean(common)), "")
            add(f"queries/s, rescore {rescore}", rate, "1/s", "reading and ordering of ids included")
        add("host memory, peak at the end", _status_gib("VmHWM"), "GiB", "of the process, mapped shards included")
        add("host memory, own", _status_gib("RssAnon"), "GiB", "at the end, without mapped shards")


def _forget_peak() -> None:
    """Starts VmHWM anew, where the system is a Linux."""
    if Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5")


def _status_gib(field: str) -> float | None:
    """A field of /proc/self/status in GiB; None where the system has no such file."""
    path = Path("/proc/self/status")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((int(line.split()[1]) / 2**20 for line in lines if line.startswith(f"{field}:")), None)


@command(
    "python -m scripts.bench.search",
    __doc__,
    option("--passages", type=int, default=8_841_823, help="0: leave exact search out"),
    option("--queries", type=int, default=6_980),
    option("--dimension", type=int, default=768),
    option("--k", type=int, default=1000),
    option("--dtype", choices=("float16", "float32"), default="float16", help="of the shards"),
    option("--memory-gib", type=float, default=16.0, help="of the device"),
    option("--repeats", type=int, default=2),
    option("--sample", type=int, default=20, help="queries checked in float64"),
    option(
        "--folder",
        type=Path,
        help="for the shards, deleted again (default: /dev/shm if roomy, else the temporary one)",
    ),
    option("--ann-passages", type=int, default=1_000_000, help="0: leave indexes out"),
    option("--ann-queries", type=int, default=1_000),
    option("--ann-dimension", type=int, default=128),
    option("--ef-construction", type=int, default=64, help="of HNSW"),
    option("--disk-passages", type=int, default=0, help="an index over so many in shards on disk; 0: left out"),
    option("--disk-index", default="ivfpq", help="name or FAISS factory string, parameters after a blank"),
    option("--rescore", type=int, nargs="+", default=[200, 1000], help="of the index over shards on disk"),
    option("--output", type=Path, default=Path("docs/bench/search.json")),
)
def main(args: argparse.Namespace) -> None:
    """The command `python -m scripts.bench.search`."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    table = Table.begin(args.command, _PACKAGES, args.output)
    table.hardware += f", {faiss.omp_get_max_threads()} threads"
    if args.passages:
        measure_exact(table, args, device)
    if args.ann_passages:
        measure_indexes(table, args, device)
    if args.disk_passages:
        measure_from_disk(table, args)


if __name__ == "__main__":
    sys.exit(main())
