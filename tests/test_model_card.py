"""The card of an export: what comes from settings and data is text in it, never markup; what another reader makes of
two lengths.
"""

from __future__ import annotations

import html
import re
from dataclasses import replace

import pytest
from markdown_it import MarkdownIt

from retriever.config import Config, ModelConfig
from retriever.encoder.settings import EncoderSettings
from retriever.model_card import model_card

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
