"""What is pushed arrives byte for byte, uploaded by the hub's own client to a stand-in that speaks the hub's HTTP."""

import base64
import hashlib
import json
import os
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import huggingface_hub
import pytest
import torch
from typer.testing import CliRunner

import tinyclip
from tests.formats.test_export import IRREGULAR, UNIFORM, state_equal, toy
from tests.formats.test_provenance import SECOND
from tinyclip.cli import app
from tinyclip.formats.card import Record, card
from tinyclip.formats.push import push

COMMIT = "0" * 40
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # of the hub's client to httpx


class Hub(ThreadingHTTPServer):
    """The endpoints of huggingface.co that uploading and downloading a folder needs; files are kept in memory."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Answers)
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.large: dict[str, bytes] = {}  # by SHA-256
        self.url = f"http://127.0.0.1:{self.server_port}"


class Answers(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def answer(self, what, status: int = 200, headers: dict[str, str] | None = None):
        data = what if isinstance(what, bytes) else json.dumps(what).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def body(self) -> bytes:
        if "Content-Length" in self.headers:
            return self.rfile.read(int(self.headers["Content-Length"]))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def do_POST(self):
        body, path = self.body(), self.path.partition("?")[0]
        if self.headers.get("Authorization") != "Bearer right":
            return self.answer({"error": "Invalid credentials"}, 401)
        if path == "/api/repos/create":
            wanted = json.loads(body)
            name = f"{wanted['organization']}/{wanted['name']}"
            if name in self.server.repositories:
                return self.answer({"error": "It is there", "url": f"{self.server.url}/{name}"}, 409)
            self.server.repositories[name] = {}
            self.server.private[name] = wanted.get("visibility") == "private" or wanted.get("private", False)
            return self.answer({"url": f"{self.server.url}/{name}"})
        if path == "/api/validate-yaml":
            return self.answer({"errors": [], "warnings": []})
        if path.endswith("/preupload/main"):
            files = json.loads(body)["files"]
            modes = {True: "lfs", False: "regular"}
            answers = [
                {"path": f["path"], "uploadMode": modes[f["path"].endswith(".safetensors")], "shouldIgnore": False}
                for f in files
            ]
            return self.answer({"files": answers})
        if path.endswith(".git/info/lfs/objects/batch"):
            objects = json.loads(body)["objects"]
            actions = [{**o, "actions": {"upload": {"href": f"{self.server.url}/large/{o['oid']}"}}} for o in objects]
            return self.answer({"objects": actions})
        if path.endswith("/commit/main"):
            name = path.removeprefix("/api/models/").removesuffix("/commit/main")
            repository = self.server.repositories[name]
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    repository[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    repository[value["path"]] = self.server.large[value["oid"]]
            return self.answer({"commitUrl": f"{self.server.url}/{name}/commit/{COMMIT}", "commitOid": COMMIT})
        return self.answer({"error": f"the stand-in has no {path}"}, 404)

    def do_PUT(self):
        data = self.body()
        self.server.large[hashlib.sha256(data).hexdigest()] = data
        self.answer(b"")

    def do_GET(self):
        path = self.path.partition("?")[0]
        for name, files in self.server.repositories.items():
            if path in (f"/api/models/{name}", f"/api/models/{name}/revision/main"):
                return self.answer({"id": name, "sha": COMMIT, "siblings": [{"rfilename": file} for file in files]})
            if path == f"/api/models/{name}/tree/{COMMIT}":
                listed = [{"type": "file", "path": f, "size": len(files[f]), "oid": COMMIT} for f in files]
                return self.answer(listed)
            file = path.removeprefix(f"/{name}/resolve/{COMMIT}/")
            if file in files:
                etag = hashlib.sha256(files[file]).hexdigest()
                return self.answer(files[file], headers={"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT})
        return self.answer({"error": f"the stand-in has no {path}"}, 404)

    do_HEAD = do_GET


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub, as this process and its children see it, through the client's documented environment variables."""
    server = Hub()
    Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    settings = {"HF_ENDPOINT": server.url, "HF_TOKEN": "right", "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path)}
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    constants = huggingface_hub.constants  # read from the environment when it was imported
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, server.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    yield server
    server.shutdown()
    server.server_close()


def model_of(config):
    model = toy(config)
    model.provenance = SECOND
    return model


def test_the_command_uploads_exactly_what_a_dry_run_writes(hub, tmp_path):
    tinyclip.save(model_of(IRREGULAR), tmp_path / "model")
    command = [sys.executable, "-m", "tinyclip", "push", "model", "me/small"]
    done = subprocess.run(command, cwd=tmp_path, env=os.environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{hub.url}/me/small\n"
    assert "read back with huggingface" in done.stderr and "warning: licences: " in done.stderr
    dry = tmp_path / "dry"
    arguments = ["push", str(tmp_path / "model"), "me/small", "--dry-run", str(dry)]
    assert CliRunner().invoke(app, arguments, catch_exceptions=False).stdout == f"{dry}\n"
    arrived = hub.repositories["me/small"]
    assert arrived.keys() >= {"README.md", "config.json", "model.safetensors", "modeling_tinyclip.py", "tokenizer.json"}
    assert arrived == {file.name: file.read_bytes() for file in dry.iterdir()}
    assert arrived["README.md"].decode() == card(model_of(IRREGULAR), "me/small", to="huggingface", record=Record())


@pytest.mark.parametrize("to, config", [("tinyclip", IRREGULAR), ("huggingface", IRREGULAR), ("huggingface", UNIFORM)])
@torch.no_grad()
def test_what_was_pushed_loads_from_the_hub_with_all_that_travels_with_it(to, config, hub, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    model = model_of(config)
    assert push(model, "me/small", to=to, private=True, say=lambda line: None) == f"{hub.url}/me/small"
    assert hub.private == {"me/small": True}
    back = tinyclip.load("hf:me/small")
    assert state_equal(back, model) and back.provenance == SECOND
    assert (back.config, back.preprocess, back.tokenizer) == (model.config, model.preprocess, model.tokenizer)


def test_a_repository_that_exists_is_only_written_to_with_update(hub):
    quiet = {"to": "tinyclip", "say": lambda line: None}
    push(toy(UNIFORM), "me/small", **quiet)
    with pytest.raises(ValueError, match="push me/small: the repository exists; --update adds a commit to it"):
        push(model_of(UNIFORM), "me/small", **quiet)
    assert b"metaclip" not in hub.repositories["me/small"]["README.md"]
    push(model_of(UNIFORM), "me/small", update=True, **quiet)
    assert b"metaclip" in hub.repositories["me/small"]["README.md"]


def test_errors_are_one_line(hub, monkeypatch):
    model, quiet = toy(UNIFORM), {"to": "tinyclip", "say": lambda line: None}
    for name in ("small", "me/sm all", "me/too/many"):
        with pytest.raises(ValueError, match="push: "):
            push(model, name, **quiet)
    monkeypatch.setenv("HF_TOKEN", "wrong")
    with pytest.raises(ValueError, match="push me/small: the hub did not take it: .*401") as caught:
        push(model, "me/small", **quiet)
    assert "\n" not in str(caught.value)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ValueError, match="push me/small: the hub did not take it: .*refused"):
        push(model, "me/small", **quiet)
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    with pytest.raises(ValueError, match="push me/small: expected a token of the hub that may write"):
        push(model, "me/small", **quiet)
    assert hub.repositories == {}


def test_a_dry_run_needs_neither_a_network_nor_a_token_but_a_name(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: pytest.fail("asked for a token"))
    tinyclip.save(toy(UNIFORM), tmp_path / "model")
    for to in ("tinyclip", "open_clip"):
        out = tmp_path / to
        command = ["push", str(tmp_path / "model"), "me/small", "--to", to, "--dry-run", str(out)]
        assert CliRunner().invoke(app, command, catch_exceptions=False).exit_code == 0
        assert (out / "README.md").is_file()
    done = CliRunner().invoke(app, ["push", str(tmp_path / "model"), "small", "--dry-run", str(tmp_path / "out")])
    assert isinstance(done.exception, ValueError) and not Path(tmp_path / "out").exists()
