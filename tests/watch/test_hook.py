"""The hook at the end against a real HTTP server and real programs."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from lrag_ray.config.watch import OnEndSection
from lrag_ray.errors import ConfigError
from lrag_ray.events import Notice
from lrag_ray.watch import hook
from lrag_ray.watch.hook import EndHook
from tests.watch.make import ended


class Server(ThreadingHTTPServer):
    """Answers with `codes` in turn, the last one repeatedly; a negative code -n delays the answer by n seconds."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.codes: Sequence[float] = (200,)
        self.got: list[tuple[str, dict[str, Any], dict[str, str]]] = []

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server = self.server
        code = server.codes[min(len(server.got), len(server.codes) - 1)]
        server.got.append((self.path, body, dict(self.headers)))
        if code < 0:
            # Never silent for long, and never done.
            self.wfile.write(b"HTTP/1.1 200 OK\r\n")
            for number in range(int(-code * 10)):
                time.sleep(0.1)
                self.wfile.write(f"X-{number}: y\r\n".encode())
            self.wfile.write(b"\r\n")
            return
        self.send_response(int(code))
        self.send_header("Location", f"{server.address}/elsewhere")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *arguments: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(hook, "_FIRST_PAUSE_S", 0.01)
    with Server() as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield running
        running.shutdown()
        thread.join()


def called(**section: Any) -> list[str]:
    """Warnings of a hook that got the last event."""
    warnings: list[str] = []
    end = EndHook(OnEndSection(**section), warnings.append)
    end(Notice("nothing to do with the end"))
    end(ended())
    return warnings


def test_the_webhook_gets_the_last_event_once(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOOK_TOKEN", "s3cret")
    assert called(webhook=f"{server.address}/services/abc", token_from="HOOK_TOKEN") == []
    ((path, body, headers),) = server.got
    assert path == "/services/abc"
    assert (body["event"], body["state"], body["exit_code"]) == ("RunEnded", "incomplete", 1)
    assert body["at"] and body["reasons"] == ["rollouts/tiny/rag/00001-bb-0: RuntimeError: no"]
    assert headers["Authorization"] == "Bearer s3cret"


def test_the_address_may_come_from_the_environment(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOOK", f"{server.address}/T000/secret-path")
    assert called(webhook_from="HOOK") == []
    assert [path for path, _, _ in server.got] == ["/T000/secret-path"]


def test_what_may_pass_is_tried_again(server: Server) -> None:
    server.codes = (503, 429, 204)
    assert called(webhook=server.address) == []
    assert len(server.got) == 3


def test_a_refusal_is_reported_and_not_tried_again(server: Server) -> None:
    server.codes = (404,)
    (warning,) = called(webhook=f"{server.address}/secret-path")
    assert "answered 404" in warning and "the run's own result stands" in warning.lower()
    assert "secret-path" not in warning and len(server.got) == 1


def test_redirects_are_not_followed(server: Server) -> None:
    server.codes = (307,)
    (warning,) = called(webhook=server.address)
    assert "answered 307" in warning and len(server.got) == 1


def test_attempts_and_their_time_are_limited(server: Server) -> None:
    server.codes = (-6.0,)
    began = time.monotonic()
    (warning,) = called(webhook=server.address, timeout_s=1, attempts=2)
    assert "no answer within 1 s (2 attempts)" in warning
    assert time.monotonic() - began < 10 and len(server.got) == 2


def test_nobody_there_is_reported_without_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hook, "_FIRST_PAUSE_S", 0.01)
    monkeypatch.setenv("HOOK", "http://127.0.0.1:1/T000/secret-path")
    (warning,) = called(webhook_from="HOOK", attempts=2)
    assert "ConnectError" in warning and "(2 attempts)" in warning and "secret-path" not in warning


@pytest.mark.parametrize(
    ("value", "complaint"),
    [
        ("", "HOOK is not set"),
        ("hooks.example.com/T000/secret-path", "must be an address such as https://host/path"),
        ("https://user:secret-path@host/", "credentials"),
        ("https://host:99999/secret-path", "is not an address"),
    ],
)
def test_a_wrong_address_is_refused_before_the_start_and_not_repeated(
    value: str, complaint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOOK", value)
    with pytest.raises(ConfigError, match=complaint) as caught:
        EndHook(OnEndSection(webhook_from="HOOK"), lambda _: None)
    assert "secret-path" not in str(caught.value)


def test_the_command_gets_the_event_without_a_shell(tmp_path: Path) -> None:
    program = (
        "import os, pathlib, sys; pathlib.Path(sys.argv[1]).write_text(os.environ['LRAG_EXIT_CODE'] + sys.stdin.read())"
    )
    target = tmp_path / "$(touch x); got"
    assert called(command=[sys.executable, "-c", program, str(target)]) == []
    text = target.read_text()
    assert text[0] == "1" and json.loads(text[1:])["uri"] == "runs/x"


def test_a_command_that_fails_is_reported_with_its_last_words(capfd: pytest.CaptureFixture[str]) -> None:
    program = "import sys; print('password=hunter2 no such channel'); sys.exit(7)"
    (warning,) = called(command=[sys.executable, "-c", program])
    assert "exit code 7" in warning and "no such channel" in warning and "hunter2" not in warning
    # stdout belongs to the run, which may print JSON there.
    assert capfd.readouterr() == ("", "")


def test_a_command_that_hangs_is_killed_with_all_that_it_started(tmp_path: Path) -> None:
    alive = tmp_path / "alive"
    child = f"import pathlib, time; time.sleep(1); pathlib.Path({str(alive)!r}).touch()"
    program = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    (warning,) = called(command=[sys.executable, "-c", program], timeout_s=0.5)
    assert "did not end within 0.5 s" in warning
    time.sleep(1.2)
    assert not alive.exists()


def test_a_command_that_is_not_there_is_reported() -> None:
    (warning,) = called(command=["/no/such/program"])
    assert "'/no/such/program' failed: it cannot be started" in warning
