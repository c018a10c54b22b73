"""A proxy before a real S3 server that does what networks and busy stores do: fail, stall, and cut connections."""

from __future__ import annotations

import http.client
import random
import re
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Literal
from urllib.parse import unquote, urlsplit

Fault = Literal[
    "InternalError",
    "SlowDown",
    "RequestTimeout",
    "AccessDenied",
    "NoSuchBucket",
    "ExpiredToken",
    "InvalidAccessKeyId",
    "RequestTimeTooSkewed",
    "PreconditionFailed",
    "QuotaExceeded",
    "NoSuchKey",
    "no store",
    "silence",
    "reset before",
    "reset after",
    "half an answer",
    "other bytes",
]
TRANSIENT: tuple[Fault, ...] = (
    "InternalError",
    "SlowDown",
    "RequestTimeout",
    "silence",
    "reset before",
    "reset after",
    "half an answer",
)
SILENCE_S = 2.0
"""Longer than the read timeout of the tests."""

_STATUS = {
    "InternalError": 500,
    "SlowDown": 503,
    "RequestTimeout": 400,
    "AccessDenied": 403,
    "NoSuchBucket": 404,
    "ExpiredToken": 400,
    "InvalidAccessKeyId": 403,
    "RequestTimeTooSkewed": 403,
    "PreconditionFailed": 412,
    "QuotaExceeded": 403,
    "NoSuchKey": 404,
    "no store": 404,
}

Choose = Callable[[str, str], Fault | None]
"""Which fault, if any, befalls a request of (method, path)."""


def scripted(faults: Iterable[Fault | None], *, method: str = "") -> Choose:
    """The faults one after the other, for requests of `method` (all if empty), then none."""
    rest: Iterator[Fault | None] = iter(list(faults))
    return lambda verb, _: next(rest, None) if verb.startswith(method) else None


def seeded(share: float, seed: int, faults: tuple[Fault, ...] = TRANSIENT) -> Choose:
    """A random fault for a share of the requests."""
    generator = random.Random(seed)
    return lambda *_: generator.choice(faults) if generator.random() < share else None


class FaultProxy:
    """Forwards to `endpoint` and meddles as `choose` says."""

    def __init__(self, endpoint: str) -> None:
        self.choose: Choose = lambda *_: None
        self.lag_s = 0.0
        """Seconds after its first write during which listings do not show a name."""
        self.hidden = 0
        """Names that listings left out."""
        self._born: dict[str, float] = {}
        self.injected: Counter[str] = Counter()
        self.requests: Counter[str] = Counter()
        self._lock = threading.Lock()
        upstream = urlsplit(endpoint).netloc
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def _handle(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                fault = proxy._next(self.command, self.path)
                if fault in _STATUS:
                    self._refuse(fault or "")
                elif fault == "silence":
                    time.sleep(SILENCE_S)
                    self.close_connection = True
                elif fault == "reset before":
                    self._reset()
                else:
                    self._forward(body, fault)

            do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = _handle  # noqa: N815

            def _forward(self, body: bytes, fault: Fault | None) -> None:
                server = http.client.HTTPConnection(upstream, timeout=60)
                server.request(self.command, self.path, body, dict(self.headers))
                answer = server.getresponse()
                data = answer.read()
                server.close()
                if self.command in ("PUT", "POST") and answer.status == 200:
                    proxy._born.setdefault(unquote(urlsplit(self.path).path).lstrip("/"), time.monotonic())
                if "list-type=2" in self.path and answer.status == 200:
                    data = proxy._as_listed(unquote(urlsplit(self.path).path).strip("/"), data)
                if fault == "reset after":
                    self._reset()
                    return
                if fault == "other bytes":
                    data = data[:-1] + bytes([data[-1] ^ 1])
                self.send_response(answer.status)
                for name, value in answer.getheaders():
                    if name.lower() not in ("connection", "transfer-encoding", "content-length", "date", "server"):
                        self.send_header(name, value)
                length = answer.getheader("Content-Length") if self.command == "HEAD" else None
                self.send_header("Content-Length", length or str(len(data)))
                self.end_headers()
                if fault == "half an answer":
                    self.wfile.write(data[: len(data) // 2])
                    self.wfile.flush()
                    self._reset()
                elif self.command != "HEAD":
                    self.wfile.write(data)

            def _refuse(self, code: str) -> None:
                text = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>made up by the test</Message></Error>"
                if code == "no store":
                    text = "<html>a machine that knows nothing of buckets</html>"
                data = b"" if self.command == "HEAD" else text.encode()
                self.send_response(_STATUS[code])
                self.send_header("Content-Type", "application/xml")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def _reset(self) -> None:
                # No lingering: the peer gets RST instead of an orderly end.
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.connection.shutdown(socket.SHUT_RD)
                self.close_connection = True
                self.connection.close()

            def finish(self) -> None:
                if self.connection.fileno() >= 0:
                    super().finish()

            def log_message(self, *_: object) -> None:
                """Quiet."""

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 128

            def shutdown_request(self, request: object) -> None:
                if request.fileno() >= 0:  # type: ignore[attr-defined]
                    super().shutdown_request(request)  # type: ignore[arg-type]

            def handle_error(self, *_: object) -> None:
                """A client that gave up is what these tests are about."""

        self._server = Server(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}"

    def _next(self, method: str, path: str) -> Fault | None:
        with self._lock:
            self.requests[method] += 1
            fault = self.choose(method, path)
            if fault is not None:
                self.injected[fault] += 1
        return fault

    def _as_listed(self, bucket: str, answer: bytes) -> bytes:
        """A listing without the names that are too young."""

        def shown(entry: re.Match[bytes]) -> bytes:
            key = unquote(re.search(rb"<Key>(.*?)</Key>", entry[0])[1].decode())  # type: ignore[index]
            if time.monotonic() - self._born.get(f"{bucket}/{key}", float("-inf")) < self.lag_s:
                self.hidden += 1
                return b""
            return entry[0]

        return re.sub(rb"<Contents>.*?</Contents>", shown, answer, flags=re.DOTALL)

    @contextmanager
    def running(self) -> Iterator[FaultProxy]:
        """Answer requests for the time of the block."""
        thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self._server.shutdown()
            thread.join()
            self._server.server_close()
