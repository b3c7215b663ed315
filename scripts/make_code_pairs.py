"""Builds BEIR folders of docstring-to-code pairs from the Python sources installed here; nothing is downloaded.

    python -m scripts.make_code_pairs --output data/code
    python -m scripts.make_code_pairs --output data/code-large --packages auto --test-queries 2000

OUTPUT/          first paragraph of a docstring -> source of the function without it: train, dev and test by module
OUTPUT/details/  first paragraph -> rest of the docstring: train, from the training modules alone

Whole modules are held out, with their twins and copies. The function's name is taken out of its source (`--names keep`
leaves it), since a query often says little more than the name. The same sources and settings give the same bytes.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import tokenize
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

from tqdm import tqdm

from retriever.command import at_least_one, command_parser, option, run, seed
from retriever.errors import RefusedError
from retriever.files import write_json
from scripts.code_pairs.functions import documented_functions, without_name
from scripts.code_pairs.pairs import Collection, code_collection, details_collection
from scripts.code_pairs.sources import STDLIB, WELL_KNOWN, installed, python_files, version
from scripts.code_pairs.split import Member, split_by_family

FORMAT = 2  # raised where the same sources would give other pairs


@dataclass(frozen=True)
class Settings:
    """What the pairs depend on, besides the sources."""

    packages: tuple[str, ...] = (STDLIB,)
    seed: int = 0
    names: Literal["hide", "keep"] = "hide"
    test_queries: int = 700
    dev_queries: int = 150
    max_test_per_module: int = 20
    max_held_out_module: int = 60


def main(arguments: Sequence[str] | None = None) -> int:
    """The command `python -m scripts.make_code_pairs`."""
    default = Settings()
    parser = command_parser(
        "python -m scripts.make_code_pairs",
        __doc__,
        option("--output", type=Path, required=True, help="folder to write"),
        option(
            "--packages",
            nargs="+",
            default=[STDLIB],
            metavar="NAME",
            help=f"import names; {STDLIB} is the standard library, auto it and the well-known packages found (default {STDLIB})",
        ),
        option("--seed", type=seed, default=default.seed, help="draws the modules held out"),
        option("--names", choices=("hide", "keep"), default=default.names, help="a function's own name in its source"),
        option(
            "--test-queries", type=at_least_one, default=default.test_queries, help="hold out modules for about so many"
        ),
        option("--dev-queries", type=at_least_one, default=default.dev_queries, help="likewise"),
        option("--max-test-per-module", type=at_least_one, default=default.max_test_per_module, help="functions"),
        option(
            "--max-held-out-module",
            type=at_least_one,
            default=default.max_held_out_module,
            help="larger ones train (default %(default)s functions)",
        ),
    )
    return run(parser, arguments, _build)


def _build(args: argparse.Namespace) -> None:
    packages = installed(WELL_KNOWN) if args.packages == ["auto"] else args.packages
    settings = Settings(
        packages=tuple(packages), **{field.name: getattr(args, field.name) for field in fields(Settings)[1:]}
    )
    print(f"{args.output}: {summary(build(args.output, settings)[1])}")


def _refuse_foreign(output: Path, files: Iterable[str]) -> None:
    """Raises RefusedError with the first of the files that this command would replace and did not write."""
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


def build(output: Path, settings: Settings) -> tuple[Collection, dict[str, Any]]:
    """Reads the sources, writes both folders (the manifest last) and returns the pairs on code with the manifest.

    Raises RefusedError for a package that isn't installed, and where no query could be held out.
    """
    members, unreadable = read_members(settings)
    split = split_by_family(
        members,
        settings.seed,
        settings.test_queries,
        settings.dev_queries,
        settings.max_test_per_module,
        settings.max_held_out_module,
    )
    code = code_collection(split, settings.seed, settings.max_test_per_module)
    details = details_collection(split)
    for name, pairs in code.qrels.items():
        if not pairs:
            raise RefusedError(
                f"--packages {' '.join(settings.packages)}: no {name} pair among {len(members)} functions; name more packages"
            )
    files = {**code.files(), **{f"details/{name}": text for name, text in details.files().items()}}
    _refuse_foreign(output, files)
    write_json(output / "manifest.json", {"format": FORMAT})  # not finished
    code.write(output)
    details.write(output / "details")
    manifest = {
        "format": FORMAT,
        "settings": asdict(settings),
        "versions": {name: version(name) for name in dict.fromkeys([STDLIB, *settings.packages])},
        "functions": dict(Counter(member.function.id.partition(":")[0].partition(".")[0] for member in members)),
        "counts": _counts(code, details),
        "unreadable_modules": unreadable,
        "content_sha256": hashlib.sha256(
            "".join(f"{name}\0{len(text)}\0{text}" for name, text in files.items()).encode()
        ).hexdigest(),
    }
    write_json(output / "manifest.json", manifest)
    return code, manifest


def read_members(settings: Settings) -> tuple[list[Member], list[str]]:
    """Every documented function of the packages, by module and line; and the modules that this Python cannot parse."""
    members, unreadable = [], []
    for package in settings.packages:
        for file in tqdm(list(python_files(package)), f"reading {package}", unit=" files", delay=2, leave=False):
            try:
                with tokenize.open(file.path) as source:
                    functions = list(documented_functions(source.read(), file.module))
            except (SyntaxError, ValueError):  # ValueError: null bytes, or not the encoding it declares
                unreadable.append(file.module)
                continue
            members += [Member(file.unit, without_name(f) if settings.names == "hide" else f) for f in functions]
    return members, unreadable


def summary(manifest: dict[str, Any]) -> str:
    """One line for a person: how many of what, from where."""
    counts = manifest["counts"]
    sources = ", ".join(f"{name} {manifest['versions'][name]}" for name in manifest["settings"]["packages"])
    return (
        f"{counts['passages']:,} functions, {counts['train_queries']:,} training queries (+ {counts['details_queries']:,} on details), "
        f"{counts['test_queries']:,} test queries from {counts['test_modules']:,} held-out modules; from {sources}"
    )


def _counts(code: Collection, details: Collection) -> dict[str, int]:
    counts = {"passages": len(code.corpus)}
    for name, pairs in code.qrels.items():
        queries = {query for query, _ in pairs}
        modules = {code.queries[query][1] for query in queries}
        counts |= {f"{name}_queries": len(queries), f"{name}_pairs": len(pairs), f"{name}_modules": len(modules)}
    return counts | {"details_queries": len(details.queries), "details_pairs": len(details.qrels["train"])}


if __name__ == "__main__":
    sys.exit(main())
