"""What MODEL may be, and the one line that each failure gets: against a hub of our own over real HTTP."""

import errno
import hashlib
import json
import os
import socket
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from dgemma import embedded
from dgemma.checkpoints.source import base_of, resolve

ROOT = Path(__file__).resolve().parents[2]
SHA = "5" * 40
NAME = "someone/model"
CODE = """
import sys
from dgemma.checkpoints.source import resolve
try:
    print("Path", resolve(sys.argv[1], weights=sys.argv[2] == "True"))
except (OSError, ValueError) as error:
    print(type(error).__name__, error)
assert "torch" not in sys.modules
"""


class Hub(ThreadingHTTPServer):
    """As much of the hub's API as a download takes. `fail` maps a part of the API to a status and its X-Error-Code."""

    def __init__(self, files):
        super().__init__(("127.0.0.1", 0), Answer)
        self.files, self.fail, self.asked, self.tokens = files, {}, [], set()
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"


class Answer(BaseHTTPRequestHandler):
    def do_HEAD(self):
        self.answer()

    def do_GET(self):
        self.answer()

    def answer(self):
        path = self.path.split("?")[0]
        files = self.server.files
        self.server.tokens.add(self.headers.get("Authorization"))
        part = "resolve" if "/resolve/" in path else "tree" if "/tree/" in path else "info"
        if part in self.server.fail or NAME not in path:
            status, code = self.server.fail.get(part, (404, "RepoNotFound"))
            return self.reply(b"", status, {"X-Error-Code": code, "X-Error-Message": code} if code else {})
        if part == "info":
            siblings = [{"rfilename": file} for file in files]
            return self.reply(json.dumps({"id": NAME, "sha": SHA, "siblings": siblings}).encode())
        if part == "tree":
            tree = [{"type": "file", "path": file, "size": len(raw), "oid": etag(raw)} for file, raw in files.items()]
            return self.reply(json.dumps(tree).encode())
        file = path.split(f"/resolve/{SHA}/")[1]
        self.server.asked.append(file)
        return self.reply(files[file], headers={"X-Repo-Commit": SHA, "ETag": f'"{etag(files[file])}"'})

    def reply(self, body, status=200, headers=None):
        self.send_response(status)
        for name, value in {"Content-Length": len(body), **(headers or {})}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *args):
        pass


def etag(raw):
    return hashlib.sha1(raw).hexdigest()


@pytest.fixture
def hub():
    kept = {"config.json": b"{}", "model.safetensors": b"weights", "chat_template.jinja": b"{{ x }}"}
    left = {"README.md": b"read", "model.gguf": b"gguf", "original/model.safetensors": b"twice"}
    server = Hub(kept | left)
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def ask(tmp_path):
    """Resolves a name in a process of its own with these HF_ variables; returns "ErrorType message" or "Path ..."."""

    def run(name, weights=True, **variables):
        own = {"HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
        inherited = {k: v for k, v in os.environ.items() if not k.startswith("HF_") and "proxy" not in k.lower()}
        environment = {**inherited, **own, **variables}
        command = [sys.executable, "-c", CODE, name, str(weights)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=120)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("\n") == 1, done.stdout
        return done.stdout.strip()

    return run


def test_download_takes_what_is_needed_and_is_then_found_offline(hub, ask, tmp_path):
    first = ask(NAME, HF_ENDPOINT=hub.url, HF_TOKEN="hf_secret")
    directory = Path(first.removeprefix("Path "))
    assert directory.is_relative_to(tmp_path / "home")
    assert sorted(path.name for path in directory.iterdir()) == [
        "chat_template.jinja",
        "config.json",
        "model.safetensors",
    ]
    assert (directory / "model.safetensors").read_bytes() == b"weights"
    assert "Bearer hf_secret" in hub.tokens
    hub.asked.clear()
    assert ask(NAME, HF_ENDPOINT=hub.url, HF_HUB_OFFLINE="1") == first
    assert hub.asked == []
    (directory / "model.safetensors").unlink()
    assert ask(NAME, HF_ENDPOINT=hub.url, HF_HUB_OFFLINE="1").startswith(f"OSError {NAME} is only partly in the cache")


def test_a_description_comes_without_the_weights(hub, ask):
    directory = Path(ask(NAME, weights=False, HF_ENDPOINT=hub.url).removeprefix("Path "))
    assert sorted(path.name for path in directory.iterdir()) == ["chat_template.jinja", "config.json"]
    assert "model.safetensors" not in hub.asked


@pytest.mark.parametrize(("status", "code"), [(404, "RepoNotFound"), (401, "RepoNotFound")])
def test_unknown_repository(hub, ask, status, code):
    hub.fail["info"] = status, code
    said = ask(NAME, HF_ENDPOINT=hub.url)
    assert said == (
        f"FileNotFoundError {NAME} is neither a directory here nor a model on {hub.url}: check the spelling, "
        "or set HF_TOKEN if it is private"
    )


@pytest.mark.parametrize("part", ["info", "resolve"])
@pytest.mark.parametrize("status", [401, 403])
def test_gated_repository(hub, ask, part, status):
    hub.fail[part] = status, "GatedRepo"
    said = ask(NAME, HF_ENDPOINT=hub.url)
    assert (
        said == f"PermissionError {NAME} is gated: accept its terms at {hub.url}/{NAME} and set HF_TOKEN to your token"
    )


def test_refused_token(hub, ask):
    hub.fail["info"] = 401, "Invalid credentials in Authorization header"
    said = ask(NAME, HF_ENDPOINT=hub.url, HF_TOKEN="hf_old")
    assert said.startswith(f"OSError could not download {NAME}: the hub answers 401; set HF_TOKEN to a valid token")


def test_forbidden(hub, ask):
    hub.fail["info"] = 403, "Forbidden"
    said = ask(NAME, HF_ENDPOINT=hub.url)
    assert said.startswith(f"OSError {NAME} is not in the cache")
    assert "the hub did not hand it out: " in said
    assert "403" in said


def test_repository_without_a_config(hub, ask):
    del hub.files["config.json"], hub.files["model.safetensors"], hub.files["chat_template.jinja"]
    assert ask(NAME, HF_ENDPOINT=hub.url).startswith(f"FileNotFoundError {NAME} holds no config.json on the hub")


def test_an_adapter_needs_no_config_of_a_model(hub, ask):
    hub.files["adapter_config.json"] = hub.files.pop("config.json")
    assert ask(NAME, HF_ENDPOINT=hub.url).startswith("Path ")


def test_network_refused(ask):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    said = ask(NAME, HF_ENDPOINT=url)
    assert said.startswith(f"OSError {NAME} is not in the cache")
    assert f"{url} cannot be reached (ConnectError): check the network and HF_ENDPOINT" in said


@pytest.mark.parametrize("part", ["tree", "resolve"])
def test_refused_after_the_first_answer(hub, ask, part):
    hub.fail[part] = 403, ""
    said = ask(NAME, HF_ENDPOINT=hub.url)
    assert said.startswith(f"OSError {NAME} is not in the cache")
    assert "the hub did not hand it out: " in said
    assert "403" in said


def test_offline_and_not_cached(ask):
    said = ask(NAME, HF_HUB_OFFLINE="1")
    assert said.startswith(f"OSError {NAME} is not in the cache")
    assert said.endswith("HF_HUB_OFFLINE is set: unset it to download, or give a local directory")


def test_cache_that_cannot_be_written(hub, ask, tmp_path):
    (tmp_path / "file").write_text("not a directory")
    said = ask(NAME, HF_ENDPOINT=hub.url, HF_HOME=str(tmp_path / "file"))
    assert said.startswith(f"OSError could not download {NAME}: Not a directory")
    assert str(tmp_path / "file") in said


@pytest.mark.parametrize(
    ("number", "message"),
    [(errno.ENOSPC, "is full; free some, or set HF_HOME"), (errno.EACCES, "/cache cannot be written; set HF_HOME")],
)
def test_disk(monkeypatch, number, message):
    """A full disk cannot be had in a test: the client's own error stands in for it."""
    import huggingface_hub

    def full(*args, **options):
        raise OSError(number, os.strerror(number), "/cache")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", full)
    with pytest.raises(OSError, match=f"could not download {NAME}: .*{message}"):
        resolve(NAME)


@pytest.mark.parametrize("name", ["two words", "someone/model.git", "-dash", "a..b", "naïve/model"])
def test_not_a_hub_id(name):
    with pytest.raises(ValueError, match="is neither a directory here nor a hub id, which reads owner/name") as error:
        resolve(name)
    assert repr(name) in str(error.value)


@pytest.mark.parametrize("name", ["./model", "../model", "/no/model", "~/no-such-model", "a/b/c", "a/b/", Path("a")])
def test_paths_that_do_not_exist(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="there is no directory"):
        resolve(name)


def test_local_directories(tmp_path, monkeypatch):
    (tmp_path / "owner" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve("owner/model") == Path("owner/model")
    assert resolve(tmp_path / "owner") == tmp_path / "owner"
    assert resolve("~/owner") == tmp_path / "owner"


def test_an_empty_name_is_not_the_working_directory():
    with pytest.raises(ValueError, match="name is empty"):
        resolve("")


def test_files_are_refused(tmp_path):
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(b"")
    with pytest.raises(NotADirectoryError, match=r"model\.safetensors is a file; give the directory"):
        resolve(weights)
    with pytest.raises(FileNotFoundError, match=r"no file someone/model-q8_0\.gguf; a GGUF file of the hub"):
        resolve("someone/model-q8_0.gguf")
    (tmp_path / "model.gguf").write_bytes(b"")
    assert resolve(tmp_path / "model.gguf") == tmp_path / "model.gguf"


def test_embedded_names_come_first(tmp_path, monkeypatch):
    monkeypatch.setattr(embedded, "HERE", tmp_path / "embedded")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sudoku").mkdir()
    (tmp_path / "embedded" / "sudoku").mkdir(parents=True)
    assert resolve("sudoku") == Path("sudoku")
    (tmp_path / "embedded" / "sudoku" / "model.safetensors").touch()
    assert resolve("sudoku") == tmp_path / "embedded" / "sudoku"
    assert resolve("./sudoku") == Path("sudoku")


def test_the_base_of_an_adapter(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner" / "model").mkdir(parents=True)
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "owner/model"}')
    assert base_of(tmp_path) == Path("owner/model")
    assert base_of(tmp_path / "owner") is None
    (tmp_path / "config.json").touch()
    assert base_of(tmp_path) is None


@pytest.mark.parametrize("name", ["null", '""', "7"])
def test_an_adapter_that_names_no_base(tmp_path, name):
    (tmp_path / "adapter_config.json").write_text(f'{{"base_model_name_or_path": {name}}}')
    with pytest.raises(ValueError, match=r"adapter_config\.json lacks base_model_name_or_path"):
        base_of(tmp_path)
