"""Chooses the checkpoint that a run resumes from, and checks its configuration."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from retriever.checkpoint import EXPORTED, FOLDER, config_of, finished_steps, newest, step_of, steps
from retriever.config import Config, ConfigError, RunConfig, adopt_auto, differences
from retriever.damage import damage

_LENGTHS = ("train.max_steps", "train.epochs")
# What may differ between the runs that write one checkpoint after the other.
_FREE = (
    *("run.output_dir", "run.resume", "run.trackers", "run.name", "run.project"),
    *("run.verify", "run.preflight", "run.timeout_s"),
    *("data.cache_dir", "data.verify"),
    *("train.log_every", "train.save_every", "train.keep_last", "train.eval_every"),
    *("eval.at_start", "eval.patience"),
    "batch.retain",
    "batch.retain_products",  # the same operations in the same order, and another GPU may keep more or less
)


def find(run: RunConfig) -> Path | None:
    """The checkpoint that `run.resume` asks to go on from: the newest of the run's folder, the one named, or none.

    A run that began from another run's checkpoint goes on from its own newest one when it is started with the same name
    again. Raises ConfigError where the folder holds a run that `run.resume` does not go on with (`never`, or a name of
    another run's), or exports without checkpoints, or where what is named is no checkpoint, or one is damaged or cannot
    be read.
    """
    root = Path(run.output_dir) / FOLDER
    last = newest(root)
    otherwise = "choose another run.output_dir or remove it"
    if last is None and (Path(run.output_dir) / EXPORTED).exists():
        raise ConfigError(f"{run.output_dir} holds the exports of a run without its checkpoints; {otherwise}")
    if run.resume == "never" and last is not None:
        raise ConfigError(f"run.resume: never, but {run.output_dir} already holds a run; {otherwise}")
    if run.resume not in ("auto", "never"):
        return _find_named(run, root, last)
    return None if last is None else _undamaged(last)


def _find_named(run: RunConfig, root: Path, last: Path | None) -> Path:
    named = Path(run.resume)
    another = last is not None and named.resolve().parent != root.resolve()
    if last is not None and another:
        begun_from = Path(config_of(_undamaged(last)).run.resume)
        if begun_from.resolve() == named.resolve():
            return last  # the other run may have removed its own by now
    if not named.is_dir():
        raise ConfigError(f"run.resume: there is no folder {named}; expected auto, never or a checkpoint's folder")
    if (found := damage(named)) is not None:
        expected = "expected a folder as checkpoints/step-00000500 of a run"
        raise ConfigError(f"run.resume: {named} is no checkpoint to go on from: {found}; {expected}")
    if another:
        raise ConfigError(
            f"run.resume: {named} is of another run than the one in {run.output_dir}; run.resume=auto goes on with "
            "that, or choose another run.output_dir"
        )
    step = finished_steps(named)
    if later := [folder.name for folder in steps(root) if step_of(folder) > step]:
        raise ConfigError(
            f"run.resume: {named} is followed by {', '.join(later)} in the same run; remove those, or choose another "
            "run.output_dir"
        )
    return named


def _undamaged(last: Path) -> Path:
    """The newest checkpoint of a run. Raises ConfigError with a way past it where it cannot be read."""
    if (found := damage(last)) is not None:
        raise ConfigError(f"{found}; {_way_past(last)}")
    return last


def _way_past(damaged: Path) -> str:
    """Advice for a run whose newest checkpoint cannot be read."""
    try:
        whole = next((folder for folder in reversed(steps(damaged.parent)) if damage(folder) is None), None)
    except ConfigError as error:
        return f"of those before it, {error}"
    if whole is None:
        return "no checkpoint before it is whole: bring the file back, or choose another run.output_dir to start afresh"
    removed = ", ".join(str(folder) for folder in steps(damaged.parent) if step_of(folder) > step_of(whole))
    return f"bring the file back, or remove {removed}: the run then goes on from {whole.name}"


def continued(config: Config, folder: Path) -> Config:
    """`config` for going on from `folder`: `auto` means what it was resolved to then. It may ask for more steps or
    epochs.

    Raises ConfigError with the keys that differ in anything but logging, saving, how often to evaluate, trackers and
    places.
    """
    before = config_of(folder)
    config = adopt_auto(config, before)
    free = {
        *_FREE,
        *(key for key, *lengths in zip(_LENGTHS, length_of(before), length_of(config), strict=True) if _more(*lengths)),
    }
    changed = [line for line in differences(_anywhere(before), _anywhere(config)) if line.partition(":")[0] not in free]
    if changed:
        listed = "\n  ".join(changed)
        raise ConfigError(
            f"{folder} was written under another configuration; change it back or choose another run.output_dir "
            f"(train.max_steps and train.epochs may only grow):\n  {listed}"
        )
    return config


def length_of(config: Config) -> tuple[float | None, ...]:
    """The length of a run: train.max_steps and train.epochs."""
    return config.train.max_steps, config.train.epochs


def _more(before: float | None, after: float | None) -> bool:
    return before is not None and after is not None and after > before


def _anywhere(config: Config) -> Config:
    """`config` without the places of its sources and its evaluation: what stands there is in the store's fingerprint,
    or measured only.
    """
    sources = tuple(replace(source, path=None, corpus=None, queries=None) for source in config.data.train)
    evaluation = config.eval
    if evaluation is not None:
        evaluation = replace(evaluation, path="", also=tuple(replace(asked, path="") for asked in evaluation.also))
    return replace(config, data=replace(config.data, train=sources), eval=evaluation)
