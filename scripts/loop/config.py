"""The configuration of a loop: what all rounds share, and what each one adds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from omegaconf import OmegaConf

from retriever.config import Config, SourceConfig, from_dict
from retriever.config_file import read_tree
from retriever.config_rules import validate
from retriever.config_tree import build, require


@dataclass(frozen=True)
class RoundConfig:
    """One round.

    - `mine`: options of scripts.mine_negatives; negatives come from the model of the round before. null: the source as
      it is.
    - `train`: overrides of the shared training configuration.
    - `start`: train from the `first` model, or from that of the `previous` round.
    - `variants`: several trainings, each with overrides of its own. The best on the split `evaluate.choose` is kept.
    - `teacher`: options of scripts.train_cross_encoder, which trains a teacher for `mine` on the negatives mined
      before.
    """

    name: str = ""
    mine: dict[str, Any] | None = None
    train: dict[str, Any] = field(default_factory=dict)
    variants: tuple[dict[str, Any], ...] = ()
    teacher: dict[str, Any] | None = None
    start: Literal["first", "previous"] = "first"


@dataclass(frozen=True)
class EvaluateConfig:
    """The evaluation of every model: `command` with `options`, to which --model and --output-dir are added.

    `choose` is the split among `options.split` on which variants are compared, by the first of `options.metrics`.
    """

    command: Literal["eval.beir", "eval.msmarco"] = "eval.beir"
    data: str = ""
    options: dict[str, Any] = field(default_factory=dict)
    choose: str = ""


@dataclass(frozen=True)
class LoopConfig:
    """A loop. `launch` is put in front of its commands, such as [accelerate, launch, --multi_gpu]; if empty they run in
    this process.
    """

    output_dir: str = "runs/loop"
    launch: tuple[str, ...] = ()
    source: SourceConfig = field(default_factory=SourceConfig)
    train: dict[str, Any] = field(default_factory=dict)  # sections of a training configuration
    rounds: tuple[RoundConfig, ...] = ()
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)

    def training(self, number: int, model: str, data: Path | None, output: Path, variant: int = 0) -> Config:
        """The training configuration of variant `variant` of round `number`, both from 0, which trains `model` on mined
        `data` or, if None, on the source.

        Raises ConfigError for a key that is unknown or cannot be run.
        """
        described = self.rounds[number]
        merged = OmegaConf.merge(self.train, described.train, *described.variants[variant : variant + 1])
        config = from_dict(OmegaConf.to_container(merged))  # type: ignore[arg-type]
        source = self.source if data is None else SourceConfig(path=str(data), format="tevatron")
        config = replace(
            config,
            run=replace(config.run, output_dir=str(output), resume="auto"),
            model=replace(config.model, name_or_path=model),
            data=replace(config.data, train=(source,), cache_dir=str(Path(self.output_dir) / "cache")),
        )
        validate(config)
        return config

    @property
    def first_model(self) -> str:
        """The model that the loop starts from."""
        return str(self.train.get("model", {}).get("name_or_path", ""))


def load_loop(path: str | Path, overrides: Sequence[str] = ()) -> LoopConfig:
    """The loop of a YAML file with `key.sub=value` overrides. Raises ConfigError; the configuration of every round is
    checked.
    """
    config: LoopConfig = build(LoopConfig, read_tree(path, overrides, LoopConfig, Config))
    _check(config)
    return config


def _words(evaluate: EvaluateConfig, option: str) -> list[str]:
    value = evaluate.options.get(option) or []
    words = [value] if isinstance(value, str) else value
    require(isinstance(words, list), f"evaluate.options.{option}", "a word or a list of words", value)
    return words


def _check(config: LoopConfig) -> None:
    names, evaluate = [described.name for described in config.rounds], config.evaluate
    require(len(set(names)) == len(names) > 0, "rounds", "at least one, each with its own name", names)
    for name in names:
        plain = name.replace("-", "").replace("_", "").isalnum() and name != "start"
        require(plain, "rounds", "names of letters, digits, - and _, and none called start", name)
    require(evaluate.data != "", "evaluate.data", "the folder of a collection", "")
    for section, key in (("data", "train"), ("data", "cache_dir"), ("run", "output_dir")):
        set_here = config.train.get(section, {}).get(key)
        require(
            set_here is None, f"train.{section}.{key}", "nothing: the loop sets it, by source and output_dir", set_here
        )
    splits, metrics = _words(evaluate, "split"), _words(evaluate, "metrics")
    choice = (
        "evaluate.choose to be one of evaluate.options.split, "
        "and evaluate.options.metrics to name the measure to choose by"
    )
    taught = "a round that mines, after one that does; it learns from that one's negatives"
    mined = False
    for number, described in enumerate(config.rounds):
        for variant in range(max(1, len(described.variants))):
            config.training(number, config.first_model, None, Path(config.output_dir), variant)
        chosen = not described.variants or (evaluate.choose in splits and len(metrics) > 0)
        require(chosen, f"rounds.{number}.variants", choice, (evaluate.choose, splits, metrics))
        teaches = described.teacher is not None
        require(
            not teaches or (mined and described.mine is not None), f"rounds.{number}.teacher", taught, described.teacher
        )
        mined = mined or described.mine is not None
