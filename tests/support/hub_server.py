"""Serve a fake Hugging Face hub on loopback: one repository, what `upload_folder` and `snapshot_download` ask."""

import base64
import json
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha1
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

REPOSITORY, TOKEN, COMMIT = "me/model", "hf_aVerySecretToken", "1" * 40


class Hub(ThreadingHTTPServer):
    """Holds the files of the repository and what was asked."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files: dict[str, bytes] = {}
        self.objects: dict[str, bytes] = {}  # of large files, by their SHA-256
        self.created: list[dict[str, Any]] = []
        self.asked: list[str] = []

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    server: Hub  # pyright: ignore[reportIncompatibleVariableOverride]
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def _reply(self, status: int, content: Any = None, **headers: str) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path, hub = self.path.partition("?")[0], self.server
        hub.asked.append(f"{self.command} {path}")
        if path.startswith("/lfs/") and self.command == "PUT":
            hub.objects[path.removeprefix("/lfs/")] = body
            self._reply(200, {})
        elif self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._reply(401, {"error": "Invalid credentials"})
        elif path == "/api/whoami-v2":
            self._reply(200, {"type": "user", "name": "me"})
        elif path == "/api/repos/create":
            hub.created.append(json.loads(body))
            self._reply(200, {"url": f"{hub.endpoint}/{REPOSITORY}"})
        elif path == "/api/validate-yaml":
            self._reply(200, {"errors": [], "warnings": []})
        elif path == f"/api/models/{REPOSITORY}/preupload/main":
            modes = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                }
                for file in json.loads(body)["files"]
            ]
            self._reply(200, {"files": modes})
        elif path == f"/{REPOSITORY}.git/info/lfs/objects/batch":
            objects = [
                {**item, "actions": {"upload": {"href": f"{hub.endpoint}/lfs/{item['oid']}"}}}
                for item in json.loads(body)["objects"]
            ]
            self._reply(200, {"transfer": "basic", "objects": objects}, Content_Type="application/json")
        elif path == f"/api/models/{REPOSITORY}/commit/main":
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    hub.files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    hub.files[value["path"]] = hub.objects[value["oid"]]
            self._reply(200, {"commitUrl": f"{hub.endpoint}/{REPOSITORY}/commit/{COMMIT}", "commitOid": COMMIT})
        elif path == f"/api/models/{REPOSITORY}/revision/main":
            siblings = [{"rfilename": name} for name in hub.files]
            self._reply(200, {"id": REPOSITORY, "sha": COMMIT, "private": True, "siblings": siblings})
        elif path.startswith(f"/{REPOSITORY}/resolve/"):
            content = hub.files.get(path.split("/", 5)[5])
            if content is None:
                self._reply(404, {}, X_Error_Code="EntryNotFound")
            else:
                self._reply(200, content, ETag=f'"{sha1(content).hexdigest()}"', X_Repo_Commit=COMMIT)
        else:
            self._reply(404, {"error": f"the stub does not know {path}"}, X_Error_Code="RepoNotFound")

    do_GET = do_HEAD = do_POST = do_PUT = _answer


@contextmanager
def hub_server() -> Iterator[Hub]:
    """Serve until the block ends."""
    with Hub() as hub:
        Thread(target=hub.serve_forever, daemon=True).start()
        try:
            yield hub
        finally:
            hub.shutdown()
