"""The report served to a browser: a real server, asked over HTTP."""

from __future__ import annotations

import os
import re
import socket
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urljoin, urlsplit

import pytest

from lrag_ray.report import collect
from lrag_ray.report.view import ReportServer
from lrag_ray.store.rollouts import RolloutRun
from tests.report.make_run import make_run


@contextmanager
def served(run: RolloutRun, folder: Path) -> Iterator[ReportServer]:
    with ReportServer(collect([run]), folder) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def get(address: str, **headers: str) -> tuple[int, dict[str, str], bytes]:
    request = urllib.request.Request(address, headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.status, dict(answer.headers), answer.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, dict(error.headers), error.read()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RolloutRun:
    return make_run(str(tmp_path_factory.mktemp("view") / "run"), ["a red fox"])


def videos_of(page: bytes, address: str) -> list[str]:
    return [urljoin(address, found) for found in re.findall(r'src="([^"]+\.mp4)"', page.decode())]


def test_page_and_videos_are_served_and_nothing_is_written_to_the_run(run: RolloutRun, tmp_path: Path) -> None:
    before = run.storage.list_files()
    with served(run, tmp_path) as server:
        assert urlsplit(server.address).hostname == "127.0.0.1"
        status, headers, page = get(server.address)
        assert status == 200 and headers["Content-Type"] == "text/html" and b"a red fox" in page
        assert get(urljoin(server.address, "/"))[2] == page
        first, *_ = videos = videos_of(page, server.address)
        assert len(videos) == 2
        status, headers, content = get(first)
        assert (status, headers["Content-Type"], content[4:8]) == (200, "video/mp4", b"ftyp")
        for asked, begin, end in (("0-99", 0, 100), ("100-", 100, None), ("-50", -50, None), ("0-999999999", 0, None)):
            status, headers, part = get(first, Range=f"bytes={asked}")
            assert (status, part) == (206, content[begin:end]), asked
            assert headers["Content-Range"].endswith(f"/{len(content)}")
        assert get(first, Range=f"bytes={len(content)}-")[0] == 416
    assert run.storage.list_files() == before


@pytest.mark.parametrize("path", ["/run.json", "/../run.json", "/..%2frun.json", "/videos/99.mp4", "//etc/passwd"])
def test_what_the_page_does_not_link_to_is_not_there(run: RolloutRun, tmp_path: Path, path: str) -> None:
    with served(run, tmp_path) as server:
        assert get(server.address.removesuffix("/report.html") + path)[0] == 404


def test_another_name_for_this_machine_is_refused(run: RolloutRun, tmp_path: Path) -> None:
    with served(run, tmp_path) as server:
        assert get(server.address, Host="evil.example")[0] == 403
        assert get(server.address, Host=f"localhost:{server.server_address[1]}")[0] == 200


@pytest.mark.parametrize(
    ("path", "header", "status"),
    [
        ("http://[::1/", "", 404),
        ("/", "Host: [::1", 403),
        ("/", "Host: 127.0.0.1#evil.example", 403),
        ("/", "Host: localhost\r\nHost: evil.example", 403),
        ("/", f"Host: localhost\r\nRange: bytes=0-{'9' * 5000}", 206),
    ],
)
def test_a_request_that_no_browser_makes_is_answered(
    run: RolloutRun, tmp_path: Path, capfd: pytest.CaptureFixture[str], path: str, header: str, status: int
) -> None:
    with (
        served(run, tmp_path) as server,
        socket.create_connection(("127.0.0.1", server.server_port), timeout=30) as browser,
    ):
        browser.sendall(f"GET {path} HTTP/1.1\r\n{header or 'Host: localhost'}\r\nConnection: close\r\n\r\n".encode())
        assert int(browser.makefile("rb").readline().split()[1]) == status
    assert "Traceback" not in capfd.readouterr().err


def test_a_video_that_became_a_link_out_of_the_run_is_not_served(tmp_path: Path) -> None:
    run = make_run(str(tmp_path / "run"), ["a red fox"])
    (tmp_path / "secret").write_text("secret")
    with served(run, tmp_path / "page") as server:
        (first, (storage, path)), (second, (_, other)), *_ = server.videos.items()
        video, pipe = Path(storage.full(path)), Path(storage.full(other))
        video.unlink()
        video.symlink_to(tmp_path / "secret")
        pipe.unlink()
        os.mkfifo(pipe)
        assert get(urljoin(server.address, first))[0] == get(urljoin(server.address, second))[0] == 404


def test_videos_of_a_bucket_come_from_there_by_a_signed_address(
    run: RolloutRun, tmp_path: Path, s3_bucket: str
) -> None:
    remote = RolloutRun(f"{s3_bucket}/view")
    for path in run.storage.list_files():
        remote.storage.write(path, run.storage.read_bytes(path))
    with served(remote, tmp_path) as server:
        first, *_ = videos_of(get(server.address)[2], server.address)
        status, _, content = get(first)
    assert status == 200 and content[4:8] == b"ftyp"
