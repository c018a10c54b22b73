"""Addresses, tokens, errors and states of the job API, against a small server that answers as Ray's dashboard does.

What only a real head shows (logs, stops, restarts) is in tests/cluster/test_submit.py.
"""

from __future__ import annotations

import json
import re
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from lrag_ray.engine.ray_jobs import client as client_module
from lrag_ray.engine.ray_jobs import dashboard as dashboard_module
from lrag_ray.engine.ray_jobs import log as log_module
from lrag_ray.engine.ray_jobs.client import (
    MOST_PACKAGE_BYTES,
    JobClient,
    LogError,
    NoAnswerError,
    RayJob,
    TakenIdError,
    UnknownJobError,
    connect,
)
from lrag_ray.engine.ray_jobs.dashboard import (
    LEAST_PYTHON,
    LEAST_RAY,
    Dashboard,
    check_versions,
    find_dashboard,
    find_token,
)
from lrag_ray.engine.ray_jobs.log import OUTAGE_S, JobLog
from lrag_ray.errors import ClusterError, UsageError
from tests.conftest import REPOSITORY

VERSION = {"version": "4", "ray_version": "2.60.0", "ray_commit": "", "session_name": "s"}
METADATA = {"result": True, "msg": "", "data": {"rayVersion": "2.60.0", "pythonVersion": "3.11.9"}}


@pytest.fixture(autouse=True)
def no_addresses_or_tokens(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))


@contextmanager
def head(answers: dict[str, tuple[int, Any]], token: str | None = None, port: int = 0) -> Iterator[str]:
    """The address of a server with these answers by ``METHOD path``; others are 404."""

    class Handler(BaseHTTPRequestHandler):
        def answer(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            given = self.headers.get("Authorization")
            if token is not None and given != f"Bearer {token}":
                status, body = (403, "Forbidden") if given else (401, "Unauthorized")
            else:
                status, body = answers.get(f"{self.command} {self.path}", (404, "404: Not Found"))
            data = (body if isinstance(body, str) else json.dumps(body)).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_POST = do_PUT = answer  # noqa: N815

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def suits(**more: tuple[int, Any]) -> dict[str, tuple[int, Any]]:
    return {"GET /api/version": (200, VERSION), "GET /api/v0/cluster_metadata": (200, METADATA), **more}


def test_the_environment_overrides_the_address_and_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_dashboard() == ("http://127.0.0.1:8265", "the default", "")
    assert find_dashboard("http://head:8265/") == ("http://head:8265", "--address", "")
    assert find_dashboard("head:8265").url == "http://head:8265"
    monkeypatch.setenv("RAY_ADDRESS", "http://other:8265")
    found = find_dashboard("http://head:8265")
    assert (found.url, found.source) == ("http://other:8265", "RAY_ADDRESS")
    assert "RAY_ADDRESS is set to http://other:8265, which overrides --address http://head:8265" in found.note
    assert find_dashboard("http://other:8265/").note == ""
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://third:8265")
    assert find_dashboard()[:2] == ("http://third:8265", "RAY_API_SERVER_ADDRESS")


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("ray://head:10001", "is a Ray Client address"),
        ("http://me:hunter2@head:8265", "credentials"),
        ("me:hunter2@head:8265", "credentials"),
        ("ftp://head", "is not the address of a dashboard"),
        ("head", "is not the address of a dashboard"),
        ("local", "is not the address of a dashboard"),
    ],
)
def test_what_is_no_dashboard_is_refused(address: str, said: str) -> None:
    with pytest.raises(UsageError, match=said) as raised:
        find_dashboard(address)
    assert "hunter2" not in str(raised.value)


def test_an_address_of_nodes_is_looked_up_with_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dashboard_module, "_LOOK_UP_S", 0.2)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{silent.getsockname()[1]}")
        with pytest.raises(ClusterError, match=r"RAY_ADDRESS is 127\.0\.0\.1:\d+, and Ray could not say .* no answer"):
            find_dashboard("http://head:8265")


def test_tokens_are_found_in_the_order_of_ray(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert find_token() is None
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("from-home\n")
    assert find_token() == ("from-home", "~/.ray/auth_token")
    (tmp_path / "token").write_text("from-file\n")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "token"))
    assert find_token() == ("from-file", f"{tmp_path}/token (RAY_AUTH_TOKEN_PATH)")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "from-variable")
    assert find_token() == ("from-variable", "RAY_AUTH_TOKEN")
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    assert find_token() is None
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.delenv("RAY_AUTH_TOKEN")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "absent"))
    with pytest.raises(UsageError, match="RAY_AUTH_TOKEN_PATH"):
        find_token()


def test_a_token_that_is_missing_or_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    with head(suits(), token="right-token") as address:
        with pytest.raises(ClusterError, match="asks for a token, and there is none here") as raised:
            connect(address)
        assert raised.value.exit_code == 3
        monkeypatch.setenv("RAY_AUTH_TOKEN", "wrong-token")
        with pytest.raises(ClusterError, match="refuses the token in RAY_AUTH_TOKEN") as raised:
            connect(address)
        assert "wrong-token" not in str(raised.value)
        monkeypatch.setenv("RAY_AUTH_TOKEN", "right-token")
        assert connect(address).url == address


def test_nothing_there_and_something_else_there() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(
        NoAnswerError, match=rf"no Ray dashboard answers at http://127.0.0.1:{port} \(--address\): conn"
    ):
        connect(f"http://127.0.0.1:{port}")
    with head({"GET /api/version": (200, "<html>")}) as address, pytest.raises(ClusterError, match="not as a Ray dash"):
        connect(address)
    with head({}) as address, pytest.raises(ClusterError, match="not as a Ray dashboard"):
        connect(address)
    with pytest.raises(NoAnswerError, match="no such host"):
        connect("http://head.invalid:8265")


def test_a_port_that_speaks_something_else() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()

        def hang_up() -> None:
            accepted, _ = other.accept()
            accepted.recv(1000)
            accepted.sendall(b"\x00\x00\x00\x04 not http\n")
            accepted.close()

        threading.Thread(target=hang_up, daemon=True).start()
        with pytest.raises(ClusterError, match=r"not as a Ray dashboard \(not HTTP\)\. Fix: give the dashboard's port"):
            connect(f"http://127.0.0.1:{other.getsockname()[1]}")


def test_an_old_ray_and_another_python() -> None:
    old = suits(**{"GET /api/version": (200, {**VERSION, "ray_version": "2.9.3"})})
    with (
        head(old) as address,
        pytest.raises(ClusterError, match=r"runs Ray 2\.9\.3, and lrag-ray needs 2\.60 or later"),
    ):
        connect(address)
    older = suits(**{"GET /api/v0/cluster_metadata": (200, {"data": {"pythonVersion": "3.9.18"}})})
    with head(older) as address, pytest.raises(ClusterError, match=r"runs Python 3\.9\.18, and lrag-ray needs 3\.11"):
        connect(address)
    assert "Python 3.99.1" in check_versions("2.61.0", "3.99.1", "there")
    with head(suits()) as address:
        assert connect(address).note == check_versions("2.60.0", "3.11.9", address)


def test_the_least_versions_are_those_of_the_package() -> None:
    text = (REPOSITORY / "pyproject.toml").read_text(encoding="utf-8")
    ray, python = re.search(r'"ray\[.*\]>=(\d+)\.(\d+)"', text), re.search(r'requires-python = ">=(\d+)\.(\d+)"', text)
    assert ray and python
    assert tuple(map(int, ray.groups())) == LEAST_RAY
    assert tuple(map(int, python.groups())) == LEAST_PYTHON


@pytest.mark.parametrize(
    ("status", "text", "error", "said"),
    [
        (500, "No available agent to submit job, please try again later.", ClusterError, "dashboard-agent-listen-port"),
        (500, "Traceback\nValueError: Job with submission_id a already exists. Use", TakenIdError, "has a job a"),
        (
            500,
            "Traceback (most recent):\n  x\nRuntimeError: why\n",
            ClusterError,
            "HTTP 500, RuntimeError: why",
        ),
    ],
)
def test_a_job_that_is_not_taken(status: int, text: str, error: type[ClusterError], said: str) -> None:
    with head(suits(**{"POST /api/jobs/": (status, text)})) as address, pytest.raises(error, match=re.escape(said)):
        client = connect(address)
        client.agent_patience_s = 0
        client.submit("a", "true", {}, {})


def test_an_unknown_job_and_one_that_is_known() -> None:
    job = {"submission_id": "a", "status": "FAILED", "message": "m", "driver_exit_code": 2, "start_time": 5, "new": 1}
    with head(suits(**{"GET /api/jobs/a": (200, job), "GET /api/jobs/": (200, [job, {"submission_id": None}])})) as at:
        client = connect(at)
        assert client.job("a") == RayJob("a", "FAILED", "m", 2, {}, 5, None)
        assert [each.id for each in client.jobs()] == ["a"]
        for ask in (client.job, client.log, client.stop):
            with pytest.raises(UnknownJobError):
                ask("b")


def test_an_upload_above_the_limit_is_not_sent(tmp_path: Path) -> None:
    large = tmp_path / "large.zip"
    with large.open("wb") as file:
        file.truncate(MOST_PACKAGE_BYTES)
    client = JobClient(find_dashboard("http://127.0.0.1:9"), None)
    with pytest.raises(ClusterError, match="takes less than 104,857,600"):
        client.upload(large)


@pytest.mark.parametrize(
    ("state", "driver", "code", "said"),
    [
        ("SUCCEEDED", 0, 0, ""),
        ("STOPPED", None, 130, "was stopped"),
        ("STOPPED", -15, 130, "was stopped"),
        ("FAILED", 1, 1, ""),
        ("FAILED", 2, 2, ""),
        ("FAILED", 3, 3, ""),
        ("FAILED", 130, 130, ""),
        ("FAILED", -9, 137, "out-of-memory killer"),
        ("FAILED", 137, 137, "out-of-memory killer"),
        ("FAILED", -15, 143, "signal 15"),
        ("FAILED", 127, 127, "--python"),
        ("FAILED", None, 3, "pip failed"),
    ],
)
def test_states_and_exit_codes(state: Any, driver: int | None, code: int, said: str) -> None:
    job = RayJob("a", state, "pip failed", driver, {}, 0, 1)
    assert job.ended and job.exit_code == code
    assert said in job.reason
    assert bool(said) == bool(job.reason)


@pytest.mark.parametrize(
    "job",
    [
        None, 3, [], {"submission_id": "a"}, {"submission_id": [], "status": "FAILED"},
        {"submission_id": "a", "status": "GONE"},
        {"submission_id": "a", "status": "FAILED", "driver_exit_code": 10**400},
        {"submission_id": "a", "status": "FAILED", "start_time": "soon"},
        {"submission_id": "a", "status": "FAILED", "start_time": 2**52},
        {"submission_id": "a", "status": "FAILED", "metadata": [1]},
        '{"submission_id": "a",', "[" * 100_000, "<html>",
    ],
)  # fmt: skip
def test_an_answer_of_another_kind_is_refused_with_the_address(job: Any) -> None:
    """Whoever may submit to a cluster decides what is in its list of jobs."""
    listed = f"[{job}]" if isinstance(job, str) else [job]
    answers = suits() | {"GET /api/jobs/": (200, listed), "GET /api/jobs/a": (200, job)}
    with head(answers | {"GET /api/jobs/a/logs": (200, "[1]")}) as url:
        client = connect(url)
        for ask in (client.jobs, lambda: client.job("a"), lambda: client.log("a")):
            with pytest.raises(ClusterError, match=rf"^{re.escape(url)}.* does not answer as Ray does \("):
                ask()


def test_what_others_say_of_their_jobs_has_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    job = {"submission_id": "a", "status": "FAILED", "message": "m" * 99_999, "start_time": 1}
    mine = job | {"metadata": {"lrag_run": "runs/x", "lrag_config": "x" * 99_999}}
    listed = [job | {"submission_id": "a" * 2000}, mine]
    answers = suits() | {"GET /api/jobs/": (200, listed), "GET /api/jobs/a/logs": (200, {"logs": "x" * 300_000})}
    with head(answers) as url:
        client = connect(url)
        (found,) = client.jobs()
        assert (found.id, len(found.message), found.metadata) == ("a", 10_000, {"lrag_run": "runs/x"})
        assert client.log("a") == "x" * 300_000
        monkeypatch.setattr(client_module, "_MOST_ANSWER_BYTES", 250_000)
        with pytest.raises(
            LogError, match=r"the log of a is too long .* more than 250,000 bytes\. Fix: .*driver-a\.log"
        ):
            client.log("a")
        with pytest.raises(ClusterError, match="answers with more than 250,000 bytes"):
            client.jobs()


def test_an_hour_asleep_in_the_middle_of_an_outage_does_not_end_the_following(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    asleep_s = [0.0]
    silences: list[float] = []
    monotonic, sleep = time.monotonic, time.sleep

    def sleep_long(seconds: float) -> None:
        sleep(seconds)
        asleep_s[0] = 3600.0

    monkeypatch.setattr(time, "monotonic", lambda: monotonic() + asleep_s[0])
    monkeypatch.setattr(time, "sleep", sleep_long)
    job = {"submission_id": "j", "status": "SUCCEEDED", "metadata": {}}
    answers = {"GET /api/jobs/j": (200, job), "GET /api/jobs/j/logs": (200, {"logs": "made it"})}
    with ExitStack() as answering:

        def on_outage(silent_s: float, error: str) -> bool:
            silences.append(silent_s)
            if len(silences) == 2:
                # The network of a machine that wakes up comes later than its programs.
                answering.enter_context(head(suits(**answers), port=port))
            return False

        client = JobClient(Dashboard(f"http://127.0.0.1:{port}", "a test"), None)
        assert list(JobLog(client, "j", on_outage=on_outage).lines()) == ["made it"]
    assert silences[0] == 0 and 0 < silences[1] < OUTAGE_S


def test_a_line_that_never_ends_is_kept_up_to_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_module, "_LONGEST_OPEN", 100)
    log = JobLog(JobClient(Dashboard("http://127.0.0.1:9", "a test"), None), "j")
    assert [line for _ in range(50) for line in log._split("x" * 60)] == []
    assert list(log._split("end\nnext")) == ["x" * 120]
    assert list(log._split("\n")) == ["next"]
