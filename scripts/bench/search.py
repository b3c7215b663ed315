"""Search at corpus scale: exact streaming search of random unit vectors, checked in float64; approximate indexes on
clustered ones.

python -m scripts.bench.search                      # 8,841,823 passages of dimension 768; one GPU, 16 cores, 14 GB of
memory or disk python -m scripts.bench.search --passages 20000 --queries 50 --dimension 32 --k 100 --ann-passages 12000
--ann-queries 50
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import faiss
import numpy as np
import torch
from torch import Tensor

from eval.engines.faiss_index import index_spec, open_index
from eval.engines.nearest import SearchOptions, search
from eval.trec import Ranking
from retriever.command import command_parser, option, run
from retriever.parallel.world import World
from retriever.shards import EmbeddingShards, ShardJob, ShardWriter, open_shards
from scripts.bench.measure import peak_gib, reset_peak
from scripts.bench.tables import Table

_SHARD_ROWS = 65_536
_PACKAGES = ("torch", "numpy", "faiss-cpu", "faiss-gpu-cu12", "pyarrow")
_WRITERS = 8  # threads
_IN_MEMORY = Path("/dev/shm")  # files there are page cache and nothing else


def unit_vectors(n: int, dimension: int, seed: int, device: torch.device) -> Tensor:
    """[n, dimension] float32 of unit length, directions uniform."""
    generator = torch.Generator(device).manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(n, dimension, generator=generator, device=device))


def write_shards(folder: Path, rows: int, dimension: int, dtype: str, device: torch.device) -> EmbeddingShards:
    """Random unit vectors as a finished folder of shards, made on `device`."""
    made = f"random {rows}"
    job = ShardJob("passage", "random", "", 1, "mean", True, "fp32", "padded", dimension, dtype, made, _SHARD_ROWS)  # type: ignore[arg-type]
    writer = ShardWriter(folder, job)
    writer.prepare()

    def write(shard: int) -> None:
        first, last = shard * _SHARD_ROWS, min(rows, (shard + 1) * _SHARD_ROWS)
        vectors = unit_vectors(last - first, dimension, shard + 1, device).to(getattr(torch, dtype))
        writer.write(shard, vectors.cpu().numpy(), [str(i) for i in range(first, last)])

    with ThreadPoolExecutor(_WRITERS) as pool:
        list(pool.map(write, range(-(-rows // _SHARD_ROWS))))  # list: raises what a thread raised
    writer.finish(rows)
    return open_shards(folder)


def disagreement(
    queries: np.ndarray, found: list[Ranking], passages: EmbeddingShards, device: torch.device
) -> tuple[float, float]:
    """(share of the true k best that `found` has, ties at the k-th place counting as equal; largest error of a score).

    The truth is every product in float64, by a matrix product; it is told from the search's float32 scores by one part
    in 2^23.
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
    """Time, memory and exactness of the search at the size that `args` asks for. Raises ArithmeticError where it is not
    exact.
    """
    case = f"{args.passages:,} × {args.dimension} {args.dtype}, {args.queries:,} queries, k {args.k:,}"
    with tempfile.TemporaryDirectory(prefix="search-", dir=args.folder or _roomy(args)) as folder:
        started = time.perf_counter()
        passages = write_shards(Path(folder), args.passages, args.dimension, args.dtype, device)
        table.add(case, "shards", "written", time.perf_counter() - started, "s")
        queries = unit_vectors(args.queries, args.dimension, 0, device).cpu().numpy()
        query_ids = [str(i) for i in range(args.queries)]
        reset_peak(device)
        for repeat in range(args.repeats):
            started = time.perf_counter()
            options = SearchOptions(engine="torch", memory_gib=args.memory_gib)
            run = search(queries, query_ids, passages, args.k, options, World(device))
            table.add(
                case, "exact, torch", f"time, run {repeat + 1}", time.perf_counter() - started, "s", "ids to rankings"
            )
        table.add(case, "exact, torch", "device memory", peak_gib(device), "GiB", f"--memory-gib {args.memory_gib:g}")
        table.add(
            case,
            "exact, torch",
            "host memory, peak",
            _status_gib("VmHWM"),
            "GiB",
            "of the process, mapped shards included",
        )
        table.add(
            case, "exact, torch", "host memory, own", _status_gib("RssAnon"), "GiB", "at the end, without mapped shards"
        )
        sample = np.linspace(0, args.queries - 1, min(args.sample, args.queries)).astype(int)
        right, error = disagreement(queries[sample], [run[str(i)] for i in sample], passages, device)
    table.add(case, "exact, torch", "agreement with fp64", 100 * right, "%", f"{len(sample)} queries, up to ties")
    table.add(case, "exact, torch", "largest score error", error, "")
    if right < 1.0 or error > 2.0**-23:
        raise ArithmeticError(
            f"the search is not exact: {100 * right}% of the float64 result, scores off by up to {error}"
        )


def _roomy(args: argparse.Namespace) -> Path | None:
    """The memory's file system where the shards fit into half of what is free there; None: the system's temporary
    folder.
    """
    needed = args.passages * args.dimension * np.dtype(args.dtype).itemsize
    return _IN_MEMORY if _IN_MEMORY.is_dir() and shutil.disk_usage(_IN_MEMORY).free > 2 * needed else None


class Clustered:
    """Unit vectors around random centres, a hundred a centre on average, and queries around the same ones, in
    memory.
    """

    def __init__(self, rows: int, queries: int, dimension: int, device: torch.device) -> None:
        """Noise is as long as the centre."""
        self.rows, self.dimension = rows, dimension
        centres = unit_vectors(max(1, rows // 100), dimension, 1, device)
        generator = torch.Generator(device).manual_seed(2)
        chosen = torch.randint(len(centres), (rows + queries,), generator=generator, device=device)
        every = (
            torch.nn.functional.normalize(centres[chosen] + unit_vectors(rows + queries, dimension, 3, device))
            .cpu()
            .numpy()
        )
        self.passages, self.queries = every[:rows], every[rows:]  # [N, D], [Q, D] float32

    def __iter__(self) -> Iterator[tuple[np.ndarray, list[str]]]:
        yield self.passages, [str(i) for i in range(self.rows)]


def measure_indexes(table: Table, args: argparse.Namespace, device: torch.device) -> None:
    """Recall@100 against exact search and queries/s of FAISS's indexes on the CPU, each at several depths of search."""
    data = Clustered(args.ann_passages, args.ann_queries, args.ann_dimension, device)
    case = f"{data.rows:,} × {data.dimension} clustered, {len(data.queries):,} queries"
    query_ids = [str(i) for i in range(len(data.queries))]
    run = search(data.queries, query_ids, data, 100, SearchOptions(engine="torch"), World(device))
    exact = np.array([[int(i) for i in ranking.passage_ids] for ranking in run.values()])  # [Q, 100]
    plan = [
        ("Flat", [""]),
        ("ivf", [f"nprobe={n}" for n in (16, 64, 256)]),
        ("ivfpq", [f"nprobe={n}" for n in (64, 256)]),
    ]
    plan.append((f"hnsw efConstruction={args.ef_construction}", [f"efSearch={n}" for n in (128, 256, 512)]))
    for name, depths in plan:
        started = time.perf_counter()
        index = open_index(data, name, 100)
        method = f"{name} ({index_spec(name, data.rows, data.dimension, 100).factory})"
        table.add(case, method, "built", time.perf_counter() - started, "s", f"{faiss.omp_get_max_threads()} threads")
        for depth in depths:
            if depth:
                faiss.ParameterSpace().set_index_parameters(index, depth)  # type: ignore[arg-type]
            index.search(data.queries[:16], 100)  # threads started
            started = time.perf_counter()
            _, positions = index.search(data.queries, 100)
            rate = len(data.queries) / (time.perf_counter() - started)
            recall = np.mean([len(np.intersect1d(a, b)) / 100 for a, b in zip(exact, positions, strict=True)])
            table.add(case, f"{method} {depth}".strip(), "recall@100", float(recall), "")
            table.add(case, f"{method} {depth}".strip(), "queries/s", rate, "1/s")


def _status_gib(field: str) -> float | None:
    """A field of /proc/self/status in GiB, None where the system has none."""
    path = Path("/proc/self/status")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((int(line.split()[1]) / 2**20 for line in lines if line.startswith(f"{field}:")), None)


def _search(args: argparse.Namespace) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    table = Table.begin(args.command, _PACKAGES)
    table.hardware += f", {faiss.omp_get_max_threads()} threads"
    try:
        if args.passages:
            measure_exact(table, args, device)
        if args.ann_passages:
            measure_indexes(table, args, device)
    finally:  # what was measured is kept, whatever happens after it
        table.save(args.output)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command `python -m scripts.bench.search`."""
    parser = command_parser(
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
        option("--output", type=Path, default=Path("docs/bench/search.json")),
    )
    return run(parser, arguments, _search)


if __name__ == "__main__":
    sys.exit(main())
