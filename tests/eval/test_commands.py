"""The evaluation commands on a small real collection, against embeddings searched by brute force and measured by
pytrec_eval.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import pytrec_eval

from eval import beir, msmarco, search
from eval.collections.collection import read_beir
from eval.evaluate import evaluate
from eval.trec import read_run, read_trec
from retriever import encode
from retriever.encoder.bundle import EncoderBundle, load_encoder
from retriever.lock import locked
from tests.commands import RankAlone, assert_refused, change_unseen
from tests.eval.texts import Texts, help_texts, write_beir, write_msmarco
from tests.starts import start
from tests.tiny import save_tiny_model

LENGTHS = ["--query-max-tokens", "24", "--passage-max-tokens", "48"]
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def texts() -> Texts:
    found = help_texts()
    assert len(found.queries) >= 15 and len(found.passages) >= 150
    return found


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, texts: Texts) -> tuple[Path, Path, Path]:
    """(model, BEIR folder, MS MARCO folder)."""
    root = tmp_path_factory.mktemp("collections")
    return save_tiny_model(root / "model"), write_beir(root / "help", texts), write_msmarco(root / "marco", texts)


def reference_run(model: Path, passages: dict[str, str], queries: dict[str, str]) -> dict[str, dict[str, float]]:
    """All passages of every query with their float32 scores."""
    bundle = load_encoder(model, query_max_tokens=24, passage_max_tokens=48, device="cpu")
    q, p = bundle.encode(list(queries.values()), "query"), bundle.encode(list(passages.values()), "passage")
    scores = (q.astype(np.float64) @ p.astype(np.float64).T).astype(np.float32)
    return {
        query_id: dict(zip(passages, map(float, row), strict=True))
        for query_id, row in zip(queries, scores, strict=True)
    }


def trec_mean(qrels: Any, run: Any, measure: str, name: str, level: int = 1) -> float:
    values = pytrec_eval.RelevanceEvaluator(qrels, {measure}, relevance_level=level).evaluate(run)
    return sum(row[name] for row in values.values()) / len(qrels)


def evaluation(folders: tuple[Path, Path, Path], output: Path) -> list[str]:
    """The arguments that evaluate the model on the BEIR folder."""
    return f"--model {folders[0]} --data {folders[1]} --output-dir {output}".split() + LENGTHS


def encoding(folders: tuple[Path, Path, Path], side: str, output: Path) -> list[str]:
    """The arguments that encode a side of the BEIR folder."""
    return f"--model {folders[0]} --input {folders[1]} --side {side} --output {output}".split()


def encoded_sides(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The side of each batch that is encoded from now on."""
    sides: list[str] = []
    encode_batches = EncoderBundle.encode_batches

    def counted(self: EncoderBundle, texts: Any, side: Any, *options: Any, **more: Any) -> Any:
        for batch in encode_batches(self, texts, side, *options, **more):
            sides.append(side)
            yield batch

    monkeypatch.setattr(EncoderBundle, "encode_batches", counted)
    return sides


def result_of(folder: Path, split: str) -> dict[str, Any]:
    return json.loads((folder / f"{split}.json").read_text(encoding="utf-8"))


def test_beir_measures_what_brute_force_gives(
    folders: tuple[Path, Path, Path], texts: Texts, tmp_path: Path, capsys: Any
) -> None:
    model = folders[0]
    beir.main([*evaluation(folders, tmp_path), "--split", "test", "half", "--metrics", "nDCG@10", "Recall@20", "MAP"])
    titled = {i: f"{text[:20]} {text}" for i, text in texts.passages.items()}
    run = reference_run(model, titled, texts.queries)
    for split, qrels in (("test", texts.qrels), ("half", {q: texts.qrels[q] for q in list(texts.qrels)[::2]})):
        result = result_of(tmp_path, split)
        assert result["metrics"]["nDCG@10"] == pytest.approx(
            trec_mean(qrels, run, "ndcg_cut.10", "ndcg_cut_10"), abs=1e-9
        )
        assert result["metrics"]["Recall@20"] == pytest.approx(
            trec_mean(qrels, run, "recall.20", "recall_20"), abs=1e-9
        )
        assert result["metrics"]["MAP"] == pytest.approx(trec_mean(qrels, run, "map", "map"), abs=1e-9)
        assert result["data"] == {
            "name": "help",
            "split": split,
            "queries": len(qrels),
            "passages": len(texts.passages),
        }
        assert result["per_query"]["nDCG@10"].keys() == qrels.keys()
        assert result["encoding"]["query"]["max_tokens"] == 24
        assert len(read_trec(tmp_path / f"{split}.trec")) == len(qrels)
    assert 0.05 < result["metrics"]["nDCG@10"] < 0.95
    printed = capsys.readouterr().out
    assert f"help half: {len(qrels)} queries, {len(texts.passages)} passages" in printed
    assert f"{result['metrics']['nDCG@10']:.4f}" in printed


def test_shards_that_match_are_used_again_and_others_made_anew(
    folders: tuple[Path, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = evaluation(folders, tmp_path)
    beir.main(arguments)
    first = result_of(tmp_path, "test")
    sides = encoded_sides(monkeypatch)
    beir.main(arguments)
    assert sides == []
    again = result_of(tmp_path, "test")
    assert again["fingerprints"] == first["fingerprints"] and again["metrics"] == first["metrics"]
    beir.main([*arguments, "--query-prompt", "query: "])
    assert set(sides) == {"query"}
    assert result_of(tmp_path, "test")["fingerprints"]["run"] != first["fingerprints"]["run"]
    sides.clear()
    beir.main([*arguments, "--query-prompt", "query: ", "--title", "drop"])
    assert set(sides) == {"passage"}


@pytest.mark.parametrize("name", ["test.json", "test.trec", "test.msmarco.tsv", "passages", "queries-test"])
@pytest.mark.parametrize("link", [False, True])
def test_what_no_evaluation_wrote_is_refused_and_left_alone(
    folders: tuple[Path, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, link: bool
) -> None:
    """A person's own files, links, and embeddings that were encoded on purpose, of another model say."""
    folder, entry = tmp_path / "results", tmp_path / "results" / name
    folder.mkdir()
    if "." in name and link:
        (tmp_path / "thesis").write_text("years of work")
        entry.symlink_to(tmp_path / "thesis")
    elif "." in name:
        entry.write_text('{"thesis": "years of work"}')
    else:
        side = "query" if name.startswith("queries") else "passage"
        assert encode.main([*encoding(folders, side, entry), "--max-tokens", "10"]) == 0
    before = {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    sides = encoded_sides(monkeypatch)
    message = (
        "was not written by an evaluation"
        if "." in name
        else "holds embeddings of another job .*--output-dir.* or remove it"
    )
    assert_refused(beir.main, evaluation(folders, folder), f"{entry} {message}")
    assert "passage" not in sides
    assert {file: file.read_bytes() for file in before} == before


def test_one_evaluation_works_in_a_folder(folders: tuple[Path, Path, Path], tmp_path: Path) -> None:
    with locked(tmp_path / ".lock", "it"):
        assert_refused(beir.main, evaluation(folders, tmp_path), f"{tmp_path} is in use by process {os.getpid()} on ")
    words = encoding(folders, "query", tmp_path / "own")
    assert encode.main(words) == 0
    with locked(tmp_path / "own" / ".lock", "it"):
        again = [*words, "--max-tokens", "10", "--overwrite"]
        assert_refused(encode.main, again, f"own is in use by process {os.getpid()} on ")


def test_search_verifies_embeddings_on_request(
    folders: tuple[Path, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A changed bit that the file's time does not tell."""
    for side in ("query", "passage"):
        assert encode.main(encoding(folders, side, tmp_path / side)) == 0
    arguments = f"--queries {tmp_path}/query --passages {tmp_path}/passage --output {tmp_path}/run.trec".split()
    change_unseen(tmp_path / "passage" / "00000.npy", monkeypatch)
    assert search.main(arguments) == 0
    assert_refused(
        search.main, [*arguments, "--verify"], r"00000\.npy is damaged \(its checksum .*writes that shard again"
    )


def test_an_evaluation_verifies_its_embeddings_on_request(
    folders: tuple[Path, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = evaluation(folders, tmp_path)
    assert beir.main(arguments) == 0
    file = tmp_path / "passages" / "00000.npy"
    content = change_unseen(file, monkeypatch)
    assert beir.main(arguments) == 0
    assert file.read_bytes() != content
    assert beir.main([*arguments, "--verify"]) == 0
    assert file.read_bytes() == content, "a cache is encoded again"


def test_a_run_file_measures_as_it_did_when_it_was_made(folders: tuple[Path, Path, Path], tmp_path: Path) -> None:
    beir.main(evaluation(folders, tmp_path / "model"))
    beir.main(f"--run {tmp_path}/model/test.trec --data {folders[1]} --output-dir {tmp_path}/run".split())
    made, measured = result_of(tmp_path / "model", "test"), result_of(tmp_path / "run", "test")
    assert measured["metrics"] == made["metrics"]
    assert measured["fingerprints"] == {key: made["fingerprints"][key] for key in ("run", "qrels")}


def test_two_processes_give_the_run_of_one(folders: tuple[Path, Path, Path], tmp_path: Path) -> None:
    beir.main(evaluation(folders, tmp_path / "one"))
    done = start(tmp_path, evaluation(folders, tmp_path / "two"), command="eval.beir", ranks=2).wait()
    assert done.finished, done.said
    assert done.said.count("nDCG@10") == 1  # one process prints
    one, two = result_of(tmp_path / "one", "test"), result_of(tmp_path / "two", "test")
    assert two["metrics"] == pytest.approx(one["metrics"], abs=1e-9)
    runs = [read_trec(tmp_path / folder / "test.trec") for folder in ("one", "two")]
    assert all(runs[0][q].passage_ids == runs[1][q].passage_ids for q in runs[0])


def test_msmarco_files_give_the_official_measures(
    folders: tuple[Path, Path, Path], texts: Texts, tmp_path: Path, capsys: Any
) -> None:
    model, _, data = folders
    msmarco.main(["--model", str(model), "--data", str(data), "--output-dir", str(tmp_path), *LENGTHS])
    run = reference_run(model, texts.passages, texts.queries)
    dev, dl19 = result_of(tmp_path, "dev"), result_of(tmp_path, "dl19")
    best = {query_id: max(grades, key=lambda p: grades[p]) for query_id, grades in texts.qrels.items()}
    reciprocal = []
    for query_id, answer in best.items():  # the official script: 1 / rank within the first ten, from the run file
        lines = [line.split("\t") for line in (tmp_path / "dev.msmarco.tsv").read_text().splitlines()]
        reciprocal += [
            next((1 / int(rank) for q, p, rank in lines if (q, p) == (query_id, answer) and int(rank) <= 10), 0.0)
        ]
    assert dev["metrics"]["MRR@10"] == pytest.approx(np.mean(reciprocal), abs=1e-12)
    assert max(reciprocal) > 0
    assert dl19["metrics"]["nDCG@10"] == pytest.approx(
        trec_mean(texts.qrels, run, "ndcg_cut.10", "ndcg_cut_10"), abs=1e-9
    )
    assert dl19["metrics"]["MAP"] == pytest.approx(trec_mean(texts.qrels, run, "map", "map", level=2), abs=1e-9)
    assert dl19["relevance"] == 2 and dev["relevance"] == 1
    assert {q: r.passage_ids for q, r in read_run(tmp_path / "dev.msmarco.tsv").items()} == {
        q: r.passage_ids for q, r in read_run(tmp_path / "dev.trec").items()
    }
    printed = capsys.readouterr().out
    assert (
        f"a sample, not MS MARCO's dev: {len(texts.passages)} passages, not 8,841,823; "
        f"{len(best)} judged queries, not 6,980" in printed
    )


def test_msmarco_says_what_is_missing_and_where_it_is(
    folders: tuple[Path, Path, Path], texts: Texts, tmp_path: Path
) -> None:
    assert_refused(
        msmarco.main,
        ["--bm25", "--data", str(tmp_path)],
        "no judgments of MS MARCO; expected one of these.*qrels.dev.small.tsv.*microsoft",
    )
    data = write_msmarco(tmp_path / "marco", texts)
    (data / "collection.tsv").unlink()
    assert_refused(
        msmarco.main,
        ["--bm25", "--data", str(data), "--split", "dev"],
        r"no passages: expected collection.tsv or .* \(or .gz\); to be had from https://microsoft",
    )
    assert_refused(msmarco.main, ["--bm25", "--data", str(data), "--split", "dl20"], "no judgments of dl20: .*nist.gov")


def test_evaluate_in_process_equals_the_command(folders: tuple[Path, Path, Path], tmp_path: Path) -> None:
    model, data, _ = folders
    beir.main(
        ["--model", str(model), "--data", str(data), "--output-dir", str(tmp_path), "--metrics", "nDCG@10", *LENGTHS]
    )
    bundle = load_encoder(model, query_max_tokens=24, passage_max_tokens=48, device="cpu")
    result = evaluate(bundle, data, "test", ["ndcg@10"])
    assert result is not None
    assert result.means == result_of(tmp_path, "test")["metrics"]
    assert result.n_queries == len(result.scores.per_query["nDCG@10"]) == len(result.collection.qrels)
    with pytest.raises(ValueError, match="shards_dir: 2 ranks need a folder"):
        evaluate(bundle, data, "test", ["nDCG@10"], world=RankAlone(0, 2))


def test_a_run_is_measured_on_the_splits_it_is_about(
    folders: tuple[Path, Path, Path], texts: Texts, tmp_path: Path, capsys: Any
) -> None:
    data = write_msmarco(tmp_path / "marco", texts)
    (data / "2019qrels-pass.txt").write_text("another Q0 1 3\n")
    query_id, grades = next(iter(texts.qrels.items()))
    (tmp_path / "run.tsv").write_text(f"{query_id}\tother\t1\n{query_id}\t{max(grades, key=lambda p: grades[p])}\t2\n")
    msmarco.main(["--run", str(tmp_path / "run.tsv"), "--data", str(data), "--output-dir", str(tmp_path / "out")])
    assert result_of(tmp_path / "out", "dev")["metrics"]["MRR@10"] == pytest.approx(0.5 / len(texts.queries))
    assert not (tmp_path / "out" / "dl19.json").exists()
    assert (
        f"{len(texts.queries) - 1} of {len(texts.queries)} judged queries not in the run, which count 0"
        in capsys.readouterr().out
    )
    assert_refused(
        msmarco.main,
        ["--run", str(tmp_path / "run.tsv"), "--data", str(data), "--split", "dl19"],
        r"none of the run's 1 queries is judged in dl19",
    )


@pytest.mark.parametrize("source", ["model", "bm25"])
def test_a_passage_with_the_querys_id_is_left_out_unless_asked_for(
    folders: tuple[Path, Path, Path], texts: Texts, tmp_path: Path, source: str
) -> None:
    data = write_beir(tmp_path / "own", texts)
    with (data / "corpus.jsonl").open("a", encoding="utf-8") as file:
        file.writelines(json.dumps({"_id": i, "title": "", "text": text}) + "\n" for i, text in texts.queries.items())
    run_of = ["--bm25"] if source == "bm25" else ["--model", str(folders[0]), *LENGTHS]
    for option, there in (("--exclude-self", False), ("--no-exclude-self", True)):
        beir.main([*run_of, "--data", str(data), "--output-dir", str(tmp_path / "out"), option])
        run = read_trec(tmp_path / "out" / "test.trec")
        assert {query_id in found.passage_ids for query_id, found in run.items()} == {there}


def test_collections_say_what_does_not_fit(folders: tuple[Path, Path, Path], texts: Texts, tmp_path: Path) -> None:
    data = write_beir(tmp_path / "odd", texts)
    with (data / "qrels" / "test.tsv").open("a") as file:
        file.write("unjudged\tnot there\t1\n")
    with (data / "corpus.jsonl").open("a") as file:
        file.write(json.dumps({"_id": "unjudged", "title": "", "text": "a passage with a query's id"}) + "\n")
    collection = read_beir(data)
    notes = collection.notes(passage_id for passage_id, _ in collection.passages("join", " "))
    assert [note.split(",")[0] for note in notes] == [
        f"1 of {1 + sum(map(len, texts.qrels.values()))} judged passages not in the corpus",
        "1 query with the id of a passage",
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--metrics", "F1"], "measure 'F1': expected one of nDCG"),
        (["--index", "hsnw"], "expected flat, ivf, ivfpq, hnsw or a FAISS factory string .*received 'hsnw'"),
        (["--index", "IVF4096,Flat"], "flat or ivf for [0-9]+ passages: IVF4096,Flat learns from at least 4,096"),
        (["--split", "train"], "expected one file qrels/train.tsv"),
        (["--pooling", "mean", "--passage-max-tokens", "4000"], "4000"),
    ],
)
def test_what_cannot_be_evaluated_stops_before_the_encoding(
    folders: tuple[Path, Path, Path], tmp_path: Path, arguments: list[str], message: str
) -> None:
    assert_refused(beir.main, [*evaluation(folders, tmp_path / "out"), *arguments], message)
    assert not (tmp_path / "out").exists()


def test_a_hugging_face_data_set_gives_the_figures_of_the_folder(
    texts: Texts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    data = write_beir(tmp_path / "help", texts)
    rows = [
        json.dumps({"query-id": q, "corpus-id": p, "score": grade})
        for q, grades in texts.qrels.items()
        for p, grade in grades.items()
    ]
    (data / "test.jsonl").write_text("\n".join(rows) + "\n")
    parts = (
        ("corpus", "corpus", "corpus.jsonl"),
        ("queries", "queries", "queries.jsonl"),
        ("default", "test", "test.jsonl"),
    )
    lines = [
        f"- config_name: {name}\n  data_files:\n  - split: {split}\n    path: {file}\n" for name, split, file in parts
    ]
    (data / "README.md").write_text("---\nconfigs:\n" + "".join(lines) + "---\n")
    for source, out in ((str(data), "folder"), (f"hf:{data}", "hub")):
        beir.main(["--bm25", "--data", source, "--output-dir", str(tmp_path / out)])
    folder, hub = result_of(tmp_path / "folder", "test"), result_of(tmp_path / "hub", "test")
    assert hub["metrics"] == folder["metrics"] and hub["data"] == folder["data"]
    assert all(hub["fingerprints"][key] == folder["fingerprints"][key] for key in ("run", "queries", "qrels"))
    assert_refused(beir.main, ["--bm25", "--data", f"hf:{data}", "--split", "dev"], "Hugging Face data set .*dev")


def test_a_folder_of_many_is_summed_up(texts: Texts, tmp_path: Path, capsys: Any) -> None:
    data = tmp_path / "many"
    for name, every in (("single", 1), ("forums/one", 2), ("forums/two", 3)):
        part = {query_id: texts.qrels[query_id] for query_id in list(texts.qrels)[::every]}
        write_beir(data / name, Texts(texts.passages, texts.queries, part))
    beir.main(["--bm25", "--data", str(data), "--output-dir", str(tmp_path / "out"), "--metrics", "nDCG@10", "MAP"])
    table = json.loads((tmp_path / "out" / "summary.json").read_text())["metrics"]
    alone = {
        name: result_of(tmp_path / "out" / name, "test")["metrics"] for name in ("single", "forums/one", "forums/two")
    }
    assert {name: table[name] for name in alone} == alone
    for measure in ("nDCG@10", "MAP"):
        forums = (alone["forums/one"][measure] + alone["forums/two"][measure]) / 2
        assert table["forums (mean of 2)"][measure] == pytest.approx(forums, abs=1e-12)
        assert table["mean of 2 collections"][measure] == pytest.approx(
            (forums + alone["single"][measure]) / 2, abs=1e-12
        )
    assert len({row["MAP"] for row in alone.values()}) == 3
    assert f"mean of 2 collections   {table['mean of 2 collections']['nDCG@10']:.4f}" in capsys.readouterr().out


def test_a_folder_of_many_is_refused_what_is_about_one(texts: Texts, tmp_path: Path) -> None:
    write_beir(tmp_path / "many" / "single", texts)
    write_beir(tmp_path / "many" / "other", texts)
    assert_refused(
        beir.main,
        ["--run", "run.trec", "--data", str(tmp_path / "many")],
        "holds 2 collections; expected --model or --bm25",
    )
    (tmp_path / "many" / "other" / "qrels" / "test.tsv").unlink()
    assert_refused(
        beir.main,
        ["--bm25", "--data", str(tmp_path / "many"), "--output-dir", str(tmp_path / "out")],
        "expected one file qrels/test.tsv",
    )
    assert not (tmp_path / "out").exists()
