"""The whole path in one command: pairs from installed code, BM25, the model before training, training, the model after,
and your own queries.

    python -m scripts.demo               # as large as suits the machine: --small on a CPU, --large on a GPU
    python -m scripts.demo --smallest    # a few steps, to see that every part works

A query is the first paragraph of a docstring. The passage to find is the function's code, without docstring and name.
The modules that the queries come from are not trained on. The interval is a bootstrap over those modules of the
difference per query.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from retriever.command import command, one_of, option
from retriever.config_file import load
from retriever.files import write_json
from retriever.run_folder import remove_run
from scripts.code_pairs.sources import installed
from scripts.code_pairs.split import Settings
from scripts.demo.model import starting_model
from scripts.make_pairs import build, summary

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Form:
    """A size of the demo: the pairs, the number of functions searched (None: all), and settings that override the
    configuration.
    """

    pairs: Settings
    searched: int | None
    overrides: tuple[str, ...] = ()


def form_called(name: str) -> Form:
    """The form `smallest`, `small` (minutes on two CPU cores) or `large` (for a GPU)."""
    if name == "smallest":
        return Form(Settings(test_queries=120, dev_queries=20), 400, ("batch.queries=16", "train.max_steps=4"))
    if name == "small":
        return Form(Settings(), 2000)
    large = Settings(packages=tuple(installed()), test_queries=2000, dev_queries=500)
    lengths = ("model.query_max_tokens=64", "model.passage_max_tokens=128")
    steps = (
        "batch.queries=4096",
        "batch.tokens_per_chunk=auto",
        "train.max_steps=60",
        "optim.lr=2e-4",
        "optim.precision=bf16",
    )
    return Form(large, None, lengths + steps)


_FORMS = {
    "smallest": "a few steps",
    "small": "the standard library, batches of 64; the default without a GPU",
    "large": "every well-known package found, batches of 4,096; the default with a GPU",
}
_SIZES = [
    option(f"--{name}", dest="form", action="store_const", const=name, help=meaning) for name, meaning in _FORMS.items()
]


@command(
    "python -m scripts.demo",
    __doc__,
    one_of(*_SIZES, required=False),
    option(
        "--config",
        type=Path,
        default=ROOT / "configs" / "demo.yaml",
        help="of the training run (default: %(default)s)",
    ),
    option("--output-dir", type=Path, default=Path("runs/demo"), help="default: %(default)s"),
    option(
        "overrides",
        nargs="*",
        metavar="key.sub=value",
        help="settings that replace the configuration's and the form's",
    ),
    lower="batch.tokens_per_chunk",
)
def main(args: argparse.Namespace) -> None:
    """The command `python -m scripts.demo`: runs every part in order and leaves `result.json` in the output folder. If
    training fails, its exit status is returned.
    """
    name, config_file, output = args.form, args.config, args.output_dir
    if name is None:
        import torch

        name = "large" if torch.cuda.is_available() else "small"
    form, started = form_called(name), time.perf_counter()
    weights = starting_model()
    settings = [*_places(weights, output), *form.overrides, *args.overrides]
    config = load(config_file, settings)
    remove_run(output / "run")  # which starts afresh

    _headline("Docstring-to-code pairs", started)
    code, manifest = build(output / "data", form.pairs)
    print(summary(manifest))
    searched, data = code, output / "data"
    if form.searched is not None:
        searched, data = code.bounded(["test"], form.searched, form.pairs.seed), output / "search"
        searched.write(data)
        own = f"the {manifest['counts']['test_queries']:,} queries' own among them"
        print(f"searched: {len(searched.corpus):,} of the functions, {own}")

    # Imported here: torch takes seconds, and what can be wrong above is told without waiting for it.
    from eval.collections.collection import read_beir
    from retriever.shards import open_shards
    from scripts.demo.parts import bm25_scores, evaluate_encoder, exactness, load_bundle, train
    from scripts.demo.report import outcome, table
    from scripts.demo.search import Searcher, answer_own_queries, sample_queries

    test = read_beir(data)

    _headline("BM25", started)
    scores = {"BM25": bm25_scores(test)}

    _headline("The model before training", started)
    before = load_bundle(weights, config)
    scores["before training"] = evaluate_encoder(before, test, output / "embeddings" / "before")

    _headline("Training", started)
    check = exactness(config, before)
    print(f"exactness, in float64: {check}")
    speed = train(config_file, settings, output / "run")

    _headline("The model after training", started)
    after = load_bundle(output / "run" / "export", config)
    scores["after training"] = evaluate_encoder(after, test, output / "embeddings" / "after")

    _headline("Held-out search", started)
    result = outcome(scores, {query_id: module for query_id, (_, module) in code.queries.items()})
    print(table(result, config, speed, check))
    seconds = round(time.perf_counter() - started, 1)
    record = {"form": name, **result, **speed, "exactness": str(check), "pairs": manifest, "seconds": seconds}
    write_json(output / "result.json", record)

    _headline("Three of the queries, drawn at random", started)
    passages = open_shards(output / "embeddings" / "after" / "passages")
    searcher = Searcher(after, passages, dict(searched.corpus.values()))
    for query_id in sample_queries(test.queries, 3, form.pairs.seed):
        print(searcher.answer(test.queries[query_id], test.qrels[query_id]), end="\n\n")
    answer_own_queries(searcher.answer)


def _places(weights: Path, output: Path) -> list[str]:
    """The settings that name files and folders."""
    # Relative where it can be: short, and the same wherever the project lies.
    near = weights.relative_to(Path.cwd()) if weights.is_relative_to(Path.cwd()) else weights
    return [
        f"model.name_or_path={near}",
        f"run.output_dir={output / 'run'}",
        f"data.train.0.path={output / 'data'}",
        f"data.train.1.path={output / 'data' / 'details'}",
        f"data.cache_dir={output / 'cache'}",
    ]


def _headline(text: str, started: float) -> None:
    print(f"\n── {text} " + "─" * (70 - len(text)) + f" {time.perf_counter() - started:4.0f} s", flush=True)


if __name__ == "__main__":
    sys.exit(main())
