"""The page in a real browser, where there is one: its script takes over, and says what cannot be played."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from lrag_ray.report import report
from tests.report.make_run import make_run

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = (
    "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking --disable-component-update "
    "--disable-sync --window-size=1280,3000 --virtual-time-budget=20000 --dump-dom"
)


@pytest.mark.skipif(BROWSER is None, reason="no chromium here")
def test_the_script_takes_over_and_tells_what_cannot_be_played(tmp_path: Path) -> None:
    run = make_run(str(tmp_path / "run"), ["a <script>fox</script>"])
    report([run], strips=0)
    (gone,) = (tmp_path / "run" / "rollouts" / "tiny" / "rag").rglob("video-12.mp4")
    gone.unlink()
    page = (tmp_path / "run" / "summary" / "report.html").as_uri()
    profile = f"--user-data-dir={tmp_path / 'profile'}"
    done = subprocess.run(
        [str(BROWSER), *FLAGS.split(), profile, page], check=True, capture_output=True, text=True, timeout=280
    )
    base, rag = re.findall(r'<figure class="player">.*?</figure>', done.stdout, flags=re.DOTALL)
    for player in (base, rag):
        assert re.search(r"<video(?! controls)[^>]*>", player) and " controls" not in player
    assert 'hidden="">not made at this duration' in base and "cannot be played" not in base
    assert re.search(r'<p class="missing">cannot be played: missing or damaged', rag)
    (transport,) = re.findall(r'<div class="transport"[^>]*>', done.stdout)
    assert "hidden" not in transport
    assert re.search(r'aria-valuetext="0\.9 of 2\.8 s"', done.stdout), "it shows a frame from inside"
