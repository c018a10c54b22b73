"""Follows the log of a job to its end, through cut connections, overlong lines and heads that fall silent.

Ray's own log stream ends at the first line above 4 MiB, for good: whoever connects again gets the log from its start.
Its end therefore means nothing; only the state of the job does. What the stream cannot give is read as a whole over
HTTP, where lines have no limit.
"""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import NamedTuple, TypeVar
from urllib.parse import quote

import aiohttp

from lrag_ray.engine.ray_jobs.client import JobClient, LogError, NoAnswerError, RayJob
from lrag_ray.errors import ClusterError

LONGEST_LINE = 1 << 20
"""Characters of a line that the stream is trusted with; it sends up to 20,000 more in the same message."""
_LONGEST_OPEN = 1 << 26
"""Characters that are kept of a line that does not end."""
_LONGEST_MESSAGE = 1 << 24
_MOST_WAITING = 8
"""Messages that were received and not shown yet."""
_SILENCE_S = 1.0
_HEARTBEAT_S = 20.0
_LOOK_EVERY_S = 15.0
_TRUST_S = 120.0
"""A stream that is silent for longer is begun again."""
_POLL_S = 1.0
_MOST_POLL_S = 60.0
_MOST_PAUSE_S = 10.0
_MOST_STEP_S = 120.0
"""A question without an answer and the pause after it take less."""
OUTAGE_S = 600.0
"""Seconds without an answer, and without any other sign of life, after which following ends."""

OnOutage = Callable[[float, str], bool]
"""Called during an outage with its seconds and the error; whether the job shows life elsewhere."""


_Answer = TypeVar("_Answer")


class Silence(NamedTuple):
    """Nothing came for about a second."""


class JobLog:
    """The log of one job, each line once."""

    def __init__(
        self,
        client: JobClient,
        job_id: str,
        *,
        on_outage: OnOutage = lambda seconds, error: False,
        warn: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.job: RayJob | None = None
        """The job as it was seen last; ended once `lines` is through."""
        self.unreadable = False
        """The cluster answers but cannot read the log."""
        self._client = client
        self._id = job_id
        self._on_outage = on_outage
        self._warn = warn
        self._seen = 0
        self._open = ""

    def lines(self) -> Iterator[str | Silence]:
        """Whole lines in order, as they come, until the job has ended and all is read.

        Raises NoAnswerError after `OUTAGE_S` without an answer, UnknownJobError where the cluster has forgotten the
        job, and ClusterError where it refuses.
        """
        pause_s, whole = _POLL_S, False
        while True:
            if not whole:
                yield from self._stream()
            # In this order: the log of a job that has ended is complete.
            job = self.job = self._patiently(lambda: self._client.job(self._id))
            began = time.monotonic()
            text = self._read_whole()
            if text is not None:
                whole = any(len(line) > LONGEST_LINE for line in text.split("\n"))
                if len(text) > self._seen:
                    fresh, self._seen = text[self._seen :], len(text)
                    yield from self._split(fresh)
            if job.ended:
                if self._open:
                    yield self._open
                return
            yield Silence()
            # Reading a long log again and again must cost neither side much.
            pause_s = min(_MOST_POLL_S, max(_POLL_S, 10 * (time.monotonic() - began)))
            time.sleep(pause_s if whole or self.unreadable else _POLL_S)

    def _stream(self) -> Iterator[str | Silence]:
        """What the stream brings beyond what was seen, until it ends, for whatever reason, or the job has."""
        chunks: queue.Queue[str | None] = queue.Queue(_MOST_WAITING)
        stop = threading.Event()
        threading.Thread(target=_receive, args=(self._client, self._id, chunks, stop), daemon=True).start()
        position, quiet_since = 0, time.monotonic()
        try:
            while True:
                try:
                    chunk = chunks.get(timeout=_SILENCE_S)
                except queue.Empty:
                    yield Silence()
                    quiet_s = time.monotonic() - quiet_since
                    if quiet_s > _TRUST_S or (quiet_s > _LOOK_EVERY_S and self._has_ended()):
                        # A stream may be dead without an end.
                        return
                    continue
                if chunk is None:
                    return
                quiet_since = time.monotonic()
                start, position = position, position + len(chunk)
                if position > self._seen:
                    fresh = chunk[max(0, self._seen - start) :]
                    self._seen = position
                    yield from self._split(fresh)
        finally:
            stop.set()

    def _has_ended(self) -> bool:
        """Whether the job has ended, or the cluster does not say."""
        try:
            return self._client.job(self._id).ended
        except ClusterError:
            return True

    def _read_whole(self) -> str | None:
        """The log so far; None where the cluster cannot read it, which may pass (half a character at its end)."""
        try:
            text = self._patiently(lambda: self._client.log(self._id))
        except LogError as error:
            if not self.unreadable:
                self._warn(f"{error}. The job goes on; progress is looked up elsewhere")
            self.unreadable = True
            return None
        self.unreadable = False
        return text

    def _split(self, text: str) -> Iterator[str]:
        first, *more = text.split("\n")
        if len(self._open) < _LONGEST_OPEN:
            self._open += first
        if more:
            yield self._open
            *whole, self._open = more
            yield from whole

    def _patiently(self, ask: Callable[[], _Answer]) -> _Answer:
        """An answer of the cluster, waiting through an outage."""
        silent_s, pause_s = 0.0, 1.0
        while True:
            began = time.monotonic()
            try:
                return ask()
            except NoAnswerError as error:
                if silent_s >= OUTAGE_S:
                    raise
                if self._on_outage(silent_s, str(error)):
                    silent_s = 0.0
                time.sleep(pause_s)
                # Questions have a time limit: beyond it this machine was asleep.
                silent_s += min(time.monotonic() - began, _MOST_STEP_S)
                pause_s = min(2 * pause_s, _MOST_PAUSE_S)


def _receive(client: JobClient, job_id: str, chunks: queue.Queue[str | None], stop: threading.Event) -> None:
    """Put what the stream sends into `chunks`, and None at its end, however it ends."""

    def put(chunk: str | None) -> None:
        while not stop.is_set():
            with suppress(queue.Full):
                chunks.put(chunk, timeout=_SILENCE_S)
                return

    async def receive() -> None:
        url = f"{client.url}/api/jobs/{quote(job_id, safe='')}/logs/tail"
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=10)
        async with (
            aiohttp.ClientSession(headers=client.headers, timeout=timeout, trust_env=True) as session,
            session.ws_connect(url, heartbeat=_HEARTBEAT_S, max_msg_size=_LONGEST_MESSAGE) as socket,
        ):
            while not stop.is_set():
                try:
                    message = await socket.receive(timeout=_SILENCE_S)
                except TimeoutError:
                    continue
                if message.type is not aiohttp.WSMsgType.TEXT:
                    return
                put(message.data)

    try:
        # The state of the job says what to make of its end.
        with suppress(aiohttp.ClientError, OSError):
            asyncio.run(receive())
    finally:
        put(None)
