"""Run Google's and Microsoft's stores on loopback, as far as a package emulates them; with what their clients need."""

import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from tests.support.ports import free_port

AZURE_ACCOUNT = "devstoreaccount1"
# Azurite's own, which is published and opens nothing else.
AZURE_KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
_GCS = (
    "import sys; from gcp_storage_emulator.server import create_server; "
    "create_server('127.0.0.1', int(sys.argv[1]), in_memory=True, default_bucket='bucket').run()"
)


class _Tokens(BaseHTTPRequestHandler):
    """Gives every service account a token; the emulator asks for none, but Google's client does."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = json.dumps({"access_token": "any", "expires_in": 3600, "token_type": "Bearer"}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


def has_gcs() -> bool:
    return importlib.util.find_spec("gcp_storage_emulator") is not None


def find_azurite() -> str | None:
    """Return Azurite's program: `npm install azurite`, and its `azurite-blob` in AZURITE or in the PATH."""
    return os.environ.get("AZURITE") or shutil.which("azurite-blob")


@contextmanager
def gcs_emulator(folder: Path) -> Iterator[dict[str, str]]:
    """Yield the environment of a client; the bucket is `bucket`."""
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import rsa

    tokens = ThreadingHTTPServer(("127.0.0.1", 0), _Tokens)
    threading.Thread(target=tokens.serve_forever, daemon=True).start()
    key = rsa.generate_private_key(65537, 2048).private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    account = {
        "type": "service_account",
        "project_id": "project",
        "private_key_id": "1",
        "private_key": key.decode(),
        "client_email": "tests@project.iam.gserviceaccount.com",
        "client_id": "1",
        "token_uri": f"http://127.0.0.1:{tokens.server_port}/token",
    }
    (folder / "account.json").write_text(json.dumps(account))
    port = free_port()
    with _running([sys.executable, "-c", _GCS, str(port)], port, folder / "gcs.log"):
        yield {
            "GOOGLE_APPLICATION_CREDENTIALS": str(folder / "account.json"),
            "GOOGLE_CLOUD_PROJECT": "project",
            "STORAGE_EMULATOR_HOST": f"http://127.0.0.1:{port}",
        }
    tokens.shutdown()
    tokens.server_close()


@contextmanager
def azurite(folder: Path) -> Iterator[str]:
    """Yield the address of the account, to which no environment leads: the clients' own is fixed to Microsoft's."""
    program = find_azurite()
    assert program is not None
    port = free_port()
    command = [program, "--blobPort", str(port), "--location", str(folder), "--silent", "--skipApiVersionCheck"]
    with _running([*command, "--disableTelemetry"], port, folder / "azurite.log"):
        yield f"http://127.0.0.1:{port}/{AZURE_ACCOUNT}"


@contextmanager
def _running(command: list[str], port: int, output: Path) -> Iterator[None]:
    with output.open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        until = time.monotonic() + 60
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), 1).close()
                break
            except OSError as error:
                if process.poll() is not None or time.monotonic() > until:
                    raise RuntimeError(f"{command[0]} did not come up:\n{output.read_text()}") from error
                time.sleep(0.1)
        yield
    finally:
        process.kill()
        process.wait()
