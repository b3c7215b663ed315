"""The run's configuration: nested frozen dataclasses. The comment above a setting says what it means.

`config_file.load` fills them from a YAML file and overrides; `config_tree` checks types and ranges, `config_rules` what
can be run together; `config_help` prints the comments (`retriever/train.py --help-settings`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any, Literal, get_args

from omegaconf import OmegaConf

from retriever.config_tree import ConfigError, Range, build, flatten, plain

__all__ = ["Config", "ConfigError"]

Auto = Literal["auto"]
Count = Annotated[int, Range(1)]
CountOrNone = Annotated[int, Range(0)]
Positive = Annotated[float, Range(0, above=True)]
NotNegative = Annotated[float, Range(0)]
Share = Annotated[float, Range(0, 1, below=True)]
Temperature = Annotated[float, Range(1e-12)]  # of float32 similarities over it
TextTokens = Annotated[int, Range(4, 1 << 20)]
Weight = Annotated[float, Range(0, 10_000, above=True)]
Seconds = Annotated[int, Range(1, 365 * 24 * 3600)]


@dataclass(frozen=True)
class RunConfig:
    """Where a run writes, how it resumes, and how long ranks wait for one another."""

    # Folder of checkpoints, exports, metrics and the report. One run at a time works in it.
    output_dir: str = "runs/default"
    # Decides the order of the queries, the negatives drawn, dropout, and the start of new weights.
    seed: CountOrNone = 0
    # Which checkpoint to go on from. auto: the newest in output_dir, if there is one; never: none, and a folder that
    # holds a run is refused; or a checkpoint's folder.
    resume: str = "auto"
    # Experiment trackers that accelerate logs to: tensorboard, wandb, mlflow, trackio, aim, clearml, comet_ml, dvclive,
    # swanlab, or all that are installed.
    trackers: tuple[str, ...] = ("tensorboard",)
    # What trackers call the run. null: the last part of output_dir.
    name: str | None = None
    # The project of the run, for trackers that have projects.
    project: str = "bigbatch"
    # Before step 1, compare the gradient with the whole batch's by autograd, in float64, on a small batch of the data.
    verify: bool = False
    # Before step 1. auto: print a summary, warnings and, measured on a GPU, the plan of a step; only: print them and
    # stop, leaving nothing behind, as `--dry-run` does; off: measure what other settings leave to auto, print nothing.
    preflight: Literal["auto", "only", "off"] = "auto"
    # Seconds that a rank may keep the others waiting in a collective. Then the run ends and names that rank.
    timeout_s: Seconds = 1800


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters, trained instead of the weights. An export has them merged."""

    # Rank of an adapter.
    r: Count = 16
    # An adapter's output is scaled by alpha / r.
    alpha: Positive = 32.0
    # Dropout on an adapter's input.
    dropout: Share = 0.0
    # Names of the linear layers that get an adapter, such as query or q_proj. Empty: all.
    targets: tuple[str, ...] = ()


@dataclass(frozen=True)
class ModelConfig:
    """The encoder: its weights, how a text becomes a vector, and how the layers compute."""

    # Model folder or Hugging Face name that training starts from. Required.
    name_or_path: str = ""
    # Start from random weights, which run.seed draws, instead of those of name_or_path: of its folder only the
    # configuration, the tokenizer and the settings are read (`python -m scripts.train_tokenizer` makes such a folder).
    from_scratch: bool = False
    # One encoder for queries and passages; false: two, from the same weights.
    tied: bool = True
    # Which tokens the embedding is made of. auto: as the model folder says, else last where attention is causal, and
    # mean elsewhere.
    pooling: Literal["auto", "cls", "mean", "last"] = "auto"
    # Tokens of a decoder (Llama, Mistral, Qwen2, Qwen3, Gemma, GPT-2) see the whole text, here and in the export;
    # false: only what is before them. auto: as the model folder says. transformers before 5.2 reads such an export as
    # causal.
    bidirectional: bool | Auto = "auto"
    # Scale embeddings to length 1, so that similarities are cosines.
    normalize: bool = True
    # Leading dimensions that an embedding keeps, before normalisation. auto: as the model folder says; null: all.
    truncate_dim: Count | Auto | None = "auto"
    # Dimensions that a trained matrix maps pooled vectors to, before truncation and normalisation. It is a new one,
    # unless the model folder has one of this size. null: as the model folder says.
    projection: Count | None = None
    # Put the end-of-text token behind every text, here and in the exported tokenizer. auto: as the tokenizer does, and
    # where the last token of a plain language model is pooled, yes. (Qwen3-Embedding's own tokenizer does so too.)
    append_eos: bool | Auto = "auto"
    # Text put in front of every query, here and in the export.
    query_prompt: str = ""
    # Text put in front of every passage, here and in the export.
    passage_prompt: str = ""
    # Tokens of a query at most, prompt and special tokens included; what is longer is cut.
    query_max_tokens: TextTokens = 32
    # Tokens of a passage at most, prompt and special tokens included; what is longer is cut.
    passage_max_tokens: TextTokens = 144
    # packed: texts of a chunk one behind another, nothing computed for padding. auto: on a GPU, if the architecture
    # can; else padded.
    attention: Literal["auto", "packed", "padded"] = "auto"
    # Our own layers of the families of BERT, ModernBERT, Nomic-BERT, Llama, Mistral, Gemma (1 and 3), Qwen2 and Qwen3,
    # on packed texts. auto: where they apply, on a GPU.
    fused: bool | Auto = "auto"
    # torch.compile, layer by layer. auto: on a GPU, where layers are not fused.
    compile: bool | Auto = "auto"
    # Recompute each layer in the backward pass: less memory for a chunk, more time.
    gradient_checkpointing: bool = False
    # Train low-rank adapters instead of all weights; null: all weights.
    lora: LoraConfig | None = None


@dataclass(frozen=True)
class SourceConfig:
    """One training source: a file or folder (`path`) or a Hugging Face dataset (`name`)."""

    # File or folder, .gz and .zst too. Exactly one of path and name is given.
    path: str | None = None
    # Hugging Face dataset.
    name: str | None = None
    # Commit, tag or branch of the dataset; null: its newest.
    revision: str | None = None
    # How the files are laid out; auto: recognised by names and first lines.
    # texts: each text is query and positive, told apart by dropout alone (SimCSE); it must be named.
    format: Literal["auto", "msmarco", "beir", "tevatron", "dpr", "flagembedding", "columns", "texts"] = "auto"
    # Split of the queries that is trained on.
    split: str = "train"
    # Of the format columns: the names of the anchor, the positive and the negatives, in this order. null: columns of
    # these names, else the first ones. Of the format texts: the name of the text. null: text.
    columns: tuple[str, ...] | None = None
    # File or folder of the passages, where they are apart from the queries.
    corpus: str | None = None
    # File of the queries' texts, where they are apart from the pairs.
    queries: str | None = None
    # Passes over the source in an epoch; with another data.sampling, its weight beside the others'.
    weight: Weight = 1.0
    # Train on the first so many queries only; null: all.
    limit: Count | None = None
    # Text put in front of its queries. null: model.query_prompt. A prompt in a record comes before both.
    query_prompt: str | None = None
    # Text put in front of its passages. null: model.passage_prompt.
    passage_prompt: str | None = None
    # What the export calls its prompts: <prompt_name>_query and <prompt_name>_document. null: source and its position,
    # such as source0.
    prompt_name: str | None = None
    # Tokens of its queries at most, no more than model.query_max_tokens. null: as many.
    query_max_tokens: TextTokens | None = None
    # Tokens of its passages at most, no more than model.passage_max_tokens. null: as many.
    passage_max_tokens: TextTokens | None = None
    # Hard negatives of its queries in a batch. null: data.negatives.
    hard_negatives: CountOrNone | None = None
    # What its queries are contrasted with. in_batch: the batch's passages; own: their own hard negatives alone; none:
    # nothing, only the teacher's terms count.
    negatives: Literal["in_batch", "own", "none"] = "in_batch"
    # In a batch of several sources, its passages are negatives of its own queries only, and these see no others.
    apart: bool = False
    # Similarities of its queries are divided by it, in batches of one source. null: loss.temperature.
    temperature: Temperature | None = None
    # Tokenise the dataset's rows as they are downloaded, and keep no other copy of them. Not for one of BEIR's form.
    streaming: bool = False


@dataclass(frozen=True)
class DataConfig:
    """Training sources, negatives of a query, and how a title joins its text."""

    # The sources. At least one.
    train: tuple[SourceConfig, ...] = ()
    # Hard negatives of a query in a batch. They rotate from pass to pass; a query that has fewer brings those it has.
    negatives: CountOrNone = 7
    # A source's share of an epoch. proportional: its size times its weight; weight: its weight, whatever its size;
    # power: its size to the power of `alpha`, times its weight; round_robin: its weight, and sources take turns.
    sampling: Literal["proportional", "weight", "power", "round_robin"] = "proportional"
    # The power of the sampling power: 1 is proportional, 0 takes sources equally.
    alpha: Annotated[float, Range(0, 1)] = 0.5
    # join: a passage is its title, title_separator and its text; drop: its text.
    title: Literal["join", "drop"] = "join"
    # Text between a title and the text.
    title_separator: str = " "
    # Folder of tokenised data, which runs share.
    cache_dir: str = "cache"
    # Read all tokenised data and compare its checksums, though no file changed since that was last done.
    verify: bool = False


@dataclass(frozen=True)
class BatchConfig:
    """The global batch of an optimizer step, and how it is cut to fit."""

    # Queries of one optimizer step over all ranks, at most: a source is divided into batches of equal size.
    queries: Annotated[int, Range(2)] = 1024
    # Tokens that the encoder sees at once. auto: measured on a GPU. The result does not change.
    tokens_per_chunk: Count | Auto = "auto"
    # Tokens a rank, of the first chunks, whose graphs are kept between the two passes: true all, false none, auto what
    # fits. The result does not change.
    retain: bool | CountOrNone | Auto = "auto"
    # Tokens a rank, of the next chunks, that keep the costliest results of their fused layers: true all, false none,
    # auto what fits. The result does not change.
    retain_products: bool | CountOrNone | Auto = "auto"
    # The queries of a batch come from one source; false: sources are mixed in a batch.
    one_source: bool = True
    # Passages that a query is compared with, at most: the batch is divided into pools, and a passage is a negative only
    # of queries in its own pool. The first query that brings a passage decides its pool. null: every passage of the
    # batch.
    pool: Annotated[int, Range(3)] | None = None
    # Representations and their gradients in host memory, a few blocks at a time on the device.
    offload: bool = False


Direction = Literal["query_to_passage", "passage_to_query", "query_to_query", "passage_to_passage"]


@dataclass(frozen=True)
class LossConfig:
    """The objective: contrastive, distilled from a teacher, or both.

    The teacher's terms compare a query's own scored passages: similarities over `temperature` with scores over
    `teacher_temperature`.
    """

    # A function of your own instead of InfoNCE, as package.module:function; docs/run.md says what it takes. null: none.
    custom: str | None = None
    # tiled holds no matrix of similarities; dense, local and disco hold one and give the same gradient.
    strategy: Literal["tiled", "dense", "local", "disco"] = "tiled"
    # What similarities are computed from. bf16: rounded representations; high: two bf16 halves of each number; fp32.
    precision: Literal["bf16", "high", "fp32"] = "bf16"
    # How ranks see each other's passages: in a ring, or gathered. auto: what is expected to be faster and fits.
    exchange: Literal["auto", "ring", "gather"] = "auto"
    # Similarities are divided by it.
    temperature: Temperature = 0.02
    # Train the temperature, from `temperature` on.
    learn_temperature: bool = False
    # Half the loss is that of finding a passage's query: short for the directions [query_to_passage, passage_to_query],
    # partition per_direction.
    symmetric: bool = False
    # What is compared: a query with passages (always), its target with queries, the query with queries, its target with
    # passages.
    directions: tuple[Direction, ...] = ("query_to_passage",)
    # joint: one softmax over all directions. per_direction: one for each, of which the loss is the mean.
    partition: Literal["joint", "per_direction"] = "joint"
    # Positives of a query in a batch, each with a term of its own; the loss of a query is their mean.
    positives: Count = 1
    # Negatives whose logits grow by hardness_strength times their similarity, without a gradient: a query's own ones,
    # those in_batch of other queries, or all.
    hardness: Literal["none", "own", "in_batch", "all"] = "none"
    # Strength of `hardness`; 5 (own) and 9 (in_batch) have been used.
    hardness_strength: NotNegative = 0.0
    # Guide model, a folder or Hugging Face name. What it finds more similar to a query than the positive less a margin
    # is no negative. null: none. Its vectors of all texts are computed once, with its own prompts and lengths.
    guide: str | None = None
    # The margin of `guide`: a larger one leaves out more, unlike false_negative_margin.
    guide_margin: NotNegative = 0.0
    # absolute: guide_margin is a difference of similarities; relative: a share of the positive's, which is above 0.
    guide_margin_kind: Literal["absolute", "relative"] = "absolute"
    # Another positive of a query is not its negative.
    mask_known_positives: bool = True
    # A passage more similar to the query than the positive by more than this is no negative; in units of similarity,
    # before temperature. null: all are.
    false_negative_margin: NotNegative | None = None
    # What earlier steps add to the loss, without a gradient. moco: their passages, encoded by a moving average of the
    # encoder's weights; contaccum: their queries and passages as they were then; none: nothing.
    bank: Literal["none", "moco", "contaccum"] = "none"
    # Optimizer steps whose texts the bank holds; a step enters whole, and the oldest leaves.
    bank_steps: Count = 8
    # Share of itself that the moving average of moco keeps at each update.
    bank_momentum: Share = 0.999
    # Matryoshka: leading dimensions, such as [768, 256, 64], whose losses are summed. Empty: all dimensions at once.
    dims: tuple[Count, ...] = ()
    # Weight of the loss of each of dims. Empty: 1 each.
    dim_weights: tuple[Positive, ...] = ()
    # MiB beside the representations that the tiled loss may take. auto: 1,024, or half of what is free if that is less.
    workspace_mib: Count | Auto = "auto"
    # Weight of the contrastive loss.
    contrastive_weight: NotNegative = 1.0
    # Weight of the KL divergence from the teacher's distribution over a query's scored passages.
    kl_weight: NotNegative = 0.0
    # Weight of the squared error of the margins between positive and negatives, against the teacher's.
    margin_mse_weight: NotNegative = 0.0
    # Weight of CoSENT: of all scored pairs in the batch, the more similar is the one with the higher score.
    cosent_weight: NotNegative = 0.0
    # Weight of the distance between embeddings and those of `teacher`: the mean over queries and that over passages,
    # half each.
    embedding_weight: NotNegative = 0.0
    # mse: the mean of squared differences; cosine: 1 less the cosine similarity.
    embedding_distance: Literal["mse", "cosine"] = "mse"
    # Model, a folder or Hugging Face name, whose embeddings are distilled. Those of all texts are computed once, with
    # its own prompts and lengths. null: none.
    teacher: str | None = None
    # The teacher's scores are divided by it.
    teacher_temperature: Temperature = 1.0
    # A negative that the teacher scores above the positive less this is no negative. null: all are.
    teacher_margin: float | None = None

    @property
    def title(self) -> str:
        """The name of the contrastive loss on the screen."""
        return self.custom or f"{self.strategy} loss"

    @property
    def softmaxes(self) -> tuple[tuple[Direction, ...], Literal["joint", "per_direction"]]:
        """The directions, in a fixed order, and their partition; those of `symmetric` where it is set."""
        if self.symmetric:
            return ("query_to_passage", "passage_to_query"), "per_direction"
        return tuple(d for d in get_args(Direction) if d in self.directions), self.partition

    @property
    def needs_own_negatives(self) -> bool:
        """Whether the loss asks which negatives are a query's own."""
        return self.hardness in ("own", "in_batch") or "passage_to_passage" in self.directions

    @property
    def distils(self) -> bool:
        """Whether a teacher's scores take part in the loss."""
        return self.compares_negatives or self.cosent_weight > 0

    @property
    def compares_negatives(self) -> bool:
        """Whether a teacher's scores of negatives are asked for."""
        return self.kl_weight > 0 or self.margin_mse_weight > 0


@dataclass(frozen=True)
class OptimConfig:
    """Optimizer, schedule and precision. Nothing is scaled by the batch size."""

    # adamw: torch.optim.AdamW; adafactor: torch.optim.Adafactor, whose state is small; adafactor_momentum: Adafactor
    # with momentum and fixed steps, as Inf-CL trains with it (there with betas [0.9, 0.95], lr 1e-3 and weight_decay
    # 1e-4); or the import path of a torch optimizer, such as torch.optim.NAdam.
    name: str = "adamw"
    # Of an optimizer by import path: what it is called with beside the parameters, lr and weight_decay.
    arguments: dict[str, Any] | None = None
    # Learning rate at the end of the warm-up.
    lr: Positive = 2.0e-5
    # Decay rates of the means of the gradient (or update) and of its square; torch's Adafactor has none.
    betas: tuple[Share, Share] = (0.9, 0.999)
    # Decoupled weight decay, of matrices only: not of biases, norms and the temperature.
    weight_decay: NotNegative = 0.01
    # The learning rate after the warm-up. linear, cosine: it decays to 0; constant: it stays; wsd (warm-up, stable,
    # decay): it stays, and decays linearly to 0 in the last steps (`decay`).
    schedule: Literal["linear", "cosine", "constant", "wsd"] = "linear"
    # Linear warm-up: a share of all steps, or a number of steps where it is 1 or more.
    warmup: NotNegative = 0.1
    # Of the schedule wsd: the steps that decay, a share of all steps or a number of steps where it is 1 or more.
    decay: NotNegative = 0.1
    # Modules and parameters of a tower that are not trained, and all that is inside them, such as embeddings or
    # encoder.layer.0.
    freeze: tuple[str, ...] = ()
    # Decay of a running mean of the weights, taken after each update, such as 0.999. Evaluation and export use the
    # mean. null: none.
    ema: Share | None = None
    # The gradient is scaled down to this Euclidean norm where it is longer.
    max_grad_norm: Positive = 1.0
    # Of the encoder's products; weights and updates are fp32.
    precision: Literal["bf16", "fp16", "fp32"] = "bf16"


@dataclass(frozen=True)
class TrainConfig:
    """How long a run is, and how often it logs, saves and evaluates."""

    # Optimizer steps of the run. Exactly one of max_steps and epochs is given; more of it extends a finished run.
    max_steps: Count | None = None
    # Passes over the sources.
    epochs: Positive | None = None
    # Steps between two lines of metrics.jsonl.
    log_every: Count = 10
    # Steps between two checkpoints.
    save_every: Count = 500
    # Checkpoints that are kept; older ones are removed.
    keep_last: Count = 2
    # Steps between two evaluations; 0: only after the last step. Each saves a checkpoint first.
    eval_every: CountOrNone = 0


@dataclass(frozen=True)
class EvalCollectionConfig:
    """A further collection to evaluate on, or held-out pairs."""

    # The folder, or the file of the pairs.
    path: str = ""
    # What the log calls it. null: the last part of the path.
    name: str | None = None
    # beir: as eval.path; msmarco: a folder of MS MARCO's files; pairs: a training file, whose first eval.candidates
    # queries are each ranked among all of their positives.
    format: Literal["beir", "msmarco", "pairs"] = "beir"
    # Which judgements; of msmarco dev, dl19 or dl20.
    split: str = "dev"


@dataclass(frozen=True)
class EvalConfig:
    """A BEIR folder to evaluate on while training, and after the last step, and what else is measured. null: none."""

    # The folder: corpus.jsonl, queries.jsonl and qrels/. Required.
    path: str = ""
    # Which judgements: qrels/<split>.tsv.
    split: str = "dev"
    # Further collections and pairs. Their measures are logged as <name>/<measure>.
    also: tuple[EvalCollectionConfig, ...] = ()
    # What chooses the model in best/: mean, the mean over the collections with judgements, or the name of one.
    best: str = "mean"
    # Queries of held-out pairs, and so the passages that each is ranked among.
    candidates: Annotated[int, Range(2)] = 1000
    # Leading dimensions of the embeddings that are measured too, as Matryoshka cuts.
    dims: tuple[Count, ...] = ()
    # Evaluate before the first step.
    at_start: bool = False
    # End the run after so many evaluations in a row that are no better than the best one. null: never.
    patience: Count | None = None
    # Measures, such as nDCG@10, MRR@10 or Recall@100. The first chooses the model in best/.
    metrics: tuple[str, ...] = ("nDCG@10", "MRR@10", "Recall@100")
    # Passages a query that are ranked.
    k: Count = 1000
    # How passages are searched: flat (exact), ivf, ivfpq, hnsw, or a FAISS factory string.
    index: str = "flat"

    @property
    def collections(self) -> tuple[EvalCollectionConfig, ...]:
        """All collections, the folder of `path` first."""
        return EvalCollectionConfig(self.path, split=self.split), *self.also


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
    before, after = (flatten(_numbered(to_dict(config))) for config in (old, new))
    keys = sorted(before.keys() | after.keys())
    return [f"{k}: {before.get(k)!r} -> {after.get(k)!r}" for k in keys if before.get(k) != after.get(k)]


def _numbered(tree: Any) -> Any:
    """`tree` with lists of sections as sections of numbers: data.train.0.path."""
    if isinstance(tree, list) and any(isinstance(value, dict) for value in tree):
        tree = dict(enumerate(tree))
    return {name: _numbered(value) for name, value in tree.items()} if isinstance(tree, dict) else tree


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
