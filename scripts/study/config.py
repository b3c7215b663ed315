"""The configuration of a study: what all runs share, and the arms, each of which varies one setting."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from retriever.config import Config, EvalCollectionConfig
from retriever.config_file import load, read_tree
from retriever.config_tree import build, require


@dataclass(frozen=True)
class CollectionConfig(EvalCollectionConfig):
    """A collection to measure on, with lengths of its own; null: the run's."""

    query_max_tokens: int | None = None
    passage_max_tokens: int | None = None


@dataclass(frozen=True)
class ArmConfig:
    """The runs in which `setting` has each of `values`; null in `values` stands for batch.queries.

    The learning rates tried with seed 0 are `lr` times each of `factors`, and √(value / 1,024) times that with
    `lr_by_root`. Where the best one is the first or the last, `extensions` further ones are tried, each as far from it
    as its neighbour. With `choose_at` they are tried for these values alone, and others take what lies between on
    logarithmic axes.
    """

    name: str = ""
    setting: str = ""
    values: tuple[int | None, ...] = ()
    overrides: tuple[str, ...] = ()
    lr: float = 1e-4
    lr_by_root: bool = False
    factors: tuple[float, ...] = (1.0,)
    extensions: int = 2
    choose_at: tuple[int | None, ...] | None = None
    seeds: tuple[int, ...] = (1, 2, 3)


@dataclass(frozen=True)
class StudyConfig:
    """A study. `train` is the configuration of a training run; `metric` on `dev` chooses, and `test` is measured for
    the chosen learning rates alone.
    """

    output_dir: str = "runs/study"
    train: str = ""
    metric: str = "nDCG@10"
    dev: CollectionConfig = field(default_factory=CollectionConfig)
    test: tuple[CollectionConfig, ...] = ()
    arms: tuple[ArmConfig, ...] = ()

    def run(self, arm: ArmConfig, value: int | None, lr: float, seed: int) -> Config:
        """The configuration of one run. Raises ConfigError."""
        chosen = [f"{arm.setting}={'null' if value is None else value}", f"optim.lr={lr}", f"run.seed={seed}"]
        folder = Path(self.output_dir) / "run"
        return load(
            self.train, [*arm.overrides, *chosen, f"run.output_dir={folder}", "eval=null", "train.eval_every=0"]
        )

    def x(self, arm: ArmConfig, value: int | None) -> int:
        """The value as a number."""
        return load(self.train, arm.overrides).batch.queries if value is None else value

    def first_lr(self, arm: ArmConfig, value: int | None) -> float:
        """The learning rate of factor 1."""
        return arm.lr * float(np.sqrt(self.x(arm, value) / 1024)) if arm.lr_by_root else arm.lr


def load_study(path: str | Path, overrides: list[str]) -> StudyConfig:
    """The study of a YAML file with `key.sub=value` overrides. Raises ConfigError; every run's configuration is
    checked.
    """
    config: StudyConfig = build(StudyConfig, read_tree(path, overrides, StudyConfig))
    require(len(config.arms) > 0, "arms", "at least one", [])
    for number, arm in enumerate(config.arms):
        key = f"arms.{number}"
        require(len(arm.values) > 0, f"{key}.values", "at least one", [])
        require(0 not in arm.seeds, f"{key}.seeds", "other seeds than 0, which chooses the learning rate", arm.seeds)
        require(len(arm.factors) > 0, f"{key}.factors", "at least one", [])
        among = set(arm.choose_at or ()) <= set(arm.values)
        require(among, f"{key}.choose_at", f"some of {list(arm.values)}", arm.choose_at)
        for value in arm.values:
            config.run(arm, value, config.first_lr(arm, value), 0)
    return config
