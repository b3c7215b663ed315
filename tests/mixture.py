"""Four small sources with different prompts, lengths and policies."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from retriever.config import BatchConfig, Config, DataConfig, LossConfig, ModelConfig, OptimConfig, SourceConfig
from tests.tiny import random_texts

MIXTURE: tuple[dict[str, Any], ...] = (
    {"prompt_name": "pairs"},
    {"prompt_name": "own", "query_prompt": "question: ", "passage_prompt": "answer: ", "query_max_tokens": 10,
     "passage_max_tokens": 16, "hard_negatives": 2, "negatives": "own"},
    {"prompt_name": "taught", "passage_prompt": "", "hard_negatives": 3, "negatives": "none"},
    {"prompt_name": "long", "query_prompt": "which ", "passage_max_tokens": 24, "hard_negatives": 0, "temperature": 0.1},
)  # fmt: skip


def mixture(folder: Path, model: str = "", **batch: Any) -> Config:
    """The configuration of a run over them, 20 queries each, in files written by the first call. The first two share a
    passage's text.
    """
    texts = iter(random_texts(1000, shortest=12, longest=40, seed=5))
    sources = []
    for number, settings in enumerate(MIXTURE):
        records = []
        for i in range(20):
            record: dict[str, Any] = {
                "query": next(texts),
                "pos": [next(texts)],
                "neg": [next(texts) for _ in range(3)],
            }
            if number < 2 and i == 0:
                record["pos"] = ["a shared text"]
            if settings["prompt_name"] == "taught":
                record |= {"pos_scores": [2.0], "neg_scores": [0.5, -1.0, 1.0]}
            records.append(json.dumps(record) + "\n")
        path = folder / f"{settings['prompt_name']}.jsonl"
        if not path.exists():  # ranks that call it find the files as they are; a rewritten one is another data set
            path.write_text("".join(records))
        sources.append(SourceConfig(path=str(path), format="flagembedding", **settings))
    return Config(
        model=ModelConfig(
            model, query_prompt="query: ", passage_prompt="passage: ", query_max_tokens=14, passage_max_tokens=32
        ),
        data=DataConfig(train=tuple(sources), negatives=1, cache_dir=str(folder / "cache")),
        batch=BatchConfig(queries=8, tokens_per_chunk=128, **batch),
        loss=LossConfig(temperature=0.05, kl_weight=0.5),
        optim=OptimConfig(lr=1e-3, precision="fp32", warmup=0),
    )
