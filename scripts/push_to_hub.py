"""Upload an exported model to the Hugging Face Hub.

    python -m scripts.push_to_hub --model runs/demo/export --repo organisation/name --private
    python -m scripts.push_to_hub --model runs/demo/best --repo organisation/name --license apache-2.0

The token is that of `hf auth login` or $HF_TOKEN, the hub that of $HF_ENDPOINT. The repository is made where there is
none. All files of the folder go into one commit; `--license` adds the licence to the model card that is uploaded.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import cast

from retriever.command import command, option
from retriever.errors import RefusedError

_CARD = "README.md"


@command(
    "python -m scripts.push_to_hub",
    __doc__,
    option("--model", required=True, type=Path, help="folder of an exported model"),
    option("--repo", required=True, help="organisation/name on the hub"),
    option("--private", action="store_true", help="make the repository, if there is none, a private one"),
    option("--license", help="identifier of the licence on the model card, as apache-2.0"),
    option("--message", default="Upload a dense retriever", help="of the commit (default: %(default)s)"),
    resumes="the same command uploads what is not there yet",
)
def main(args: argparse.Namespace) -> None:
    """The command `python -m scripts.push_to_hub`."""
    if not (args.model / "modules.json").is_file() or not (args.model / _CARD).is_file():
        raise RefusedError(f"--model {args.model}: expected an exported model with modules.json and {_CARD}")
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    unreachable = cast(
        type[Exception], HfHubHTTPError.__bases__[0]
    )  # HTTPError of the client that the hub's library has
    files = sorted(path for path in args.model.rglob("*") if path.is_file())
    content: dict[Path, Path | bytes] = {path: path for path in files}
    if args.license is not None:
        content[args.model / _CARD] = licensed((args.model / _CARD).read_text(encoding="utf-8"), args.license).encode()
    added = [CommitOperationAdd(path.relative_to(args.model).as_posix(), source) for path, source in content.items()]
    api = HfApi(library_name="bigbatch")
    try:
        api.create_repo(args.repo, private=args.private, exist_ok=True)
        done = api.create_commit(args.repo, added, commit_message=args.message)
    except (HfHubHTTPError, HFValidationError, unreachable) as error:
        raise RefusedError(f"--repo {args.repo}: {' '.join(str(error).split())}") from error
    print(f"{done.commit_url}: {len(added)} files")


def licensed(card: str, name: str) -> str:
    """The card with a licence in its metadata. Raises RefusedError where it names another one."""
    opening, header, body = card.split("---\n", maxsplit=2) if card.startswith("---\n") else ("", "", card)
    named = [line for line in header.splitlines() if line.startswith("license:")]
    if named and named != [f"license: {name}"]:
        raise RefusedError(
            f"--license {name}: the model card has {named[0]!r}; change it there, or leave --license out"
        )
    return card if named else f"---\nlicense: {name}\n{header}---\n{body}"


if __name__ == "__main__":
    sys.exit(main())
