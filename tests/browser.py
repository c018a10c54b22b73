"""A headless Chromium, driven through its debugging protocol."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
_FLAGS = (
    "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking --disable-component-update "
    "--disable-sync --remote-debugging-port=0"
)
_PATIENCE_S = 60


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
            message = json.loads(self._socket.recv(timeout=_PATIENCE_S))
            if message.get("id") == self._number:
                assert "error" not in message, message
                result: dict[str, Any] = message["result"]
                return result

    def run(self, script: str) -> Any:
        """Value of a script in the page, awaited where it is a promise."""
        found = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def until(self, script: str) -> Any:
        """Value of a script once it is true."""
        deadline = time.monotonic() + _PATIENCE_S
        while not (value := self.run(script)):
            assert time.monotonic() < deadline, f"never true: {script}"
            time.sleep(0.05)
        return value

    def resize(self, width: int, height: int = 900) -> None:
        """Size of the window in CSS pixels."""
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )

    def picture(self, path: Path, *, whole: bool = False) -> None:
        """A PNG of the window, or of the whole page."""
        shot = self.call("Page.captureScreenshot", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(shot["data"]))

    def go(self, url: str, *, scripts: bool = True) -> None:
        """Open another address."""
        self.call("Emulation.setScriptExecutionDisabled", value=not scripts)
        self.call("Page.navigate", url=url)
        self.until("document.readyState === 'complete'")


@contextmanager
def opened(page: Path, scratch: Path) -> Iterator[Tab]:
    """A tab that shows `page`; its downloads and the browser's own files go to `scratch`."""
    from websockets.sync.client import connect

    profile = scratch / "profile"
    command = [str(BROWSER), *_FLAGS.split(), f"--user-data-dir={profile}", "about:blank"]
    browser = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + _PATIENCE_S
        while not (profile / "DevToolsActivePort").is_file():
            assert browser.poll() is None and time.monotonic() < deadline
            time.sleep(0.1)
        port = (profile / "DevToolsActivePort").read_text().split()[0]
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/json", timeout=_PATIENCE_S) as answer:
            address = next(tab["webSocketDebuggerUrl"] for tab in json.load(answer) if tab["type"] == "page")
        with connect(address, max_size=None, open_timeout=_PATIENCE_S) as socket:
            tab = Tab(socket)
            tab.call("Page.setDownloadBehavior", behavior="allow", downloadPath=str(scratch))
            tab.go(page.as_uri())
            yield tab
    finally:
        browser.terminate()
        browser.wait(20)
