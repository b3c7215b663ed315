"""Write an exported model as ONNX too, compared with torch's embeddings in onnxruntime.

    python -m scripts.export_onnx --model runs/demo/export                    # runs/demo/export/onnx/model.onnx
    python -m scripts.export_onnx --model intfloat/e5-small-v2 --output e5    # e5/onnx/model.onnx

Inputs are input_ids and attention_mask of the folder's tokenizer, outputs last_hidden_state and sentence_embedding,
the finished embedding. Of two towers, query/ and passage/ get a file each. Needs the extra `onnx`.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from retriever.command import command, option
from retriever.environment import check_extra
from retriever.errors import RefusedError


@command(
    "python -m scripts.export_onnx",
    __doc__,
    option("--model", required=True, help="model folder or Hugging Face name"),
    option("--output", type=Path, help="folder to write onnx/ into (default: the model folder)"),
    option("--overwrite", action="store_true", help="replace an onnx/ that is there"),
)
def main(args: argparse.Namespace) -> None:
    """The command `python -m scripts.export_onnx`."""
    check_extra("onnx", "onnx", "onnxruntime", "onnxscript")
    from retriever.encoder.bundle import load_encoder
    from retriever.onnx_export import FOLDER, export_onnx

    if args.output is None and not Path(args.model).is_dir():
        raise RefusedError(f"--model {args.model} is no folder; expected --output, the folder to write onnx/ into")
    output = args.output or Path(args.model)
    there = [path for path in (output, output / "query", output / "passage") if (path / FOLDER).exists()]
    if there and not args.overwrite:
        raise RefusedError(f"{there[0] / FOLDER} exists; choose another folder (--output), or replace it (--overwrite)")
    for file, difference in export_onnx(load_encoder(args.model, device="cpu"), output).items():
        print(f"{file}: embeddings equal torch's to {difference:.1e}")


if __name__ == "__main__":
    sys.exit(main())
