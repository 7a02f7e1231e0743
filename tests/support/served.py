"""Serve a detector within the test's process, at a free port."""

import json
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.client import HTTPConnection
from typing import Any

import uvicorn

from recipe import Detector
from recipe.serve.__main__ import bind
from recipe.serve.app import make_app
from recipe.serve.options import Limits


@contextmanager
def served(detector: Detector, limits: Limits | None = None, allowed: tuple[str, ...] = ()) -> Iterator[int]:
    """Yield the port."""
    address = bind("127.0.0.1", 0)
    app = make_app(detector, limits or Limits(), allowed)
    server = uvicorn.Server(uvicorn.Config(app, access_log=False, log_level="warning"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [address]}, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield address.getsockname()[1]
    finally:
        server.should_exit = True
        thread.join(30)
        address.close()


def ask(
    port: int, path: str, body: bytes | None = None, kind: str = "application/octet-stream"
) -> tuple[int, Any, Mapping[str, str]]:
    """Return status, content and headers of a request; a GET without a body."""
    connection = HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        connection.request(
            "GET" if body is None else "POST", path, body, {} if body is None else {"Content-Type": kind}
        )
        response = connection.getresponse()
        data, headers = response.read(), dict(response.getheaders())
        is_json = headers.get("content-type", "").startswith("application/json")
        return response.status, json.loads(data) if is_json else data, headers
    finally:
        connection.close()


def form(image: bytes, fields: tuple[tuple[str, str], ...] = ()) -> tuple[bytes, str]:
    """Return a form's body and content type."""
    border = "a-border-that-is-in-no-image"
    parts = [f'--{border}\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{text}\r\n' for name, text in fields]
    head = f'--{border}\r\nContent-Disposition: form-data; name="image"; filename="a.png"\r\n\r\n'
    return "".join(
        [*parts, head]
    ).encode() + image + f"\r\n--{border}--\r\n".encode(), f"multipart/form-data; boundary={border}"
