"""The search page: what its server answers about one model and two, to whom, and what the command refuses."""

from __future__ import annotations

import argparse
import re
import shutil
import socket
from dataclasses import replace
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from eval.collections.collection import read_beir
from eval.evaluate import evaluate
from retriever.encoder.bundle import load_encoder
from scripts.serve.__main__ import main
from scripts.serve.app import application
from scripts.serve.models import open_models, texts_of
from tests.beir import write_beir
from tests.commands import assert_refused
from tests.tiny import random_texts, save_tiny_model

HOSTILE = "</script><img src=x onerror=alert(1)>\u202e\x00 & 'river'"
ADDRESS = "http://127.0.0.1:8000"


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, TestClient]:
    """The page of two models over 200 passages, one of them hostile."""
    folder = tmp_path_factory.mktemp("serve")
    texts = [HOSTILE, *random_texts(199, shortest=6, longest=20, seed=3)]
    corpus = [{"_id": f"d{i}", "title": "", "text": text} for i, text in enumerate(texts)]
    judged = {"q0": {"d0": 1, "d1": 0}, "q1": {"d5": 2, "gone": 1}}
    write_beir(folder / "data", corpus, {"q0": HOSTILE, "q1": "a river  in winter"}, test=judged)
    args = argparse.Namespace(output_dir=folder / "evaluations", batch=None, precision="fp32", attention="auto")
    names = [str(save_tiny_model(folder / f"model{seed}", seed=seed)) for seed in range(2)]
    collection = read_beir(folder / "data")
    models = open_models(names, names, collection, args)
    app = application(models, collection, texts_of(collection, models[0]))
    return folder, TestClient(app, base_url=ADDRESS)


def test_the_page_runs_its_own_script_and_nothing_else(served: tuple[Path, TestClient]) -> None:
    answer = served[1].get("/")
    policy = answer.headers["content-security-policy"]
    assert answer.status_code == 200 and "default-src 'none'" in policy and "unsafe" not in policy
    assert not re.search(r"https?:|innerHTML|outerHTML|insertAdjacent|document\.write|@import|url\(", answer.text)
    for path in ("/docs", "/redoc", "/openapi.json"):
        assert served[1].get(path).status_code == 404


def test_the_collection_is_told_with_each_models_measures(served: tuple[Path, TestClient]) -> None:
    folder, client = served
    about = client.get("/collection").json()
    expected = evaluate(load_encoder(folder / "model1"), folder / "data", "test", ["nDCG@10"])
    assert expected is not None and about["models"][1]["means"]["nDCG@10"] == expected.means["nDCG@10"]
    per_query = dict(zip(expected.scores.query_ids, expected.scores.per_query["nDCG@10"], strict=True))
    assert [query["text"] for query in about["queries"]] == [HOSTILE, "a river  in winter"]
    assert [query["scores"][1] for query in about["queries"]] == [per_query["q0"], per_query["q1"]]
    assert (about["passages"], about["name"], about["split"]) == (200, "data", "test")


def test_a_judged_query_shows_grades_ranks_and_what_is_missed(served: tuple[Path, TestClient]) -> None:
    answer = served[1].get("/search", params={"query": f" {HOSTILE}  ", "k": 100}).json()
    assert answer["judged"] and answer["relevant"] == 1 and len(answer["models"]) == 2
    for model, found in enumerate(answer["models"]):
        first = found["passages"][0]
        assert (first["id"], first["text"], first["grade"], first["relevant"]) == ("d0", HOSTILE, 1, True)
        assert first["score"] == pytest.approx(1, abs=1e-5) and first["ranks"][model] == first["rank"] == 1
        scores = [passage["score"] for passage in found["passages"]]
        assert len(scores) == 100 and scores == sorted(scores, reverse=True) and found["below"] == []
    both = served[1].get("/search", params={"query": "a river in winter", "k": 1}).json()
    assert both["judged"] and both["relevant"] == 1, "a passage that is not there cannot be found"
    for model, found in enumerate(both["models"]):
        (missed,) = found["below"]
        assert missed["id"] == "d5" and missed["grade"] == 2
        assert missed["rank"] == missed["ranks"][model] and (missed["rank"] is None) == (missed["score"] is None)


def test_a_query_of_ones_own_has_no_judgments(served: tuple[Path, TestClient]) -> None:
    answer = served[1].get("/search", params={"query": "ocean storm"}).json()
    assert not answer["judged"]
    assert all(len(found["passages"]) == 10 and found["below"] == [] for found in answer["models"])
    assert {passage["grade"] for found in answer["models"] for passage in found["passages"]} == {None}


def test_the_passage_that_a_query_is_is_left_out(served: tuple[Path, TestClient]) -> None:
    """As the measures leave it out; two queries with one text show the judgments of both."""
    folder, _ = served
    names, collection = [str(folder / "model0")], read_beir(folder / "data")
    args = argparse.Namespace(output_dir=folder / "evaluations", batch=None, precision="fp32", attention="auto")
    models = open_models(names, names, collection, args)
    texts = texts_of(collection, models[0])
    queries, qrels = {"d7": texts["d7"], "d8": texts["d7"]}, {"d7": {"d9": 1}, "d8": {"d10": 1}}
    own = replace(collection, queries=queries, qrels=qrels)
    client = TestClient(application(models, own, texts), base_url=ADDRESS)
    answer = client.get("/search", params={"query": texts["d7"]}).json()
    assert "d7" not in {passage["id"] for passage in answer["models"][0]["passages"]} and answer["relevant"] == 2
    best = served[1].get("/search", params={"query": texts["d7"]}).json()["models"][0]["passages"][0]
    assert best["id"] == "d7"


def test_two_runs_of_one_name_have_embeddings_of_their_own(served: tuple[Path, TestClient], tmp_path: Path) -> None:
    folder, client = served
    folders = [str(tmp_path / side / "mine" / "best") for side in "ab"]
    for i, place in enumerate(folders):
        shutil.copytree(folder / f"model{i}", place)
    collection = read_beir(folder / "data")
    args = argparse.Namespace(output_dir=tmp_path / "evaluations", batch=None, precision="fp32", attention="auto")
    models = open_models(folders, folders, collection, args)
    both = TestClient(application(models, collection, texts_of(collection, models[0])), base_url=ADDRESS)
    asked = {"query": "ocean storm"}
    scores = [
        [[p["score"] for p in model["passages"]] for model in one.get("/search", params=asked).json()["models"]]
        for one in (both, client)
    ]
    assert scores[0] == scores[1]


@pytest.mark.parametrize("query", ["", " \n", "x" * 10_001])
def test_what_is_no_query_is_refused(query: str, served: tuple[Path, TestClient]) -> None:
    assert served[1].get("/search", params={"query": query}).status_code == 422


def test_another_hosts_name_is_refused(served: tuple[Path, TestClient]) -> None:
    """A page of another site whose name points to this machine would otherwise read the collection."""
    assert served[1].get("/collection", headers={"host": "elsewhere.example:8000"}).status_code == 400
    assert served[1].get("/collection", headers={"host": "localhost:8000"}).status_code == 200


def test_the_command_serves_a_runs_best_model_over_what_the_run_evaluates_on(
    served: tuple[Path, TestClient], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _ = served
    shutil.copytree(folder / "model1", folder / "run" / "best")
    shutil.copytree(folder / "model0", folder / "run" / "export")
    (folder / "run" / "config.yaml").write_text(f"eval: {{path: {folder / 'data'}, split: test}}\n")
    addresses, answers = list[str](), list[list[float]]()

    def scores(client: TestClient) -> list[list[float]]:
        found = client.get("/search", params={"query": "ocean storm"}).json()["models"]
        return [[passage["score"] for passage in model["passages"]] for model in found]

    def run(server: object, sockets: list[socket.socket]) -> None:
        addresses.append(sockets[0].getsockname()[0])
        client = TestClient(server.config.app, base_url=ADDRESS)  # type: ignore[attr-defined]
        answers.extend(scores(client))

    monkeypatch.setattr("uvicorn.Server.run", run)
    assert main([str(folder / "run"), "--port", "0", "--output-dir", str(folder / "evaluations")]) == 0
    assert addresses == ["127.0.0.1"] and re.search(r"http://127.0.0.1:\d{4,5}  ", capsys.readouterr().out)
    exported, best = scores(served[1])
    assert answers == [best] and best != exported


def test_what_cannot_be_served_is_refused(served: tuple[Path, TestClient], monkeypatch: pytest.MonkeyPatch) -> None:
    folder, _ = served
    model, data = str(folder / "model0"), ["--data", str(folder / "data")]
    assert_refused(main, [model, model, model, *data], "3 runs: expected one, or two")
    assert_refused(main, [f"{model}/x"], f"there is no folder {model}/x: expected --data, or a run's folder")
    assert_refused(main, [model, "--format", "msmarco"], "--format msmarco: expected --data, of which it is the format")
    assert_refused(main, [model], "names no collection: expected --data, or a run's folder with `eval`")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert_refused(main, [model, *data, "--port", str(port)], f"--port {port}: Address already in use; expected")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "uvicorn" else object())
    assert_refused(main, [model, *data], r"uvicorn not installed: run `pip install '.\[serve\]'`")
