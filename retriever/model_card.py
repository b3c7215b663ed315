"""The README.md of an export: what the model is, how it was trained, how to use it."""

from __future__ import annotations

import json

from retriever.config import Config
from retriever.data.tokens import Side
from retriever.encoder.settings import EncoderSettings
from retriever.wording import counted

_HEADER = """---
library_name: sentence-transformers
pipeline_tag: sentence-similarity
tags:
- sentence-transformers
- feature-extraction
- sentence-similarity
- dense-retrieval
---
"""

_TIED_USE = """from sentence_transformers import SentenceTransformer

model = SentenceTransformer("{folder}")
queries = model.encode(["a query"], prompt_name="query")
passages = model.encode(["a passage"], prompt_name="document")
scores = model.similarity(queries, passages)"""

_UNTIED_USE = """from sentence_transformers import SentenceTransformer

queries = SentenceTransformer("{folder}/query").encode(["a query"], prompt_name="query")
passages = SentenceTransformer("{folder}/passage").encode(["a passage"], prompt_name="document")
scores = queries @ passages.T"""


def model_card(settings: EncoderSettings, config: Config, dimension: int, side: Side | None = None) -> str:
    """Markdown with the hub's metadata; the same text for the same run. `side`: the card of one tower of two."""
    described = "A dense retriever: queries and passages as vectors, compared by their dot product."
    if side is not None:
        described = f"The {side} tower of a dense retriever with two towers; the other one lies beside it."
    use = (_TIED_USE if settings.tied else _UNTIED_USE).format(folder=".." if side is not None else ".")
    unit = "unit vectors" if settings.normalize else "vectors of any length"
    model, batch, optim, loss = config.model, config.batch, config.optim, config.loss
    learned = " (learned)" if loss.learn_temperature else ""
    passage = f"title + {settings.title_separator!r} + text" if settings.title == "join" else "text without title"
    return f"""{_HEADER}
# Dense retriever

{described}

| | query | passage |
|---|---|---|
| prompt | `{json.dumps(settings.query_prompt)}` | `{json.dumps(settings.passage_prompt)}` |
| tokens at most, prompt and special tokens included | {settings.query_max_tokens} | {settings.passage_max_tokens} |
| text | the query | {passage} |

Dimension {dimension}, {settings.pooling} pooling over all tokens (the prompt's too), {unit}, \
similarity: {settings.similarity}.

```python
{use}
```

sentence-transformers knows one length a model: {"the longer of the two" if settings.tied else "each tower has its own"}.
`bigbatch.json` holds all of these settings; `retriever/encode.py` and the eval commands of bigbatch read it.

## Training

Contrastive training with bigbatch from `{model.name_or_path}`: {batch.queries} queries a step, \
at most {counted(config.data.negatives, "hard negative")} a query, temperature {loss.temperature:g}{learned}, \
{optim.name} with learning rate {optim.lr:g} ({optim.schedule}), precision {optim.precision}, seed {config.run.seed}.
"""
