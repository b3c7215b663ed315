"""The command that runs the benchmarks of the mteb package on a model.

python -m eval.mteb --model runs/demo/export --benchmark NanoBEIR --output-dir results
python -m eval.mteb --model runs/demo/export --tasks SciFact NFCorpus STSBenchmark
python -m eval.mteb --model runs/demo/export --data datasets/scifact
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eval.arguments import ENCODING
from retriever.command import BATCH, ENCODER, command, group, one_of, option
from retriever.environment import check_extra
from retriever.errors import RefusedError

if TYPE_CHECKING:
    from retriever.encoder.bundle import EncoderBundle


@command(
    "python -m eval.mteb",
    "evaluate by the mteb package: benchmarks and tasks of the Hugging Face hub, or a BEIR folder as a task of mteb",
    option("--model", required=True, help="model folder or Hugging Face name"),
    one_of(
        option("--benchmark", help="of mteb: NanoBEIR, 'MTEB(eng, v2)', …"),
        option("--tasks", nargs="+", metavar="NAME", help="of mteb: SciFact, NanoNQRetrieval, STSBenchmark, …"),
        option("--data", type=Path, help="a BEIR folder"),
    ),
    option("--split", default="test", help="of --data"),
    option("--name", help="organisation/model in the results (default: the last two names of the model's path)"),
    option(
        "--output-dir",
        type=Path,
        help="for results as mteb's leaderboard takes them (default: evaluations/<model>/mteb)",
    ),
    option(
        "--overwrite",
        action="store_true",
        help="run tasks again that have results of this model and its settings",
    ),
    BATCH,
    *ENCODER,
    group("encoding", *ENCODING, about="each by default what the model folder says"),
    resumes="the same command goes on with the tasks that have no results yet",
    lower="--batch",
)
def main(args: argparse.Namespace) -> None:
    """The command `python -m eval.mteb`."""
    check_extra("mteb", "mteb")
    import mteb
    import torch

    from eval.commands import load_bundle, model_label
    from eval.mteb_adapter import MtebEncoder
    from eval.report import format_table

    ranks = os.environ.get("WORLD_SIZE", "1")
    if ranks != "1":
        raise RefusedError(f"WORLD_SIZE {ranks}: expected 1; mteb runs in one process, start it without a launcher")
    name = args.name or model_label(args.model)
    if "/" not in name:
        raise RefusedError(f"--name {name}: expected organisation/model")
    bundle = load_bundle(args, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    tasks = _tasks(args, bundle)
    folder = args.output_dir or Path("evaluations") / name.replace("/", "-") / "mteb"
    found = mteb.evaluate(
        MtebEncoder(bundle, name, args.batch),
        tasks,
        cache=mteb.ResultCache(folder),
        overwrite_strategy="always" if args.overwrite or args.data else "only-missing",
        encode_kwargs={"batch_size": 512},  # texts that mteb hands over at once
    )
    measures = {task.metadata.name: task.metadata.main_score for task in tasks}
    rows = {result.task_name: {measures[result.task_name]: result.get_score()} for result in found.task_results}
    print(f"\n{name}: {folder / 'results'}\n{format_table(rows)}", flush=True)


def _tasks(args: argparse.Namespace, bundle: EncoderBundle) -> Sequence[Any]:
    """The tasks asked for. Raises RefusedError for a name that mteb does not know."""
    import mteb

    from eval.collections.collection import read_beir
    from eval.mteb_adapter import local_task

    if args.data is not None:
        return [local_task(read_beir(args.data, args.split), bundle)]
    try:
        return mteb.get_benchmark(args.benchmark).tasks if args.benchmark else mteb.get_tasks(tasks=args.tasks)
    except (KeyError, ValueError) as error:
        raise RefusedError(f"mteb {mteb.__version__}: {error.args[0]}") from error


if __name__ == "__main__":
    sys.exit(main())
