"""The page's server: the page itself, the collection's queries, and searches."""

from __future__ import annotations

import base64
import hashlib
import re
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from fastapi import FastAPI, HTTPException, Query
from fastapi.responses import HTMLResponse
from starlette.middleware.trustedhost import TrustedHostMiddleware

from eval.collections.collection import Collection
from scripts.demo.search import Searcher
from scripts.serve.models import DEPTH, MEASURES, Model

_PAGE = Path(__file__).with_name("page.html")
_LONGEST_QUERY = 10_000  # characters


def application(models: Sequence[Model], collection: Collection, texts: Mapping[str, str]) -> FastAPI:
    """The page over `models`, which have all encoded the collection; `texts` are its passages by id."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    # a page of another site whose name was made to point here reads nothing
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=["127.0.0.1", "localhost"])
    page, answers = _PAGE.read_text(encoding="utf-8"), _Answers(models, collection, texts)
    headers = {"Content-Security-Policy": _policy(page), "X-Content-Type-Options": "nosniff"}

    @app.get("/")
    def show() -> HTMLResponse:
        return HTMLResponse(page, headers=headers)

    @app.get("/collection")
    def about() -> dict[str, Any]:
        return answers.about()

    @app.get("/search")
    def search(
        query: Annotated[str, Query(max_length=_LONGEST_QUERY)], k: Annotated[int, Query(ge=1, le=DEPTH)] = 10
    ) -> dict[str, Any]:
        if not query.strip():
            raise HTTPException(422, "query: expected words")
        return answers.search(query, k)

    return app


class _Answers:
    """What the page asks for."""

    def __init__(self, models: Sequence[Model], collection: Collection, texts: Mapping[str, str]) -> None:
        self._models, self._collection, self._texts = models, collection, texts
        self._searchers = [Searcher(model.bundle, model.passages, texts) for model in models]
        self._ids = dict[str, list[str]]()  # of the queries with one text
        for query_id, text in collection.queries.items():
            self._ids.setdefault(_plain(text), []).append(query_id)
        self._one_at_a_time = threading.Lock()  # tokenizers keep their truncation in themselves

    def about(self) -> dict[str, Any]:
        """The collection, its queries with each model's measure, and the models."""
        named = self._collection
        queries = [
            {"text": text, "scores": [model.per_query.get(query_id) for model in self._models]}
            for query_id, text in named.queries.items()
        ]
        models = [{"name": model.name, "means": dict(model.means)} for model in self._models]
        about = {"name": named.name, "split": named.split, "passages": len(self._texts), "measure": MEASURES[0]}
        return about | {"models": models, "queries": queries}

    def search(self, query: str, k: int) -> dict[str, Any]:
        """Each model's k best passages, and those judged relevant that are not among them.

        Of queries with one text, the judgments are put together; the passage of the first one's id is left out where
        the collection's measures leave it out.
        """
        ids = self._ids.get(_plain(query), [])
        grades = {p: grade for query_id in ids for p, grade in self._collection.qrels.get(query_id, {}).items()}
        excluded = ids[0] if ids and self._collection.exclude_self else None
        relevant = {p for p, grade in grades.items() if grade >= self._collection.relevance and p in self._texts}
        with self._one_at_a_time:
            found = [_Found.by(searcher, query, excluded) for searcher in self._searchers]

        def shown(passage_id: str, one: _Found) -> dict[str, Any]:
            return {
                "id": passage_id,
                "rank": one.ranks.get(passage_id),
                "score": one.scores.get(passage_id),
                "text": self._texts[passage_id],
                "grade": grades.get(passage_id),
                "relevant": passage_id in relevant,
                "ranks": [other.ranks.get(passage_id) for other in found],
            }

        models = []
        for one in found:
            best = list(one.ranks)[:k]
            below = sorted(relevant.difference(best), key=one.order)
            listed = {name: [shown(p, one) for p in ids] for name, ids in (("passages", best), ("below", below))}
            models.append({"seconds": one.seconds, **listed})
        return {"judged": bool(ids), "relevant": len(relevant), "depth": DEPTH, "models": models}


@dataclass(frozen=True)
class _Found:
    """The passages that one model finds for a query, best first."""

    ranks: Mapping[str, int]
    scores: Mapping[str, float]
    seconds: float

    @classmethod
    def by(cls, searcher: Searcher, query: str, excluded: str | None) -> _Found:
        """What the searcher finds."""
        started = time.perf_counter()
        ids, scores = searcher(query, DEPTH, excluded)
        ranks = {passage_id: rank for rank, passage_id in enumerate(ids, 1)}
        return cls(ranks, dict(zip(ids, map(float, scores), strict=True)), time.perf_counter() - started)

    def order(self, passage_id: str) -> tuple[int, str]:
        """Sorts passages by rank, those that were not found last."""
        return self.ranks.get(passage_id, DEPTH + 1), passage_id


def _plain(text: str) -> str:
    return " ".join(text.split())


def _policy(page: str) -> str:
    """Lets the page's own script and style run, and nothing else that a text might bring."""
    hashes = []
    for tag in ("script", "style"):
        (content,) = re.findall(f"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        hashes.append(f"{tag}-src 'sha256-{digest}'")
    fixed = ("default-src 'none'", "connect-src 'self'", "img-src data:", "base-uri 'none'", "form-action 'none'")
    return "; ".join((*fixed, *hashes))
