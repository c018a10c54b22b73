"""A real headless Chromium, driven through its debugging protocol."""

from __future__ import annotations

import http.client
import json
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from tests.chat.servers import free_port

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Tab:
    """A page."""

    def __init__(self, socket: Any) -> None:
        self._socket = socket
        self._number = 0

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """A call of the protocol; its result."""
        self._number += 1
        self._socket.send(json.dumps({"id": self._number, "method": method, "params": parameters}))
        while True:
            message = json.loads(self._socket.recv(timeout=60))
            if message.get("id") == self._number:
                assert "error" not in message, message
                result: dict[str, Any] = message["result"]
                return result

    def run(self, script: str) -> Any:
        """Value of a script in the page."""
        found = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def until(self, script: str) -> Any:
        """Value of a script once it is true; while the page loads it is not."""
        deadline = time.monotonic() + 60
        while True:
            with suppress(AssertionError):
                if value := self.run(script):
                    return value
            assert time.monotonic() < deadline, f"never true: {script}"
            time.sleep(0.05)


@contextmanager
def opened(page: Path, scratch: Path) -> Iterator[Tab]:
    """A tab that shows `page`; what it downloads goes to `scratch`."""
    from websockets.sync.client import connect

    port = free_port()
    flags = "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking --disable-sync"
    browser = subprocess.Popen(
        [str(BROWSER), *flags.split(), f"--remote-debugging-port={port}", f"--user-data-dir={scratch / 'profile'}",
         page.as_uri()],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 60
        while not (address := _address(port, page.as_uri())):
            assert browser.poll() is None and time.monotonic() < deadline
            time.sleep(0.1)
        with connect(address, max_size=None) as socket:
            tab = Tab(socket)
            tab.call("Page.setDownloadBehavior", behavior="allow", downloadPath=str(scratch))
            tab.until("document.readyState === 'complete'")
            yield tab
    finally:
        browser.terminate()
        browser.wait(20)


def _address(port: int, url: str) -> str:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", "/json")
        tabs = json.loads(connection.getresponse().read())
    except OSError:
        return ""
    finally:
        connection.close()
    return next((tab["webSocketDebuggerUrl"] for tab in tabs if tab.get("url") == url), "")
