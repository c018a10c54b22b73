"""The HTTP client of the vendors' libraries: answers of bounded size and time, from the server that was named alone."""

from __future__ import annotations

import time
from contextlib import suppress
from typing import Any

import httpx2

from lrag_ray.config.chat import ChatSection
from lrag_ray.config.redaction import redact
from lrag_ray.errors import ChatError

_MOST_ANSWER_BYTES = 1 << 20
_MOST_TOKEN_BYTES = 32
_ENCODINGS = ("", "identity", "gzip", "deflate")
"""Of these, 64 kB become 64 MB at most; others become gigabytes before anybody can count them."""
_OF_THE_TRANSFER = ("content-encoding", "content-length", "transfer-encoding")


class BadAnswerError(httpx2.RequestError):
    """An answer that is not read to its end; the text says why."""


class AnswerClient(httpx2.Client):
    """Reads an answer whole, at most 1 MiB and 32 bytes for each token that was asked for, within `timeout_s`.

    Sends nothing anywhere but to the named server, whatever its answers say: no redirect is followed. Raises
    BadAnswerError for an answer that is too long, too slow or packed otherwise than asked for, ChatError for one that
    leads elsewhere.
    """

    def __init__(self, section: ChatSection, vendor: str) -> None:
        """`vendor` is the address where the section names none."""
        super().__init__(timeout=section.timeout_s, headers={"Accept-Encoding": "gzip, deflate"})
        self._server = httpx2.URL(section.base_url or vendor)
        self._most_bytes = _MOST_ANSWER_BYTES + _MOST_TOKEN_BYTES * section.max_tokens
        self._timeout_s = section.timeout_s

    def __del__(self) -> None:
        """Close its connections, as the libraries' own clients do."""
        # Modules may be gone at the end of the process.
        with suppress(Exception):
            self.close()

    def send(self, request: httpx2.Request, **options: Any) -> httpx2.Response:
        """As of a client, but the answer is read."""
        if _origin(request.url) != _origin(self._server):
            # The official client uploads to where the server says.
            raise self._elsewhere(str(request.url))
        response = super().send(request, **{**options, "stream": True, "follow_redirects": False})
        try:
            if response.is_redirect:
                raise self._elsewhere(response.headers["location"])
            body = self._read(response)
        finally:
            response.close()
        headers = [pair for pair in response.headers.multi_items() if pair[0].lower() not in _OF_THE_TRANSFER]
        return httpx2.Response(response.status_code, headers=headers, content=body, request=request)

    def _read(self, response: httpx2.Response) -> bytes:
        if (encoding := response.headers.get("content-encoding", "").strip().lower()) not in _ENCODINGS:
            raise BadAnswerError(f"the answer is packed as {encoding[:40]!r}, which was not asked for")
        until_s = time.monotonic() + self._timeout_s
        body = bytearray()
        for chunk in response.iter_bytes():
            body += chunk
            if len(body) > self._most_bytes:
                raise BadAnswerError(f"the answer has more than {self._most_bytes:,} bytes")
            if time.monotonic() > until_s:
                raise BadAnswerError(f"the answer was not complete after {self._timeout_s:g} s (timeout_s)")
        return bytes(body)

    def _elsewhere(self, address: str) -> ChatError:
        return ChatError(
            f"{redact(str(self._server))} sends its requests on to {redact(address)[:200]}, which is not followed. "
            "Fix: set base_url to the address that answers"
        )


def _origin(url: httpx2.URL) -> tuple[str, str, int | None]:
    return url.scheme, url.host, url.port
