"""What is pushed arrives whole in a hub on this machine: its upload protocol with files inside the commit."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import numpy as np
import pytest

from retriever.config import Config, ModelConfig
from retriever.encoder.bundle import load_encoder
from retriever.encoder.dual_encoder import DualEncoder
from retriever.encoder.tokenizer import training_tokenizer
from retriever.export import Probe, export
from scripts.push_to_hub import licensed, main
from tests.commands import assert_refused
from tests.tiny import random_texts, save_tiny_model

TEXTS = random_texts(3)


class Hub(ThreadingHTTPServer):
    """Keeps what is committed in `folder`; takes one token alone."""

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder, self.created = folder, list[dict[str, Any]]()


class _Handler(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *_: Any) -> None: ...

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.headers["Authorization"] != "Bearer right":
            return self._answer(401, {"error": "Invalid username or password."})
        if self.path == "/api/repos/create":
            self.server.created.append(json.loads(body))
            return self._answer(200, {"url": f"http://{self.headers['Host']}/us/tiny"})
        if "/preupload/" in self.path:
            asked = [file["path"] for file in json.loads(body)["files"]]
            told = [{"path": path, "uploadMode": "regular", "shouldIgnore": False, "oid": None} for path in asked]
            return self._answer(200, {"files": told})
        if "/commit/" not in self.path:  # the check of the card's metadata
            return self._answer(200, {"errors": [], "warnings": []})
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                path = self.server.folder / line["value"]["path"]
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(base64.b64decode(line["value"]["content"]))
        return self._answer(200, {"commitUrl": f"http://{self.headers['Host']}/us/tiny/commit/1", "commitOid": "1"})

    def _answer(self, status: int, content: dict[str, Any]) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    server = Hub(tmp_path / "hub")
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "right")
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("push")
    start = ModelConfig(str(save_tiny_model(root / "start")))
    encoder, tokenizer, config = DualEncoder.from_pretrained(start), training_tokenizer(start), Config(model=start)
    return export(encoder, tokenizer, config, root / "export", Probe.of(encoder, tokenizer, config, TEXTS))


def test_a_model_arrives_whole_with_its_licence(hub: Hub, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--model", str(model), "--repo", "us/tiny", "--private", "--license", "apache-2.0"]) == 0
    (created,) = hub.created
    assert (created["organization"], created["name"], created["visibility"]) == ("us", "tiny", "private")
    sent, kept = ({p.relative_to(f): p.read_bytes() for p in f.rglob("*") if p.is_file()} for f in (model, hub.folder))
    assert sent.keys() == kept.keys() and f"/commit/1: {len(sent)} files" in capsys.readouterr().out
    changed = [path.name for path in sent if sent[path] != kept[path]]
    assert changed == ["README.md"]
    assert kept[Path("README.md")].startswith(b"---\nlicense: apache-2.0\nlibrary_name: sentence-transformers\n")
    expected = load_encoder(model, device="cpu").encode(TEXTS, "query")
    np.testing.assert_array_equal(load_encoder(hub.folder, device="cpu").encode(TEXTS, "query"), expected)


def test_what_the_hub_refuses_is_told_in_one_line(hub: Hub, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "wrong")
    assert_refused(main, ["--model", str(model), "--repo", "us/tiny"], "--repo us/tiny: .*401.*Invalid username")
    assert_refused(main, ["--model", str(model), "--repo", "a/b/c"], "--repo a/b/c: Repo id must")
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    assert_refused(main, ["--model", str(model), "--repo", "us/tiny"], "--repo us/tiny: .*refused")
    assert_refused(main, ["--model", str(model.parent), "--repo", "us/tiny"], "expected an exported model")
    assert not hub.created and not hub.folder.exists()


def test_a_card_names_one_licence() -> None:
    card = licensed("---\nlibrary_name: x\n---\n# Card\n---\n", "mit")
    assert card == "---\nlicense: mit\nlibrary_name: x\n---\n# Card\n---\n" and licensed(card, "mit") == card
    assert licensed("# Card\n", "mit") == "---\nlicense: mit\n---\n# Card\n"
    with pytest.raises(ValueError, match="the model card has 'license: mit'"):
        licensed(card, "apache-2.0")
