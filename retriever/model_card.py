"""The README.md of an export: what the model is, how it was trained, how to use it, how well it did."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from retriever.config import Config, to_dict
from retriever.config_sources import hard_negatives
from retriever.data.planner import Planner
from retriever.data.store import Store
from retriever.data.tokens import Side
from retriever.encoder.settings import EncoderSettings
from retriever.environment import versions
from retriever.wording import counted, without_folders

_HEADER = """---
library_name: sentence-transformers
pipeline_tag: sentence-similarity
tags:
- sentence-transformers
- feature-extraction
- sentence-similarity
- dense-retrieval
{base}---
"""
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_PACKAGES = ("bigbatch", "torch", "transformers", "tokenizers")
_DISTILLATION = {
    "kl_weight": "KL divergence from a teacher's scores",
    "margin_mse_weight": "margin MSE against a teacher's scores",
    "cosent_weight": "CoSENT",
    "embedding_weight": "distance to a teacher's embeddings",
}

_LICENCE_AND_CITATION = """## Licence and citation

The licences of the training data, and of the base model if there is one, hold for what was made from them. The gradient
over a whole batch is computed by the gradient cache:

```bibtex
@inproceedings{gao-etal-2021-scaling,
  title = {Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup},
  author = {Gao, Luyu and Zhang, Yunyi and Han, Jiawei and Callan, Jamie},
  booktitle = {Proceedings of the 6th Workshop on Representation Learning for NLP},
  year = {2021}
}
```
"""

_TIED_USE = """from sentence_transformers import SentenceTransformer

model = SentenceTransformer("{folder}")
queries = model.encode(["a query"], prompt_name="query"{unit})
passages = model.encode(["a passage"], prompt_name="document"{unit})
scores = model.similarity(queries, passages)"""

_UNTIED_USE = """from sentence_transformers import SentenceTransformer

model = SentenceTransformer("{folder}")  # {folder}/query and {folder}/passage are models of one tower each
queries = model.encode_query(["a query"]{unit})
passages = model.encode_document(["a passage"]{unit})
scores = model.similarity(queries, passages)"""


@dataclass(frozen=True)
class TrainingFacts:
    """Facts about the training data that the configuration does not hold."""

    sources: tuple[tuple[str, int], ...]  # name and number of queries
    passages: int
    batch: tuple[int, int]  # queries of the smallest and of the largest batch
    negatives: int  # hard negatives of a query in a batch, at most

    @classmethod
    def of(cls, config: Config, store: Store) -> TrainingFacts:
        """The facts of a run with `config` on the data of `store`."""
        sources = tuple((source.name, source.last - source.first) for source in store.sources)
        most = int(np.diff(store.negatives.ptr).max(initial=0))
        batch = Planner.from_config(store, config).batch_queries
        return cls(sources, len(store.passages), batch, min(max(hard_negatives(config.data), default=0), most))

    def __str__(self) -> str:
        """A sentence without the names of the sources, which may be any text."""
        least, most = self.batch
        batch = f"{most:,} queries" if least == most else f"{least:,} to {most:,} queries"
        hard = f"at most {counted(self.negatives, 'hard negative')} a query" if self.negatives else "no hard negatives"
        return f"{counted(self.passages, 'passage')}; batches of {batch}, {hard}"


def model_card(
    settings: EncoderSettings,
    config: Config,
    dimension: int,
    side: Side | None = None,
    training: tuple[int, TrainingFacts] | None = None,
    parameters: int | None = None,
) -> str:
    """The model card: Markdown with the Hugging Face Hub's metadata. One run always gives the same text.

    `side`: the tower described, if there are two. `training`: the number of steps made, and the facts of their data.
    `parameters`: the encoder's, both towers' where there are two.
    """
    described = "A dense retriever: queries and passages as vectors, compared by their dot product."
    if side is not None:
        described = f"The {side} tower of a dense retriever with two towers; the other one lies beside it."
    # sentence-transformers truncates what its Normalize gave.
    again = ", normalize_embeddings=True" if settings.normalize and settings.truncate_dim is not None else ""
    use = (_TIED_USE if settings.tied else _UNTIED_USE).format(folder=".." if side is not None else ".", unit=again)
    unit = "unit vectors" if settings.normalize else "vectors of any length"
    optim, loss = config.optim, config.loss
    learned = " (learned)" if loss.learn_temperature else ""
    passage = f"title + {_cell(settings.title_separator)} + text" if settings.title == "join" else "text without title"
    name = config.model.name_or_path
    new = config.model.from_scratch
    base = f"base_model: {name}\n" if _HUB_NAME.fullmatch(name) and not Path(name).exists() and not new else ""
    start = f"{'random weights of the architecture of ' if new else ''}{_code(without_folders(name))}"
    size = "" if parameters is None else f", {parameters:,} parameters"
    return f"""{_HEADER.format(base=base)}
# Dense retriever

{described}

| | query | passage |
|---|---|---|
| prompt | {_cell(settings.query_prompt)} | {_cell(settings.passage_prompt)} |
| tokens at most, prompt and special tokens included | {settings.query_max_tokens} | {settings.passage_max_tokens} |
| text | the query | {passage} |

Dimension {dimension}{size}, {settings.pooling} pooling over all tokens (the prompt's too), {unit}, \
similarity: {settings.similarity}.

```python
{use}
```

{_lengths(settings)}
`bigbatch.json` holds all of these settings; `retriever/encode.py` and the eval commands of bigbatch read it.

{_LICENCE_AND_CITATION}
## Training

Training with bigbatch from {start}: {_trained(training)}\
temperature {loss.temperature:g}{learned}, {optim.name} with learning rate {optim.lr:g} ({optim.schedule}), \
precision {optim.precision}, seed {config.run.seed}.

Loss: {_loss(config)}. Versions: {", ".join(f"{name} {v}" for name, v in versions(_PACKAGES).items())}.
"""


def evaluation_section(config: Config, step: int, measures: Mapping[str, float]) -> str:
    """Markdown to stand behind a card: the measures of the evaluation after `step`."""
    where = ""
    if config.eval is not None:
        collections = config.eval.collections
        where = " and ".join(f"the split {_code(c.split)} of {_code(without_folders(c.path))}" for c in collections)
        where = f" on {where}"
        if config.eval.also:
            best = "the mean over those with judgements" if config.eval.best == "mean" else _code(config.eval.best)
            where += f"; figures without a collection's name are those of {best}"
    rows = "\n".join(f"| {_code(name)} | {value:.4f} |" for name, value in measures.items())
    return f"\n## Evaluation\n\nAfter step {step:,}{where}:\n\n| measure | value |\n|---|---|\n{rows}\n"


def _loss(config: Config) -> str:
    """The loss by name and the settings that are not the defaults; models of others by their names alone."""
    usual, own = to_dict(Config())["loss"], to_dict(config)["loss"]
    custom = own.pop("custom")
    name = "InfoNCE" if custom is None else f"the custom loss {_code(custom)}"
    if config.loss.contrastive_weight == 0:
        name = " and ".join(title for key, title in _DISTILLATION.items() if own[key] > 0)
    changed = [f"loss.{key}={without_folders(str(value))}" for key, value in own.items() if value != usual[key]]
    return f"{name} with {', '.join(map(_code, changed))}" if changed else f"{name} with the default settings"


def _trained(training: tuple[int, TrainingFacts] | None) -> str:
    if training is None:
        return ""
    steps, facts = training
    sources = ", ".join(f"{_code(name)} ({counted(queries, 'query')})" for name, queries in facts.sources)
    return f"{counted(steps, 'step')} on {sources} and {facts}, "


def _lengths(settings: EncoderSettings) -> str:
    """The single length that sentence-transformers knows of a model: the longer of the two."""
    if not settings.tied:
        return "Each tower has its own length in sentence-transformers too."
    query, passage = settings.query_max_tokens, settings.passage_max_tokens
    if query == passage:
        return "Both lengths are the model's `max_seq_length` in sentence-transformers."
    side, cut = ("query", query) if query < passage else ("passage", passage)
    return (
        "sentence-transformers knows one length per model, `max_seq_length`: the longer of the two, "
        f"{max(query, passage)}. A {side} of more than {cut} tokens is cut at {cut} by bigbatch and not there; for the "
        f"same embedding set `model.max_seq_length = {cut}` before encoding it."
    )


def _code(text: str) -> str:
    """Text from data or settings as a code span of Markdown: on one line, printable, and nothing in it is markup."""
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    fence = "`" * (1 + max(map(len, re.findall("`+", shown)), default=0))
    padded = shown.strip() and (shown[0] in "` " or shown[-1] in "` ")  # readers take one space off either end
    return f"{fence} {shown} {fence}" if padded else f"{fence}{shown}{fence}"


def _cell(text: str) -> str:
    """As `_code`, of a quoted text in a cell of a table, which a bar would end."""
    return _code(json.dumps(text, ensure_ascii=False)).replace("|", "\\|")
