"""A stub of the W&B server on loopback: enough of its GraphQL for `wandb` 0.31, and faults that a test chooses."""

from __future__ import annotations

import gzip
import json
import re
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any

Answer = tuple[int, Any]
"""HTTP status and JSON value."""
Fault = Callable[[str, dict[str, Any]], "Answer | None"]
"""Called with the name of an operation (`file_stream` and `upload` too) and its variables. None: no fault."""


class WandbServer:
    """Answers as W&B does. Keeps the operations in `calls`, and what runs logged in `history` and `uploaded`."""

    def __init__(self) -> None:
        self.fault: Fault = lambda name, variables: None
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.history: dict[str, list[dict[str, Any]]] = {}
        """Run id -> lines of the history."""
        self.uploaded: list[str] = []
        self.finished: list[str] = []
        """Ids of the runs whose end has arrived."""
        self.released = threading.Event()
        """Ends the faults that wait."""
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *arguments: Any) -> None:
                pass

            def do_GET(self) -> None:
                self._answer(200, {})

            def do_PUT(self) -> None:
                self._body()
                self._answer(*outer.upload(self.path))

            def do_POST(self) -> None:
                body = self._body()
                if self.path == "/graphql":
                    self._answer(*outer.operate(json.loads(body)))
                elif self.path.endswith("/file_stream"):
                    self._answer(*outer.stream(self.path.split("/")[-2], json.loads(body)))
                else:
                    self._answer(200, {})

            def _body(self) -> bytes:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                return gzip.decompress(body) if self.headers.get("Content-Encoding") == "gzip" else body

            def _answer(self, status: int, value: Any) -> None:
                content = json.dumps(value).encode()
                try:
                    self.send_response(status)
                    self.send_header("Content-Type", "application/json")
                    self.send_header("Content-Length", str(len(content)))
                    self.end_headers()
                    self.wfile.write(content)
                except ConnectionError:  # the client did not wait
                    self.close_connection = True

        class Server(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, request: Any, client_address: Any) -> None:
                """Ignores a client that has ended its connection."""

        self._server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> WandbServer:
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.released.set()
        self._server.shutdown()
        self._server.server_close()

    @property
    def environment(self) -> dict[str, str]:
        """Variables with which a process logs to this server."""
        return {"WANDB_BASE_URL": self.url, "WANDB_API_KEY": "0" * 40, "WANDB_MODE": "online"}

    def operate(self, request: dict[str, Any]) -> Answer:
        found = re.search(r"(?:query|mutation)\s+(\w+)", request["query"])
        name, variables = found.group(1) if found else "", request.get("variables") or {}
        self.calls.append((name, variables))
        if fault := self.fault(name, variables):
            return fault
        answer = getattr(self, f"_answer_{name}", lambda **_: {})
        return 200, {"data": answer(**variables)}

    def stream(self, run: str, body: dict[str, Any]) -> Answer:
        if fault := self.fault("file_stream", body):
            return fault
        lines = body.get("files", {}).get("wandb-history.jsonl", {}).get("content", [])
        self.history.setdefault(run, []).extend(map(json.loads, lines))
        if body.get("complete"):
            self.finished.append(run)
        return 200, {"exitcode": None, "limits": {}}

    def upload(self, path: str) -> Answer:
        if fault := self.fault("upload", {"path": path}):
            return fault
        self.uploaded.append(path.removeprefix("/storage/"))
        return 200, {}

    # --- operations -----------------------------------------------------------------------------------------------

    def _answer_Viewer(self, **_: Any) -> Any:
        teams = {"edges": [{"node": {"name": "me"}}]}
        return {"viewer": {"id": "1", "entity": "me", "username": "me", "email": "", "flags": "{}", "teams": teams}}

    def _answer_UpsertBucket(self, name: str, project: str, entity: str | None = None, **_: Any) -> Any:
        owner = {"id": "e", "name": entity or "me"}
        bucket = {"id": f"bucket-{name}", "name": name, "displayName": name, "description": None, "config": "{}"}
        bucket |= {"sweepName": None, "historyLineCount": 0, "project": {"id": "p", "name": project, "entity": owner}}
        return {"upsertBucket": {"bucket": bucket, "inserted": True}}

    def _answer_RunResumeStatus(self, **_: Any) -> Any:
        return {"model": None}

    def _answer_ArtifactType(self, **_: Any) -> Any:
        return {"project": None}

    def _answer_CreateRunFiles(self, files: list[str], **_: Any) -> Any:
        places = [{"name": name, "uploadUrl": f"{self.url}/storage/{name}"} for name in files]
        return {"createRunFiles": {"runID": "1", "uploadHeaders": [], "files": places}}

    def _answer_CreateArtifact(self, **_: Any) -> Any:
        # As if the server had an artifact of the same content: then its files are not uploaded.
        sequence = {"latestArtifact": {"id": "1"}}
        return {"createArtifact": {"artifact": {"id": "1", "state": "COMMITTED", "artifactSequence": sequence}}}
