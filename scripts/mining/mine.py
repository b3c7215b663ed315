"""Mining from a training source to a training file: encode, search, shortlist, score, filter, write."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from eval.collections.collection import fingerprint
from eval.engines.bm25 import DESCRIPTION, Bm25
from eval.engines.bm25_index import FILES, SPOOL
from retriever.data.formats import Passage
from retriever.data.tokens import SIDES
from retriever.files import write_lines
from retriever.parallel.world import World
from retriever.shards import EmbeddingShards, open_shards
from scripts.mining.candidates import NONE, encode, search_bm25, search_model, shortlist
from scripts.mining.pool import Pool
from scripts.mining.scores import Judge, bm25_judge, fused_judge, model_judge, teacher_judge, write_scores
from scripts.mining.settings import MiningSettings, Retriever
from scripts.stages import STAGE_FILES, Outputs, read_parts, refuse_foreign, run_stage

if TYPE_CHECKING:
    from retriever.encoder.bundle import EncoderBundle
    from scripts.mining.teacher import CrossEncoder

DATA = "train.jsonl"
_INPUTS = ("data", "settings", "retrievers", "judge")  # of the stage that writes DATA
# What the other stages leave in their folders: embedding shards with an index, BM25's index, rows of scores.
_SHARDS = ("[0-9]*.npy", "[0-9]*.arrow", "[0-9]*.tmp", "index-*", *STAGE_FILES)
_WORK = (*(f"{side}/{name}" for side in SIDES for name in _SHARDS), *FILES, SPOOL, "*.npy")
_DIGITS = 9  # name a float32 uniquely


@dataclass
class Mining:
    """One mining. `output` receives the data, `work` the stages that later minings can reuse."""

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
    counts: dict[str, int] = field(default_factory=dict)

    def run(self) -> Outputs:
        """Mines unless it was done before. `output` then holds train.jsonl (Tevatron's fields, with passages) and
        manifest.json.
        """
        inputs = {
            "data": self.pool.fingerprint,
            "settings": asdict(self.settings),
            "retrievers": {name: self._description(name) for name in self.settings.retrievers},
            "judge": self._judge_inputs(),
        }
        facts = {"counts": self.counts}
        return run_stage("mine", self.output, inputs, self._mine, writes=[DATA], world=self.world, facts=facts)

    def _stage(
        self, name: str, folder: str, inputs: Mapping[str, Any], work: Callable[[Path], Sequence[str]]
    ) -> Outputs:
        """Runs a stage whose outputs other minings of the same data can reuse."""
        return run_stage(
            name, self.work / folder, {"data": self.pool.fingerprint, **inputs}, work, writes=_WORK, world=self.world
        )

    def _description(self, judge: CrossEncoder | Retriever) -> Any:
        """Everything but the data that the rankings or scores of `judge` depend on."""
        if judge == "bm25":
            return DESCRIPTION
        if judge != "model":
            return judge.description
        assert self.bundle is not None  # the command asks for it where a retriever or a teacher is the model
        return {
            "model": self.bundle.model_hash(),
            "encoding": asdict(self.bundle.settings),
            "precision": self.bundle.precision,
            "index": self.index,
        }

    def _judge_inputs(self) -> Any:
        if self.teachers:
            return {
                "teachers": [self._description(t) for t in self.teachers],
                "tokens_per_batch": self.tokens_per_batch,
            }
        return self._description("model") if self.settings.filters else None

    def _mine(self, folder: Path) -> list[str]:
        searched = [self._search(name) for name in self.settings.retrievers]
        shortlists = shortlist(self.pool, [numbers for numbers, _ in searched], self.settings)
        scores = self._score(shortlists, [outputs for _, outputs in searched])
        if self.world.is_first:
            write_lines(
                folder / DATA, (json.dumps(record, ensure_ascii=False) for record in self._records(shortlists, scores))
            )
        return [DATA]

    @cached_property
    def _shards(self) -> tuple[EmbeddingShards, EmbeddingShards]:
        """The model's embeddings of the queries and of the passages."""
        bundle, folder = self.bundle, self.work / "embeddings"
        assert bundle is not None
        model = {key: value for key, value in self._description("model").items() if key != "index"}
        self._stage(
            "encode",
            folder.name,
            {"model": model},
            lambda aside: encode(self.pool, bundle, aside, self.world, self.tokens_per_chunk),
        )
        return open_shards(folder / "query"), open_shards(folder / "passage")

    @cached_property
    def _bm25(self) -> Bm25:
        def work(folder: Path) -> list[str]:
            if self.world.is_first:
                Bm25.build(self.pool.texts(), folder, progress=True)
            return list(FILES)

        self._stage("index for bm25", "bm25", {"bm25": DESCRIPTION}, work)
        return Bm25(self.work / "bm25")

    def _search(self, name: Retriever) -> tuple[np.ndarray, Outputs]:
        """(numbers [Q, last_rank] of the passages that the retriever ranks first, the files that hold them)."""
        depth = self.settings.last_rank

        def work(folder: Path) -> list[str]:
            if name == "bm25":
                return search_bm25(self.pool, self._bm25, depth, folder, self.world, self.threads)
            return search_model(*self._shards, depth, self.index, folder, self.world)

        outputs = self._stage(
            f"search by {name}", f"search-{name}", {"retriever": self._description(name), "depth": depth}, work
        )
        found = read_parts(self.work / f"search-{name}", outputs)
        if self.world.is_first and (found == NONE).all():
            print(f"warning: search by {name}: no query finds a passage", flush=True)
        return found, outputs

    def _score(self, shortlists: Sequence[Sequence[int]], searched: Sequence[Outputs]) -> np.ndarray:
        """The scores of each query's positives and then of its shortlist, one query after another; zeros if nothing is
        scored.
        """
        if not self.teachers and not self.settings.filters:
            return np.zeros(sum(len(query.positives) for query in self.pool.queries) + sum(map(len, shortlists)))

        def work(folder: Path) -> list[str]:
            judge = fused_judge([self._judge(teacher) for teacher in self.teachers or ("model",)])
            return write_scores(self.pool, shortlists, judge, folder, self.world)

        inputs = {
            "shortlists": fingerprint([list(numbers) for numbers in shortlists]),
            "searched": [dict(outputs) for outputs in searched],
            "judge": self._judge_inputs(),
        }
        return read_parts(self.work / "scores", self._stage("score", "scores", inputs, work))

    def _judge(self, teacher: CrossEncoder | Retriever) -> Judge:
        if teacher == "bm25":
            return bm25_judge(self.pool, self._bm25)
        if teacher == "model":
            return model_judge(*self._shards)
        return teacher_judge(self.pool, teacher, self.tokens_per_batch)

    def _records(self, shortlists: Sequence[Sequence[int]], scores: np.ndarray) -> Iterator[dict[str, Any]]:
        """The record of each query. Counts what is kept and what is dropped."""
        self.counts |= {
            "queries": len(self.pool.queries),
            "without a positive": self.pool.left_out,
            "passages": len(self.pool.passages),
            **dict.fromkeys(("negatives", "dropped by score", "queries without negatives"), 0),
        }
        end = 0
        for query, numbers in zip(self.pool.queries, shortlists, strict=True):
            start, middle = end, end + len(query.positives)
            end = middle + len(numbers)
            positives, negatives = scores[start:middle].astype(np.float64), scores[middle:end].astype(np.float64)
            allowed = np.flatnonzero(negatives <= self.settings.line(positives.min()))
            kept = allowed[: self.settings.negatives]
            self.counts["dropped by score"] += len(numbers) - len(allowed)
            self.counts["negatives"] += len(kept)
            self.counts["queries without negatives"] += not len(kept)
            record: dict[str, Any] = {"query_id": query.id, "query": query.text}
            if query.prompt is not None:
                record["prompt"] = query.prompt
            record["positive_passages"] = [_described(self.pool.passages[n]) for n in query.positives]
            record["negative_passages"] = [_described(self.pool.passages[numbers[i]]) for i in kept]
            if self.teachers:
                record["positive_scores"] = [_number(score) for score in positives]
                record["negative_scores"] = [_number(score) for score in negatives[kept]]
            yield record


def check_output(folder: Path) -> None:
    """Raises ConfigError if `folder` holds anything that no mining wrote."""
    refuse_foreign("mine", folder, _INPUTS, [DATA])


def _described(passage: Passage) -> dict[str, str]:
    found = {"docid": passage.id} if passage.id is not None else {}
    return found | {"title": passage.title, "text": passage.text or ""}


def _number(score: float) -> float:
    return float(f"{score:.{_DIGITS}g}")
