"""A Hub of one's own: an HTTP server that speaks the routes which huggingface_hub uses, and serves plain files too."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """Files by ``repository/path``, or by their plain path; connections can be cut in the middle of a file."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.moved: dict[str, str] = {}
        """Plain paths that are answered with another place."""
        self.cut_after: dict[str, int] = {}
        """Bytes after which the next download of a file is cut off, once."""
        self.stall_after: dict[str, int] = {}
        """Bytes after which the next download of a file stands still, once, until the hub ends."""
        self.closed = False
        """Answer 503 to every download."""
        self.ranges: list[str | None] = []
        """Range header of every download."""
        self.tokens: list[str | None] = []
        """Authorization header of every request."""
        self.endpoint = ""

    @contextmanager
    def serve(self) -> Iterator[Hub]:
        hub, ended = self, threading.Event()

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, format: str, *args: Any) -> None:
                pass

            def do_HEAD(self) -> None:
                self._answer(body=False)

            def do_GET(self) -> None:
                self._answer(body=True)

            def _answer(self, body: bool) -> None:
                hub.tokens.append(self.headers.get("Authorization"))
                plain = self.path.lstrip("/")
                if plain in hub.moved:
                    self.send_response(302)
                    self.send_header("Location", f"{hub.endpoint}/{hub.moved[plain]}")
                    self.send_header("Content-Length", "0")
                    self.end_headers()
                    return
                repository, _, rest = plain.partition("/resolve/")
                name = f"{repository}/{rest.partition('/')[2]}" if rest else plain
                content = hub.files.get(name)
                if content is None:
                    self.send_response(404)
                    self.send_header("X-Error-Code", "EntryNotFound")
                    self.send_header("Content-Length", "0")
                    self.end_headers()
                    return
                start, status = 0, 200
                if body:
                    wanted = self.headers.get("Range")
                    hub.ranges.append(wanted)
                    if hub.closed:
                        self.send_response(503)
                        self.send_header("Content-Length", "0")
                        self.end_headers()
                        return
                    if wanted is not None:
                        start, status = int(wanted.removeprefix("bytes=").rstrip("-")), 206
                        if start >= len(content):
                            self.send_response(416)
                            self.send_header("Content-Length", "0")
                            self.end_headers()
                            return
                self.send_response(status)
                self.send_header("X-Repo-Commit", COMMIT)
                self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
                self.send_header("Content-Length", str(len(content) - start))
                if status == 206:
                    self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
                self.end_headers()
                if body:
                    stalls = name in hub.stall_after
                    end = hub.stall_after.pop(name, hub.cut_after.pop(name, len(content)))
                    self.wfile.write(content[start:end])
                    if stalls:
                        ended.wait()

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        self.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
        try:
            yield self
        finally:
            ended.set()
            server.shutdown()
            server.server_close()
            thread.join()
