"""Search a collection with one model or two, side by side, in a browser on this machine.

    python -m scripts.serve runs/mine
    python -m scripts.serve runs/before runs/after --data data/scifact --split test

RUN is a training run's folder (its best/ model, else its export/), a model folder or a Hugging Face name. The
collection is by default the one that the first run evaluates on. It is encoded at the first start; a later start
reuses the embeddings. The page shows scores, ranks and the judgments that the collection has. Only this machine can
open it.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import socket
import sys
from pathlib import Path

import yaml

from retriever.command import BATCH, ENCODER, command, option, whole
from retriever.config import ConfigError, EvalCollectionConfig

_HOST = "127.0.0.1"
_NEEDED = ("fastapi", "uvicorn")


@command(
    "python -m scripts.serve",
    __doc__,
    option("runs", nargs="+", metavar="RUN", help="one model, or two to compare"),
    option("--data", type=Path, help="the collection's folder (default: eval.path of the first run)"),
    option("--split", help="of the queries and judgments (default: the run's eval.split, else test)"),
    option("--format", choices=("beir", "msmarco"), help="of --data (default: beir)"),
    option("--port", type=whole(0, 65535), default=8000, help="of 127.0.0.1; 0: any that is free"),
    option("--output-dir", type=Path, default=Path("evaluations"), help="for embeddings (default: %(default)s)"),
    BATCH,
    *ENCODER,
    lower="--batch",
)
def main(args: argparse.Namespace) -> None:
    """The command `python -m scripts.serve`."""
    if len(args.runs) > 2:
        raise ConfigError(f"{len(args.runs)} runs: expected one, or two to compare")
    if absent := [name for name in _NEEDED if importlib.util.find_spec(name) is None]:
        raise ConfigError(f"{' and '.join(absent)} not installed: run `pip install '.[serve]'` in the clone")
    asked = _collection(args)

    import uvicorn

    from eval.several import read_collection
    from scripts.serve.app import application
    from scripts.serve.models import open_models, texts_of

    with _listening(args.port) as listening:  # before anything is encoded
        collection = read_collection(asked)
        collection.check()
        models = open_models(args.runs, [*map(_model_folder, args.runs)], collection, args)
        app = application(models, collection, texts_of(collection, models[0]))
        print(f"http://{_HOST}:{listening.getsockname()[1]}  (Ctrl-C ends)", flush=True)
        uvicorn.Server(uvicorn.Config(app, log_level="warning")).run(sockets=[listening])


def _collection(args: argparse.Namespace) -> EvalCollectionConfig:
    """The collection to search: `--data`, else what the first run evaluates on."""
    if args.data is not None:
        return EvalCollectionConfig(path=str(args.data), format=args.format or "beir", split=args.split or "test")
    if args.format is not None:
        raise ConfigError(f"--format {args.format}: expected --data, of which it is the format")
    if not Path(args.runs[0]).is_dir():
        raise ConfigError(f"there is no folder {args.runs[0]}: expected --data, or a run's folder")
    file = Path(args.runs[0]) / "config.yaml"
    evaluated = yaml.safe_load(file.read_text(encoding="utf-8")).get("eval") if file.is_file() else None
    if not evaluated:
        raise ConfigError(f"{args.runs[0]} names no collection: expected --data, or a run's folder with `eval`")
    return EvalCollectionConfig(path=evaluated["path"], split=args.split or evaluated["split"])


def _model_folder(run: str) -> str:
    """The model of a run's folder; `run` itself where it is no run's."""
    exported = (Path(run) / name for name in ("best", "export"))
    return next((str(folder) for folder in exported if folder.is_dir()), run)


def _listening(port: int) -> socket.socket:
    try:
        return socket.create_server((_HOST, port))
    except OSError as error:
        raise ConfigError(f"--port {port}: {os.strerror(error.errno or 0)}; expected a free port, 0 for any") from error


if __name__ == "__main__":
    sys.exit(main())
