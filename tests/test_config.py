"""The configuration: what is written is what is read, and every refusal names its key."""

from __future__ import annotations

from dataclasses import fields, is_dataclass, replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retriever.config import (
    Config,
    ConfigError,
    EvalConfig,
    LossConfig,
    ModelConfig,
    SourceConfig,
    adopt_auto,
    differences,
    from_dict,
    to_dict,
    to_yaml,
)
from retriever.config_file import load
from retriever.config_rules import validate

MINIMAL = """
model: {name_or_path: some/model}
data: {train: [{path: a}, {name: b, weight: 0.5}]}
train: {max_steps: 5}
"""


@pytest.fixture
def minimal(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(MINIMAL)
    return path


@pytest.mark.parametrize(
    ("override", "message"),
    [
        # Unknown keys, with the nearest known one.
        ("loss.temprature=0.1", "loss.temprature: .*did you mean temperature"),
        ("los.temperature=0.1", "los: .*did you mean loss"),
        ("data.train.1.wait=2", r"data.train.1.wait: .*weight"),
        ("eval.paht=x", "eval.paht: .*path"),
        # Wrong types.
        ("run.seed=true", "run.seed: expected a whole number, received True"),
        ("model.tied=1", "model.tied: expected true or false, received 1"),
        ("data={title_separator: 5}", "data.title_separator: expected text, received 5"),
        ("optim.lr=fast", "optim.lr: expected a number, received 'fast'"),
        ("optim.betas=[0.9]", "optim.betas: expected .*received"),
        ("optim.betas=[0.9,x]", "optim.betas.1: expected a number, received 'x'"),
        ("run.trackers=tensorboard", "run.trackers: expected a list"),
        ("loss.strategy=sparse", r"loss.strategy: expected tiled \| dense \| local \| disco, received 'sparse'"),
        (
            "batch.tokens_per_chunk=many",
            r"batch.tokens_per_chunk: expected a whole number of at least 1 \| auto, received 'many'",
        ),
        ("batch.tokens_per_chunk=true", "batch.tokens_per_chunk: "),
        ("optim=adamw", "optim: expected a mapping"),
        ("data.train=[5]", "data.train.0: expected a mapping"),
        # Impossible alone or together.
        ("model.name_or_path=''", "model.name_or_path: "),
        ("model.query_max_tokens=3", "model.query_max_tokens: "),
        ("data.train=[]", "data.train: expected at least one source"),
        ("data.train.0.name=both", "data.train.0: expected exactly one of path and name"),
        ("data.train.1.weight=0", "data.train.1.weight: "),
        ("data.train.1.limit=0", "data.train.1.limit: "),
        (
            "model={name_or_path: m, fused: true, attention: padded}",
            "model.fused: expected auto or false with model.attention=padded",
        ),
        (
            "model={name_or_path: m, fused: true, compile: true}",
            "model.compile: expected auto or false with model.fused=true",
        ),
        (
            "model={name_or_path: m, compile: true, gradient_checkpointing: true}",
            "model.compile: expected auto or false with",
        ),
        (
            "model={name_or_path: m, fused: true, gradient_checkpointing: true}",
            "model.fused: expected auto or false with",
        ),
        ("data.negatives=-1", "data.negatives: "),
        (
            "batch.retain=-1",
            r"batch.retain: expected true or false \| a whole number of at least 0 \| auto, received -1",
        ),
        ("data.train=[{path: x, columns: [a, a]}]", "data.train.0.columns: expected names of different columns"),
        ("batch.retain_products=-1", "batch.retain_products: expected true or false"),
        ("loss.kl_weight=-1", "loss.kl_weight: expected a number of at least 0, received -1"),
        (
            "loss.contrastive_weight=0",
            "loss: expected one of contrastive_weight, kl_weight, margin_mse_weight, cosent_weight, emb",
        ),
        ("loss={teacher_temperature: 0}", "loss.teacher_temperature: expected a number of at least 1e-12"),
        ("batch.queries=1", "batch.queries: "),
        ("batch.pool=15", "batch.pool: expected null or at least 16"),
        ("batch.tokens_per_chunk=143", "batch.tokens_per_chunk: expected auto or at least 144"),
        ("loss.temperature=0", "loss.temperature: "),
        ("loss.false_negative_margin=-0.1", "loss.false_negative_margin: "),
        ("loss.directions=[query_to_query]", "loss.directions: expected query_to_passage and others, each once"),
        ("loss.directions=[query_to_passage, query_to_doc]", "loss.directions.1: expected query_to_passage"),
        ("loss={symmetric: true, directions: [query_to_passage, query_to_query]}", "loss.directions: expected .*symm"),
        ("loss={strategy: dense, directions: [query_to_passage, query_to_query]}", "loss.strategy: expected tiled"),
        ("loss.hardness=own", "loss.hardness_strength: expected above 0 with loss.hardness, else 0"),
        ("loss.hardness_strength=5", "loss.hardness_strength: expected above 0 with loss.hardness, else 0"),
        ("loss={strategy: local, hardness: all, hardness_strength: 5}", "loss.strategy: expected tiled with loss.hard"),
        ("loss={positives: 2, strategy: dense}", "loss.strategy: expected tiled with several loss.positives"),
        ("loss={positives: 2, symmetric: true}", "loss.symmetric: expected false with several loss.positives"),
        ("loss={positives: 2, cosent_weight: 1}", "loss.cosent_weight: expected 0 with several loss.positives"),
        ("loss={strategy: disco, guide: folder}", "loss.strategy: expected tiled with loss.guide"),
        ("loss.guide_margin=0.1", "loss.guide_margin: expected 0.0 with loss.guide=null; received 0.1"),
        ("loss.guide_margin_kind=relative", "loss.guide_margin_kind: expected absolute with loss.guide=null"),
        ("loss.bank_steps=4", "loss.bank_steps: expected 8 with loss.bank=none; received 4"),
        ("loss={bank: contaccum, bank_momentum: 0.5}", "loss.bank_momentum: expected 0.999 with loss.bank=contaccum"),
        ("loss={bank: moco, teacher_margin: 0.1}", "loss.teacher_margin: expected none with loss.bank=moco"),
        ("optim.lr=-1e-5", "optim.lr: "),
        ("optim.warmup=-1", "optim.warmup: "),
        ("optim.betas=[1.5,0.9]", "optim.betas"),
        ("optim.weight_decay=-1", "optim.weight_decay: "),
        ("optim.max_grad_norm=0", "optim.max_grad_norm: "),
        ("optim.name=adam", "optim.name: expected adamw .*received 'adam'"),
        ("optim.arguments.momentum=0.9", "optim.arguments: expected null with optim.name=adamw"),
        ("optim.ema=1", "optim.ema"),
        (
            "optim={name: torch.optim.NAdam, betas: [0.8, 0.9]}",
            r"optim.betas: expected \[0.9, 0.999\] with optim.name=torch.optim.NAdam, whose are in optim.arguments",
        ),
        ("optim.decay=0.2", "optim.decay: expected 0.1 with optim.schedule=linear; received 0.2"),
        ("data={alpha: 0.7, sampling: weight}", "data.alpha: expected 0.5 with data.sampling=weight; received 0.7"),
        ("train.max_steps=null", "train: expected exactly one of train.max_steps and train.epochs"),
        ("train.keep_last=0", "train.keep_last: "),
        ("train.eval_every=10", "train.eval_every: "),
        ("eval={split: dev}", "eval.path: "),
        ("model.lora={rank: 8}", "model.lora.rank: unknown key"),
        ("model.lora={r: 0}", "model.lora.r: "),
        ("model.lora={alpha: 0}", "model.lora.alpha: "),
        ("model.lora={dropout: 1.0}", "model.lora.dropout: "),
        ("loss.dims=[64, 0]", "loss.dims"),
        # Numbers that nothing can hold.
        ("train.epochs=.inf", "train.epochs: expected a finite number"),
        ("loss={teacher_temperature: 1e-30}", "loss.teacher_temperature: expected a number of at least 1e-12"),
        # Overrides that are none, or go nowhere.
        ("run.trackers=" + "[" * 3000, "override 'run.trackers=.*: "),
        ("eval.metrics=[nDCG@10", "eval.metrics"),
        ("data.train.2.path=c", r"data.train.2|data.train\[2\]"),
        ("data.train.first.path=c", "data.train.first"),
    ],
)
def test_every_refusal_names_its_key(minimal: Path, override: str, message: str) -> None:
    """Nothing that cannot be run is accepted, and the message says where it was set. tests/malformed has more."""
    load(minimal)
    with pytest.raises(ConfigError, match=message):
        load(minimal, [override])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("loss.strategy=dense", "loss.strategy: expected tiled with batch.offload=true"),
        ("loss.exchange=gather", "loss.exchange: expected auto or ring with batch.offload=true"),
        ("loss.cosent_weight=1", "loss.cosent_weight: expected 0 with batch.offload=true"),
        ("loss.guide=folder", "loss.guide: expected none with batch.offload=true"),
        (
            "loss.directions=[query_to_passage,query_to_query]",
            "loss.directions: expected .* or .* with batch.offload=true",
        ),
        ("loss.kl_weight=1", "loss.kl_weight: expected 0 with batch.offload=true"),
        ("loss.margin_mse_weight=0.5", "loss.margin_mse_weight: expected 0 with batch.offload=true"),
    ],
)
def test_what_cannot_be_in_host_memory_is_refused(minimal: Path, override: str, message: str) -> None:
    """Each alone is accepted."""
    load(minimal, ["batch.offload=true", "loss.symmetric=true", "loss.dims=[8, 16]"])
    load(minimal, [override])
    with pytest.raises(ConfigError, match=message):
        load(minimal, ["batch.offload=true", override])


def test_sources_take_turns_in_batches_of_one_source(minimal: Path) -> None:
    load(minimal, ["data.sampling=round_robin"])
    load(minimal, ["optim.schedule=wsd", "optim.decay=0.2", "data.sampling=power", "data.alpha=0.7"])
    with pytest.raises(ConfigError, match="batch.one_source: expected true with data.sampling=round_robin"):
        load(minimal, ["data.sampling=round_robin", "batch.one_source=false"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a\n", r"--config .*run\.yaml: expected a mapping of sections, found a list"),
        ("5\n", r"--config .*run\.yaml: expected a mapping of sections"),
        ("model: [1,\n", r"--config .*run\.yaml: expected YAML .*, line 2"),
        ("model: {}\nmodel: {}\n", r"--config .*run\.yaml: expected YAML .*duplicate key model"),
        ("run:\n", "run: expected a mapping, received None"),
        ("3: 4\n", "3: unknown key"),
    ],
)
def test_a_file_that_is_no_configuration_is_refused_as_such(tmp_path: Path, text: str, message: str) -> None:
    """With or without overrides, never by a parser's traceback."""
    (tmp_path / "run.yaml").write_text(text)
    for overrides in ((), ("optim.lr=1",)):
        with pytest.raises(ConfigError, match=message):
            load(tmp_path / "run.yaml", overrides)


def test_overrides_reach_every_kind_of_value(minimal: Path) -> None:
    """Numbers without a point or with an exponent, lists, list entries, sections that are absent by default, null."""
    config = load(
        minimal,
        [
            "optim.lr=2e-5",
            "loss.temperature=1",
            "optim.betas=[0.9,0.95]",
            "data.train.1.limit=100",
            "run.trackers=[]",
            "eval.path=dev",
            "train.max_steps=null",
            "train.epochs=0.5",
            "run.output_dir=a=b",
            "model.compile=false",
        ],
    )
    assert config.optim.lr == 2e-5
    assert (config.loss.temperature, type(config.loss.temperature)) == (1.0, float)
    assert config.optim.betas == (0.9, 0.95)
    assert config.data.train == (SourceConfig(path="a"), SourceConfig(name="b", weight=0.5, limit=100))
    assert config.run.trackers == ()
    assert config.eval == EvalConfig(path="dev")
    assert (config.train.max_steps, config.train.epochs) == (None, 0.5)
    assert config.run.output_dir == "a=b"
    assert config.model.compile is False


@pytest.mark.parametrize(
    "prompt",
    [
        "query: ", "Represent ", " it: {text}", "rank #1 ", "a=b", "task: a | query: ", "[Q] ", "# ", "- ", "-", "{x}", "${x} ", "null",
        "1e5", "true", "'tis ", "Instruct: Given a query, retrieve\nQuery: ", "*x", "&x", "!x", "%", "@", "`", "|", ">", "? ", "\t", "",
    ],
)  # fmt: skip
def test_a_prompt_on_the_command_line_is_taken_as_it_stands(minimal: Path, prompt: str) -> None:
    """Text with YAML's punctuation and outer blanks, as prompts have, needs no second layer of quotes."""
    assert load(minimal, [f"model.query_prompt={prompt}"]).model.query_prompt == prompt
    assert load(minimal, [f"data.title_separator={prompt}"]).data.title_separator == prompt


def test_quotation_marks_around_a_text_are_yamls(minimal: Path) -> None:
    assert load(minimal, [r'model.query_prompt="a\n"', "data.title_separator=' '"]).model.query_prompt == "a\n"
    assert load(minimal, ["data.train.1.revision=null"]).data.train[1].revision is None
    assert load(minimal, ["data.train.1.revision=1.0"]).data.train[1].revision == "1.0"
    assert load(minimal, ["data.train[1].limit=5", "model={pooling: cls}"]).data.train[1].limit == 5


def test_the_largest_seed_is_accepted(minimal: Path) -> None:
    assert load(minimal, [f"run.seed={2**63 - 1}"]).run.seed == 2**63 - 1


def test_an_exponent_in_a_file_is_a_number(tmp_path: Path) -> None:
    """`2e-5` without a point is a number, which plain YAML 1.1 readers deny."""
    path = tmp_path / "run.yaml"
    path.write_text(MINIMAL + "optim: {lr: 2e-5}\n")
    assert load(path).optim.lr == 2e-5


_TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12) | st.sampled_from(
    [
        "null",
        "true",
        "on",
        "~",
        "1e5",
        "0x10",
        "1_000",
        "1:30",
        "2024-01-01",
        "???",
        "${a}",
        "\\${a}",
        "<<",
        "=",
        "- a",
        "\u2028",
        "a\r\nb",
    ]
)
_NUMBER = st.floats(min_value=1e-12, max_value=1e12)


@settings(max_examples=60, deadline=None)
@given(
    texts=st.lists(_TEXT, min_size=4, max_size=4),
    numbers=st.lists(_NUMBER, min_size=3, max_size=3),
    evaluate=st.booleans(),
)
def test_what_to_yaml_writes_load_reads_back(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], numbers: list[float], evaluate: bool
) -> None:
    """load(to_yaml(config)) == config, for any text and number that a user may have set."""
    config = Config(
        model=ModelConfig(name_or_path="m", query_prompt=texts[0], passage_prompt=texts[1]),
        loss=LossConfig(temperature=numbers[0], false_negative_margin=numbers[1]),
        eval=EvalConfig(path="x", metrics=(texts[2],)) if evaluate else None,
    )
    sources = (
        SourceConfig(path=texts[2], columns=(f"{texts[3]}a", "b"), weight=min(numbers[2], 1e4)),
        SourceConfig(name="n", limit=3),
    )
    config = replace(config, data=replace(config.data, train=sources), train=replace(config.train, epochs=numbers[2]))
    path = tmp_path_factory.mktemp("yaml") / "run.yaml"
    path.write_text(to_yaml(config), encoding="utf-8")
    assert load(path) == config
    assert from_dict(to_dict(config)) == config


def test_the_default_configuration_lacks_only_what_nobody_can_guess() -> None:
    """Model, data and length of training have no default; everything else does."""
    given_values = {"model": {"name_or_path": "m"}, "data": {"train": [{"path": "a"}]}, "train": {"epochs": 1}}
    validate(from_dict(given_values))
    for section in given_values:
        with pytest.raises(ConfigError, match=section):
            validate(from_dict({k: v for k, v in given_values.items() if k != section}))


def test_differences_lists_each_changed_key_once_and_nothing_else() -> None:
    """Old and new value of every changed leaf, of a source's too, lists whole, a section that came or went."""
    old = from_dict({"model": {"name_or_path": "m"}, "data": {"train": [{"path": "a"}]}})
    assert differences(old, old) == []
    new = replace(old, optim=replace(old.optim, lr=1.0), data=replace(old.data, train=()), eval=EvalConfig(path="x"))
    found = differences(old, new)
    assert "optim.lr: 2e-05 -> 1.0" in found
    assert "eval.path: None -> 'x'" in found
    assert {line.partition(":")[0] for line in found} <= {
        "optim.lr",
        "data.train",
        *(f"data.train.0.{f.name}" for f in fields(SourceConfig)),
        "eval",
        *(f"eval.{f.name}" for f in fields(EvalConfig)),
    }
    assert any(line.startswith("data.train: ") for line in found)
    other = replace(old, data=replace(old.data, train=(replace(old.data.train[0], format="dpr"),)))
    assert differences(old, other) == ["data.train.0.format: 'auto' -> 'dpr'"]


def test_adopt_auto_replaces_auto_and_nothing_else() -> None:
    """A resumed run takes over what `auto` was resolved to; what was set stays; `resume: auto` is not a value to
    adopt.
    """
    asked = from_dict({"model": {"name_or_path": "m", "pooling": "auto"}, "batch": {"queries": 8}})
    resolved = from_dict(
        {
            "model": {"name_or_path": "n", "pooling": "cls"},
            "batch": {"queries": 4, "tokens_per_chunk": 512},
            "run": {"resume": "never"},
        }
    )
    adopted = adopt_auto(asked, resolved)
    assert (adopted.model.pooling, adopted.batch.tokens_per_chunk) == ("cls", 512)
    assert (adopted.model.name_or_path, adopted.batch.queries, adopted.run.resume) == ("m", 8, "auto")


def test_every_section_is_frozen_and_documented() -> None:
    """A configuration cannot change during a run, and every section says what it is for."""
    for field in fields(Config):
        kind: type = EvalConfig if field.name == "eval" else type(getattr(Config(), field.name))
        assert is_dataclass(kind) and vars(kind)["__dataclass_params__"].frozen, field.name
        assert kind.__doc__ and not kind.__doc__.startswith(f"{kind.__name__}("), (
            field.name
        )  # dataclass makes one up where there is none


def test_a_teacher_without_negatives_is_refused(minimal: Path) -> None:
    """A group of a target alone would teach nothing."""
    with pytest.raises(ConfigError, match="data.negatives: expected at least 1 where a teacher is distilled"):
        load(minimal, ["data.negatives=0", "loss.margin_mse_weight=1"])


def test_a_length_on_the_command_line_replaces_the_files_other_one(minimal: Path) -> None:
    """The file says max_steps: `train.epochs=2` is enough to train two epochs; both on the command line contradict each
    other.
    """
    assert load(minimal).train.max_steps is not None
    train = load(minimal, ["train.epochs=2"]).train
    assert (train.max_steps, train.epochs) == (None, 2.0)
    with pytest.raises(ConfigError, match="exactly one of"):
        load(minimal, ["train.epochs=2", "train.max_steps=5"])
