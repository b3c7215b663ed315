"""Train a tokenizer on your own texts with sentencepiece, as the start of an encoder that is trained from scratch.

    python -m scripts.train_tokenizer --data data/scifact --output models/new --vocab-size 8000
    python -m scripts.train_tokenizer --data data/pairs.jsonl notes.txt --output models/new \\
        --architecture model_type=bert hidden_size=256 num_hidden_layers=4 num_attention_heads=4 intermediate_size=1024

Of a folder the corpus is read (corpus.* or collection.*), of a .txt file each line, of any other file all texts of its
training pairs. OUTPUT is a Hugging Face tokenizer folder: a unigram model, `[CLS] text [SEP]`, ids 0 to 4 for [PAD],
[UNK], [CLS], [SEP] and [MASK]. With --architecture, config.json is written beside it; `model.name_or_path=OUTPUT
model.from_scratch=true` then trains that encoder from random weights. The same texts give the same bytes.
"""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from retriever.command import command, option, whole

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


@command(
    "python -m scripts.train_tokenizer",
    __doc__,
    option("--data", nargs="+", type=Path, required=True, help="folders with a corpus, or files of texts or pairs"),
    option("--output", type=Path, required=True, help="folder to write, a new one"),
    option("--vocab-size", type=whole(len(SPECIAL_TOKENS) + 1, 1 << 24), default=16_000, help="at most"),
    option("--keep-case", action="store_true", help="tell capitals from small letters"),
    option("--max-tokens", type=whole(4, 1 << 20), default=512, help="longest input that the tokenizer names"),
    option(
        "--architecture",
        nargs="+",
        default=[],
        metavar="KEY=VALUE",
        help="settings of a transformers configuration; model_type is one of them",
    ),
)
def main(args: argparse.Namespace) -> None:
    """The command `python -m scripts.train_tokenizer`."""
    from retriever.errors import RefusedError
    from retriever.files import replace_folder, write_json

    if args.output.exists():
        raise RefusedError(f"--output {args.output}: exists already; expected a new folder")
    lower_case = not args.keep_case
    pieces = train_pieces((text for path in args.data for text in read_texts(path)), args.vocab_size, lower_case)
    tokenizer = tokenizer_of(pieces, lower_case, args.max_tokens)
    described = describe(args.architecture, tokenizer) if args.architecture else None
    with replace_folder(args.output) as writing:
        tokenizer.save_pretrained(writing)
        if described is not None:
            write_json(writing / "config.json", described)
    print(f"{args.output}: {len(tokenizer):,} tokens" + ("" if described is None else f", a {described['model_type']}"))


def read_texts(path: Path) -> Iterator[str]:
    """The texts of a corpus folder, of a file of lines, or of training pairs. Raises DataError."""
    from retriever.config import SourceConfig
    from retriever.data.formats import final_text, open_source, read_corpus

    if path.is_dir():
        yield from (final_text(passage, "join", " ") for passage in read_corpus(path))
        return
    lines = path.name.removesuffix(".gz").removesuffix(".zst").endswith(".txt")
    for example in open_source(SourceConfig(path=str(path), format="texts" if lines else "auto")).examples():
        yield example.query
        yield from (
            final_text(p, "join", " ") for p in (*example.positives, *example.negatives) if not lines and p.text
        )


def train_pieces(texts: Iterable[str], vocab_size: int, lower_case: bool) -> bytes:
    """A sentencepiece unigram model of at most `vocab_size` pieces. Raises RefusedError where it finds none."""
    import sentencepiece

    from retriever.errors import RefusedError

    normalizer, written = _normalizer(lower_case), io.BytesIO()
    special: dict[str, Any] = {"control_symbols": list(SPECIAL_TOKENS[4:])}
    for i, kind in enumerate(("pad", "unk", "bos", "eos")):
        special |= {f"{kind}_id": i, f"{kind}_piece": SPECIAL_TOKENS[i]}
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=(normalized for text in texts if (normalized := normalizer.normalize_str(text))),
            model_writer=written,
            vocab_size=vocab_size,
            hard_vocab_limit=False,  # fewer where the texts have no more
            normalization_rule_name="identity",  # they are normalised, as the tokenizer will do it
            max_sentence_length=1 << 30,  # longer ones are left out
            num_threads=1,  # sums in one order
            minloglevel=2,
            **special,
        )
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise RefusedError(
            f"sentencepiece finds no vocabulary in these texts (--data, --vocab-size): {reason}"
        ) from error
    return written.getvalue()


def tokenizer_of(pieces: bytes, lower_case: bool, max_tokens: int) -> PreTrainedTokenizerFast:
    """The tokenizer of transformers that splits a text as the sentencepiece model does."""
    import sentencepiece
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    model = sentencepiece.SentencePieceProcessor(model_proto=pieces)
    vocabulary = [(model.id_to_piece(i), model.get_score(i)) for i in range(model.get_piece_size())]
    backend = Tokenizer(models.Unigram(vocabulary, unk_id=model.unk_id()))
    backend.normalizer = _normalizer(lower_case)
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(token, SPECIAL_TOKENS.index(token)) for token in ("[CLS]", "[SEP]")],
    )
    names = {f"{token[1:-1].lower()}_token": token for token in SPECIAL_TOKENS}
    return PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=max_tokens, eos_token="[SEP]", **names)


def describe(architecture: Sequence[str], tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    """The config.json of an encoder for `tokenizer`. Raises ConfigError for an architecture that is not verified, and
    where no model can be built or it has fewer embeddings than tokens.
    """
    import torch
    from omegaconf import OmegaConf
    from transformers import AutoConfig

    from retriever.config import ConfigError
    from retriever.encoder.architectures import check_architecture
    from retriever.encoder.model_files import one_line
    from retriever.encoder.towers import build_tower

    settings: Any = OmegaConf.to_container(OmegaConf.from_dotlist(list(architecture)))
    if "model_type" not in settings:
        raise ConfigError(f"--architecture: expected model_type=... among the settings; received {', '.join(settings)}")
    tokens = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "cls", "sep", "eos")}
    tokens |= {"vocab_size": len(tokenizer), "bos_token_id": tokenizer.cls_token_id}
    with one_line("--architecture: no configuration of a model that transformers knows"):
        config = AutoConfig.for_model(**tokens | settings)
    check_architecture(config, "of --architecture")
    unknown = [key for key in settings if key != "model_type" and key not in type(config)().to_dict()]
    if unknown:
        raise ConfigError(f"--architecture: a {config.model_type} model has no setting {unknown[0]!r}")
    if config.vocab_size < len(tokenizer):
        raise ConfigError(
            f"--architecture: vocab_size: expected at least {len(tokenizer)}, the tokenizer's tokens; "
            f"received {config.vocab_size}"
        )
    described = config.to_dict()
    with torch.device("meta"):
        build_tower(config, "--architecture")
    return described


def _normalizer(lower_case: bool) -> Any:
    """Unicode's compatibility form, small letters where asked for, and single spaces."""
    from tokenizers import Regex, normalizers

    case = [normalizers.Lowercase()] if lower_case else []
    spaces = [normalizers.Replace(Regex(r"\s+"), " "), normalizers.Strip()]
    return normalizers.Sequence([normalizers.NFKC(), *case, *spaces])


if __name__ == "__main__":
    sys.exit(main())
