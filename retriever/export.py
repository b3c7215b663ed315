"""A trained encoder as a folder that transformers, sentence-transformers and this project load with the same
embeddings.

The schema is the long-standing one of sentence-transformers, so that older servers read it too; what it cannot say (two
lengths, title policy) stands in `bigbatch.json`. Untied towers become two such folders, `query/` and `passage/`.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from retriever.config import Config, to_dict
from retriever.config_sources import named_prompts
from retriever.data.tokens import SIDES, Side
from retriever.encoder.bundle import EncoderBundle, load_encoder
from retriever.encoder.dual_encoder import DualEncoder
from retriever.encoder.lora import merged_state
from retriever.encoder.pretrained import quiet_transformers
from retriever.encoder.projection import write_projection
from retriever.encoder.settings import SETTINGS_FILE, SETTINGS_VERSION, EncoderSettings, settings_of
from retriever.errors import RefusedError
from retriever.files import replace_folder, write_json, write_text
from retriever.model_card import TrainingFacts, model_card
from retriever.older_readers import name_older_tokenizer, older_config_keys
from retriever.rng import OwnGenerator, RngState
from retriever.wording import without_folders

CARD = "README.md"
_PARITY = 1e-5  # how far an embedding may move by being written and read, in units of the largest entry or of 1
_CHARACTERS_A_TOKEN = 20  # more than a token has, on average
_POOLING_FLAGS = {"cls": "pooling_mode_cls_token", "mean": "pooling_mode_mean_tokens", "last": "pooling_mode_lasttoken"}
_UNUSED_FLAGS = ("pooling_mode_max_tokens", "pooling_mode_mean_sqrt_len_tokens", "pooling_mode_weightedmean_tokens")


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
        card = model_card(settings, config, encoder.dimension, side, training)
        write_text(folder / CARD, card)

    with replace_folder(folder) as writing:
        if encoder.tied:
            prompts = {"query": settings.query_prompt, "document": settings.passage_prompt, **named_prompts(config)}
            max_tokens = max(settings.query_max_tokens, settings.passage_max_tokens)
            _write_tower(
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
    called = "query" if side == "query" else "document"
    own = {name: prompt for name, prompt in named.items() if name.endswith(f"_{called}")}
    prompts = {called: settings.prompt(side), **own}
    _write_tower(folder, tower, encoder.unused_weights[side], tokenizer, settings, prompts, settings.max_tokens(side))


def _write_tower(
    folder: Path,
    tower: PreTrainedModel,
    unused_weights: dict[str, Tensor],
    tokenizer: PreTrainedTokenizerBase,
    settings: EncoderSettings,
    prompts: dict[str, str],
    max_tokens: int,
) -> None:
    """A sentence-transformers folder of one transformer, its pooling and, where asked, normalisation."""
    tied: Any = tower.all_tied_weights_keys  # second names of other weights
    weights = {name: tensor for name, tensor in merged_state(tower).items() if name not in tied} | unused_weights
    with quiet_transformers():
        tower.save_pretrained(folder, state_dict={name: _as_fp32(tensor) for name, tensor in weights.items()})
    described = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    write_json(folder / "config.json", described | older_config_keys(described) | {"dtype": "float32"})
    _save_tokenizer(tokenizer, folder, max_tokens)

    modules = [
        ("", "Transformer"),
        ("1_Pooling", "Pooling"),
        *([("2_Normalize", "Normalize")] if settings.normalize else []),
    ]
    named = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (path, kind) in enumerate(modules)
    ]
    write_json(folder / "modules.json", named)
    write_json(folder / "sentence_bert_config.json", {"max_seq_length": max_tokens, "do_lower_case": False})
    for path, _ in modules[1:]:
        (folder / path).mkdir()
    flags = {flag: mode == settings.pooling for mode, flag in _POOLING_FLAGS.items()} | dict.fromkeys(
        _UNUSED_FLAGS, False
    )
    pooling = {"word_embedding_dimension": int(tower.config.hidden_size), **flags, "include_prompt": True}
    write_json(folder / "1_Pooling" / "config.json", pooling)
    described = {
        "__version__": {"transformers": transformers.__version__, "pytorch": torch.__version__},
        "prompts": prompts,
        "default_prompt_name": None,
        "similarity_fn_name": settings.similarity,
        **({} if settings.truncate_dim is None else {"truncate_dim": settings.truncate_dim}),
    }
    write_json(folder / "config_sentence_transformers.json", described)


def _save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path, max_tokens: int) -> None:
    """The tokenizer as training used it: cut at `max_tokens`, able to pad, without the settings of its last call."""
    saved = copy.deepcopy(tokenizer)
    saved.model_max_length = max_tokens
    saved.padding_side = "right"  # absolute positions (GPT-2) would be wrong behind padding
    if saved.pad_token is None:
        saved.pad_token = saved.eos_token
    if (backend := getattr(saved, "backend_tokenizer", None)) is not None:
        backend.no_truncation()
        backend.no_padding()
    saved.save_pretrained(folder)
    name_older_tokenizer(saved, folder)


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
    return {
        "similarity": settings.similarity,
        "base_model": without_folders(config.model.name_or_path),
        "config_sha256": digest,
    }


def _as_fp32(tensor: Tensor) -> Tensor:
    tensor = tensor.detach().cpu()
    return (tensor.float() if tensor.is_floating_point() else tensor).contiguous()
