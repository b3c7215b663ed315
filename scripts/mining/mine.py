"""Mining from a training source to a file of training data: encode, search, shortlist, score, filter, write."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from eval.collections.collection import fingerprint
from eval.engines.bm25 import DESCRIPTION, Bm25
from eval.engines.bm25_index import FILES
from retriever.data.formats import Passage
from retriever.files import replace_file
from retriever.parallel.world import World
from retriever.shards import EmbeddingShards, open_shards
from scripts.mining.candidates import encode, read_candidates, search_bm25, search_model, shortlist
from scripts.mining.pool import Pool
from scripts.mining.scores import Judge, bm25_judge, fused_judge, model_judge, read_scores, teacher_judge, write_scores
from scripts.mining.settings import MiningSettings, Retriever
from scripts.stages import Outputs, run_stage

if TYPE_CHECKING:
    from retriever.encoder.bundle import EncoderBundle
    from scripts.mining.teacher import CrossEncoder

DATA = "train.jsonl"
Shards = tuple[EmbeddingShards, EmbeddingShards]  # of queries and passages
_DIGITS = 9  # name a float32 uniquely


@dataclass
class Mining:
    """One mining: what it reads, what it asks, and where it works. `output` gets the data, `work` what can be used again."""

    pool: Pool
    settings: MiningSettings
    output: Path
    work: Path
    world: World
    bundle: EncoderBundle | None = None
    teachers: tuple[CrossEncoder | Retriever, ...] = ()  # several: their standardised scores' mean
    index: str = "flat"
    tokens_per_batch: int = 8_192  # of a cross-encoder
    tokens_per_chunk: int | None = None  # of the encoder
    threads: int | None = None  # of BM25's search; None: all cores, divided among the ranks
    progress: bool = True
    counts: dict[str, int] = field(default_factory=dict)

    def run(self) -> Outputs:
        """Mines, or finds that it was done: `output` holds train.jsonl (Tevatron's fields, passages inside) and manifest.json."""
        return run_stage("mine", self.output, self._inputs(), self._mine, world=self.world, facts=lambda: {"counts": self.counts})

    def _inputs(self) -> dict[str, Any]:
        return {
            "data": self.pool.fingerprint,
            "settings": asdict(self.settings),
            "retrievers": {name: self._retriever(name) for name in self.settings.retrievers},
            "judge": self._judge_inputs(),
        }

    def _retriever(self, name: Retriever) -> Any:
        if name == "bm25":
            return DESCRIPTION
        assert self.bundle is not None  # the command asks for it where a retriever is the model
        return {
            "model": self.bundle.model_hash(),
            "encoding": asdict(self.bundle.settings),
            "precision": self.bundle.precision,
            "index": self.index,
        }

    def _judge_inputs(self) -> Any:
        if self.teachers:
            names = [self._retriever(t) if isinstance(t, str) else t.description for t in self.teachers]
            return {"teachers": names, "tokens_per_batch": self.tokens_per_batch}
        return self._retriever("model") if self.settings.filters else None

    def _mine(self, folder: Path) -> list[str]:
        shards = None
        if self.bundle is not None:
            shards = self._encode(self.bundle)
        searched = [self._search(name, shards) for name in self.settings.retrievers]
        shortlists = shortlist(self.pool, [numbers for numbers, _ in searched], self.settings)
        scores = None
        if self.teachers or self.settings.filters:
            scores = self._score(shortlists, shards, [outputs for _, outputs in searched])
        if self.world.is_first:
            self._write(folder / DATA, shortlists, scores)
        return [DATA]

    def _encode(self, bundle: EncoderBundle) -> Shards:
        def work(folder: Path) -> list[str]:
            encode(self.pool, bundle, folder, self.world, self.tokens_per_chunk)
            return [f"{side}/manifest.json" for side in ("query", "passage")]

        folder = self.work / "embeddings"
        model = {key: value for key, value in self._retriever("model").items() if key != "index"}
        run_stage("encode", folder, {"data": self.pool.fingerprint, "model": model}, work, world=self.world)
        return open_shards(folder / "query"), open_shards(folder / "passage")

    def _bm25(self) -> Bm25:
        def work(folder: Path) -> list[str]:
            if self.world.is_first:
                Bm25.build(self.pool.texts(), folder, progress=self.progress)
            return list(FILES)

        folder = self.work / "bm25"
        run_stage("index for bm25", folder, {"data": self.pool.fingerprint, "bm25": DESCRIPTION}, work, world=self.world)
        return Bm25(folder)

    def _search(self, name: Retriever, shards: Shards | None) -> tuple[np.ndarray, Outputs]:
        def work(folder: Path) -> list[str]:
            if name == "bm25":
                return search_bm25(self.pool, self._bm25(), self.settings.last_rank, folder, self.world, self.threads)
            assert shards is not None
            queries, passages = shards
            return search_model(queries, passages, self.settings.last_rank, self.index, folder, self.world)

        inputs = {"data": self.pool.fingerprint, "retriever": self._retriever(name), "depth": self.settings.last_rank}
        folder = self.work / f"search-{name}"
        outputs = run_stage(f"search by {name}", folder, inputs, work, world=self.world)
        return read_candidates(folder, list(outputs)), outputs

    def _score(self, shortlists: Sequence[Sequence[int]], shards: Shards | None, searched: Sequence[Outputs]) -> np.ndarray:
        def work(folder: Path) -> list[str]:
            judge = fused_judge([self._judge(teacher, shards) for teacher in self.teachers or ("model",)])
            return write_scores(self.pool, shortlists, judge, folder, self.world, self.progress)

        inputs = {
            "data": self.pool.fingerprint,
            "shortlists": fingerprint([list(numbers) for numbers in shortlists]),
            "searched": [dict(outputs) for outputs in searched],
            "judge": self._judge_inputs(),
        }
        folder = self.work / "scores"
        return read_scores(folder, list(run_stage("score", folder, inputs, work, world=self.world)))

    def _judge(self, teacher: CrossEncoder | Retriever, shards: Shards | None) -> Judge:
        if teacher == "bm25":
            return bm25_judge(self.pool, self._bm25())
        if teacher == "model":
            assert shards is not None  # the command asks for the model where a teacher is it
            return model_judge(*shards)
        return teacher_judge(self.pool, teacher, self.tokens_per_batch)

    def _write(self, path: Path, shortlists: Sequence[Sequence[int]], scores: np.ndarray | None) -> None:
        self.counts = {"queries": len(self.pool.queries), "without a positive": self.pool.left_out, "passages": len(self.pool.passages)}
        self.counts |= {"negatives": 0, "dropped by score": 0, "queries without negatives": 0}
        with replace_file(path) as aside, aside.open("w", encoding="utf-8") as stream:
            for record in self._records(shortlists, scores):
                stream.write(json.dumps(record, ensure_ascii=False) + "\n")

    def _records(self, shortlists: Sequence[Sequence[int]], scores: np.ndarray | None) -> Iterator[dict[str, Any]]:
        at = 0
        for query, numbers in zip(self.pool.queries, shortlists, strict=True):
            positives, kept = len(query.positives), list(range(len(numbers)))
            here = None
            if scores is not None:
                here = scores[at : at + positives + len(numbers)]
                at += len(here)
                line = self.settings.line(float(here[:positives].min()))
                kept = [i for i in kept if float(here[positives + i]) <= line]
                self.counts["dropped by score"] += len(numbers) - len(kept)
            kept = kept[: self.settings.negatives]
            self.counts["negatives"] += len(kept)
            self.counts["queries without negatives"] += not kept
            record: dict[str, Any] = {"query_id": query.id, "query": query.text}
            if query.prompt is not None:
                record["prompt"] = query.prompt
            record["positive_passages"] = [_described(self.pool.passages[n]) for n in query.positives]
            record["negative_passages"] = [_described(self.pool.passages[numbers[i]]) for i in kept]
            if here is not None and self.teachers:
                record["positive_scores"] = [_number(s) for s in here[:positives]]
                record["negative_scores"] = [_number(here[positives + i]) for i in kept]
            yield record


def _described(passage: Passage) -> dict[str, str]:
    found = {"docid": passage.id} if passage.id is not None else {}
    return found | {"title": passage.title, "text": passage.text or ""}


def _number(score: np.floating[Any]) -> float:
    return float(f"{float(score):.{_DIGITS}g}")
