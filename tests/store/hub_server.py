"""A server with the routes of the Hub that writing and reading dataset repositories takes; content is in memory."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Repository:
    private: bool
    files: dict[str, bytes] = field(default_factory=dict)


class HubServer:
    """Repositories of one user, whose token is `token`."""

    token = "hf_" + "t" * 30

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.writes = 0
        self.endpoint = ""

    @contextmanager
    def serve(self) -> Iterator[HubServer]:
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, format: str, *args: Any) -> None:
                pass

            def _json(self, status: int, value: Any, error: str = "") -> None:
                content = json.dumps(value).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(content)))
                if error:
                    self.send_header("X-Error-Code", error)
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(content)

            @property
            def _known(self) -> bool:
                return self.headers.get("Authorization") == f"Bearer {hub.token}"

            def do_GET(self) -> None:
                self._read()

            def do_HEAD(self) -> None:
                self._read()

            def _read(self) -> None:
                path = unquote(urlsplit(self.path).path)
                name = "/".join(path.removeprefix("/api").removeprefix("/datasets/").split("/")[:2])
                repository = hub.repositories.get(name)
                if repository is None or (repository.private and not self._known):
                    return self._json(401, {"error": "no such repository"}, "RepoNotFound")
                if "/tree/" in path:
                    files = repository.files.items()
                    entries = [{"type": "file", "path": file, "size": len(c), "oid": "0" * 40} for file, c in files]
                    return self._json(200, entries)
                if path.startswith("/api/datasets/"):
                    siblings = [{"rfilename": file} for file in repository.files]
                    return self._json(
                        200, {"id": name, "private": repository.private, "sha": COMMIT, "siblings": siblings}
                    )
                content = repository.files.get(path.split("/resolve/")[-1].partition("/")[2])
                if content is None:
                    return self._json(404, {"error": "no such file"}, "EntryNotFound")
                self.send_response(200)
                self.send_header("X-Repo-Commit", COMMIT)
                self.send_header("ETag", f'"{hashlib.sha1(content).hexdigest()}"')
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                if self.command == "GET":
                    self.wfile.write(content)
                return None

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                if not self._known:
                    return self._json(401, {"error": "who are you?"})
                if self.path == "/api/validate-yaml":
                    return self._json(200, {"errors": [], "warnings": []})
                hub.writes += 1
                path = unquote(urlsplit(self.path).path)
                if path == "/api/repos/create":
                    asked = json.loads(body)
                    name = f"{asked['organization']}/{asked['name']}"
                    if name in hub.repositories:
                        return self._json(409, {"url": f"{hub.endpoint}/datasets/{name}"})
                    assert asked["type"] == "dataset"
                    hub.repositories[name] = Repository(asked.get("visibility") == "private")
                    return self._json(200, {"url": f"{hub.endpoint}/datasets/{name}"})
                owner, short, what = path.removeprefix("/api/datasets/").split("/")[:3]
                repository = hub.repositories[f"{owner}/{short}"]
                if what == "preupload":
                    names = [file["path"] for file in json.loads(body)["files"]]
                    modes = [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in names]
                    return self._json(200, {"files": modes})
                assert what == "commit"
                for line in map(json.loads, body.decode().splitlines()):
                    if line["key"] == "file":
                        repository.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                page = f"{hub.endpoint}/datasets/{owner}/{short}/commit/{COMMIT}"
                return self._json(200, {"success": True, "commitUrl": page, "commitOid": COMMIT})

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        self.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
        try:
            yield self
        finally:
            server.shutdown()
            server.server_close()
            thread.join()
