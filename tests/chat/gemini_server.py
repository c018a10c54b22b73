"""A local server that speaks Gemini's API as the official client does: resumable upload, files, generateContent.

Requests and answers follow the models of the installed google-genai (`google.genai.types`), which the tests check.
Google's server was not asked.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Answer = tuple[int, dict[str, Any]]


def said(text: str, finish: str = "STOP") -> Answer:
    """An answer of a model."""
    candidate = {"content": {"role": "model", "parts": [{"text": text}]}, "finishReason": finish, "index": 0}
    usage = {"promptTokenCount": 300, "candidatesTokenCount": 7, "thoughtsTokenCount": 3, "totalTokenCount": 310}
    return 200, {"candidates": [candidate], "usageMetadata": usage, "modelVersion": "m"}


def blocked() -> Answer:
    """A question that a filter stopped."""
    return 200, {"promptFeedback": {"blockReason": "SAFETY"}, "usageMetadata": {"promptTokenCount": 300}}


def failed(code: int, status: str, retry: str = "") -> Answer:
    """An error; `retry` is the delay of a RetryInfo."""
    details = [{"@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": retry}] if retry else []
    return code, {"error": {"code": code, "message": f"it is {status}", "status": status, "details": details}}


class GeminiServer:
    """Answers generateContent with what `answer` returns for the number of the call, from 0."""

    def __init__(self, answer: Callable[[int], Answer]) -> None:
        self.calls: list[dict[str, Any]] = []
        self.uploads: dict[str, bytes] = {}
        self.upload_requests: list[dict[str, Any]] = []
        self.deleted: list[str] = []
        self.keys: set[str | None] = set()
        self.uploads_to = ""
        """Another address that it sends uploads to."""
        self._looks: dict[str, int] = {}
        lock = threading.Lock()
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                with lock:
                    if "upload_id=" not in self.path:
                        server.keys.add(self.headers.get("x-goog-api-key"))
                    if self.path.endswith(":generateContent"):
                        number = len(server.calls)
                        server.calls.append(json.loads(body))
                        return self._send(*answer(number))
                    if "upload_id=" in self.path:
                        name = f"files/f{self.path.rpartition('=')[2]}"
                        server.uploads[name] = body
                        return self._send(200, {"file": server.file(name)}, {"X-Goog-Upload-Status": "final"})
                    assert re.fullmatch(r"/upload/v1(beta)?/files", self.path), self.path
                    server.upload_requests.append({"headers": dict(self.headers.items()), "body": json.loads(body)})
                    there = server.uploads_to or f"http://{self.headers['Host']}"
                    url = f"{there}/upload/v1beta/files?upload_id={len(server.upload_requests)}"
                    return self._send(200, {}, {"X-Goog-Upload-URL": url, "X-Goog-Upload-Status": "active"})

            def do_GET(self) -> None:
                self._send(200, server.file(_name(self.path)))

            def do_DELETE(self) -> None:
                server.deleted.append(_name(self.path))
                self._send(200, {})

            def _send(self, status: int, body: dict[str, Any], headers: dict[str, str] | None = None) -> None:
                data = json.dumps(body).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                for name, value in (headers or {}).items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def file(self, name: str) -> dict[str, Any]:
        """A file, which is processed at the second look."""
        self._looks[name] = self._looks.get(name, 0) + 1
        state = "ACTIVE" if self._looks[name] > 1 else "PROCESSING"
        return {"name": name, "uri": f"{self.url}/v1beta/{name}", "mimeType": "video/mp4", "state": state}

    def __enter__(self) -> GeminiServer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()


def _name(path: str) -> str:
    return re.sub(r"^/v1(beta)?/", "", path)
