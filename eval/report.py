"""Results on the screen (a table) and on disk (a run and a JSON file that says what it was made from)."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from eval.collections.collection import file_fingerprint
from eval.evaluate import EvalResult
from eval.outputs import is_result, is_run, refuse_foreign
from eval.trec import write_msmarco, write_trec
from retriever import environment
from retriever.files import write_text

_VERSIONS = (
    "bigbatch",
    "torch",
    "transformers",
    "numpy",
    "faiss-cpu",
    "faiss-gpu",
    "faiss-gpu-cu12",
    "faiss-gpu-cu11",
    "bm25s",
)


def format_table(rows: Mapping[str, Mapping[str, float]]) -> str:
    """Label -> measure -> value, as an aligned table with four decimals; a measure that a row lacks is left blank."""
    measures = list(dict.fromkeys(name for means in rows.values() for name in means))
    width = max((len(label) for label in rows), default=0)
    columns = [max(len(name), 6) for name in measures]
    lines = [" " * width + "".join(f"  {name:>{w}}" for name, w in zip(measures, columns, strict=True))]
    for label, means in rows.items():
        cells = (f"{means[name]:.4f}" if name in means else "" for name in measures)
        lines.append(f"{label:<{width}}" + "".join(f"  {cell:>{w}}" for cell, w in zip(cells, columns, strict=True)))
    return "\n".join(lines)


def write_result(
    result: EvalResult,
    folder: Path,
    *,
    command: str,
    source: Mapping[str, Any],
    search: Mapping[str, Any],
    msmarco: bool = False,
) -> Path:
    """Writes `<split>.trec` (with `msmarco`, `<split>.msmarco.tsv` too) and `<split>.json` into `folder`; returns the
    JSON file.

    `command` is the line that made it, `source` where the run came from (model, BM25, a run file), `search` how
    passages were searched.
    """
    collection = result.collection
    run_file = folder / f"{collection.split}.trec"
    write_trec(run_file, result.run)
    if msmarco:
        write_msmarco(folder / f"{collection.split}.msmarco.tsv", result.run)
    scores = result.scores
    content = {
        "command": command,
        "data": {
            "name": collection.name,
            "split": collection.split,
            "queries": result.n_queries,
            "passages": result.n_passages,
        },
        "source": dict(source),
        "encoding": dict(result.encoding),
        "search": dict(search),
        "relevance": collection.relevance,
        "metrics": result.means,
        **({"dims": dict(result.at_dims)} if result.at_dims else {}),
        **({"quantized": dict(result.quantized)} if result.quantized else {}),
        "fingerprints": {"run": file_fingerprint(run_file), **collection.fingerprints()},
        "versions": versions(),
        "per_query": {
            name: dict(zip(scores.query_ids, map(float, values), strict=True))
            for name, values in scores.per_query.items()
        },
    }
    path = folder / f"{collection.split}.json"
    write_text(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    return path


def refuse_foreign_results(folder: Path, *names: str) -> None:
    """Raises ConfigError with the first file that `write_result` would replace for the splits `names` and no evaluation
    wrote.
    """
    known = {".json": is_result("command", "metrics"), ".trec": is_run, ".msmarco.tsv": is_run}
    for name in names:
        for ending, ours in known.items():
            refuse_foreign(folder / f"{name}{ending}", ours, "another folder (--output-dir)")


def versions() -> dict[str, str]:
    """The versions of what a result depends on, those that are installed."""
    return {"python": platform.python_version()} | environment.versions(_VERSIONS)
