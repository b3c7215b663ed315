"""Our encoder behind mteb's encoder protocol, and collections of ours as retrieval tasks of mteb."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, replace
from typing import Any

import datasets
import numpy as np
import torch
from mteb.abstasks.retrieval import AbsTaskRetrieval
from mteb.abstasks.retrieval_dataset_loaders import RetrievalSplitData
from mteb.abstasks.task_metadata import TaskMetadata
from mteb.models.model_meta import ModelMeta, ScoringFunction
from mteb.types import PromptType

from eval.collections.collection import Collection, fingerprint
from retriever.data.records import Passage, final_text
from retriever.data.tokens import Side
from retriever.encoder.bundle import EncoderBundle
from retriever.encoder.text_batches import mode_of


class MtebEncoder:
    """Queries and documents get the prompts, lengths and title policy of the model. Texts that are neither, as those of
    clustering, are encoded as documents without a prompt.
    """

    def __init__(self, bundle: EncoderBundle, name: str, tokens_per_chunk: int | None = None) -> None:
        """`name`: of the model in the results, as `organisation/model`."""
        self._bundle, self._tokens_per_chunk = bundle, tokens_per_chunk
        settings = bundle.settings
        self._unprompted = replace(bundle, settings=replace(settings, passage_prompt=""))
        self.mteb_model_meta = ModelMeta(
            loader=None,
            name=name,
            revision=_revision(bundle),
            release_date=None,
            languages=None,
            n_parameters=sum(parameter.numel() for parameter in bundle.encoder.parameters()),
            memory_usage_mb=None,
            max_tokens=max(settings.query_max_tokens, settings.passage_max_tokens),
            embed_dim=bundle.dimension,
            license=None,
            open_weights=None,
            public_training_code=None,
            public_training_data=None,
            framework=["PyTorch", "Sentence Transformers"],
            similarity_fn_name=ScoringFunction.COSINE if settings.normalize else ScoringFunction.DOT_PRODUCT,
            use_instructions=bool(settings.query_prompt or settings.passage_prompt),
            training_datasets=None,
        )

    def encode(
        self, inputs: Iterable[dict[str, Any]], *, prompt_type: PromptType | None = None, **_: Any
    ) -> np.ndarray:
        """Embeddings [n, D] float32 of the texts of mteb's batches."""
        texts = [text for batch in inputs for text in self._texts(batch)]
        bundle = self._unprompted if prompt_type is None else self._bundle
        side: Side = "query" if prompt_type is PromptType.query else "passage"
        return bundle.encode(texts, side, tokens_per_chunk=self._tokens_per_chunk)

    def similarity(self, embeddings1: Any, embeddings2: Any) -> torch.Tensor:
        """Inner products [n, m] of embeddings [n, D] and [m, D]."""
        return self._tensor(embeddings1) @ self._tensor(embeddings2).T

    def similarity_pairwise(self, embeddings1: Any, embeddings2: Any) -> torch.Tensor:
        """Inner products [n] of embeddings [n, D] and [n, D]."""
        return (self._tensor(embeddings1) * self._tensor(embeddings2)).sum(dim=-1)

    def _texts(self, batch: dict[str, Any]) -> Iterator[str]:
        """Those of a batch; mteb joins titles by a space, which is not every model's way."""
        settings = self._bundle.settings
        if "title" not in batch or (settings.title, settings.title_separator) == ("join", " "):
            yield from batch["text"]
            return
        for title, text in zip(batch["title"], batch["body"], strict=True):
            yield final_text(Passage(None, text, title), settings.title, settings.title_separator)

    def _tensor(self, embeddings: Any) -> torch.Tensor:
        return torch.atleast_2d(torch.as_tensor(embeddings, device=self._bundle.encoder.device))


def _revision(bundle: EncoderBundle) -> str:
    """A hash of all that the embeddings depend on: mteb takes results of the same name and revision as its own."""
    settings = asdict(bundle.settings)
    return fingerprint([bundle.model_hash(), settings, bundle.precision, mode_of(bundle.encoder)])


def local_task(collection: Collection, bundle: EncoderBundle) -> AbsTaskRetrieval:
    """A collection as a task of mteb, its texts as the model reads them."""
    settings, prints = bundle.settings, collection.fingerprints()
    name = "".join(c if c.isalnum() else "-" for c in collection.name)

    class Local(AbsTaskRetrieval):
        metadata = TaskMetadata(
            name=name,
            description=f"The collection {name} of a folder on this machine",
            type="Retrieval",
            dataset={"path": name, "revision": prints["corpus"]},
            eval_splits=[collection.split],
            eval_langs=["eng-Latn"],  # mteb asks for one; nothing depends on it
            main_score="ndcg_at_10",
        )
        ignore_identical_ids = collection.exclude_self

        def load_data(self, *_: Any, **__: Any) -> None:
            passages = collection.passages(settings.title, settings.title_separator)
            split = RetrievalSplitData(
                corpus=datasets.Dataset.from_list([{"id": i, "text": text} for i, text in passages]),
                queries=datasets.Dataset.from_list([{"id": i, "text": text} for i, text in collection.queries.items()]),
                relevant_docs={query_id: dict(grades) for query_id, grades in collection.qrels.items()},
                top_ranked=None,
            )
            self.dataset = {"default": {collection.split: split}}
            self.data_loaded = True

    return Local()
