"""Images behind URLs: which are asked for at all, and what an answer may be."""

import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar

import pytest

from recipe.serve import fetch as module
from recipe.serve.admission import Refusal
from recipe.serve.fetch import fetch, public_address

HOST = "images.example.org"


@pytest.mark.parametrize(
    ("url", "status"),
    [
        ("http://images.example.org/a.png", 400),  # not encrypted
        ("https://images.example.org:8443/a.png", 400),
        ("https://user:word@images.example.org/a.png", 400),
        ("https:///a.png", 400),
        ("ftp://images.example.org/a.png", 400),
        ("https://images.example.org/a b.png", 400),
        ("https://other.example.org/a.png", 403),
        ("https://sub.images.example.org/a.png", 403),
        ("https://127.0.0.1/a.png", 403),
    ],
)
def test_urls_that_are_not_asked_for(url: str, status: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: pytest.fail("looked up"))
    with pytest.raises(Refusal) as refusal:
        fetch(url, [HOST], 100, 1)
    assert refusal.value.status == status


def test_without_allowed_hosts_none_is_asked_for() -> None:
    with pytest.raises(Refusal, match="send the image itself"):
        fetch(f"https://{HOST}/a.png", [], 100, 1)


@pytest.mark.parametrize(
    "addresses", [["127.0.0.1"], ["10.1.2.3"], ["169.254.1.1"], ["::1"], ["fd00::1"], ["93.184.216.34", "192.168.0.7"]]
)
def test_a_host_of_the_inner_network_is_refused(addresses: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: [(0, 0, 0, "", (one, 443)) for one in addresses])
    with pytest.raises(Refusal, match="not public") as refusal:
        fetch(f"https://{HOST}/a.png", [HOST], 100, 1)
    assert refusal.value.status == 403


def test_an_address_is_looked_up_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: [(0, 0, 0, "", ("93.184.216.34", 443))])
    assert public_address(HOST) == "93.184.216.34"


class Store(BaseHTTPRequestHandler):
    asked: ClassVar[list[tuple[str, str | None]]] = []

    def do_GET(self) -> None:
        self.asked.append((self.path, self.headers["Host"]))
        found = {"/small?x=1": (200, 50), "/large": (200, 5000), "/moved": (302, 0), "/none": (404, 9)}[self.path]
        self.send_response(found[0])
        if found[0] == 302:
            self.send_header("Location", "/small?x=1")
        self.send_header("Content-Length", str(found[1]))
        self.end_headers()
        self.wfile.write(b"x" * found[1])

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Store]]:
    """A server in place of the public one; the connection is not encrypted."""

    class Plain:
        def wrap_socket(self, plain: socket.socket, server_hostname: str) -> socket.socket:
            assert server_hostname == HOST
            return plain

    server = ThreadingHTTPServer(("127.0.0.1", 0), Store)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(module, "public_address", lambda host: "127.0.0.1")
    monkeypatch.setattr(module, "PORT", server.server_port)
    monkeypatch.setattr(module.ssl, "create_default_context", Plain)
    Store.asked.clear()
    yield Store
    server.shutdown()
    server.server_close()


def test_an_image_is_fetched_within_its_limits(store: type[Store]) -> None:
    assert fetch(f"https://{HOST}/small?x=1", [HOST], 100, 5) == b"x" * 50
    assert store.asked[0][0] == "/small?x=1" and (store.asked[0][1] or "").startswith(HOST)
    for path, status in (("large", 413), ("moved", 400), ("none", 400)):
        with pytest.raises(Refusal) as refusal:
            fetch(f"https://{HOST}/{path}", [HOST], 100, 5)
        assert refusal.value.status == status
    assert len(store.asked) == 4, "a redirect is not followed"
