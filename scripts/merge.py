"""Average the weights of models that one model was trained into, or of a run's checkpoints.

    python -m scripts.merge runs/a/export runs/b/export --output merged
    python -m scripts.merge runs/a/checkpoints/step-* --output merged --weights 1 2 --data data/scifact --split dev
    python -m scripts.merge base runs/a/export --output merged --weights 0.3 0.7  # base: the model that a began with

Each model is a folder that `retriever/train.py` exported, or a checkpoint, whose export is taken, or the folder of a
starting model, which is taken to have the prompts, lengths and pooling of the first export. They must agree in
everything but the weights. Of a LoRA run, the exports have the adapters merged. The result is written once it was
loaded again and gave the embeddings of the averaged weights. With --data, all models and the result are evaluated.
"""

from __future__ import annotations

import argparse
import re
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from retriever.command import BATCH, command, number, option
from retriever.errors import RefusedError
from retriever.files import read_json, replace_folder, write_json, write_text
from retriever.wording import counted

if TYPE_CHECKING:
    from torch import Tensor

_WEIGHTS = "model.safetensors"
_OF_TRAINING = {"config_sha256", "base_model"}  # in bigbatch.json: what a model was made from
_OF_ONE_MODEL = re.compile("^## (?:Training|Evaluation)$", re.MULTILINE)  # what its card tells from there on
_SETTINGS = ("bigbatch.json", "config.json", "modules.json", "config_sentence_transformers.json", "tokenizer.json")
_PROBES = ("how tall is a giraffe", "Adult giraffes are 4.3 to 5.7 m tall.", "a")
_PARITY = 1e-5


@command(
    "python -m scripts.merge",
    __doc__,
    option("models", nargs="+", type=Path, help="two or more exported models or checkpoints"),
    option("--output", required=True, type=Path, help="folder of the averaged model; must not exist"),
    option("--weights", nargs="+", type=number(above=True), help="of each model in the mean (default: equal)"),
    option("--data", type=Path, help="a BEIR folder to evaluate on"),
    option("--split", default="dev", help="of --data (default: %(default)s)"),
    option("--metrics", nargs="+", metavar="NAME", default=["nDCG@10", "MRR@10", "Recall@100"]),
    BATCH,
    lower="--batch",
)
def main(args: argparse.Namespace) -> None:
    """The command `python -m scripts.merge`."""
    if len(args.models) < 2 or len(args.weights or args.models) != len(args.models):
        received = f"{counted(len(args.models), 'model')} and {counted(len(args.weights or ()), 'weight')}"
        raise RefusedError(f"expected two or more models and a weight for each, or none; received {received}")
    if args.output.exists():
        raise RefusedError(f"--output {args.output}: exists; expected the name of a new folder")
    total = sum(args.weights or [1.0] * len(args.models))
    shares = [weight / total for weight in args.weights or [1.0] * len(args.models)]
    with tempfile.TemporaryDirectory(prefix="bigbatch-") as aside:
        folders = _exports_of(args.models, Path(aside))
        merge(folders, shares, args.output)
        print(f"{args.output}: the mean of {len(folders)} models", flush=True)
        if args.data is not None:
            _evaluate(dict(zip([*map(str, args.models), str(args.output)], [*folders, args.output], strict=True)), args)


def merge(folders: Sequence[Path], shares: Sequence[float], output: Path) -> None:
    """Writes the model whose weights are Σ share · weight of the models in `folders`.

    Raises RefusedError where the models differ in more than their weights, or the written one in its embeddings from
    the averaged weights.
    """
    from safetensors.torch import load_file, save_file

    files = sorted(path.relative_to(folders[0]) for path in folders[0].rglob(_WEIGHTS))
    for folder in folders[1:]:
        _check_alike(folders[0], folder)
    with replace_folder(output) as writing:
        others = shutil.ignore_patterns("adapter", "onnx")  # of the first model alone
        shutil.copytree(folders[0], writing, dirs_exist_ok=True, ignore=others)
        for file in files:
            states = [load_file(folder / file) for folder in folders]
            save_file(average(states, shares), writing / file, metadata={"format": "pt"})
        described = read_json(writing / "bigbatch.json")
        write_json(writing / "bigbatch.json", {**described, "merged": list(shares)})
        for card in writing.rglob("README.md"):
            write_text(card, _merged_card(card.read_text(encoding="utf-8"), shares))
        _check_parity(writing, folders, shares)


def _merged_card(card: str, shares: Sequence[float]) -> str:
    """A model's card with the mean in the place of its own training and evaluation."""
    weighted = ", ".join(f"{share:.3g}" for share in shares)
    mean = f"The weights are the mean over {counted(len(shares), 'model')} of one form, with the shares {weighted}."
    return f"{_OF_ONE_MODEL.split(card, maxsplit=1)[0]}## Training\n\n{mean}\n"


def average(states: Sequence[dict[str, Tensor]], shares: Sequence[float]) -> dict[str, Tensor]:
    """Σ share · state, summed in float64; what is no floating-point number must be equal and stays.

    Raises RefusedError where names, shapes or such values differ.
    """
    import torch

    first, averaged = states[0], {}
    for state in states[1:]:
        shapes = [{(name, tensor.shape) for name, tensor in each.items()} for each in (first, state)]
        if different := shapes[0] ^ shapes[1]:
            raise RefusedError(f"weight {min(different)[0]!r}: expected one shape in all models")
    for name, tensor in first.items():
        if tensor.is_floating_point():
            parts = (share * state[name].double() for share, state in zip(shares, states, strict=True))
            averaged[name] = sum(parts, torch.zeros_like(tensor, dtype=torch.float64)).to(tensor.dtype)
        elif all(torch.equal(tensor, state[name]) for state in states):
            averaged[name] = tensor
        else:
            raise RefusedError(f"weight {name!r}: expected the same whole numbers in all models")
    return averaged


def _exports_of(models: Sequence[Path], aside: Path) -> list[Path]:
    """The exports of exported models and checkpoints; those of starting models are made in `aside`."""
    folders = [model / "export" if (model / "export").is_dir() else model for model in models]
    exported = next((folder for folder in folders if (folder / "bigbatch.json").is_file()), None)
    for place, (model, folder) in enumerate(zip(models, folders, strict=True)):
        if (folder / "bigbatch.json").is_file():
            continue
        if exported is None or not (folder / "config.json").is_file():
            missing = "config.json" if exported is not None else "bigbatch.json"
            raise RefusedError(
                f"{model}: expected an exported model, a checkpoint or, beside one, the folder of a starting model; "
                f"it has no {missing}"
            )
        folders[place] = _export_like(exported, folder, aside / str(place))
    return folders


def _export_like(exported: Path, start: Path, output: Path) -> Path:
    """The weights of a starting model in an export that is otherwise as `exported`."""
    from transformers import AutoModel

    from retriever.encoder.pretrained import quiet_transformers

    shutil.copytree(exported, output)
    with quiet_transformers():
        AutoModel.from_pretrained(start, dtype="float32").save_pretrained(output / "start")
    for file in output.rglob(_WEIGHTS):
        if file.parent.name == "start":
            continue
        if "model_type" not in read_json(file.with_name("config.json")):
            raise RefusedError(f"{exported / file.relative_to(output)}: a projection, which {start} lacks")
        shutil.copyfile(output / "start" / _WEIGHTS, file)
    shutil.rmtree(output / "start")
    return output


def _check_alike(first: Path, other: Path) -> None:
    for name in _SETTINGS:
        for file in sorted(path.relative_to(first) for path in first.rglob(name)):
            found = [_settings(folder / file) for folder in (first, other)]
            if found[0] != found[1]:
                raise RefusedError(f"{other / file} differs from that of {first}; expected models of one base and form")


def _settings(file: Path) -> Any:
    """The content of a settings file without the model's origin; None if there is no such file."""
    if not file.is_file():
        return None
    found = read_json(file)
    return {key: value for key, value in found.items() if key not in _OF_TRAINING} if isinstance(found, dict) else found


def _check_parity(written: Path, folders: Sequence[Path], shares: Sequence[float]) -> None:
    """Raises RefusedError where the written model embeds otherwise than the averaged weights of the loaded ones."""
    import numpy as np

    from retriever.data.tokens import SIDES
    from retriever.encoder.bundle import load_encoder

    reloaded, bundles = load_encoder(written), [load_encoder(folder) for folder in folders]
    expected = bundles[0]
    expected.encoder.load_state_dict(average([bundle.encoder.state_dict() for bundle in bundles], shares))
    for side in SIDES:
        mean = expected.encode(_PROBES, side)
        difference, allowed = np.abs(reloaded.encode(_PROBES, side) - mean).max(), _PARITY * max(1, np.abs(mean).max())
        if not difference <= allowed:
            much = f"{difference:.2e}; expected at most {allowed:.2e}"
            raise RefusedError(f"reloaded, a {side} embedding differs by {much}")


def _evaluate(folders: Mapping[str, Path], args: argparse.Namespace) -> None:
    from eval.evaluate import EvalOptions, evaluate
    from eval.report import format_table
    from retriever.encoder.bundle import load_encoder

    rows = {}
    for name, folder in folders.items():
        options = EvalOptions(batch=args.batch, progress=True)
        result = evaluate(load_encoder(folder), args.data, args.split, args.metrics, options)
        assert result is not None
        rows[name] = result.means
    print(format_table(rows), flush=True)


if __name__ == "__main__":
    sys.exit(main())
