"""A trained encoder as a folder that transformers, sentence-transformers and this project load with the same
embeddings.

The schema is the long-standing one of sentence-transformers, so that older servers read it too; what it cannot say (two
lengths, title policy) stands in `bigbatch.json`. Untied towers become two such folders, `query/` and `passage/`. The
folder around them is a model of sentence-transformers too, whose Router chooses between them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from retriever.config import Config, to_dict
from retriever.config_sources import named_prompts
from retriever.data.tokens import SIDES, Side
from retriever.encoder.bundle import EncoderBundle, load_encoder
from retriever.encoder.dual_encoder import DualEncoder
from retriever.encoder.projection import write_projection
from retriever.encoder.settings import SETTINGS_FILE, SETTINGS_VERSION, EncoderSettings, settings_of
from retriever.errors import RefusedError
from retriever.files import replace_folder, write_json, write_text
from retriever.model_card import TrainingFacts, model_card
from retriever.model_folder import ADAPTER, ROUTES, write_adapter, write_described, write_router, write_tower
from retriever.rng import OwnGenerator, RngState
from retriever.wording import without_folders

CARD = "README.md"
_PARITY = 1e-5  # how far an embedding may move by being written and read, in units of the largest entry or of 1
_CHARACTERS_A_TOKEN = 20  # more than a token has, on average


class ExportError(RefusedError):
    """A written model whose embeddings differ from those of the live one."""


@dataclass(frozen=True)
class Probe:
    """A few texts and the live encoder's embeddings of them, which the written model must reproduce."""

    texts: Sequence[str]
    embeddings: dict[Side, np.ndarray]  # [texts, D] float32

    @staticmethod
    def of(encoder: DualEncoder, tokenizer: PreTrainedTokenizerBase, config: Config, texts: Sequence[str]) -> Probe:
        """Embeds `texts` in fp32; neither the encoder's modes nor any generator's state change.

        Raises ValueError if there is no text.
        """
        if not texts:
            raise ValueError("export: no text to compare the written model by; expected at least one")
        settings = settings_of(config, encoder.pooling, encoder.truncate_dim)
        # One text is longer than each side's length, and none much longer: a text of 20 MB would take 90 s.
        longest = max(settings.query_max_tokens, settings.passage_max_tokens)
        texts = [*(text[: _CHARACTERS_A_TOKEN * longest] for text in texts), "retrieval " * (longest + 1)]
        bundle = EncoderBundle(encoder, tokenizer, settings)
        autocast_dtype, encoder.autocast_dtype = encoder.autocast_dtype, None
        try:
            with RngState.capture(encoder.device).restored():
                return Probe(texts, {side: bundle.encode(texts, side) for side in SIDES})
        finally:
            encoder.autocast_dtype = autocast_dtype


def export(
    encoder: DualEncoder,
    tokenizer: PreTrainedTokenizerBase,
    config: Config,
    folder: str | Path,
    probe: Probe,
    training: tuple[int, TrainingFacts] | None = None,
) -> Path:
    """Writes the encoder in fp32 to `folder`, replacing what is there, and returns it. The same weights give the same
    bytes.

    The folder gets its name only after it was loaded again, on the encoder's device, and gave the embeddings of
    `probe`. `training` goes into its model card. No other thread's random numbers change. Raises ExportError if an
    embedding differs by more than 1e-5.
    """
    folder = Path(folder)
    settings = settings_of(config, encoder.pooling, encoder.truncate_dim)

    def write_card(folder: Path, side: Side | None = None) -> None:
        part = encoder if side is None else encoder.query_tower if side == "query" else encoder.passage_tower
        parameters = sum(tensor.numel() for name, tensor in part.named_parameters() if ".lora_" not in name)
        card = model_card(settings, config, encoder.dimension, side, training, parameters)
        write_text(folder / CARD, card)

    prompts = {"query": settings.query_prompt, "document": settings.passage_prompt, **named_prompts(config)}
    with replace_folder(folder) as writing:
        if encoder.tied:
            max_tokens = max(settings.query_max_tokens, settings.passage_max_tokens)
            write_tower(
                writing,
                encoder.passage_tower,
                encoder.unused_weights["shared"],
                tokenizer,
                settings,
                prompts,
                max_tokens,
            )
            if encoder.projections:
                write_projection(writing, encoder.projections["shared"])
        else:
            for side in SIDES:
                _write_tower_of(side, writing / side, encoder, tokenizer, settings, named_prompts(config))
                if encoder.projections:
                    write_projection(writing / side, encoder.projections[side])
                write_card(writing / side, side)
            write_router(writing)
            write_described(writing, settings, prompts)
        if config.model.lora is not None:
            for name, tower in encoder.towers.items():
                write_adapter(writing / ("" if encoder.tied else name) / ADAPTER, tower, config.model)
        write_json(
            writing / SETTINGS_FILE,
            {"format_version": SETTINGS_VERSION, **asdict(settings), **_origin(settings, config)},
        )
        write_card(writing)
        _check_parity(writing, probe, encoder.device)
    return folder


def _write_tower_of(
    side: Side,
    folder: Path,
    encoder: DualEncoder,
    tokenizer: PreTrainedTokenizerBase,
    settings: EncoderSettings,
    named: dict[str, str],
) -> None:
    """One tower of two, as a folder that stands on its own; `named`: the sources' prompts, of both sides."""
    tower = encoder.query_tower if side == "query" else encoder.passage_tower
    called = ROUTES[side]
    own = {name: prompt for name, prompt in named.items() if name.endswith(f"_{called}")}
    prompts = {called: settings.prompt(side), **own}
    write_tower(folder, tower, encoder.unused_weights[side], tokenizer, settings, prompts, settings.max_tokens(side))


def _check_parity(written: Path, probe: Probe, device: torch.device) -> None:
    """Loads the written folder and raises ExportError if it embeds a text otherwise than the live encoder."""
    with OwnGenerator():  # a weight that the folder lacks, such as a pooler's, is drawn
        reloaded = load_encoder(written, device=device)
    for side, expected in probe.embeddings.items():
        found = reloaded.encode(probe.texts, side)
        allowed = _PARITY * max(1.0, float(np.abs(expected).max()))
        difference = float(np.abs(found - expected).max())
        if not difference <= allowed:  # NaN is no parity either
            raise ExportError(
                f"export: reloaded, a {side} embedding differs from the live one by {difference:.2e}; "
                f"expected at most {allowed:.2e}. No file was replaced; the encoder is unchanged"
            )


def _origin(settings: EncoderSettings, config: Config) -> dict[str, Any]:
    """The origin of the model, the same for two runs of one configuration in different folders."""
    plain = to_dict(config)
    trained = {section: plain[section] for section in ("model", "batch", "loss", "optim", "train")}
    trained["seed"] = config.run.seed
    digest = hashlib.sha256(json.dumps(trained, sort_keys=True).encode()).hexdigest()
    base = {} if config.model.from_scratch else {"base_model": without_folders(config.model.name_or_path)}
    return {"similarity": settings.similarity, **base, "config_sha256": digest}
