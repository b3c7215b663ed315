"""A mixture of sources: each one's prompts, lengths, negatives and share of an epoch."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from retriever.config import Config, ConfigError, DataConfig, SourceConfig, from_dict, to_dict
from retriever.config_rules import validate
from retriever.config_sources import named_prompts, queries_per_epoch
from retriever.data.batch import BatchLoader
from retriever.data.planner import Mixture, Planner
from retriever.data.store import Csr, Store, build_or_open
from retriever.data.tokens import TokenTemplate
from retriever.parallel.world import World
from tests.mixture import mixture
from tests.tiny import tiny_tokenizer


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    return mixture(tmp_path_factory.mktemp("mixture"))


@pytest.fixture(scope="module")
def store(config: Config) -> Store:
    return build_or_open(config, tiny_tokenizer(), progress=False)


def _words(text: str) -> list[int]:
    return list(tiny_tokenizer()(text, add_special_tokens=False)["input_ids"])


def _loader(store: Store, config: Config) -> BatchLoader:
    world, template = World(torch.device("cpu")), TokenTemplate.from_tokenizer(tiny_tokenizer())
    config = replace(config, loss=replace(config.loss, exchange="gather"))
    return BatchLoader(store, Planner.from_config(store, config), template, config, world)


def test_every_text_has_the_prompt_and_the_length_of_its_source(config: Config, store: Store) -> None:
    """Also a text that two sources share: it is a passage of each of the two prompts, and a positive in one is no
    negative in the other.
    """
    expected = {source.prompt_name: source for source in config.data.train}
    seen = set[tuple[str | None, str, bool]]()
    for step in range(Planner.from_config(store, config).steps_per_epoch):
        batch = _loader(store, config).load(step)
        number = next(i for i, source in enumerate(store.sources) if source.name == batch.source)
        source = config.data.train[number]
        for chunk in batch.chunks:
            prompt = getattr(source, f"{chunk.side}_prompt")
            prompt = _words(getattr(config.model, f"{chunk.side}_prompt") if prompt is None else prompt)
            most = getattr(source, f"{chunk.side}_max_tokens") or getattr(config.model, f"{chunk.side}_max_tokens")
            lengths = chunk.tokens.attention_mask.sum(dim=1)  # type: ignore[union-attr]
            assert lengths.max() <= most
            seen.update((source.prompt_name, chunk.side, int(length) == most) for length in lengths)
            assert all(row[1 : 1 + len(prompt)] == prompt for row in chunk.tokens.input_ids.tolist())
    assert {(name, side) for name, side, cut in seen if cut} == {(n, s) for n in expected for s in ("query", "passage")}
    shared = [
        row
        for row in range(len(store.passages))
        if _words("shared text")[-2:] == store.passages.tokens(row)[-2:].tolist()
    ]
    assert len(shared) == 2
    first, second = (store.sources[i] for i in (0, 1))
    assert set(shared) <= set(store.known.row(first.first)) and set(shared) <= set(store.known.row(second.first))


def test_what_a_source_is_contrasted_with(config: Config, store: Store) -> None:
    """A batch of one source has its policy and temperature; a mixed one has each row's policy."""
    loader, found = _loader(store, config), {}
    for step in range(Planner.from_config(store, config).steps_per_epoch):
        batch = loader.load(step)
        found[batch.source] = batch.targets
    by_name = {
        source.prompt_name: found[stored.name] for source, stored in zip(config.data.train, store.sources, strict=True)
    }
    assert by_name["pairs"].in_batch is None and by_name["pairs"].own_groups is None and by_name["pairs"].contrasts
    assert by_name["pairs"].temperature is None and by_name["long"].temperature == 0.1
    own = by_name["own"]
    assert not own.contrasts and own.in_batch is not None and not own.in_batch.any() and own.own_groups is not None
    assert own.own_groups.ptr.diff().tolist() == [3] * len(own.positives), "the target and two negatives of its own"
    assert torch.equal(own.own_groups.ids[own.own_groups.ptr[:-1]], own.passage_ids[own.positives])
    taught = by_name["taught"]
    assert (
        not taught.contrasts and taught.own_groups is None and taught.groups is not None and len(taught.groups.ids) > 8
    )

    mixed = replace(
        config,
        batch=replace(config.batch, one_source=False, queries=24),
        data=replace(
            config.data,
            train=tuple(
                replace(source, temperature=None, apart=source.prompt_name == "long") for source in config.data.train
            ),
        ),
    )
    planner, targets = Planner.from_config(store, mixed), _loader(store, mixed).load(0).targets
    sources = planner.source_of(planner.plan(0).queries)
    assert set(sources) == {0, 1, 2, 3}
    assert targets.in_batch is not None and targets.own_groups is not None and targets.pools is not None
    assert targets.in_batch.tolist() == [config.data.train[s].negatives == "in_batch" for s in sources]
    assert [n > 0 for n in targets.own_groups.ptr.diff().tolist()] == [
        config.data.train[s].negatives == "own" for s in sources
    ]
    long = [source.prompt_name for source in config.data.train].index("long")
    assert len({*targets.pools.rows.tolist()}) == 2
    assert len({(int(p), s == long) for p, s in zip(targets.pools.rows, sources, strict=True)}) == 2


@pytest.mark.parametrize(
    ("sampling", "alpha", "expected"),
    [
        ("proportional", 0.5, [400, 100, 100]),
        ("weight", 0.5, [137, 137, 275]),
        ("round_robin", 0.5, [137, 137, 275]),
        ("power", 0.0, [137, 137, 275]),
        ("power", 0.5, [249, 125, 176]),
        ("power", 1.0, [367, 92, 92]),
    ],
)
def test_shares_of_an_epoch(sampling: str, alpha: float, expected: list[int]) -> None:
    """Sources of 400, 100 and 50 queries, the last one of weight 2."""
    sizes, weights = [400, 100, 50], (1.0, 1.0, 2.0)
    train = tuple(SourceConfig(path=str(i), weight=weight) for i, weight in enumerate(weights))
    data = DataConfig(train=train, sampling=sampling, alpha=alpha)  # type: ignore[arg-type]
    assert queries_per_epoch(data, sizes) == pytest.approx(expected, abs=1)


def test_sources_take_turns() -> None:
    """round_robin: a batch of each source, whatever its size, before any comes again; an order of its own each time."""
    sources = tuple(
        SimpleNamespace(name=n, first=a, last=b) for n, a, b in (("a", 0, 60), ("b", 60, 80), ("c", 80, 90))
    )
    store = SimpleNamespace(fingerprint="0f" * 16, sources=sources, positives=Csr(np.arange(91), np.arange(90)))
    train = tuple(SourceConfig(path=source.name) for source in sources)
    data = DataConfig(train=train, sampling="round_robin")
    planner = Planner(
        store,  # type: ignore[arg-type]
        queries=6,
        negatives=0,
        seed=1,
        mixture=Mixture(queries_per_epoch(data, [60, 20, 10]), takes_turns=True),
    )
    names = [planner.plan(step).source for step in range(planner.steps_per_epoch)]
    assert planner.steps_per_epoch == 15
    turns = ["".join(names[i : i + 3]) for i in range(0, 15, 3)]
    assert {"".join(sorted(turn)) for turn in turns} == {"abc"} and len(set(turns)) > 1


def test_a_store_of_the_models_prompts_is_the_one_without_settings_of_sources(config: Config, store: Store) -> None:
    """Prompts that say what the model says change nothing; another length of the only kind needs no other store."""
    tokenizer = tiny_tokenizer()
    plain = replace(config, data=replace(config.data, train=(SourceConfig(path=config.data.train[0].path),)))
    said = replace(
        plain,
        data=replace(
            plain.data,
            train=(replace(plain.data.train[0], query_prompt=plain.model.query_prompt, passage_max_tokens=9),),
        ),
    )
    first, second = (build_or_open(c, tokenizer, progress=False) for c in (plain, said))
    assert first.folder == second.folder != store.folder
    assert (first.limits(plain, "passage"), second.limits(said, "passage")) == (plain.model.passage_max_tokens, 9)


def test_every_prompt_has_a_name_in_the_export(config: Config) -> None:
    assert named_prompts(config) == {
        "own_query": "question: ",
        "long_query": "which ",
        "own_document": "answer: ",
        "taught_document": "",
    }


def _runnable(negatives: int) -> dict[str, Any]:
    """The settings of a run on two sources."""
    tree = to_dict(Config(data=DataConfig(train=(SourceConfig(path="a"), SourceConfig(path="b")), negatives=negatives)))
    tree["model"]["name_or_path"], tree["train"]["max_steps"] = "m", 1
    validate(from_dict(tree))
    return tree


@pytest.mark.parametrize(
    ("setting", "others", "message"),
    [
        ({"passage_max_tokens": 400}, {}, "data.train.0.passage_max_tokens: expected null or at most"),
        ({"negatives": "own"}, {}, "data.train.0.hard_negatives: expected at least 1 with negatives=own"),
        ({"negatives": "none"}, {}, "data.train.0.negatives: expected in_batch or own"),
        ({"apart": True}, {}, "data.train.0.apart: expected false with batch.one_source=true"),
        ({"prompt_name": "source1"}, {}, "data.train: expected sources of different prompt_name"),
        (
            {"temperature": 0.1},
            {"batch": {"one_source": False}},
            "data.train.0.temperature: expected null where batch.one_source=false",
        ),
        (
            {"temperature": 0.1},
            {"loss": {"bank": "contaccum"}},
            "data.train.0.temperature: expected null where .* loss.bank is set",
        ),
    ],
)
def test_settings_of_a_source_that_cannot_be_run(
    setting: dict[str, object], others: dict[str, dict[str, object]], message: str
) -> None:
    tree = _runnable(negatives=0)
    tree["data"]["train"][0] |= setting
    for section, values in others.items():
        tree[section] |= values
    with pytest.raises(ConfigError, match=message):
        validate(from_dict(tree))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("custom", "some.module:f", "loss.custom: expected none with negatives=own of a source"),
        ("guide", "folder", "loss.guide: expected none with negatives=own of a source"),
        ("false_negative_margin", 0.1, "loss.false_negative_margin: expected none with negatives=own of a source"),
        ("hardness", "all", "loss.hardness: expected none or in_batch with negatives=own of a source"),
        ("symmetric", True, "loss.symmetric: expected false with negatives=own of a source"),
        (
            "directions",
            ["query_to_passage", "query_to_query"],
            r"loss.directions: expected \['query_to_passage'\] with negatives=own of a source",
        ),
    ],
)
def test_what_rows_of_own_negatives_would_not_follow_is_refused(key: str, value: object, message: str) -> None:
    tree = _runnable(negatives=2)
    tree["loss"] |= {key: value, "hardness_strength": 5.0 if key == "hardness" else 0.0}
    validate(from_dict(tree))
    tree["data"]["train"][1]["negatives"] = "own"
    with pytest.raises(ConfigError, match=message):
        validate(from_dict(tree))
