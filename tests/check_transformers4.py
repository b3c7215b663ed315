"""Whether transformers 4 reads our exports as transformers 5 does: `python -m tests.check_transformers4`.

Exports a tiny model of every architecture, with scaled and unusual RoPE and several kinds of tokenizers, and embeds the
same texts with the installed transformers and with 4.57.6, which is installed into a temporary environment that shares
torch. Exit status 1 where one differs.
"""

from __future__ import annotations

import json
import string
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from transformers import BertTokenizer, LlamaTokenizer, PreTrainedTokenizerBase, XLMRobertaTokenizer

from retriever.config import Config, ModelConfig
from retriever.encoder.dual_encoder import DualEncoder
from retriever.encoder.tokenizer import training_tokenizer
from retriever.export import Probe, export
from tests.tiny import ARCHITECTURES, random_texts, save_tiny_model, tiny_tokenizer

VERSION = "4.57.6"
TEXTS = [*random_texts(6, shortest=1, longest=100, seed=3), "The BRAIN, naïve <mask> [SEP]  of  Zürich\tand 水"]
UNKNOWN_THERE = {"nomic_bert"}  # version 4 has it as remote code alone

_LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
_FULL, _SLIDING = {"rope_type": "default", "rope_theta": 80_000.0}, {"rope_type": "default", "rope_theta": 5_000.0}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in sorted(ARCHITECTURES.keys() - UNKNOWN_THERE)},
    "llama, llama3 scaling": ("llama", {"rope_parameters": _LLAMA3 | {"original_max_position_embeddings": 32}}),
    "llama, linear scaling": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}}),
    "qwen2, theta 1e6": ("qwen2", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
    "qwen3, theta 1e6": ("qwen3", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
    "gemma, theta 50": ("gemma", {"rope_parameters": {"rope_type": "default", "rope_theta": 50.0}}),
    "gemma3_text, causal, other thetas": (
        "gemma3_text",
        {
            "rope_parameters": {"full_attention": _FULL, "sliding_attention": _SLIDING},
            "use_bidirectional_attention": False,
        },
    ),
    "modernbert, theta 80,000": (
        "modernbert",
        {"rope_parameters": {"full_attention": _FULL, "sliding_attention": _SLIDING}},
    ),
    "modernbert, every third layer": ("modernbert", {"num_hidden_layers": 7, "global_attn_every_n_layers": 3}),
}

# Runs in both environments: of each folder the token ids of every text and the means of its token vectors.
_READER = """
import json, sys
import torch
from transformers import AutoConfig, AutoModel, AutoModelForTextEncoding, AutoTokenizer
folders, texts, output = json.loads(sys.argv[1]), json.loads(sys.argv[2]), sys.argv[3]
found = []
for folder in folders:
    try:
        kind = AutoModelForTextEncoding if AutoConfig.from_pretrained(folder).model_type == "t5" else AutoModel
        tokenizer, model = AutoTokenizer.from_pretrained(folder), kind.from_pretrained(folder).eval()
        encoded = [tokenizer(text, truncation=True, return_tensors="pt") for text in texts]
        with torch.no_grad():
            means = [model(**inputs).last_hidden_state[0].mean(dim=0).tolist() for inputs in encoded]
        found.append({"ids": [inputs["input_ids"][0].tolist() for inputs in encoded], "means": means})
    except Exception as error:
        found.append({"error": repr(error)})
json.dump(found, open(output, "w"))
"""


def main() -> int:
    """Prints how far the two versions' vectors are from each other, of each export; returns 1 where one is not the
    same, else 0.
    """
    with TemporaryDirectory() as temporary:
        folder, failed = Path(temporary), 0
        older, exports = _environment(folder / "environment"), _exports(folder)
        both = [
            _embed(python, list(exports.values()), folder / "found.json") for python in (Path(sys.executable), older)
        ]
    for name, new, old in zip(exports, *both, strict=True):
        said = _difference(new, old)
        failed += not said.startswith("same")
        print(f"{name}: {said}")
    return int(failed > 0)


def _difference(new: dict[str, Any], old: dict[str, Any]) -> str:
    """What is seen, which begins with "same" where cosines are 1 to five decimals and no entry differs by 1e-5 of the
    largest.
    """
    if "error" in new or "error" in old:
        return f"DIFFERS: {new.get('error', 'read')} here, {old.get('error', 'read')} there"
    ours, theirs = np.array(new["means"]), np.array(old["means"])  # [texts, H]
    cosine = float(((ours * theirs).sum(axis=1) / np.linalg.norm(ours, axis=1) / np.linalg.norm(theirs, axis=1)).min())
    difference = float(np.abs(ours - theirs).max() / max(1.0, np.abs(ours).max()))
    same = new["ids"] == old["ids"] and cosine > 1 - 5e-6 and difference < 1e-5
    tokens = "equal" if new["ids"] == old["ids"] else "other"
    return f"{'same' if same else 'DIFFERS'}: cosine {cosine:.7f}, difference {difference:.1e}, {tokens} tokens"


def _environment(folder: Path) -> Path:
    """The interpreter of an environment with the older transformers, whose other packages are the present ones where it
    has none.
    """
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "--quiet", f"transformers=={VERSION}"], check=True)
    (packages,) = folder.glob("lib/*/site-packages")
    (packages / "zz_present.pth").write_text(
        sysconfig.get_path("purelib") + "\n"
    )  # searched after the environment's own
    found = subprocess.check_output(
        [python, "-c", "import transformers; print(transformers.__version__)"], text=True
    ).strip()
    assert found == VERSION, found
    return python


def _exports(folder: Path) -> dict[str, Path]:
    starts = {
        name: save_tiny_model(folder / f"start {i}", kind, **more)
        for i, (name, (kind, more)) in enumerate(CASES.items())
    }
    vocabulary = tiny_tokenizer().get_vocab()
    tokenizers: dict[str, tuple[str, PreTrainedTokenizerBase]] = {
        "bert, cased": ("bert", BertTokenizer(vocab=vocabulary, do_lower_case=False, model_max_length=256)),
        "xlm-roberta, its own tokenizer": ("xlm-roberta", _unigram()),
        "llama, its own tokenizer and an end appended": ("llama", _characters()),
    }
    for i, (name, (kind, tokenizer)) in enumerate(tokenizers.items()):
        starts[name] = save_tiny_model(
            folder / f"other {i}", kind, vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id
        )
        tokenizer.save_pretrained(starts[name])
    settings = {"query_prompt": "query: ", "query_max_tokens": 60, "passage_max_tokens": 120}
    models = {name: ModelConfig(str(start), **settings) for name, start in starts.items()}  # type: ignore[arg-type]
    return {name: _export(model, Path(f"{model.name_or_path} exported")) for name, model in models.items()}


def _export(model: ModelConfig, folder: Path) -> Path:
    encoder, tokenizer, config = DualEncoder.from_pretrained(model), training_tokenizer(model), Config(model=model)
    return export(encoder, tokenizer, config, folder, Probe.of(encoder, tokenizer, config, TEXTS))


def _unigram() -> PreTrainedTokenizerBase:
    words = sorted({word for text in random_texts(99) for word in text.split()})
    pieces = [
        "<s>",
        "<pad>",
        "</s>",
        "<unk>",
        "▁",
        *(f"▁{word}" for word in words),
        *"abcdefghijklmnopqrstuvwxyzBRAINTZü水<>,[]",
        "<mask>",
    ]
    return XLMRobertaTokenizer(
        vocab=[(piece, -0.1 * i) for i, piece in enumerate(dict.fromkeys(pieces))], model_max_length=256
    )


def _characters() -> PreTrainedTokenizerBase:
    pieces = ["<unk>", "<s>", "</s>", "▁", *string.ascii_letters]
    return LlamaTokenizer(
        vocab={piece: i for i, piece in enumerate(pieces)}, merges=[], add_bos_token=False, pad_token="</s>"
    )


def _embed(python: Path, folders: list[Path], output: Path) -> list[dict[str, Any]]:
    names = json.dumps([str(folder) for folder in folders])
    subprocess.run([python, "-W", "ignore", "-c", _READER, names, json.dumps(TEXTS), output], check=True)
    return json.loads(output.read_text())


if __name__ == "__main__":
    sys.exit(main())
