"""The arrows between rooms, read from the source: imports never point back up, and nothing in the house shadows what it
stands on.
"""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("kernels", "retriever", "eval", "bigbatch", "scripts")

# Rooms of retriever/ by floor, from the ground up. A room may import from its own floor and from those below it.
FLOORS = (
    (
        "own_kernels",
        "rng",
        "config",
        "config_tree",
        "config_rules",
        "config_sources",
        "config_file",
        "config_help",
        "environment",
        "errors",
        "files",
        "wording",
        "screen",
    ),
    ("checksums", "lock", "quantized", "run_folder"),
    ("data", "encoder", "parallel"),
    ("loss",),
    ("gradcache", "representations", "retention", "adafactor", "optim", "optimizers"),
    ("step",),
    ("plan",),
    (
        "callbacks",
        "charts",
        "checkpoint",
        "damage",
        "data_warnings",
        "telemetry",
        "signals",
        "verify",
        "shard_files",
        "shards",
        "encode_shards",
        "text_vectors",
        "export",
        "history",
        "published",
        "model_card",
        "named",
        "model_folder",
        "onnx_export",
        "older_readers",
        "outputs",
        "preflight",
        "launch",
        "trackers",
        "report",
        "report_examples",
        "resume",
        "summary",
    ),
    ("command", "assembly", "evaluation", "inputs"),
    ("run", "train", "encode"),
)
RENAMES = {"replace", "rename", "renames", "move"}
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}


def _sources(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def _imports(path: Path) -> Iterator[tuple[int, str]]:
    """Line and dotted name of everything that a file imports, wherever in the file it does so."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.lineno, "." * node.level + (node.module or "")
            if (node.module or "").partition(".")[0] in PACKAGES:  # from retriever import step
                yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def _room(path: Path) -> str:
    return path.relative_to(ROOT / "retriever").parts[0].removesuffix(".py")


def _arrows() -> Iterator[tuple[Path, int, str]]:
    for package in PACKAGES:
        for path in _sources(package):
            yield from ((path, line, name) for line, name in _imports(path))


def test_the_walk_sees_the_house() -> None:
    """Guard: arrows that are known to exist are found, so that an empty result means something."""
    found = {(path.relative_to(ROOT).as_posix(), name) for path, _, name in _arrows()}
    assert ("retriever/step.py", "retriever.gradcache") in found
    assert ("retriever/loss/tiled.py", "kernels.infonce.api") in found


def test_packages_import_downwards_only() -> None:
    """kernels <- retriever <- eval <- scripts, bigbatch, and absolutely; only retriever/evaluation.py, for evaluations
    while a run trains, may import eval.
    """
    wrong = []
    for path, line, name in _arrows():
        package, target = path.relative_to(ROOT).parts[0], name.partition(".")[0]
        wiring = path == ROOT / "retriever" / "evaluation.py" and target == "eval"
        up = target in PACKAGES and PACKAGES.index(target) > PACKAGES.index(package) and not wiring
        if up or name.startswith(".") or target == "tests":
            wrong.append(f"{path.relative_to(ROOT)}:{line} imports {name}")
    assert not wrong, "\n".join(wrong)


def test_kernels_stand_on_torch_and_triton_alone() -> None:
    """What a kernel imports is the standard library, torch, triton and its own package."""
    allowed = sys.stdlib_module_names | {"torch", "triton", "kernels"}
    wrong = [
        f"{path.name}:{line} imports {name}"
        for path in _sources("kernels")
        for line, name in _imports(path)
        if name.partition(".")[0] not in allowed
    ]
    assert not wrong, "\n".join(wrong)


def test_rooms_of_retriever_import_downwards_only() -> None:
    """rng, config <- data, encoder, parallel <- loss <- gradcache <- step <- what serves a run <- commands."""
    wrong = []
    for path in _sources("retriever"):
        if path == ROOT / "retriever" / "__init__.py":
            continue
        assert _room(path) in FLOOR, f"retriever/{_room(path)} stands on no floor: give it one in {Path(__file__).name}"
        for line, name in _imports(path):
            if name.startswith("retriever.") and FLOOR[name.split(".")[1]] > FLOOR[_room(path)]:
                wrong.append(f"{path.relative_to(ROOT)}:{line} imports {name}")
    assert not wrong, "\n".join(wrong)


def test_modules_import_in_no_circle() -> None:
    """No module reaches itself by any import: those inside functions and those for type checkers count."""
    modules = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts): path
        for package in PACKAGES
        for path in _sources(package)
    }
    graph = {
        module: {name for _, name in _imports(path)} & modules.keys() - {module} for module, path in modules.items()
    }
    finished: set[str] = set()

    def visit(module: str, above: tuple[str, ...]) -> None:
        assert module not in above, " -> ".join((*above[above.index(module) :], module))
        if module not in finished:
            for target in sorted(graph[module]):
                visit(target, (*above, module))
            finished.add(module)

    for module in graph:
        visit(module, ())


def test_files_get_their_names_in_one_place() -> None:
    """retriever/files.py renames, for it syncs before and after. (`replace` of one argument is Path's; of more, a
    string's.)
    """
    wrong, seen = [], 0
    for package in PACKAGES:
        for path in _sources(package):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if (
                    isinstance(node, ast.Call)
                    and isinstance(node.func, ast.Attribute)
                    and _renames(node.func, len(node.args))
                ):
                    seen += 1
                    if path != ROOT / "retriever" / "files.py":
                        wrong.append(f"{path.relative_to(ROOT)}:{node.lineno}: {ast.unparse(node)}")
                if (
                    isinstance(node, ast.ImportFrom)
                    and node.module in ("os", "shutil")
                    and {a.name for a in node.names} & RENAMES
                ):
                    wrong.append(f"{path.relative_to(ROOT)}:{node.lineno}: {ast.unparse(node)}")
    assert seen, "the walk finds no call"
    assert not wrong, "\n".join(wrong)


def _renames(function: ast.Attribute, arguments: int) -> bool:
    module = function.value.id if isinstance(function.value, ast.Name) else ""
    if function.attr == "replace":
        return module == "os" or (arguments == 1 and module != "dataclasses")
    return function.attr in RENAMES


def _requirements(name: str, seen: set[str]) -> set[str]:
    """The distribution and all it requires without extras, as far as they are installed here."""
    if name in seen:
        return seen
    try:
        required = metadata.requires(name) or []
    except metadata.PackageNotFoundError:
        return seen
    seen.add(name)
    for line in required:
        if "extra ==" not in line:
            _requirements(_distribution(line), seen)
    return seen


def _distribution(requirement: str) -> str:
    return re.split(r"[^A-Za-z0-9._-]", requirement, maxsplit=1)[0].lower().replace("_", "-")


@pytest.fixture(scope="module")
def foreign_modules() -> set[str]:
    """Top-level modules of everything that the project's dependencies, extras included, bring along."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = project["dependencies"] + [line for extra in project["optional-dependencies"].values() for line in extra]
    distributions: set[str] = set()
    for line in lines:
        _requirements(_distribution(line), distributions)
    distributions.discard(project["name"])
    return {
        module
        for module, owners in metadata.packages_distributions().items()
        if distributions & {_distribution(o) for o in owners}
    }


def test_nothing_in_retriever_shadows_a_dependency(foreign_modules: set[str]) -> None:
    """`python retriever/train.py` puts retriever/ first on sys.path: `import datasets` must not find a room of ours."""
    assert {"torch", "transformers", "tokenizers", "datasets", "numpy"} <= foreign_modules
    ours = {path.name.removesuffix(".py") for path in (ROOT / "retriever").iterdir() if not path.name.startswith("_")}
    assert not ours & (foreign_modules | sys.stdlib_module_names)


def test_kernels_init_imports_the_standard_library_alone() -> None:
    """Another distribution's `import kernels` finds it too, before anybody asked for torch."""
    imported = [name for _, name in _imports(ROOT / "kernels" / "__init__.py")]
    assert imported and {name.partition(".")[0] for name in imported} <= sys.stdlib_module_names
