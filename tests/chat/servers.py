"""A real OpenAI-compatible server (`transformers serve`), and a proxy before it that counts calls and makes faults."""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import socket
import struct
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

Fault = str | bytes
"""429 N (Retry-After: N), 307 ADDRESS, HTTP status, cut, silence, not json, no message, refusal or text:… (an answer).

Bytes are sent as they are, those of gzip with their encoding."""
SILENCE_S = 2.0


@contextmanager
def transformers_serve(folder: Path) -> Iterator[int]:
    """`transformers serve` with the model in `folder` on the CPU; yields its port."""
    port = free_port()
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    command = ["serve", str(folder), "--port", str(port), "--device", "cpu", "--host", "127.0.0.1"]
    log = folder.with_suffix(".log")
    with log.open("w") as output:
        server = subprocess.Popen(
            [sys.executable, "-c", "from transformers.cli.transformers import main; main()", *command],
            stdout=output,
            stderr=output,
            env=environment,
        )
        try:
            deadline = time.monotonic() + 180
            while not _answers(port):
                assert server.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
                time.sleep(0.2)
            yield port
        finally:
            server.terminate()
            try:
                server.wait(10)
            except subprocess.TimeoutExpired:
                server.kill()
                server.wait()


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


def _answers(port: int) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=2)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()


class ChatProxy:
    """Counts chat completions by body and answers some of them with a fault.

    `fault` gets the number of the call, from 0, and its body. Without `port` every call needs one.
    """

    def __init__(self, port: int | None, fault: Callable[[int, dict[str, Any]], Fault | None]) -> None:
        self.port = port
        self.fault = fault
        self.calls: list[dict[str, Any]] = []
        self.headers: list[Mapping[str, str]] = []
        self.answered: Counter[str] = Counter()
        """Whole answers by digest of the body."""
        self.at_once = self.most_at_once = 0
        self.lock = threading.Lock()
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                with proxy.lock:
                    number = len(proxy.calls)
                    proxy.calls.append(json.loads(body))
                    proxy.headers.append({name.lower(): value for name, value in self.headers.items()})
                    proxy.at_once += 1
                    proxy.most_at_once = max(proxy.most_at_once, proxy.at_once)
                try:
                    proxy.serve(self, body, proxy.fault(number, proxy.calls[number]))
                except (BrokenPipeError, ConnectionResetError):
                    self.close_connection = True
                finally:
                    with proxy.lock:
                        proxy.at_once -= 1

            def log_message(self, format: str, *args: Any) -> None:
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 64

        self._server = Server(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}/v1"

    def serve(self, handler: BaseHTTPRequestHandler, body: bytes, fault: Fault | None) -> None:
        if isinstance(fault, bytes):
            return _send(handler, 200, fault, {"Content-Encoding": "gzip"} if fault.startswith(b"\x1f\x8b") else {})
        if fault == "silence":
            time.sleep(SILENCE_S)
            handler.close_connection = True
            return
        if fault and fault.split()[0].isdecimal():
            status, _, after = fault.partition(" ")
            error = json.dumps({"error": {"message": f"fault {status}", "code": None, "type": "x", "param": None}})
            header = "Location" if status.startswith("3") else "Retry-After"
            return _send(handler, int(status), error.encode(), {header: after} if after else {})
        if fault in ("refusal", "no message") or (fault or "").startswith("text:"):
            message: dict[str, Any] = {"role": "assistant", "content": (fault or "")[5:]}
            if fault == "refusal":
                message = {"role": "assistant", "content": None, "refusal": "I can't help with that."}
            choices = [] if fault == "no message" else [{"index": 0, "message": message, "finish_reason": "stop"}]
            usage = {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15}
            answer = json.dumps({"id": "x", "object": "chat.completion", "choices": choices, "usage": usage}).encode()
            if choices:
                self._count(body)
            return _send(handler, 200, answer)
        if fault == "not json":
            return _send(handler, 200, b'{"choices": [{"mess')
        assert self.port is not None, "no server behind this proxy"
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        connection.request("POST", handler.path, body, {"Content-Type": "application/json"})
        response = connection.getresponse()
        answer = response.read()
        connection.close()
        if fault == "cut":
            handler.send_response(response.status)
            handler.send_header("Content-Type", "application/json")
            handler.send_header("Content-Length", str(len(answer)))
            handler.end_headers()
            handler.wfile.write(answer[: len(answer) // 2])
            handler.wfile.flush()
            handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            handler.close_connection = True
            return
        if response.status == 200:
            self._count(body)
        _send(handler, response.status, answer)

    def _count(self, body: bytes) -> None:
        with self.lock:
            self.answered[hashlib.sha256(body).hexdigest()] += 1

    def __enter__(self) -> ChatProxy:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()


def _send(handler: BaseHTTPRequestHandler, status: int, body: bytes, headers: Mapping[str, str] | None = None) -> None:
    handler.send_response(status)
    handler.send_header("Content-Type", "application/json")
    handler.send_header("Content-Length", str(len(body)))
    for name, value in (headers or {}).items():
        handler.send_header(name, value)
    handler.end_headers()
    handler.wfile.write(body)
