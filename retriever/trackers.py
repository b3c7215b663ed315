"""Experiment trackers of accelerate's: what they call a run and its project, and the settings that they are told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.tracking import GeneralTracker, TensorBoardTracker, on_main_process

from retriever.config import Config, flat, to_yaml

_RUN_NAME = {  # what each tracker calls the name of a run
    "wandb": "name",
    "trackio": "name",
    "swanlab": "experiment_name",
    "mlflow": "run_name",
    "clearml": "task_name",
}


class _TensorBoard(TensorBoardTracker):
    """Accelerate's makes a run of its own for the settings at each start; this one has them as text."""

    @on_main_process
    def store_init_configuration(self, values: dict[str, Any]) -> None:
        settings = values["settings"]
        self.writer.add_text("settings", "".join(f"    {line}\n" for line in settings.splitlines()), 0)
        self.writer.flush()


def asked(config: Config) -> list[str | GeneralTracker]:
    """The trackers of `run.trackers`, for accelerate; TensorBoard's files lie in `logs` under the run's name."""
    board = _TensorBoard(_name(config), logs(config))
    return [board if name == "tensorboard" else name for name in config.run.trackers]


def start(accelerator: Accelerator, config: Config) -> None:
    """Starts the trackers, on the first rank, and tells them the resolved settings."""
    if not accelerator.is_main_process:
        return
    loggable = {key: value for key, value in flat(config).items() if isinstance(value, (bool, int, float, str))}
    named = {tracker: {argument: _name(config)} for tracker, argument in _RUN_NAME.items()}
    accelerator.init_trackers(config.run.project, {**loggable, "settings": to_yaml(config)}, named)


def logs(config: Config) -> str:
    """The folder of trackers that write files."""
    return str(Path(config.run.output_dir) / "logs")


def _name(config: Config) -> str:
    return config.run.name or Path(config.run.output_dir).resolve().name
