"""What a run says of itself before step 1, held against its data and the files that it writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from retriever.train import main
from tests.tiny import save_tiny_model

_SIZES: dict[str, Any] = {"num_hidden_layers": 1, "hidden_size": 128, "intermediate_size": 256}
_SETTINGS = (
    *("model.query_prompt='search query '", "model.query_max_tokens=16", "model.passage_max_tokens=12"),
    *("batch.queries=8", "batch.tokens_per_chunk=100", "data.negatives=2", "loss.learn_temperature=true"),
    *("optim.freeze=[embeddings]", "optim.precision=fp32", "optim.warmup=0", "train.max_steps=1", "run.trackers=[]"),
)


def test_the_summary_counts_data_parameters_and_bytes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_tiny_model(tmp_path / "model", **_SIZES)
    words = ["law", "court", "team", "film", "book", "road", "train", "ship"]
    queries = [f"river {word}" for word in words[2:]]
    queries += [" ".join(["bridge"] * 12), " ".join(["ocean"] * 14)]  # with prompt and special tokens 16 and 18
    records = [
        {
            "query": query,
            "pos": [" ".join([words[i]] * (2 * i + 2))],  # 2 to 16 tokens: 3 of them are more than 10
            "neg": [" ".join(["ocean"] * (i + 1) + ["storm"] * j) for j in range(i % 3)],  # 7 of them
        }
        for i, query in enumerate(queries)
    ]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    paths = (
        f"model.name_or_path={tmp_path}/model",
        f"data.train=[{{path: {tmp_path}/pairs.jsonl, query_max_tokens: 15}}]",
        f"data.cache_dir={tmp_path}/cache",
        f"run.output_dir={tmp_path}/run",
    )
    assert main([*paths, *_SETTINGS]) == 0
    out = capsys.readouterr().out
    said = {line.split()[0]: line for line in out.splitlines() if line}
    assert "warning" not in out
    assert "M parameters, 0.13M of them trained, tied towers, mean pooling, 128 dimensions; " in said["model"]
    assert said["data"].endswith("15 passages; a query has 1 positive and 0 to 2 hard negatives (0.9 on average)")
    assert said["tokens"] == (
        "tokens  at most 16 a query, with a prompt of 2 (25.0% are cut); at most 12 a passage (20.0% are cut)"
    )
    assert "8 queries in chunks of at most 100 tokens, 15 passages in the first batch; " in said["batch"]
    assert said["batch"].endswith("temperature 0.02 (learned)")
    mib = float(said["run"].split()[-4])
    (step,) = (tmp_path / "run" / "checkpoints").iterdir()
    written = sum(file.stat().st_size for file in step.rglob("*.safetensors")) / 2**20
    assert said["run"].endswith(" MiB a checkpoint") and mib == pytest.approx(written, rel=0.06)
