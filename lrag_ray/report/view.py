"""The report of a run in a browser, served to this machine alone, wherever the run is.

The page is made here from the run's data; nothing that is stored as a page is shown. Only what the page links to is
served. Videos of a bucket are not passed through: the browser is sent to an address that is signed for an hour.
"""

from __future__ import annotations

import mimetypes
import os
import re
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import unquote

from lrag_ray.errors import StorageError
from lrag_ray.report.build import PAGE, write_report
from lrag_ray.report.collect import ReportData
from lrag_ray.store.address import Storage
from lrag_ray.store.inside import opened_file

_SIGNED_FOR_S = 3600
_OWN_HOST = re.compile(r"(?:127\.0\.0\.1|localhost)(?::[0-9]{1,5})?", re.IGNORECASE)
_RANGE = re.compile(r"bytes=([0-9]{0,18})-([0-9]{0,18})")


class ReportServer(ThreadingHTTPServer):
    """Serves one report on the loopback address; `address` is what a browser opens."""

    daemon_threads = True

    def __init__(self, data: ReportData, folder: Path, *, port: int = 0, strips: int = 0) -> None:
        """`folder` takes the page and its data; `port` 0 takes a free one. OSError for a port that is taken."""
        self.videos: dict[str, tuple[Storage, str]] = {}
        """Storage and path of each video by its URL."""

        def link(storage: Storage, path: str) -> str:
            known = {place: url for url, place in self.videos.items()}
            url = known.get((storage, path), f"videos/{len(self.videos)}.mp4")
            self.videos[url] = (storage, path)
            return url

        write_report(data, to=str(folder), strips=strips, link=link)
        self.files: Mapping[str, Path] = {
            path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()
        }
        """Files of the report by their URL."""
        super().__init__(("127.0.0.1", port), _Handler)
        self.address = f"http://127.0.0.1:{self.server_address[1]}/{PAGE}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Nothing for a browser that went away; the base class reports all else."""
        if not isinstance(sys.exception(), ConnectionError | TimeoutError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    server: ReportServer
    protocol_version = "HTTP/1.1"
    timeout = 60

    def do_GET(self) -> None:
        """A file of the report, or a video: here a range of it, in a bucket its signed address."""
        hosts = self.headers.get_all("Host", [])
        if len(hosts) != 1 or _OWN_HOST.fullmatch(hosts[0]) is None:
            # Another site's name that resolves to this machine: its pages must not read what is served here.
            self.send_error(HTTPStatus.FORBIDDEN)
            return
        url = unquote(re.split("[?#]", self.path, maxsplit=1)[0]).lstrip("/") or PAGE
        if url in self.server.files:
            self._send(str(self.server.files[url]), None)
        elif url in self.server.videos:
            storage, path = self.server.videos[url]
            if storage.is_local:
                self._send(f"{storage.root}/{path}", storage.root)
            else:
                self.send_response(HTTPStatus.FOUND)
                self.send_header("Location", str(storage.fs.sign(storage.full(path), expiration=_SIGNED_FOR_S)))
                self.send_header("Content-Length", "0")
                self.end_headers()
        else:
            self.send_error(HTTPStatus.NOT_FOUND)

    do_HEAD = do_GET  # noqa: N815 - the base class calls it so

    def _send(self, path: str, root: str | None) -> None:
        """A file, inside of `root` where that is given: the run may change while its page is shown."""
        with ExitStack() as opened:
            try:
                file = opened.enter_context(opened_file(path, root))
            except (OSError, StorageError):
                self.send_error(HTTPStatus.NOT_FOUND)
                return
            size = os.fstat(file.fileno()).st_size
            begin, end = self._range(size)
            part = "Range" in self.headers
            if part and begin >= end:
                self.send_response(HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE)
                self.send_header("Content-Range", f"bytes */{size}")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            self.send_response(HTTPStatus.PARTIAL_CONTENT if part else HTTPStatus.OK)
            self.send_header("Content-Type", mimetypes.guess_type(path)[0] or "application/octet-stream")
            self.send_header("Content-Length", str(end - begin))
            self.send_header("Accept-Ranges", "bytes")
            self.send_header("X-Content-Type-Options", "nosniff")
            if part:
                self.send_header("Content-Range", f"bytes {begin}-{end - 1}/{size}")
            self.end_headers()
            if self.command == "GET":
                self._copy(file, begin, end)

    def _range(self, size: int) -> tuple[int, int]:
        """First byte and the one after the last of those that are asked for; all where no single range is."""
        found = _RANGE.fullmatch(self.headers.get("Range") or "")
        if found is None or found.groups() == ("", ""):
            return 0, size
        first, last = found.groups()
        if not first:
            return max(0, size - int(last)), size
        return int(first), min(size, int(last) + 1) if last else size

    def _copy(self, file: BinaryIO, begin: int, end: int) -> None:
        file.seek(begin)
        left = end - begin
        # A browser that seeks ends the transfer that it no longer wants.
        try:
            while left > 0 and (chunk := file.read(min(left, 1 << 20))):
                self.wfile.write(chunk)
                left -= len(chunk)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: the terminal is the user's."""
