"""How a run evaluates while it trains. The only module of `retriever` that imports `eval`."""

from __future__ import annotations

from pathlib import Path

from eval.evaluate import EvalOptions, EvalResult
from eval.examples import Examples
from eval.several import check_evaluation, evaluate_all
from retriever.assembly import Assembly, EvalQueries
from retriever.config import Config, ConfigError
from retriever.encoder.bundle import EncoderBundle
from retriever.encoder.settings import settings_of
from retriever.optim import Optimizer
from retriever.run_folder import EXAMPLES


def check(config: Config) -> EvalQueries:
    """Checks what evaluations will need, and returns their queries. Raises RefusedError or DataError."""
    return {} if config.eval is None else check_evaluation(config.eval)


def evaluate(parts: Assembly, optimizer: Optimizer, folder: Path | None, step: int) -> dict[str, float]:
    """Measures the weights after `step` steps as section `eval` says: `eval/<measure>` -> mean over queries.

    `folder`: the run's folder for embeddings; with it, the queries that the run won and lost are kept in its own.
    Empty on ranks other than the first. Raises ConfigError where there is no section `eval`.
    """
    config, world = parts.config, parts.world
    asked = config.eval
    if asked is None:
        raise ConfigError("eval: expected a section with a path; received null")
    compared: set[str] = set()

    def compare(result: EvalResult) -> None:
        """Of the first collection."""
        if folder is not None and not compared:
            data = config.data
            Examples(folder.with_name(EXAMPLES), data.title, data.title_separator).add(step, result)
        compared.add(result.collection.name)

    options = EvalOptions(index=asked.index, k=asked.k, dims=asked.dims, progress=world.is_first, on_result=compare)
    settings = settings_of(config, parts.encoder.pooling, parts.encoder.truncate_dim)
    with optimizer.averaged():
        bundle = EncoderBundle(parts.placed.whole(world.device), parts.prepared.tokenizer, settings)
        measured = evaluate_all(bundle, asked, parts.objective.temperature, folder, options, world)
    return {f"eval/{name}": value for name, value in measured.items()}
