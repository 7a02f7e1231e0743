"""A W&B server on loopback, well or ill in several ways."""

import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

ILLS = ("refused", "401", "500", "silent", "cannot open runs")


class _Server(ThreadingHTTPServer):
    """`status` answers every request; without it those that a run makes are answered like W&B does."""

    daemon_threads = True
    status: int | None = None
    opens_runs = True
    num_uploads = 0

    def answer(self, path: str, body: str) -> tuple[int, dict[str, Any]]:
        if self.status is not None:
            return self.status, {}
        if not path.endswith("/graphql"):
            self.num_uploads += 1
            return 200, {}
        if "ProbeServerCapabilities" in body:
            return 200, {"data": {name: {"fields": []} for name in ("QueryType", "MutationType", "ServerInfoType")}}
        variables = json.loads(body).get("variables") or {}
        if "upsertBucket" in body:
            project = {"id": "P", "name": "p", "entity": {"id": "E", "name": "e"}}
            bucket = {"id": "B", "name": variables.get("name"), "displayName": "r", "config": "{}", "project": project}
            answer = {"upsertBucket": {"bucket": {**bucket, "historyLineCount": 0}, "inserted": True}}
            return (200, {"data": answer}) if self.opens_runs else (500, {})
        if "createRunFiles" in body:
            url = f"http://127.0.0.1:{self.server_port}/upload/"
            files = [{"name": name, "uploadUrl": url + name} for name in variables["files"]]
            return 200, {"data": {"createRunFiles": {"runID": "B", "uploadHeaders": [], "files": files}}}
        viewer = {"id": "V", "entity": "e", "username": "u", "flags": "{}", "teams": {"edges": []}}
        return 200, {"data": {"viewer": viewer, "serverInfo": {"cliVersionInfo": {}, "latestLocalVersionInfo": None}}}


class _Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        assert isinstance(self.server, _Server)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0)).decode(errors="replace")
        if self.path == "/die":
            self.server.status = 503
            threading.Thread(target=self.server.shutdown).start()
        status, answer = self.server.answer(self.path, body)
        data = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    do_GET = do_PUT = do_POST

    def log_message(self, format: str, *args: Any) -> None:
        pass


@contextmanager
def wandb_server(ill: str | None = None) -> Iterator[str]:
    """The address of a server that has one of `ILLS`, or is well until `POST /die`, after which it never answers."""
    if ill in ("refused", "silent"):
        with socket.create_server(("127.0.0.1", 0)) as listener:
            address = f"http://127.0.0.1:{listener.getsockname()[1]}"
            if ill == "refused":
                listener.close()
            yield address
        return
    with _Server(("127.0.0.1", 0), _Handler) as server:
        server.status = int(ill) if ill and ill.isdigit() else None
        server.opens_runs = ill != "cannot open runs"
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
