"""The events of a training run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from retriever.step import StepReport


class Callback:
    """Hears the events of a run; override those that you need. `run` is the `Run`; `run.should_stop = True` ends it.

    The names are those of transformers. Every rank hears every event, in the order of the methods below, but `on_log`,
    which the first rank hears alone. An error in a callback ends the run on every rank.
    """

    def on_train_begin(self, run: Any) -> None:
        """The run was entered: its checkpoint is loaded, `run.done` steps are finished."""

    def on_step_end(self, run: Any, report: StepReport) -> None:
        """A step made its update; `report` has its loss, gradient norm, learning rate and so on."""

    def on_log(self, run: Any, values: dict[str, Any]) -> None:
        """`values` are about to be written to `metrics.jsonl` and the trackers, under step `run.done`.

        Every `train.log_every` steps, after an evaluation, and for `run.record`. What is changed in `values` is written
        as changed.
        """

    def on_evaluate(self, run: Any, measures: Mapping[str, float]) -> None:
        """An evaluation is recorded, and `best/` is up to date. `measures` is empty on ranks other than the first."""

    def on_save(self, run: Any) -> None:
        """A checkpoint and its export are begun; a thread writes them. After an evaluation they are written."""

    def on_train_end(self, run: Any) -> None:
        """The run is left without an error: everything is written."""
