"""The comparison of run files: the differences by hand, the queries that moved, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from scipy import stats

from eval.compare import main
from tests.commands import assert_refused
from tests.eval.texts import help_texts, write_beir, write_msmarco

N = 30


def reciprocal_ranks(first: int, second: int) -> list[float]:
    """What `write_run` scores: the relevant passage stands first for the first queries, second for the next ones, else
    nowhere.
    """
    return [1.0] * first + [0.5] * second + [0.0] * (N - first - second)


def write_run(path: Path, first: int, second: int, *, msmarco: bool = False) -> Path:
    lines = []
    for q in range(N):
        ranked = ["yes", "no"] if q < first else ["no", "yes"] if q < first + second else ["no", "neither"]
        for rank, passage in enumerate(ranked, start=1):
            lines.append(f"q{q}\t{passage}\t{rank}\n" if msmarco else f"q{q} Q0 {passage} {rank} {1 / rank} tag\n")
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(lines))
    return path


@pytest.fixture
def qrels(tmp_path: Path) -> Path:
    path = tmp_path / "qrels.tsv"
    path.write_text("".join(f"q{q}\t0\tyes\t1\n" for q in range(N)))
    return path


def test_runs_of_both_formats_against_the_first(
    tmp_path: Path, qrels: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [write_run(tmp_path / "a" / "test.trec", 5, 10), write_run(tmp_path / "b" / "test.trec", 12, 8)]
    runs.append(write_run(tmp_path / "c.tsv", 5, 9, msmarco=True))
    output = tmp_path / "out" / "compared.json"
    main(
        [
            *map(str, runs),
            "--qrels",
            str(qrels),
            "--metrics",
            "MRR@10",
            "Success@1",
            "--output",
            str(output),
            "--moved",
            "3",
        ]
    )
    content = json.loads(output.read_text())
    base, better, worse = (reciprocal_ranks(*counts) for counts in ((5, 10), (12, 8), (5, 9)))
    found = {(c["run"], c["measure"]): c for c in content["comparisons"]}
    assert content["baseline"] == "a/test.trec"
    assert found.keys() == {
        (run, measure) for run in ("b/test.trec", f"{tmp_path.name}/c.tsv") for measure in ("MRR@10", "Success@1")
    }
    b, c = found["b/test.trec", "MRR@10"], found[f"{tmp_path.name}/c.tsv", "MRR@10"]
    assert b["difference"] == pytest.approx((sum(better) - sum(base)) / N)
    assert b["t_p"] == pytest.approx(stats.ttest_rel(better, base).pvalue, rel=1e-8)
    assert b["interval"][0] < b["difference"] < b["interval"][1]
    assert (b["better"], b["equal"], b["worse"], c["better"], c["equal"], c["worse"]) == (12, 18, 0, 0, 29, 1)
    assert b["randomisation_p"] < 0.01 and c["randomisation_p"] == 1.0
    assert b["randomisation_p_holm"] == pytest.approx(2 * b["randomisation_p"])
    assert [row[1:] for row in b["moved"]] == [[0.5, 1.0]] * 3
    assert c["moved"] == [["q14", 0.5, 0.0]]
    assert worse[14] == 0.0
    printed = capsys.readouterr().out
    assert "0.5000 -> 0.0000  q14" in printed and "12/18/0" in printed


def test_the_same_run_does_not_differ_from_itself(
    tmp_path: Path, qrels: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [write_run(tmp_path / name, 4, 4) for name in ("a.trec", "b.trec")]
    main([*map(str, runs), "--qrels", str(qrels), "--metrics", "nDCG@10"])
    printed = capsys.readouterr().out
    assert "+0.0000  [+0.0000, +0.0000]   1.0000   1.0000  1.0000  0/30/0" in printed
    assert "moved most" not in printed


@pytest.mark.parametrize("layout", ["beir", "msmarco"])
def test_a_collection_gives_judgments_and_texts(
    tmp_path: Path, layout: str, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = help_texts()
    data = write_beir(tmp_path / "data", texts) if layout == "beir" else write_msmarco(tmp_path / "data", texts)
    query = next(iter(texts.queries))
    best = {q: max(grades, key=lambda p: grades[p]) for q, grades in texts.qrels.items()}
    for name, left_out in (("full", None), ("less", query)):
        lines = (f"{q} Q0 {p} 1 1.0 tag\n" for q, p in best.items() if q != left_out)
        (tmp_path / name).write_text("".join(lines))
    split = [] if layout == "beir" else ["--split", "dev"]
    main([str(tmp_path / "full"), str(tmp_path / "less"), "--data", str(data), *split])
    printed = capsys.readouterr().out
    assert f"note: less: 1 of {len(texts.queries)} judged queries not in the run, which count 0" in printed
    assert f"{query}  {texts.queries[query]}" in printed


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("a.trec --qrels qrels.tsv", "expected at least two different runs"),
        ("a.trec a.trec --qrels qrels.tsv", "expected at least two different runs"),
        ("a.trec b.trec --qrels qrels.tsv --metrics F1", "measure 'F1': expected one of"),
        ("a.trec none --qrels qrels.tsv", "no such file"),
        ("a.trec b.trec --data .", "--split None: expected one of dev, dl19, dl20"),
        (
            "a.trec b.trec --qrels dev.tsv",
            r"a\.trec: none of the run's queries is judged in .*dev\.tsv; expected a run of the judged queries",
        ),
    ],
)
@pytest.mark.usefixtures("qrels")
def test_what_cannot_be_compared_is_refused(
    tmp_path: Path, words: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a.trec", "b.trec"):
        write_run(tmp_path / name, 1, 1)
    (tmp_path / "dev.tsv").write_text("another 0 yes 1\n")
    assert_refused(main, words.split(), message)


def test_a_file_that_is_no_comparison_is_not_replaced(tmp_path: Path, qrels: Path) -> None:
    runs = [str(write_run(tmp_path / name, 4, 4)) for name in ("a.trec", "b.trec")]
    output = tmp_path / "compared.json"
    arguments = [*runs, "--qrels", str(qrels), "--output"]
    assert main([*arguments, str(output)]) == main([*arguments, str(output)]) == 0, "a comparison is replaced"
    for content in ("[]", '{"command": "mine"}', "years of work"):
        output.write_text(content)
        assert_refused(main, [*arguments, str(output)], f"{output} was not written by an evaluation; .*--output")
        assert output.read_text() == content
    before = Path(runs[0]).read_bytes()
    assert_refused(main, [*arguments, runs[0]], "a.trec was not written by an evaluation")
    assert Path(runs[0]).read_bytes() == before
    assert_refused(main, [*arguments, str(tmp_path)], f"{tmp_path} is a folder; choose another file")
