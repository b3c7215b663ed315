"""The run's configuration: nested frozen dataclasses with every setting.

`config_file.load` fills them from a YAML file and overrides; `config_tree` checks types, `config_rules` what can be run
together.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from omegaconf import OmegaConf

from retriever.config_tree import ConfigError, build, flatten, plain

__all__ = ["Config", "ConfigError"]

Auto = Literal["auto"]


@dataclass(frozen=True)
class RunConfig:
    """Where a run writes, how it resumes, how long a collective may wait (`timeout_s`)."""

    output_dir: str = "runs/default"
    seed: int = 0
    resume: str = "auto"  # auto | never | a checkpoint folder
    trackers: tuple[str, ...] = ("tensorboard",)
    verify: bool = False
    preflight: Literal["auto", "only", "off"] = "auto"
    timeout_s: int = 1800


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters: rank `r`, scale `alpha / r`, dropout on their input, and which linear layers get one."""

    r: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    targets: tuple[str, ...] = ()  # names of linear layers, such as query or q_proj; empty: all


@dataclass(frozen=True)
class ModelConfig:
    """The encoder. Lengths are in tokens, prompt and special tokens included; `auto` of pooling and truncate_dim: as
    the folder says.
    """

    name_or_path: str = ""
    tied: bool = True
    pooling: Literal["auto", "cls", "mean", "last"] = "auto"
    normalize: bool = True
    truncate_dim: int | Auto | None = "auto"  # leading dimensions that are kept, before normalisation; null: all
    # The end-of-text token behind every text, in training and in the exported tokenizer. auto: as the tokenizer does,
    # and where the last token of a plain language model is pooled, appended (as Qwen3-Embedding's own tokenizer does);
    # an embedding model's is left alone.
    append_eos: bool | Auto = "auto"
    query_prompt: str = ""
    passage_prompt: str = ""
    query_max_tokens: int = 32
    passage_max_tokens: int = 144
    attention: Literal["auto", "packed", "padded"] = "auto"
    fused: bool | Auto = "auto"  # our own layers of the BERT family, on packed texts
    compile: bool | Auto = "auto"
    gradient_checkpointing: bool = False
    lora: LoraConfig | None = None


@dataclass(frozen=True)
class SourceConfig:
    """One training source: a file or folder (`path`) or a Hugging Face dataset (`name`)."""

    path: str | None = None
    name: str | None = None
    revision: str | None = None
    format: Literal["auto", "msmarco", "beir", "tevatron", "dpr", "flagembedding", "columns"] = "auto"
    split: str = "train"
    columns: tuple[str, ...] | None = None  # anchor, positive[, negative...]: which columns of a columns file
    corpus: str | None = None
    queries: str | None = None
    weight: float = 1.0
    limit: int | None = None  # the first so many queries


@dataclass(frozen=True)
class DataConfig:
    """Training sources, negatives per query, and how a title joins its text."""

    train: tuple[SourceConfig, ...] = ()
    negatives: int = 7
    title: Literal["join", "drop"] = "join"
    title_separator: str = " "
    cache_dir: str = "cache"
    verify: bool = (
        False  # read the whole token store and compare its checksums, though no file changed since that was last done
    )


@dataclass(frozen=True)
class BatchConfig:
    """The global batch of an optimizer step, and how it is cut to fit."""

    queries: int = 1024  # global, per optimizer step
    tokens_per_chunk: int | Auto = "auto"
    retain: bool | int | Auto = "auto"  # graphs kept between the passes: all, none, or of so many tokens a rank
    retain_products: bool | int | Auto = "auto"  # of the other chunks: the results of their fused layers that cost most
    one_source: bool = True
    offload: bool = False  # representations and their gradients in host memory, a few blocks of them on the device


@dataclass(frozen=True)
class LossConfig:
    """The objective: contrastive, distilled from a teacher, or both; `false_negative_margin` is in similarity units,
    before temperature.

    The teacher's terms compare a query's own scored passages: similarities over `temperature` with scores over
    `teacher_temperature`.
    """

    strategy: Literal["tiled", "dense", "local", "disco"] = "tiled"
    precision: Literal["bf16", "high", "fp32"] = "bf16"
    exchange: Literal["auto", "ring", "gather"] = "auto"
    temperature: float = 0.02
    learn_temperature: bool = False
    symmetric: bool = False
    mask_known_positives: bool = True
    false_negative_margin: float | None = None
    dims: tuple[int, ...] = ()  # leading dimensions to sum the loss over (Matryoshka); empty: all dimensions at once
    dim_weights: tuple[float, ...] = ()  # of each of dims; empty: ones
    workspace_mib: int | Auto = "auto"
    contrastive_weight: float = 1.0
    kl_weight: float = 0.0  # of the KL divergence from the teacher's distribution over a query's group
    margin_mse_weight: float = 0.0  # of the squared error of the margins between positive and negatives
    teacher_temperature: float = 1.0
    teacher_margin: float | None = None  # a negative that the teacher scores above the positive less this is none

    @property
    def distils(self) -> bool:
        """Whether a teacher's scores take part in the loss."""
        return self.kl_weight > 0 or self.margin_mse_weight > 0


@dataclass(frozen=True)
class OptimConfig:
    """Optimizer, schedule and precision. Nothing is scaled by the batch size."""

    name: Literal["adamw", "adafactor"] = "adamw"
    lr: float = 2.0e-5
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.01
    schedule: Literal["linear", "cosine"] = "linear"
    warmup: float = 0.1  # a share of all steps, or a number of steps if >= 1
    max_grad_norm: float = 1.0
    precision: Literal["bf16", "fp16", "fp32"] = "bf16"


@dataclass(frozen=True)
class TrainConfig:
    """How long, and how often what is written."""

    max_steps: int | None = None
    epochs: float | None = None
    log_every: int = 10
    save_every: int = 500
    keep_last: int = 2
    eval_every: int = 0  # 0: only after the last step


@dataclass(frozen=True)
class EvalConfig:
    """A BEIR folder to evaluate on while training; the first metric chooses `best/`."""

    path: str = ""
    split: str = "dev"
    metrics: tuple[str, ...] = ("nDCG@10", "MRR@10", "Recall@100")
    k: int = 1000
    index: str = "flat"


@dataclass(frozen=True)
class Config:
    """Everything a run depends on. `config_file.load` reads it, `to_yaml` writes it."""

    run: RunConfig = field(default_factory=RunConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    batch: BatchConfig = field(default_factory=BatchConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig | None = None


def from_dict(tree: Mapping[Any, Any]) -> Config:
    """A Config from nested plain values, types checked, combinations not. Raises ConfigError."""
    return build(Config, tree)


def to_dict(config: Config) -> dict[str, Any]:
    """Nested plain values (tuples as lists), as they are saved with a run."""
    return plain(asdict(config))


def to_yaml(config: Config) -> str:
    """The resolved configuration as YAML that `config_file.load` reads back to an equal Config."""
    return OmegaConf.to_yaml(OmegaConf.create(to_dict(config)))


def differences(old: Config, new: Config) -> list[str]:
    """The keys that differ, as `key: old -> new`."""
    before, after = flat(old), flat(new)
    keys = sorted(before.keys() | after.keys())
    return [f"{k}: {before.get(k)!r} -> {after.get(k)!r}" for k in keys if before.get(k) != after.get(k)]


def flat(config: Config) -> dict[str, Any]:
    """Every setting under its dotted key; lists stay whole."""
    return flatten(to_dict(config))


def adopt_auto(config: Config, resolved: Config) -> Config:
    """`config` with each `auto` replaced by the value that an earlier start of the same run resolved it to.

    But for what is kept between the passes: no result depends on it, and this GPU may have other memory than the last
    one.
    """
    chosen = flat(resolved)
    tree = to_dict(config)
    for key, value in flat(config).items():
        if value == "auto" and key not in ("run.resume", "batch.retain", "batch.retain_products"):
            section, _, name = key.partition(".")
            tree[section][name] = chosen[key]
    return from_dict(tree)
