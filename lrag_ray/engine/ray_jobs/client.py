"""A client of Ray's job API over HTTP, with time limits, and errors that say what is wrong.

Ray's own client waits without a limit and needs Ray here; a laptop that only submits needs neither.
"""

from __future__ import annotations

import hashlib
import os
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, NoReturn, TypeVar
from urllib.parse import quote

import requests
from pydantic import BaseModel, Field, TypeAdapter, ValidationError

from lrag_ray.config.redaction import redact
from lrag_ray.engine.ray_jobs.dashboard import Dashboard, Token, check_versions, find_dashboard, find_token
from lrag_ray.errors import INTERRUPTED, ClusterError

MOST_PACKAGE_BYTES = 100 << 20
"""The dashboard takes no larger body. Ray's own warning begins far above."""
_MOST_ANSWER_BYTES = 1 << 26
"""Whoever may submit to a cluster decides how long its logs and its list of jobs are."""
_MOST_ID, _MOST_TEXT = 1000, 10_000
"""Characters of a job's id, and of what its metadata and messages keep."""
_YEAR_10000_MS = 253_402_300_800_000
_CONNECT_S = 10.0
_ANSWER_S = 90.0
_SIGKILL = 9
_AGENT_POLL_S = 2.0
_NO_AGENT = re.compile("No available agent|Failed to get head node agent")

_Answer = TypeVar("_Answer")
JobState = Literal["PENDING", "RUNNING", "STOPPED", "SUCCEEDED", "FAILED"]


class NoAnswerError(ClusterError):
    """The dashboard could not be reached; it may answer later."""


class UnknownJobError(ClusterError):
    """The cluster has no such job."""


class TakenIdError(ClusterError):
    """A job with this id exists already."""


class LongAnswerError(ClusterError):
    """An answer is longer than anything that Ray has to say."""


class LogError(ClusterError):
    """The cluster answers but does not give the log of a job."""


@dataclass(frozen=True)
class RayJob:
    """A submitted job as the cluster knows it."""

    id: str
    state: JobState
    message: str
    """Ray's words on the state; of a failed environment, what failed."""
    driver_exit_code: int | None
    """Negative after a signal; None while the job works, after a stop and where its program never started."""
    metadata: Mapping[str, str]
    began_ms: int
    """By the cluster's clock, since 1970."""
    ended_ms: int | None

    ENDED: ClassVar = ("STOPPED", "SUCCEEDED", "FAILED")

    @property
    def ended(self) -> bool:
        """Whether nothing more will happen."""
        return self.state in self.ENDED

    @property
    def exit_code(self) -> int:
        """Of an ended job: that of its program, 128 + signal where one ended it, 130 after a stop, 3 without any."""
        if self.state == "SUCCEEDED":
            return 0
        if self.state == "STOPPED":
            return INTERRUPTED
        if self.driver_exit_code is None:
            return ClusterError.exit_code
        return self.driver_exit_code if self.driver_exit_code >= 0 else 128 - self.driver_exit_code

    @property
    def reason(self) -> str:
        """Why an ended job ended as it did, for people; empty where its own log says it."""
        if self.state == "STOPPED":
            return "the job was stopped. What it stored stays, and the same submit continues"
        if self.state != "FAILED":
            return ""
        match self.exit_code, self.driver_exit_code:
            case _, None:
                return f"the job failed without an exit code of its own: {self.message.strip()}"
            case code, _ if code == 128 + _SIGKILL:
                return (
                    "the job's driver was killed (SIGKILL), most often by the out-of-memory killer of the head node "
                    "(`dmesg` there says so). What it stored stays, and the same submit continues; give the head more "
                    "memory, or fewer other jobs"
                )
            case ((126 | 127), _):
                return (
                    f"the head node found no program to run: {self.message.strip()}\nFix: activate the environment "
                    "before `ray start` there, or name its Python (--python)"
                )
            case code, _ if code > 128 and code != INTERRUPTED:
                return f"the job's driver was ended by signal {code - 128}. The same submit continues"
            case _:
                return ""


class _Job(BaseModel):
    """A job as the dashboard describes it; whoever may submit to the cluster decides what is in it."""

    submission_id: str
    status: JobState
    message: str | None = None
    driver_exit_code: int | None = Field(default=None, ge=-255, le=255)
    metadata: dict[str, str] | None = None
    start_time: int | None = Field(default=None, ge=0, lt=_YEAR_10000_MS)
    end_time: int | None = Field(default=None, ge=0, lt=_YEAR_10000_MS)

    def found(self) -> RayJob:
        """As the rest of the program knows it."""
        return RayJob(
            id=self.submission_id,
            state=self.status,
            message=(self.message or "")[:_MOST_TEXT],
            driver_exit_code=self.driver_exit_code,
            metadata={k: text for k, text in (self.metadata or {}).items() if len(k) + len(text) <= _MOST_TEXT},
            began_ms=self.start_time or 0,
            ended_ms=self.end_time,
        )


class _Reply(NamedTuple):
    """What came back."""

    status_code: int
    content: bytes

    @property
    def text(self) -> str:
        """For people."""
        return self.content.decode("utf-8", "replace")


class _Driver(BaseModel):
    """One that was not submitted."""

    submission_id: None = None


class _Log(BaseModel):
    logs: str | None = None


class _Stopped(BaseModel):
    stopped: bool = False


class _Version(BaseModel):
    ray_version: str


class _Metadata(BaseModel):
    python_version: Annotated[str, Field(alias="pythonVersion", pattern=r"^\d+\.\d+")]


class _Cluster(BaseModel):
    data: _Metadata


class JobClient:
    """Talks to the dashboard of one cluster."""

    def __init__(self, dashboard: Dashboard, token: Token | None) -> None:
        self.dashboard = dashboard
        self.agent_patience_s = 90.0
        """How long a head may take until it can start jobs: a new one answers before it can."""
        self.note = ""
        """What a person should know about this cluster."""
        self._token = token
        self.headers = {"Authorization": f"Bearer {token.text}"} if token else {}
        """Of every request."""

    @property
    def url(self) -> str:
        """Of the dashboard."""
        return self.dashboard.url

    def check(self) -> JobClient:
        """Ask who answers: ClusterError unless it is the dashboard of a Ray that suits us and takes our token."""
        answer = self._request("GET", "/api/version")
        try:
            ray = _Version.model_validate_json(answer.content).ray_version
        except ValidationError:
            raise self._other_service(f"HTTP {answer.status_code}") from None
        self.note = check_versions(ray, self._python(), self._where())
        return self

    def jobs(self) -> list[RayJob]:
        """All submitted jobs that the cluster remembers, oldest first."""
        answer = self._request("GET", "/api/jobs/")
        if answer.status_code != 200:
            self._refuse(answer, "does not list its jobs")
        listed = self._parsed(answer, TypeAdapter(list[_Job | _Driver]))
        found = [job.found() for job in listed if isinstance(job, _Job) and len(job.submission_id) <= _MOST_ID]
        return sorted(found, key=lambda job: (job.began_ms, job.id))

    def job(self, job_id: str) -> RayJob:
        """One job; UnknownJobError where there is none of this id."""
        answer = self._request("GET", f"/api/jobs/{quote(job_id, safe='')}")
        if answer.status_code == 404:
            raise UnknownJobError(f"{self._where()} has no job {job_id!r}")
        if answer.status_code != 200:
            self._refuse(answer, f"does not describe job {job_id!r}")
        return self._parsed(answer, TypeAdapter(_Job)).found()

    def log(self, job_id: str) -> str:
        """All that the job has written so far. LogError where the cluster cannot read it."""
        try:
            answer = self._request("GET", f"/api/jobs/{quote(job_id, safe='')}/logs")
        except LongAnswerError as error:
            raise LogError(
                f"the log of {job_id} is too long to be read from here: {error}. Fix: read it on the head node, "
                f"/tmp/ray/session_latest/logs/job-driver-{job_id}.log"
            ) from None
        if answer.status_code == 404:
            raise UnknownJobError(f"{self._where()} has no job {job_id!r}")
        if answer.status_code != 200:
            raise LogError(f"{self._where()} cannot read the log of {job_id}: {_last_line(answer.text)}")
        return self._parsed(answer, TypeAdapter(_Log)).logs or ""

    def upload(self, package: Path) -> str:
        """Upload a zip archive or a wheel unless the cluster has it; the address under which a job names it.

        The name of a wheel must say what is in it. ClusterError above `MOST_PACKAGE_BYTES`.
        """
        if (size := package.stat().st_size) >= MOST_PACKAGE_BYTES:
            raise ClusterError(f"{package.name} has {size:,} bytes; a dashboard takes less than {MOST_PACKAGE_BYTES:,}")
        data = package.read_bytes()
        name = package.name if package.suffix == ".whl" else f"_ray_pkg_{hashlib.sha1(data).hexdigest()}.zip"
        path = f"/api/packages/gcs/{quote(name)}"
        if self._request("GET", path).status_code != 200:
            answer = self._request("PUT", path, data=data)
            if answer.status_code != 200:
                self._refuse(answer, f"did not take the upload of {package.name} ({len(data):,} bytes)")
        return f"gcs://{name}"

    def submit(self, job_id: str, entrypoint: str, runtime_env: Mapping[str, Any], metadata: Mapping[str, str]) -> None:
        """Start a job. TakenIdError where the id exists; ClusterError with the reason where it cannot start."""
        body = {
            "entrypoint": entrypoint,
            "submission_id": job_id,
            "runtime_env": dict(runtime_env),
            "metadata": dict(metadata),
        }
        began_s = time.monotonic()
        while True:
            answer = self._request("POST", "/api/jobs/", json=body)
            if answer.status_code == 200:
                return
            if not _NO_AGENT.search(answer.text):
                break
            if time.monotonic() - began_s > self.agent_patience_s:
                raise ClusterError(
                    f"{self._where()} has had no agent that could start the job for {self.agent_patience_s:g} s: the "
                    "dashboard agent of the head node does not run, most often because its port is taken by another "
                    "cluster on that machine. Fix: start the head with another --dashboard-agent-listen-port "
                    "(dashboard_agent.log there has the reason)"
                )
            time.sleep(_AGENT_POLL_S)
        if "already exists" in answer.text:
            raise TakenIdError(f"{self._where()} has a job {job_id} already")
        self._refuse(answer, "did not take the job")

    def stop(self, job_id: str) -> bool:
        """Ask a job to end; whether anything of it was still there."""
        answer = self._request("POST", f"/api/jobs/{quote(job_id, safe='')}/stop")
        if answer.status_code == 404:
            raise UnknownJobError(f"{self._where()} has no job {job_id!r}")
        if answer.status_code != 200:
            self._refuse(answer, f"did not stop job {job_id!r}")
        return self._parsed(answer, TypeAdapter(_Stopped)).stopped

    def _python(self) -> str | None:
        """The cluster's Python; None where it does not say."""
        answer = self._request("GET", "/api/v0/cluster_metadata")
        try:
            return _Cluster.model_validate_json(answer.content).data.python_version
        except ValidationError:
            return None

    def _where(self) -> str:
        return f"{self.url} ({self.dashboard.source})"

    def _request(self, method: str, path: str, **options: Any) -> _Reply:
        timeout = (_CONNECT_S, _ANSWER_S)
        content = bytearray()
        try:
            # Not over a connection that is kept: the other end may have closed it.
            with requests.request(
                method, self.url + path, headers=self.headers, timeout=timeout, stream=True, **options
            ) as response:
                for chunk in response.iter_content(1 << 16):
                    content += chunk
                    if len(content) > _MOST_ANSWER_BYTES:
                        raise LongAnswerError(f"{self._where()} answers with more than {_MOST_ANSWER_BYTES:,} bytes")
            answer = _Reply(response.status_code, bytes(content))
        except requests.exceptions.SSLError as error:
            raise ClusterError(
                f"{self._where()}: no secure connection: {redact(str(error))}. Fix: http:// where the dashboard has no "
                "certificate, or REQUESTS_CA_BUNDLE for one of your own"
            ) from None
        except requests.exceptions.RequestException as error:
            if "BadStatusLine" in str(error):
                raise self._other_service("not HTTP") from None
            raise NoAnswerError(
                f"no Ray dashboard answers at {self._where()}: {_cause(error)}. Fix: start the cluster (`ray start "
                "--head`), give the dashboard's address (--address http://host:8265), or open a tunnel to it (ssh -L, "
                "kubectl port-forward)"
            ) from None
        if answer.status_code == 401:
            raise ClusterError(
                f"{self._where()} asks for a token, and there is none here. Fix: set RAY_AUTH_TOKEN, or "
                "RAY_AUTH_TOKEN_PATH to a file that holds it, or write it to ~/.ray/auth_token"
                + ("" if self._token else _mode_off())
            )
        if answer.status_code == 403:
            used = f"the token in {self._token.source}" if self._token else "a request without a token"
            raise ClusterError(f"{self._where()} refuses {used}. Fix: use the token of that cluster")
        return answer

    def _other_service(self, answer: str) -> ClusterError:
        return ClusterError(
            f"{self._where()} answers, but not as a Ray dashboard ({answer}). Fix: give the dashboard's port, 8265 "
            "unless set otherwise"
        )

    def _parsed(self, answer: _Reply, expected: TypeAdapter[_Answer]) -> _Answer:
        """What an answer says; ClusterError where it is not what Ray answers."""
        try:
            return expected.validate_json(answer.content)
        except ValidationError as error:
            first = error.errors(include_input=False)[0]
            place = ".".join(map(str, first["loc"])) or "its start"
            raise ClusterError(
                f"{self._where()} does not answer as Ray does ({first['msg']} at {place}). Fix: check what listens at "
                "that address; where it is Ray's dashboard, use the Ray version of constraints.txt there"
            ) from None

    def _refuse(self, answer: _Reply, what: str) -> NoReturn:
        raise ClusterError(f"{self._where()} {what}: HTTP {answer.status_code}, {_last_line(answer.text)}")


def connect(address: str | None = None) -> JobClient:
    """A client of the cluster that `address` or the environment names, once it has answered. See `find_dashboard`."""
    return JobClient(find_dashboard(address), find_token()).check()


def _mode_off() -> str:
    mode = os.environ.get("RAY_AUTH_MODE")
    return f" (RAY_AUTH_MODE={mode} switches tokens off here)" if mode and mode.lower() != "token" else ""


def _cause(error: BaseException) -> str:
    """The innermost reason: connection refused, unknown host, no answer in time."""
    text = str(error)
    for pattern, said in (
        (r"Connection refused", "connection refused"),
        (r"Name or service not known|getaddrinfo|NameResolution", "no such host"),
        (r"[Tt]imed out", "no answer in time"),
        (r"No route to host|Network is unreachable", "no route to that host"),
        (r"Connection aborted|RemoteDisconnected|reset by peer", "the connection was closed without an answer"),
    ):
        if re.search(pattern, text):
            return said
    return redact(text)


def _last_line(text: str) -> str:
    """Of a traceback, what was raised."""
    lines = [line for line in text.strip().splitlines() if line.strip()]
    return redact(lines[-1].strip()[:500]) if lines else "without a reason"
