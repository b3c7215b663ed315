"""Short CPU runs whose weights and losses are recorded: `python -m tests.golden.make` writes recorded.safetensors anew.

Record again only where a change of the numbers is intended, and say so in the commit. The runs start from the model and
the data of tests/artefacts, so that they depend on no library's initialisation.
"""

from __future__ import annotations

import json
import platform
import tempfile
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import load_file, save_file

from retriever.train import main as train
from tests.artefacts.archive import unpack
from tests.determinism import make_strict

RECORDED = Path(__file__).with_name("recorded.safetensors")
STEPS = 12
_SETTINGS = {
    "run": {"seed": 5, "trackers": []},
    "model": {"name_or_path": "model", "query_max_tokens": 12, "passage_max_tokens": 24, "query_prompt": "query: "},
    "data": {
        "train": [{"path": "data"}, {"path": "loop/mined/mine/data"}],
        "negatives": 2,
        "cache_dir": "golden-cache",
    },
    "batch": {"queries": 8, "tokens_per_chunk": 72},
    "loss": {
        "temperature": 0.1,
        "learn_temperature": True,
        "precision": "fp32",
        "symmetric": True,
        "dims": [4, 8],
        "false_negative_margin": 0.1,
    },
    "optim": {"lr": 3.0e-3, "precision": "fp32", "warmup": 2},
    "train": {"max_steps": STEPS, "save_every": STEPS, "log_every": 1},
}
_FUSED = ("model.attention=packed", "model.fused=true", "batch.retain=40", "batch.retain_products=60")
_PLAIN = ("loss.symmetric=false", "loss.dims=[]", "loss.false_negative_margin=null", "batch.one_source=false")
RUNS: dict[str, tuple[str, ...]] = {
    "tiled": (),
    "one-direction": _PLAIN,
    "fused": (*_FUSED, *_PLAIN, "loss.precision=bf16"),
    "untied": ("model.attention=packed", "model.tied=false", "batch.retain=60"),
    "dense": ("loss.strategy=dense",),
    "local": ("loss.strategy=local",),
    "disco": ("loss.strategy=disco",),
    "offload": ("batch.offload=true", "batch.retain=30"),
    "distilled": (*_FUSED, *_PLAIN, "loss.kl_weight=1.0", "loss.margin_mse_weight=0.1", "loss.teacher_margin=0.0"),
}


def environment() -> dict[str, str]:
    """What the last bits of a run depend on beside its code."""
    return {
        "torch": torch.__version__,
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "machine": platform.machine(),
    }


def trained(folder: Path, name: str) -> dict[str, np.ndarray]:
    """Trains run `name` in `folder`, where the archive of tests/artefacts is unpacked; its losses and final weights."""
    settings = folder / "golden.json"
    settings.write_text(json.dumps(_SETTINGS))
    places = {"run.output_dir": f"golden-{name}", "data.cache_dir": "golden-cache", "model.name_or_path": "model"}
    places |= {"data.train.0.path": "data", "data.train.1.path": "loop/mined/mine/data"}
    overrides = [f"{key}={folder / place}" for key, place in places.items()]
    if train(["--config", str(settings), *overrides, *RUNS[name]]) != 0:
        raise SystemExit(f"the run {name} was refused")
    run = folder / f"golden-{name}"
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    found = load_file(run / "checkpoints" / f"step-{STEPS:08d}" / "model.safetensors")
    return found | {"losses": np.array([line["train/loss"] for line in lines if "train/loss" in line])}


def main() -> None:
    """Writes the file."""
    make_strict()
    arrays: dict[str, np.ndarray] = {}
    with tempfile.TemporaryDirectory() as name:
        unpack(Path(name))
        for run in RUNS:
            arrays |= {f"{run}/{key}": array for key, array in trained(Path(name), run).items()}
    save_file(arrays, RECORDED, environment())
    print(f"{RECORDED}: {len(RUNS)} runs, {environment()}")


if __name__ == "__main__":
    main()
