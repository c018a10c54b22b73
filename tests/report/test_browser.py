"""The page in a real browser, where there is one: what its script does, what is there without it, and that nobody is
left out."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from lrag_ray.report import report
from lrag_ray.store.rollouts import RolloutRun
from tests.browser import BROWSER, Tab, opened
from tests.report.make_run import make_run
from tests.report.vbench_rows import by_rollout, store_rows, video_rows

pytestmark = pytest.mark.skipif(BROWSER is None, reason="no chromium here")
PROMPTS = ["a <script>fox</script>", "a bear", "a wolf"]
WINS = {"rag": (0.6, 0.9, 0.5)}
"""Scores by prompt; those of other methods are 0.7."""


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report whose first video of rag is missing."""
    folder = tmp_path_factory.mktemp("page")
    run: RolloutRun = make_run(str(folder / "run"), PROMPTS, horizons=(12, 24))
    prompts = list(run.require().prompts)
    for rollout, videos in by_rollout(run).items():
        score = WINS.get(rollout.method, (0.7,) * 3)[prompts.index(rollout.prompt_id)]
        store_rows(run, rollout, video_rows(videos, lambda *_, score=score: score))
    report([run], strips=1)
    for video in (folder / "run" / "rollouts" / "tiny" / "rag" / f"{prompts[0]}-0").rglob("video-24.mp4"):
        video.unlink()
    return folder / "run" / "summary" / "report.html"


@pytest.fixture(scope="module")
def tab(page: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tab]:
    with opened(page, tmp_path_factory.mktemp("browser")) as tab:
        tab.resize(1280)
        yield tab


@pytest.fixture
def fresh(tab: Tab, page: Path) -> Tab:
    tab.go("about:blank")
    tab.go(page.as_uri())
    return tab


def test_the_script_takes_over_and_tells_what_cannot_be_played(fresh: Tab) -> None:
    assert fresh.run("[...document.querySelectorAll('video')].every(video => !video.controls)")
    fresh.run("document.querySelector('#videos').scrollIntoView()")
    shown = "[...document.querySelectorAll('.row:first-of-type .missing:not([hidden])')].map(e => e.textContent).join()"
    assert fresh.until(shown) == "cannot be played: missing or damaged"
    assert fresh.run("document.querySelector('.transport').hidden") is False
    first = fresh.run("document.querySelector('.seek').getAttribute('aria-valuetext')")
    assert first == "4.4 of 5.8 s", "it shows a late frame"
    fresh.run("document.querySelectorAll('.row')[1].scrollIntoView()")
    frames = "document.querySelectorAll('.row')[1].querySelector('[data-method=rag] .frames')"
    fresh.until(f"{frames}.querySelectorAll('canvas').length === 2")
    assert fresh.run(f"{frames}.textContent") == "retrieved for the block at 3.75 s:0.25 s0.50 s"


def test_prompts_are_sorted_by_paired_difference_and_filtered(fresh: Tab) -> None:
    def titles() -> list[str]:
        shown = "[...document.querySelectorAll('.row:not([hidden]) h3')].map(e => e.textContent.trim().slice(0, 8))"
        found: list[str] = fresh.run(shown)
        return found

    def choose(name: str, value: str) -> None:
        fresh.run(
            f"(c => {{ c.value = '{value}'; c.dispatchEvent(new Event('change', {{bubbles: true}})) }})"
            f"(document.querySelector('[name={name}]'))"
        )

    assert titles() == ["Prompt 1", "Prompt 2", "Prompt 3"]
    choose("one", "rag")
    choose("other", "base")
    choose("measure", "imaging_quality")
    choose("order", "1")
    assert titles() == ["Prompt 2", "Prompt 1", "Prompt 3"]
    gaps = fresh.run("[...document.querySelectorAll('.gap')].map(e => e.textContent.split(': ')[1])")
    assert gaps == ["+20", "−10", "−20"]
    choose("order", "-1")
    assert titles() == ["Prompt 3", "Prompt 1", "Prompt 2"]
    fresh.run("(s => { s.value = 'BEAR'; s.dispatchEvent(new Event('input')) })(document.querySelector('.search'))")
    assert titles() == ["Prompt 2"] and fresh.run("document.querySelector('.found').textContent") == "1 of 3"
    fresh.run("document.querySelector('[name=method][value=base]').click()")
    assert (
        fresh.run("[...document.querySelectorAll('.row:not([hidden]) .player:not([hidden]) > figcaption')].length") == 1
    )


def test_scores_and_links_follow_the_duration(fresh: Tab) -> None:
    fresh.run("document.querySelector('[name=duration][value=\"12\"]').click()")
    visible = "[...document.querySelectorAll('.scores:not([hidden])')].map(e => e.dataset.frames)"
    assert set(fresh.run(visible)) == {"12"}
    links = fresh.run("[...document.querySelectorAll('.file')].map(e => e.getAttribute('href'))")
    assert len(links) == 12 and all(link.endswith("video-12.mp4") for link in links)


def test_a_click_on_a_map_goes_there_shows_what_was_retrieved_and_can_be_linked_to(fresh: Tab, page: Path) -> None:
    """Given the second prompt's rag, a click at its fifth block seeks there, draws two frames and has a permalink."""
    found = fresh.run(
        "(field => { const box = field.getBoundingClientRect(); const at = {bubbles: true,"
        " clientX: box.left + box.width * 4.5 / 8, clientY: box.bottom - 1};"
        " field.querySelector('path').dispatchEvent(new PointerEvent('pointermove', at));"
        " const said = field.parentElement.querySelector('.pointed').textContent;"
        " field.dispatchEvent(new PointerEvent('click', at)); return said })"
        "(document.querySelectorAll('.row')[1].querySelector('[data-method=rag] .field'))"
    )
    assert found == "; block at 3.00 s: 0.00 s, sink"
    drawn = "document.querySelectorAll('.row')[1].querySelectorAll('[data-method=rag] .frames canvas').length"
    fresh.until(f"{drawn} === 2")
    playhead = fresh.run("document.querySelectorAll('.row')[1].querySelector('.playhead').style.left")
    assert float(playhead.rstrip("%")) == pytest.approx(56.25, abs=0.3)
    link = fresh.run("document.querySelectorAll('.row')[1].querySelector('.permalink').href")
    address, _, settings = link.partition("&")
    assert settings == "t=3.37&d=24"
    fresh.go("about:blank")
    fresh.go(f"{address}&t=1.5&d=12")
    time = "document.querySelectorAll('.row')[1].querySelector('.time').textContent"
    assert fresh.until(time) == "1.5 of 2.8 s"
    fresh.until("Math.abs(document.querySelectorAll('.row')[1].getBoundingClientRect().top) < 400")


def test_a_map_is_read_and_followed_with_the_keyboard(fresh: Tab) -> None:
    """Given rag's map, three blocks to the right by arrow keys, what they retrieve is said and Enter goes there."""
    field = "document.querySelectorAll('.row')[1].querySelector('[data-method=rag] .field')"

    def press(*keys: str) -> list[str]:
        for key in keys:
            fresh.run(f"{field}.dispatchEvent(new KeyboardEvent('keydown', {{key: '{key}', bubbles: true}}))")
        return list(fresh.run(f"(f => [f.getAttribute('aria-valuenow'), f.getAttribute('aria-valuetext')])({field})"))

    label = fresh.run(f"(f => [f.tabIndex, f.getAttribute('role'), f.getAttribute('aria-label')])({field})")
    assert label[:2] == [0, "slider"]
    assert label[2].startswith("Retrieval map of rag, Prompt 2. Attended latent frames per block over 8 blocks")
    assert press("Home") == ["0.00", "block at 0.00 s: nothing retrieved"]
    assert press("ArrowRight", "ArrowRight", "ArrowRight") == ["2.25", "block at 2.25 s: retrieved 0.25, 0.50 s"]
    assert press("ArrowLeft")[0] == "1.50" and press("ArrowLeft", "ArrowLeft", "ArrowLeft")[0] == "0.00"
    assert press("End")[0] == "5.25" and press("ArrowRight")[0] == "5.25"
    time = "document.querySelectorAll('.row')[1].querySelector('.time').textContent"
    assert fresh.run(time) == "4.4 of 5.8 s", "arrows leave the videos alone"
    press("Enter")
    assert fresh.run(time) == "5.3 of 5.8 s"


def test_tables_scores_and_videos_are_there_without_the_script(tab: Tab, page: Path) -> None:
    tab.go("about:blank")
    tab.go(page.as_uri(), scripts=False)
    html: str = tab.call("Runtime.evaluate", expression="document.documentElement.outerHTML")["result"]["value"]
    assert '<div class="toolbar" role="group" aria-label="Videos shown" hidden' in html
    assert html.count("<video controls") == 6 and html.count('<dl class="scores" data-frames="24">') == 6
    tab.call("Emulation.setScriptExecutionDisabled", value=False)


@pytest.mark.parametrize("width", [400, 1280, 1600])
def test_nothing_is_clipped(fresh: Tab, width: int) -> None:
    """Tables wider than their place scroll by keyboard too, beside a first column that stays."""
    fresh.resize(width)
    assert fresh.run("document.documentElement.scrollWidth") <= width
    wide = fresh.run(
        "[...document.querySelectorAll('.scroll')].filter(e => e.scrollWidth > e.clientWidth + 1)"
        ".map(e => [e.tabIndex, getComputedStyle(e.querySelector('tbody th[scope=row]')).position])"
    )
    assert all(found == [0, "sticky"] for found in wide) and (width == 400 or not wide)
    fresh.resize(1280)


@pytest.mark.proof
def test_an_accessibility_checker_finds_nothing(fresh: Tab, tmp_path: Path) -> None:
    npm = shutil.which("npm")
    if npm is None:
        pytest.skip("no npm here, which axe-core comes from")
    got = subprocess.run(
        [npm, "install", "--prefix", str(tmp_path), "axe-core@4.14.1"], capture_output=True, text=True, timeout=120
    )
    if got.returncode:
        pytest.skip(f"axe-core is not available from npm: {got.stderr.strip()[-200:]}")
    fresh.run((tmp_path / "node_modules" / "axe-core" / "axe.min.js").read_text() + ";0")
    for width in (400, 1280):
        fresh.resize(width)
        found = fresh.run("axe.run().then(found => JSON.stringify(found.violations.map(v => [v.id, v.nodes[0].html])))")
        assert json.loads(found) == []
