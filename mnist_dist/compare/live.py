"""A web server for the live page, which follows runs while they train. It answers requests from this machine only."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock
from typing import Any
from urllib.parse import quote

from mnist_dist.compare.page import Page, render, to_json

ADDRESS = "127.0.0.1"


class LiveServer(ThreadingHTTPServer):
    """Serves the page at /, its newest values at /data, and the pictures that these values name.

    Args:
        port: 0 for any free port.
        values: returns the newest values of a page; never called by two threads at once.

    Raises:
        OSError: the port is in use or may not be used.
        OverflowError: the port is not between 0 and 65535.
    """

    daemon_threads = True  # a browser's open connection must not delay the exit

    def __init__(self, port: int, values: Callable[[Page], dict[str, Any]]):
        super().__init__((ADDRESS, port), _Handler)
        self._values, self._page, self._lock = values, Page(self._picture_url), Lock()
        self.pictures: dict[str, Path] = {}
        self.url = f"http://{ADDRESS}:{self.server_port}/"

    def newest(self) -> dict[str, Any]:
        """Returns the current values of the page."""
        with self._lock:
            return self._values(self._page)

    def _picture_url(self, path: Path) -> str:
        """Returns a URL that changes with the file's content, because browsers cache pictures."""
        if not path.is_file():
            return ""
        url = f"/picture/{quote(os.fsencode(path.resolve()))}?{path.stat().st_mtime_ns}"
        self.pictures[url] = path
        return url


class _Handler(BaseHTTPRequestHandler):
    server: LiveServer

    def do_GET(self) -> None:
        # DNS rebinding: the host name of a foreign page can resolve to this machine. The browser still sends that host
        # name.
        if self.headers.get("Host", "").split(":")[0] not in (ADDRESS, "localhost"):
            self.send_error(403, "this server answers only requests to localhost")
            return
        path, _, known = self.path.partition("?")
        try:
            if path == "/":
                self._send("text/html; charset=utf-8", render(self.server.newest(), live=True).encode())
            elif path == "/data":
                text = to_json(self.server.newest()).encode()
                version = hashlib.sha256(text).hexdigest()[:16]
                self._send("application/json", b"" if known == version else text, version)
            elif self.path in self.server.pictures:
                self._send("image/png", self.server.pictures[self.path].read_bytes())
            else:
                self.send_error(404)
        except ConnectionError:
            pass  # the browser closed the connection
        except OSError as error:
            self.send_error(404, error.strerror)

    def _send(self, kind: str, content: bytes, version: str = "") -> None:
        self.send_response(200 if content else 204)
        for name, value in (("Content-Type", kind), ("Content-Length", str(len(content))), ("X-Version", version)):
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        pass
