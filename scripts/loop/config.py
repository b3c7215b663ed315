"""The loop's configuration: what its rounds share, and what each adds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
    """One training. `mine`: options of scripts.mine_negatives, for negatives from the model of the round before; null:
    the source as it is.

    `train` replaces keys of the shared training configuration, section by section. `start: first` trains from the first
    model again. `variants` are trainings that replace further keys, one each; the best on the split `evaluate.choose`
    is the round's model. `teacher`: options of scripts.train_cross_encoder, for a teacher of `mine` made from the
    negatives that the round before mined.
    """

    name: str = ""
    mine: dict[str, Any] | None = None
    train: dict[str, Any] = field(default_factory=dict)
    variants: tuple[dict[str, Any], ...] = ()
    teacher: dict[str, Any] | None = None
    start: Literal["first", "previous"] = "first"

    def training(self, variant: int) -> list[dict[str, Any]]:
        """What replaces keys of the shared training configuration, the later going before the earlier; `variant` counts
        from 0.
        """
        return [self.train, *self.variants[variant : variant + 1]]


@dataclass(frozen=True)
class EvaluateConfig:
    """The evaluation of every model: `command` is eval.beir or eval.msmarco, `options` its own beside --model and
    --output-dir.

    `choose`: the split among `options.split` on which a round's variants are compared, by the first of
    `options.metrics`.
    """

    command: Literal["eval.beir", "eval.msmarco"] = "eval.beir"
    data: str = ""
    options: dict[str, Any] = field(default_factory=dict)
    choose: str = ""


@dataclass(frozen=True)
class LoopConfig:
    """A loop. `launch` is put in front of its commands, as [accelerate, launch, --multi_gpu]; empty: they run in this
    process.
    """

    output_dir: str = "runs/loop"
    launch: tuple[str, ...] = ()
    source: SourceConfig = field(default_factory=SourceConfig)
    train: dict[str, Any] = field(default_factory=dict)  # sections of a training configuration
    rounds: tuple[RoundConfig, ...] = ()
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)

    def training(self, number: int, model: str, data: Path | None, output: Path, variant: int = 0) -> Config:
        """The training configuration of round `number` from `model`, on mined `data` or on the source, into `output`.

        Raises ConfigError naming a key that is unknown or cannot be run.
        """
        trees = [self.train, *self.rounds[number].training(variant)]
        merged = OmegaConf.to_container(OmegaConf.merge(*map(OmegaConf.create, trees)))
        config = from_dict(merged)  # type: ignore[arg-type]
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
    """The loop of a YAML file, `key.sub=value` overrides applied, every round's configuration checked. Raises
    ConfigError.
    """
    tree = read_tree(path, overrides, LoopConfig, Config)
    config: LoopConfig = build(LoopConfig, tree)
    _check(config)
    return config


def flags(options: Mapping[str, Any]) -> list[str]:
    """Options as a command line: {first_rank: 3} -> --first-rank 3; a list gives several words, true the flag alone,
    null nothing.
    """
    words = []
    for name, value in options.items():
        if value is not None and value is not False:
            values = [] if value is True else value if isinstance(value, (list, tuple)) else [value]
            words += [f"--{name.replace('_', '-')}", *map(str, values)]
    return words


def _check(config: LoopConfig) -> None:
    names, evaluate = [described.name for described in config.rounds], config.evaluate
    require(len(set(names)) == len(names) > 0, "rounds", "at least one, each with its own name", names)
    for name in names:
        plain = name.replace("-", "").replace("_", "").isalnum() and name != "start"
        require(plain, "rounds", "names of letters, digits, - and _, and none called start", name)
    require(evaluate.data != "", "evaluate.data", "the folder of a collection", "")
    for section, key in (("data", "train"), ("data", "cache_dir"), ("run", "output_dir")):
        given = config.train.get(section, {}).get(key)
        require(given is None, f"train.{section}.{key}", "nothing: the loop sets it, by source and output_dir", given)
    for number, described in enumerate(config.rounds):
        for variant in range(max(1, len(described.variants))):
            config.training(number, config.first_model, None, Path(config.output_dir), variant)
        splits, metrics = evaluate.options.get("split", []), evaluate.options.get("metrics", [])
        choice = "evaluate.choose to be one of evaluate.options.split, and evaluate.options.metrics to name the measure to choose by"
        chosen = not described.variants or (evaluate.choose in splits and len(metrics) > 0)
        require(chosen, f"rounds.{number}.variants", choice, (evaluate.choose, splits, metrics))
        taught = "a round that mines, after one that does; it learns from that one's negatives"
        mined = described.mine is not None and any(earlier.mine is not None for earlier in config.rounds[:number])
        require(described.teacher is None or mined, f"rounds.{number}.teacher", taught, described.teacher)
