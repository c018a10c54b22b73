"""The hook at the end of a start: a webhook or a command gets the `RunEnded` event.

It is called once, after everything else. A hook that fails is reported and changes nothing: the exit code is that of
the run. The address of a webhook may be a secret, so messages name its host alone.
"""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from urllib.parse import urlsplit

import httpx2

from lrag_ray.config.redaction import redact
from lrag_ray.config.watch import OnEndSection, webhook_address
from lrag_ray.errors import ConfigError
from lrag_ray.events import Event, RunEnded, log_record
from lrag_ray.printable import counted, json_text

_FIRST_PAUSE_S = 1.0
_LONGEST_PAUSE_S = 30.0
_RETRIED = {408, 429, *range(500, 600)}
_SHOWN_CHARACTERS = 300


class EndHook:
    """A listener that calls the hook on `RunEnded`."""

    def __init__(self, section: OnEndSection, warn: Callable[[str], None]) -> None:
        """ConfigError for an environment variable that is not set or holds no address."""
        self._section = section
        self._warn = warn
        self._address = section.webhook
        self._token = None
        if section.webhook_from is not None:
            try:
                self._address = webhook_address(_variable("webhook_from", section.webhook_from))
            except ValueError as error:
                raise ConfigError(
                    f"watch.on_end.webhook_from: the value of the environment variable {section.webhook_from} {error}"
                ) from None
        if section.token_from is not None:
            self._token = _variable("token_from", section.token_from)
            if not self._token.isascii() or not self._token.isprintable():
                raise ConfigError(
                    f"watch.on_end.token_from: the value of {section.token_from} cannot be sent in a header: it has "
                    "line feeds, spaces at its ends or characters beyond ASCII"
                )

    def __call__(self, event: Event) -> None:
        """Call the hook if this is the end."""
        if not isinstance(event, RunEnded):
            return
        try:
            problem = self._post(event) if self._address is not None else self._start(event)
        except KeyboardInterrupt:
            problem = "it was interrupted"
        if problem is not None:
            self._warn(f"watch.on_end: {self._name} failed: {problem}. The run's own result stands")

    @property
    def _name(self) -> str:
        if self._address is not None:
            parts = urlsplit(self._address)
            return f"the webhook at {parts.scheme}://{parts.hostname}"
        assert self._section.command is not None
        return f"the command {self._section.command[0]!r}"

    def _post(self, event: RunEnded) -> str | None:
        """Why it failed, or None."""
        headers = {"Content-Type": "application/json"}
        if self._token is not None:
            headers["Authorization"] = f"Bearer {self._token}"
        body = json_text(log_record(event)).encode()
        problem, pause_s = "", _FIRST_PAUSE_S
        for attempt in range(self._section.attempts):
            if attempt:
                time.sleep(pause_s)
                pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
            answer = self._attempt(body, headers)
            if isinstance(answer, int):
                if 200 <= answer < 300:
                    return None
                problem = f"it answered {answer}"
                if answer not in _RETRIED:
                    return problem
            else:
                problem = answer
        return f"{problem} ({counted(self._section.attempts, 'attempt')})"

    def _attempt(self, body: bytes, headers: dict[str, str]) -> int | str:
        """The status code, or what happened instead."""
        assert self._address is not None
        address, timeout_s = self._address, self._section.timeout_s
        answers: queue.SimpleQueue[int | str] = queue.SimpleQueue()

        def ask() -> None:
            try:
                # Redirects are not followed: they would take token and content somewhere else.
                with httpx2.stream("POST", address, content=body, headers=headers, timeout=timeout_s) as answer:
                    answers.put(answer.status_code)
            except (httpx2.HTTPError, httpx2.InvalidURL, OSError) as error:
                answers.put(redact(f"{type(error).__name__}: {error}".replace(address, "the address")))

        # In a thread, because the library limits the silence between two bytes and not the whole attempt.
        threading.Thread(target=ask, name="on-end", daemon=True).start()
        try:
            return answers.get(timeout=timeout_s)
        except queue.Empty:
            return f"no answer within {timeout_s:g} s"

    def _start(self, event: RunEnded) -> str | None:
        assert self._section.command is not None
        environment = os.environ | {"LRAG_RUN": event.uri, "LRAG_EXIT_CODE": str(event.exit_code)}
        try:
            started = subprocess.Popen(
                self._section.command,
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                # A group of its own, so that a timeout ends what it started, too.
                start_new_session=True,
            )
        except (OSError, ValueError) as error:
            return f"it cannot be started: {error}"
        try:
            said, _ = started.communicate(json_text(log_record(event)).encode(), timeout=self._section.timeout_s)
        except subprocess.TimeoutExpired:
            _end_group(started)
            return f"it did not end within {self._section.timeout_s:g} s and was killed"
        except KeyboardInterrupt:
            _end_group(started)
            raise
        if started.returncode == 0:
            return None
        last = said.decode(errors="replace").strip()[-_SHOWN_CHARACTERS:]
        return redact(f"exit code {started.returncode}{f': {last}' if last else ''}")


def _end_group(process: subprocess.Popen[bytes]) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    if process.stdout is not None:
        process.stdout.close()


def _variable(key: str, name: str) -> str:
    value = os.environ.get(name, "")
    if not value:
        raise ConfigError(f"watch.on_end.{key}: the environment variable {name} is not set. Set it, or remove the key")
    return value
