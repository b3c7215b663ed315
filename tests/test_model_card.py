"""The card of an export: what comes from settings and data is text in it, never markup; what another reader makes of
two lengths.
"""

from __future__ import annotations

import html
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from markdown_it import MarkdownIt

from retriever.config import (
    Config,
    DataConfig,
    EvalCollectionConfig,
    EvalConfig,
    LossConfig,
    ModelConfig,
    RunConfig,
    SourceConfig,
)
from retriever.encoder.settings import EncoderSettings
from retriever.history import LoggedRun
from retriever.model_card import TrainingFacts, evaluation_section, model_card
from retriever.report import write_report

SETTINGS = EncoderSettings("mean", True, "query: ", "find the ", 24, 40)
HOSTILE = [
    "`x` ``y`` ```z```",
    "`",
    " ` ",
    "a | b || c \\| d \\",
    "<script>alert(1)</script><img src=x onerror=y>",
    "![i](http://x/y.png) [l](javascript:z) **bold** _i_ # h\n\n# heading\n---\nlicense: mit\n---\n",
    "\r\n| | |\n|---|---|\n",
    "\u2028\u202e\x00\x1b[31m\ud800",
    "",
    "   ",
    "&lt;b&gt; &#96;",
]


def _rendered(card: str) -> str:
    header, _, body = card.removeprefix("---\n").partition("\n---\n")
    assert set(header.split("\n")) == {*MODEL_CARD_HEADER.split("\n")}
    return MarkdownIt("commonmark").enable("table").render(body)


MODEL_CARD_HEADER = model_card(SETTINGS, Config(), 32).removeprefix("---\n").partition("\n---\n")[0]


@pytest.mark.parametrize("text", HOSTILE)
def test_a_text_is_a_text_wherever_it_comes_from(text: str) -> None:
    """The card of the text has the elements of any other card, and shows the text."""
    plain = _rendered(model_card(SETTINGS, Config(model=ModelConfig("base")), 32))
    settings = replace(SETTINGS, query_prompt=text, passage_prompt=text, title_separator=text)
    page = _rendered(model_card(settings, Config(model=ModelConfig(text or "x")), 32))
    assert re.findall("<[^>]*>", page) == re.findall("<[^>]*>", plain)
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    codes = [html.unescape(code) for code in re.findall("<code>(.*?)</code>", page)]
    quoted = [code for code in codes if code.startswith('"') and code.endswith('"')]
    assert len(quoted) == 3 and len(set(quoted)) == 1
    if "\\" not in shown and '"' not in shown:
        assert quoted[0] == f'"{text}"' and (text or "x") in codes


def test_what_a_longer_text_gets_elsewhere_is_said() -> None:
    card = model_card(SETTINGS, Config(), 32)
    assert "the longer of the two, 40. A query of more than 24 tokens" in card and "`model.max_seq_length = 24`" in card
    assert "A passage of more than 20 tokens" in model_card(replace(SETTINGS, passage_max_tokens=20), Config(), 32)
    assert "Both lengths are" in model_card(replace(SETTINGS, query_max_tokens=40), Config(), 32)
    assert "Each tower has its own" in model_card(replace(SETTINGS, tied=False), Config(), 32)


def test_a_card_tells_size_loss_versions_and_base() -> None:
    base, loss = ModelConfig("intfloat/e5-small"), LossConfig(symmetric=True, kl_weight=0.5)
    card = model_card(SETTINGS, Config(model=base, loss=loss), 32, parameters=1_234_567)
    assert "\nbase_model: intfloat/e5-small\n---\n" in card and "base_model" not in MODEL_CARD_HEADER
    assert "Dimension 32, 1,234,567 parameters, mean pooling" in card
    assert "Loss: InfoNCE with `loss.symmetric=True`, `loss.kl_weight=0.5`. Versions: " in card
    assert f"torch {torch.__version__}" in card and "@inproceedings{gao-etal-2021-scaling," in card
    guided = model_card(SETTINGS, Config(loss=LossConfig(guide="/home/anna/guide")), 32)
    assert "`loss.guide=guide`" in guided and "/home" not in guided
    assert "Loss: InfoNCE with the default settings." in model_card(SETTINGS, Config(), 32)


def test_random_weights_have_no_base() -> None:
    card = model_card(SETTINGS, Config(model=ModelConfig("intfloat/e5-small", from_scratch=True)), 32)
    assert "base_model" not in card
    assert "from random weights of the architecture of `intfloat/e5-small`: temperature" in card


@pytest.mark.parametrize(
    ("loss", "told"),
    [
        (LossConfig(custom="mine.losses:margin"), "the custom loss `mine.losses:margin` with the default settings"),
        (
            LossConfig(contrastive_weight=0, kl_weight=1, cosent_weight=2),
            "KL divergence from a teacher's scores and CoSENT with `loss.contrastive_weight=0",
        ),
        (
            LossConfig(contrastive_weight=0, margin_mse_weight=1, embedding_weight=1),
            "margin MSE against a teacher's scores and distance to a teacher's embeddings with ",
        ),
    ],
)
def test_a_card_names_the_loss_that_was_used(loss: LossConfig, told: str) -> None:
    card = model_card(SETTINGS, Config(loss=loss), 32)
    assert f"Loss: {told}" in card and "InfoNCE" not in card


FACTS = TrainingFacts((("pairs", 120), ("more", 1)), 1700, (60, 61), 0)


def test_a_card_says_what_was_trained_on() -> None:
    config = Config(model=ModelConfig("/home/anna/models/base"))
    card = model_card(SETTINGS, config, 32, training=(40, FACTS))
    assert "from `base`: 40 steps on `pairs` (120 queries), `more` (1 query) and 1,700 passages; batches of " in card
    assert "60 to 61 queries, no hard negatives, temperature" in card and "/home" not in card
    with_negatives = model_card(SETTINGS, config, 32, training=(1, replace(FACTS, negatives=3, batch=(8, 8))))
    assert (
        "batches of 8 queries, at most 3 hard negatives a query" in with_negatives and ": 1 step on" in with_negatives
    )
    scored = evaluation_section(Config(eval=EvalConfig("/data/set", "dev")), 40, {"MRR@10": 0.5})
    assert "After step 40 on the split `dev` of `set`:" in scored
    also = EvalConfig("/data/set", "dev", (EvalCollectionConfig("/data/other", split="test"),))
    for best, told in (("mean", "the mean over those with judgements"), ("other", "`other`")):
        several = evaluation_section(Config(eval=replace(also, best=best)), 40, {"MRR@10": 0.5})
        where = "the split `dev` of `set` and the split `test` of `other`"
        assert f"on {where}; figures without a collection's name are those of {told}:" in several
    assert "| `MRR@10` | 0.5000 |" in scored


@pytest.mark.parametrize("text", HOSTILE)
def test_the_name_of_a_source_is_a_text_too(text: str) -> None:
    facts = TrainingFacts(((text or "x", 2),), 3, (2, 2), 0)
    page, plain = (
        _rendered(model_card(SETTINGS, Config(model=ModelConfig("base")), 32, training=(1, found)))
        for found in (facts, replace(facts, sources=(("plain", 2),)))
    )
    assert re.findall("<[^>]*>", page) == re.findall("<[^>]*>", plain)


def test_what_a_run_trains_on_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest number of negatives that a query has, or that it may have in a batch."""
    monkeypatch.setattr("retriever.data.planner.Planner.from_config", lambda *_: SimpleNamespace(batch_queries=(3, 4)))
    source = SimpleNamespace(name="pairs", first=2, last=9)
    for counts, expected in (([0, 0], 0), ([1, 2], 2), ([9, 0], 7)):
        negatives = SimpleNamespace(ptr=np.cumsum([0, *counts]))
        store: Any = SimpleNamespace(sources=(source,), passages=range(11), negatives=negatives)
        config = Config(data=DataConfig(train=(SourceConfig("pairs"),)))
        assert TrainingFacts.of(config, store) == TrainingFacts((("pairs", 7),), 11, (3, 4), expected)


def test_a_report_shows_no_folders_of_its_machine(tmp_path: Path) -> None:
    config = Config(RunConfig("/home/anna/runs/a"), ModelConfig("/home/anna/base", query_prompt="/find "))
    line = {"step": 3, "train/loss": 1.0, "train/lr": 0.1, "train/pairs_per_s": 9.0}
    write_report(tmp_path / "report.html", config, FACTS, LoggedRun("", [line]))
    page = (tmp_path / "report.html").read_text()
    assert "<h1>a: base</h1>" in page and "/home" not in page and "query_prompt: '/find '" in html.unescape(page)
    assert "1,700 passages; batches of 60 to 61 queries, no hard negatives" in page
