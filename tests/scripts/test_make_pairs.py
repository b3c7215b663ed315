"""The pair builder: what a pair is made of, what stays on one side, and that the same sources give the same bytes."""

from __future__ import annotations

import hashlib
import json
import os
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from retriever.errors import RefusedError
from scripts.code_pairs.near_duplicates import near_duplicates, words
from scripts.code_pairs.sources import (
    STDLIB,
    Function,
    documented_functions,
    every_package,
    python_files,
    without_name,
)
from scripts.code_pairs.split import Settings, split_by_family
from scripts.make_pairs import build, main
from tests.commands import assert_refused

SOURCE = '''
import typing

class Shelf:
    @property
    def width(self):
        """Width of the shelf in metres.

        Measured between the inner sides of the two vertical boards.
        """

        # the boards are equally thick
        return self.outer - 2 * self.board

    @width.setter
    def width(self, value):
        """Sets the width of the shelf."""
        self.outer = value + 2 * self.board

    def books(self): "Docstring on the line of the definition."; return []
    def undocumented(self):
        return 1
    def short(self):
        """Too short."""
        return 1
    def abstract(self):
        """Says what a subclass does."""
        raise NotImplementedError

@typing.overload
def load(path: str) -> int:
    """Load a shelf from disk."""
    return 1

if True:
    async def load(path):
        """load(path) -> Shelf
        Load a shelf from disk."""
        def inner():
            """A function inside of another."""
            return load
        return await inner()
'''


def test_functions_are_taken_apart_into_summary_details_and_code() -> None:
    width, setter, load = documented_functions(SOURCE, "furniture")
    assert (width.id, setter.id, load.id) == ("furniture:Shelf.width", "furniture:Shelf.width~2", "furniture:load")
    assert width.summary == "Width of the shelf in metres."
    assert width.details == "Measured between the inner sides of the two vertical boards."
    assert (
        width.code
        == "@property\ndef width(self):\n    # the boards are equally thick\n    return self.outer - 2 * self.board"
    )
    assert load.summary == "Load a shelf from disk."  # the signature line is no description
    assert load.code.startswith("async def load(path):\n    def inner():") and '"""A function inside' in load.code


@pytest.mark.parametrize(
    "body",
    [
        "x = 1  # Load a shelf\n    # from disk",
        "print('load a  shelf from disk.')\n    x = 1",
        '"""Load a shelf\n    from disk"""\n    x = 1',
    ],
)
def test_a_function_that_repeats_its_docstring_is_no_pair(body: str) -> None:
    """The passage would hold the query; words that only begin like it are no repetition."""
    source = '\ndef load(path):\n    """Load a shelf from disk."""\n    {}\n    return x\n'
    assert not list(documented_functions(source.format(body), "furniture"))
    assert list(documented_functions(source.format(body.replace("disk", "diskette")), "furniture"))


def test_what_no_file_can_hold_is_left_out(furniture: Path) -> None:
    """A lone surrogate of a docstring, and a module nested too deeply for Python's parser to walk."""
    odd = _function("odd", "Weighs two \\ud800 boards.", "return a + b")
    deep = _function("deep", "Weighs three boards.", f"return {'-' * 5000}a")
    _package(furniture / "site", "furniture", {"odd": odd, "deep": deep})
    _, manifest = build(furniture / "out", _small())
    corpus, queries, _ = _read(furniture / "out")
    assert "furniture.odd:odd" in corpus and "Weighs two boards." in {query["text"] for query in queries.values()}
    assert "furniture.deep" in manifest["unreadable_modules"]


def test_a_name_in_other_characters_is_hidden() -> None:
    """Python takes a ligature for its letters: the two spellings are one name."""
    source = '\ndef \ufb01nd(shelf):\n    """Look for a board in a shelf."""\n    return \ufb01nd(find) or \ufb01nder\n'
    (function,) = documented_functions(source, "furniture")
    assert without_name(function).code == "def _(shelf):\n    return _(_) or \ufb01nder"


def test_a_hidden_name_occurs_nowhere_in_the_code() -> None:
    _, setter, load = documented_functions(SOURCE, "furniture")
    assert without_name(setter).code.splitlines()[:2] == ["@_.setter", "def _(self, value):"]
    assert without_name(load).code.endswith("return _\n    return await inner()")


def _package(folder: Path, name: str, modules: dict[str, str]) -> None:
    for module, source in modules.items():
        path = folder / name / f"{module}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source, encoding="utf-8")


def _function(name: str, summary: str, *body: str) -> str:
    return f'def {name}(a, b):\n    """{summary}"""\n' + "".join(f"    {line}\n" for line in body)


def _modules(count: int) -> dict[str, str]:
    """Modules of five functions that nothing ties together."""
    return {
        f"module{m}": "".join(
            _function(f"f{m}_{i}", f"Adds number {m} to value {i}.", f"return a + {m} * b + {i}") for i in range(5)
        )
        for m in range(count)
    }


@pytest.fixture
def furniture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An importable package `furniture` of twelve unrelated modules, and `_vendor`, `tests` and a broken file to be
    passed over.
    """
    modules = _modules(12)
    modules["tests/test_module"] = modules["_vendor/copy"] = modules["module0"]
    modules["template"] = "def {{ name }}: pass"
    _package(tmp_path / "site", "furniture", modules | {"__init__": ""})
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    return tmp_path


def _small(**changes: object) -> Settings:
    return Settings(**{"packages": ("furniture",), "test_queries": 10, "dev_queries": 5, **changes})  # type: ignore[arg-type]


def _read(folder: Path) -> tuple[dict[str, str], dict[str, dict], dict[str, list[tuple[str, str]]]]:
    corpus, queries = (
        {record["_id"]: record for record in map(json.loads, (folder / f"{name}.jsonl").read_text().splitlines())}
        for name in ("corpus", "queries")
    )
    qrels = {}
    for path in (folder / "qrels").iterdir():
        header, *lines = path.read_text().splitlines()
        assert header == "query-id\tcorpus-id\tscore"
        qrels[path.stem] = [
            (query, passage) for query, passage, score in (line.split("\t") for line in lines) if score == "1"
        ]
    return {passage: record["text"] for passage, record in corpus.items()}, queries, qrels


def test_the_folder_is_complete_and_whole_modules_are_held_out(furniture: Path) -> None:
    _, manifest = build(furniture / "out", _small())
    corpus, queries, qrels = _read(furniture / "out")
    assert manifest["unreadable_modules"] == ["furniture.template"]
    assert len(corpus) == 60 and len(queries) == 60  # every function is a passage; vendored and test files are none
    assert {split: len(pairs) for split, pairs in qrels.items()} == {"train": 45, "dev": 5, "test": 10}
    modules = {split: {queries[query]["metadata"]["module"] for query, _ in pairs} for split, pairs in qrels.items()}
    assert (
        not modules["train"] & modules["test"]
        and not modules["train"] & modules["dev"]
        and not modules["dev"] & modules["test"]
    )
    for query, passage in qrels["test"]:
        assert query == f"{passage}#summary" and passage.rpartition(":")[2] not in corpus[passage]


def test_bytes_depend_on_nothing_but_sources_and_settings(furniture: Path) -> None:
    build(furniture / "out", _small())
    files = sorted(path.relative_to(furniture / "out") for path in (furniture / "out").rglob("*") if path.is_file())
    for hash_seed in ("1", "2"):
        command = [
            sys.executable,
            "-m",
            "scripts.make_pairs",
            "--output",
            str(furniture / hash_seed),
            "--packages",
            "furniture",
        ]
        command += ["--test-queries", "10", "--dev-queries", "5"]
        path = os.pathsep.join([str(furniture / "site"), str(Path(__file__).parents[2])])
        subprocess.run(
            command,
            check=True,
            env={**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": path},
            stdout=subprocess.DEVNULL,
        )
        assert all(
            (furniture / hash_seed / file).read_bytes() == (furniture / "out" / file).read_bytes() for file in files
        )
    _, other = build(furniture / "other", _small(seed=1))
    assert other["content_sha256"] != json.loads((furniture / "out" / "manifest.json").read_text())["content_sha256"]


def _functions(modules: dict[str, str]) -> list[Function]:
    return [function for unit, source in modules.items() for function in documented_functions(source, unit)]


COPY = _function("copied", "Weighs both boards.", "a = b", "b = a", "return a, b")
LONG = "Tells whether two boards are of equal length."


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("_pydecimal", "decimal"),
        ("_collections_abc", "collections"),
        ("one", "two"),  # tied by COPY
        ("three", "four"),  # tied by LONG
    ],
)
def test_twins_and_copies_stay_on_one_side(first: str, second: str) -> None:
    modules = _modules(20)
    modules[first], modules[second] = modules.pop("module0"), modules.pop("module1")
    if first == "one":
        modules["one"], modules["two"] = modules["one"] + COPY, modules["two"] + COPY
    if first == "three":
        modules["three"] += _function("equal", LONG, "return a == b")
        modules["four"] += _function("same", LONG, "return not a != b")
    for seed in range(8):
        functions = _functions(modules)
        split = split_by_family(functions, Settings(seed=seed, test_queries=40, dev_queries=15))
        sides = [{function.unit for function in side} for side in (split.train, split.dev, split.test)]
        families = [{split.family[f.id] for f in functions if f.unit == unit} for unit in (first, second)]
        assert families[0] == families[1] and len(families[0]) == 1
        assert [first in side for side in sides] == [second in side for side in sides]
        assert sum(map(len, sides)) == 20 and all(sides)


def _jaccard(one: str, other: str) -> float:
    triples = [{tuple(words(text)[i : i + 3]) for i in range(len(words(text)) - 2)} for text in (one, other)]
    return len(triples[0] & triples[1]) / len(triples[0] | triples[1])


def test_near_duplicates_are_found_by_their_word_triples() -> None:
    """Of texts with more and more words replaced, those of a similarity well above and well below the threshold."""
    draw = random.Random(0)
    texts, expected = list[str](), set[tuple[int, int]]()
    for changed in (1, 2, 3, 20, 30):
        for _ in range(10):
            text = [f"word{draw.randrange(10**6)}" for _ in range(60)]
            other = [f"new{draw.randrange(10**6)}" if i < changed else word for i, word in enumerate(text)]
            texts += [" ".join(text).upper(), " ".join(other)]
            if changed <= 3:
                expected.add((len(texts) - 2, len(texts) - 1))
            assert (_jaccard(*texts[-2:]) > 0.85) == (changed <= 3) and not 0.6 < _jaccard(*texts[-2:]) < 0.8
    assert set(near_duplicates(texts)) == expected and not list(near_duplicates([]))


def test_packages_with_a_near_duplicate_stay_on_one_side() -> None:
    """A long copied function ties two packages, a short one does not; stdlib is one package."""
    steps = [f"total{i} = first{i} + second{i}" for i in range(30)]
    copy = _function("copied", "Weighs two boards.", *steps, "return total0")
    near = copy.replace("second7", "third7")
    short = _function("close", "Close the file.", "return a.close()")
    modules = {f"package{p}.{module}": source for p in range(12) for module, source in _modules(2).items()}
    distinct = {}
    for name, source in modules.items():
        own = name.replace(".", "_")
        distinct[name] = source.replace("Adds number", f"Adds {own}").replace("return a", f"return {own} + a") + short
    distinct["package0.module0"] += copy
    distinct["package1.module1"] += near
    functions = _functions(distinct)
    for seed in range(4):
        settings = Settings(seed=seed, hold_out="packages", test_queries=40, dev_queries=20)
        split = split_by_family(functions, settings)
        sides = [{function.package for function in side} for side in (split.train, split.dev, split.test)]
        assert sum(map(len, sides)) == 12 and all(sides)
        assert [("package0" in side, "package1" in side) for side in sides].count((True, True)) == 1
        assert len(set(split.family.values())) == 11


def test_a_smaller_corpus_holds_every_judged_passage(furniture: Path) -> None:
    _, manifest = build(furniture / "out", _small(searched=20))
    corpus, _, qrels = _read(furniture / "out" / "search")
    whole, _, judged = _read(furniture / "out")
    assert len(corpus) == 20 and corpus.items() <= whole.items() and set(qrels) == {"dev", "test"}
    assert all(qrels[name] == judged[name] and {p for _, p in qrels[name]} <= corpus.keys() for name in qrels)
    assert manifest["counts"]["test_files"] == 2


def test_other_sources_are_a_file_of_pairs_each(furniture: Path) -> None:
    licence = "  1 This software and database is being provided to you\n"
    lines = {
        "noun": '00003553 03 n 02 whole 0 dining_room 1 000 | a room for meals; "we ate there"; "a whole room"  \n',
        "verb": "00001740 29 v 01 breathe 0 000 01 + 02 00 | draw air into the lungs  \n",
        "adj": "00001740 00 a 01 afraid(p) 0 000 | filled with fear  \n",
        "adv": "",
    }
    for part, line in lines.items():
        (furniture / f"data.{part}").write_text(licence + line)
    leads = {"1": {"title": "Oak (tree)", "extract": "An oak is a tree. Oaks and OAK wood."}}
    (furniture / "leads.json").write_text(json.dumps(leads))
    (furniture / "packages").write_text(
        "Package: shelf\nDescription-md5: 12\nDescription-en: keeps books\n Keeps books\n .\n on boards.\nTag: x\n\n"
        "Package: board\nDescription: no long one\n"
    )
    paths = {"wordnet": furniture, "wikipedia": furniture / "leads.json", "debian": furniture / "packages"}
    _, manifest = build(furniture / "out", _small(), paths)
    found = {
        kind: [
            tuple(json.loads(line).values()) for line in (furniture / "out" / f"{kind}.jsonl").read_text().splitlines()
        ]
        for kind in paths
    }
    assert found["wordnet"] == [
        ("whole", "a room for meals"),
        ("dining room", "a room for meals"),
        ("breathe", "draw air into the lungs"),
        ("afraid", "filled with fear"),
    ]
    assert found["wikipedia"] == [("Oak", "An _ is a tree. Oaks and _ wood.")]
    assert found["debian"] == [("keeps books", "Keeps books  on boards.")]
    assert {kind: manifest["counts"][f"{kind}_pairs"] for kind in paths} == {"wordnet": 4, "wikipedia": 1, "debian": 1}
    assert (
        manifest["sha256"]["debian.jsonl"]
        == hashlib.sha256((furniture / "out" / "debian.jsonl").read_bytes()).hexdigest()
    )


def test_dev_and_test_share_packages_that_are_too_few_for_both() -> None:
    functions = _functions({f"package{p}.module": _own(f"package{p}") for p in range(12)})
    split = split_by_family(functions, Settings(hold_out="packages", test_queries=100, dev_queries=50))
    assert [len({f.package for f in side}) for side in (split.train, split.dev, split.test)] == [0, 4, 8]


def _own(name: str) -> str:
    return _modules(1)["module0"].replace("Adds number", f"Adds {name}").replace("return a", f"return {name} + a")


def test_every_package_is_the_installed_ones_but_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    names = every_package()
    assert names[0] == STDLIB and {"numpy", "torch"} <= set(names)
    assert not {"retriever", "kernels", "scripts", "tests"} & set(names)
    found = {"scripts": ["another"], "numpy": ["numpy"]}
    monkeypatch.setattr("scripts.code_pairs.sources._distributions", lambda: found)
    assert every_package() == [STDLIB, "numpy"]


def test_nothing_identical_stands_on_two_sides() -> None:
    short = _function("close", "Close the file.", "return a") + _function("name", "The shelf's name.", "return b")
    functions = _functions({name: source + short for name, source in _modules(12).items()})
    split = split_by_family(functions, Settings(test_queries=10, dev_queries=5))
    summaries = [{function.summary for function in side} for side in (split.train, split.dev, split.test)]
    codes = [{function.code for function in side} for side in (split.train, split.dev, split.test)]
    assert "Close the file." in summaries[0] and min(map(len, codes)) > 0
    assert all(not sides[i] & sides[j] for sides in (summaries, codes) for i, j in ((0, 1), (0, 2), (1, 2)))


def test_a_shared_docstring_is_one_query_and_identical_code_one_passage(furniture: Path) -> None:
    shared = _function("left", "Shifts to the left.", "return a << b") + _function(
        "also_left", "Shifts to the left.", "return a * 2**b"
    )
    shared += _function("twice", "Twice the left shift.", "return a << b")
    _package(furniture / "site", "furniture", {name: source + shared for name, source in _modules(1).items()})
    build(furniture / "out", _small(max_held_out_module=6))  # the module of eight trains
    corpus, _, qrels = _read(furniture / "out")
    positives = [passage for query, passage in qrels["train"] if query == "furniture.module0:left#summary"]
    assert positives == ["furniture.module0:left", "furniture.module0:also_left"]
    assert ("furniture.module0:twice#summary", "furniture.module0:left") in qrels["train"]
    assert "furniture.module0:also_left#summary" not in [query for query, _ in qrels["train"]]


def test_the_standard_library_makes_a_benchmark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Here of a third of its modules."""
    files = [(name, path) for name, path in python_files(STDLIB) if len(name) % 3 == 0]
    monkeypatch.setattr("scripts.make_pairs.python_files", lambda package: iter(files))
    _, manifest = build(tmp_path, Settings(test_queries=233, dev_queries=50))
    corpus, queries, qrels = _read(tmp_path)
    counts = manifest["counts"]
    assert counts["test_queries"] >= 167 and counts["train_queries"] >= 1000 and counts["test_modules"] >= 13
    assert counts["passages"] == len(corpus) == len(set(corpus.values()))
    units = {split: {query.partition(":")[0].split(".")[1] for query, _ in pairs} for split, pairs in qrels.items()}
    assert not units["train"] & units["test"] and not units["train"] & units["dev"]
    per_module = Counter(queries[query]["metadata"]["module"] for query, _ in qrels["test"])
    assert max(per_module.values()) <= 20
    details, _, judged = _read(tmp_path / "details")
    assert list(judged) == ["train"] and not set(details) & set(corpus) and len(details) > 167
    assert {query for query, _ in judged["train"]} <= {query for query, _ in qrels["train"]}
    assert not any(module.startswith((f"{STDLIB}.test", f"{STDLIB}.ensurepip")) for module, _ in python_files(STDLIB))


@pytest.mark.parametrize(
    ("name", "content"),
    [("corpus.jsonl", "mine"), ("details/queries.jsonl", "mine"), ("manifest.json", "{}"), ("manifest.json", "[]")],
)
def test_a_persons_own_files_are_refused_and_left_alone(
    furniture: Path, tmp_path: Path, name: str, content: str
) -> None:
    file = tmp_path / "pairs" / name
    file.parent.mkdir(parents=True)
    file.write_text(content)
    with pytest.raises(RefusedError, match=f"pairs/{name} was not written by this command"):
        build(tmp_path / "pairs", _small())
    assert [path for path in (tmp_path / "pairs").rglob("*") if path.is_file()] == [
        file
    ] and file.read_text() == content


def test_what_was_interrupted_is_written_again(
    furniture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = build(tmp_path / "whole", _small())[1]
    with monkeypatch.context() as interrupted, pytest.raises(KeyboardInterrupt):
        interrupted.setattr("scripts.make_pairs.write_text", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        build(tmp_path / "pairs", _small())
    for _ in range(2):
        assert build(tmp_path / "pairs", _small())[1] == whole


def test_an_unknown_package_is_named(tmp_path: Path) -> None:
    arguments = ["--output", str(tmp_path), "--packages", "no_such_package"]
    assert_refused(main, arguments, "--packages no_such_package: no module of this name is installed")


def test_groups_of_packages_stand_beside_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("scripts.make_pairs.installed", lambda: ["stdlib", "json"])
    arguments = ["--output", str(tmp_path), "--packages", "json", "auto", "no_such_package"]
    monkeypatch.setattr("scripts.make_pairs.build", lambda _, settings, __: pytest.fail(" ".join(settings.packages)))
    with pytest.raises(pytest.fail.Exception, match="^json stdlib no_such_package$"):
        main(arguments)
