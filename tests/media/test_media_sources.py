"""Where bytes may come from: nothing is fetched, or read from a path, unless that is allowed."""

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from dgemma.media import sources
from dgemma.media.sources import Sources


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        if self.path == "/moved":
            self.send_response(302)
            self.send_header("Location", "/a.png")
            self.end_headers()
            return
        body = b"x" * 5000 if self.path == "/large" else b"bytes"
        self.send_response(404 if self.path == "/none" else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def remote() -> Iterator[str]:
    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_an_allowed_host_is_fetched_from(remote: str, monkeypatch: pytest.MonkeyPatch) -> None:
    allowed = Sources(hosts=(remote,))
    assert allowed.bytes_of(f"http://{remote}/a.png", "it") == b"bytes"
    with pytest.raises(ValueError, match=r"it: .* cannot be fetched: .*404"):
        allowed.bytes_of(f"http://{remote}/none", "it")
    with pytest.raises(ValueError, match=r"it: .* cannot be fetched: .*302"):
        allowed.bytes_of(f"http://{remote}/moved", "it")
    monkeypatch.setattr(sources, "MAX_REMOTE_BYTES", 1000)
    with pytest.raises(ValueError, match="larger than 1000 bytes"):
        allowed.bytes_of(f"http://{remote}/large", "it")


def test_nothing_else_is(remote: str) -> None:
    host = remote.partition(":")[0]
    for hosts in ((), (host,), ("example.org",), (f"{remote}0",)):
        with pytest.raises(ValueError, match=f"it: nothing is fetched from '{host}'"):
            Sources(hosts=hosts).bytes_of(f"http://{remote}/a.png", "it")
    for url in (f"http://{remote}@evil.example/a", f"http://evil.example/{remote}", f"http://{remote}.evil.example/"):
        with pytest.raises(ValueError, match="it: "):
            Sources(hosts=(remote,)).bytes_of(url, "it")
    with pytest.raises(ValueError, match="user name"):
        Sources(hosts=(remote,)).bytes_of(f"http://me:pass@{remote}/a.png", "it")


def test_paths_only_where_they_are_allowed(tmp_path) -> None:
    (tmp_path / "a").write_bytes(b"secret")
    for path in (str(tmp_path / "a"), f"file://{tmp_path}/a", "ftp://x/y", "a"):
        with pytest.raises(ValueError, match="it: a data: URL is expected"):
            Sources(files=False).bytes_of(path, "it")
    assert Sources().bytes_of(str(tmp_path / "a"), "it") == tmp_path / "a"
    with pytest.raises(ValueError, match="there is no file"):
        Sources().bytes_of(str(tmp_path / "b"), "it")


def test_data_urls() -> None:
    assert Sources(files=False).bytes_of("data:image/png;base64,aGVsbG8=", "it") == b"hello"
    assert Sources(files=False).bytes_of("data:,hello%20you", "it") == b"hello you"
