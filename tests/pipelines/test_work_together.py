"""What may go on at once on one run, and what a copy of a run is that was taken in the middle."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from lrag_ray.errors import LeaseError
from lrag_ray.events import silent
from lrag_ray.pipelines.decode import DecodeJob
from lrag_ray.pipelines.evaluate import EvaluateJob
from lrag_ray.pipelines.gc import collect_garbage
from lrag_ray.pipelines.job import Job
from lrag_ray.pipelines.lease import keep_lease
from lrag_ray.pipelines.report import report
from lrag_ray.pipelines.score import ScoreJob
from lrag_ray.scoring.preview.suite import PREVIEW
from lrag_ray.store.lease import DECODE, REPORT, RUN
from lrag_ray.store.process import ProcessIdentity
from lrag_ray.store.rollouts import RolloutRun
from lrag_ray.store.status import run_status
from tests.stages.make import digests, do_all, make_config, make_prompts

PROMPTS = make_prompts("a red fox in the snow")
TTL_S = 6.0

HELD = {
    "run": [RUN, PREVIEW.folder],
    "decode": [DECODE],
    "score": [PREVIEW.folder],
    "another suite": ["scores/vbench_long-direct"],
    "report": [REPORT],
    "gc": [RUN, DECODE],
}
"""Kinds of work by what is at work."""

REFUSED = {
    "run": {"run", "score", "gc"},
    "decode": {"decode", "gc"},
    "score": {"run", "score"},
    "gc": {"run", "decode", "gc"},
    "report": set[str](),
}
"""Which of those keep a command from starting."""


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> RolloutRun:
    """A run with nothing left to do but its scores: without Ray."""
    folder = tmp_path_factory.mktemp("finished")
    run = RolloutRun(str(folder))
    do_all(run, make_config(folder, methods={"base": {"method": "base", "window": 9}}), PROMPTS)
    return run


def command(name: str, run: RolloutRun) -> Callable[[], object]:
    """A command as far as its leases, after which it would need Ray or is done."""
    base = {"base": {"method": "base", "window": 9}}
    config = make_config(run.uri, methods=base, scoring={"suite": "preview"}, engine={"lease_ttl_s": TTL_S})
    jobs: dict[str, Callable[[], Job[Any]]] = {
        "run": lambda: EvaluateJob(config, PROMPTS, silent),
        "decode": lambda: DecodeJob(config, False, silent),
        "score": lambda: ScoreJob(config, silent),
    }
    if name in jobs:

        def leased() -> None:
            job = jobs[name]()
            with job.leased(job.kinds):
                pass

        return leased
    if name == "gc":
        return lambda: collect_garbage(run, remove=True)
    return lambda: report([run], suite="preview")


@contextmanager
def elsewhere(run: RolloutRun, name: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A driver of another machine at work: nothing but its signs of life tells that it lives."""
    with monkeypatch.context() as context:
        process = ProcessIdentity(host="node3", pid=4711, space="another boot", started="1")
        context.setattr("lrag_ray.store.lease.this_process", lambda: process)
        holding = keep_lease(run.storage, name, HELD[name], ttl_s=TTL_S, listener=silent)
        holding.__enter__()
    try:
        yield
    finally:
        holding.__exit__(None, None, None)


@pytest.mark.parametrize("at_work", HELD)
def test_only_what_would_be_done_twice_or_pulled_away_is_refused(
    finished: RolloutRun, monkeypatch: pytest.MonkeyPatch, at_work: str
) -> None:
    before = finished.storage.list_details("decoded")
    with elsewhere(finished, at_work, monkeypatch):
        for name, refused in REFUSED.items():
            if at_work == "report" and name == "report":
                continue
            if at_work in refused:
                with pytest.raises(LeaseError, match=rf"worked on by .* on node3 \(lrag-ray {at_work}, process 4711\)"):
                    command(name, finished)()
            else:
                command(name, finished)()
    assert finished.storage.list_details("decoded") == before


def test_a_report_waits_for_the_one_that_is_being_written(
    finished: RolloutRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    with elsewhere(finished, "report", monkeypatch):
        writing = threading.Thread(target=command("report", finished))
        writing.start()
        writing.join(1.5)
        assert writing.is_alive(), "two reports were written at once"
    writing.join(60)
    assert not writing.is_alive()


def test_a_copy_that_is_taken_at_any_moment_can_be_opened_and_continued(tmp_path: Path) -> None:
    """Copies are taken file by file, in an order of their own, while rollouts go on; the original never notices."""
    original = RolloutRun(str(tmp_path / "original"))
    config = make_config(original.uri, engine={"checkpoint_every_blocks": 1})
    working = threading.Thread(target=do_all, args=(original, config, PROMPTS))
    copies: list[RolloutRun] = []
    seen = 0
    with keep_lease(original.storage, "run", [RUN], ttl_s=600, listener=silent):
        working.start()
        while working.is_alive():
            there, seen = seen, len(original.storage.list_files("rollouts"))
            if seen == there:
                continue
            copies.append(copy_now(original, tmp_path / f"copy-{len(copies)}", backwards=len(copies) % 2 == 1))
        working.join()
        for copy in copies:
            if copy.read() is not None:
                assert (run_status(copy).held_by, run_status(copy).lost) == (None, None)
    expected, files = digests(original.commits()), original.storage.list_details()
    assert len(expected) == 4

    begun = [copy for copy in copies if 0 < len(copy.storage.list_files("rollouts")) < len(files)]
    assert begun, "no copy was taken in the middle"
    for copy in begun[:: max(1, len(begun) // 8)]:
        for state in run_copy_problems(copy):
            copy.set_aside(state)
        do_all(copy, make_config(copy.uri), PROMPTS)
        assert digests(copy.commits()) == expected and run_status(copy).done
    assert original.storage.list_details() == files, "the original was touched"


def copy_now(run: RolloutRun, target: Path, *, backwards: bool) -> RolloutRun:
    """What ``cp -r`` takes: one listing, then file after file; what vanished meanwhile is left out."""
    copy = RolloutRun(str(target))
    target.mkdir()
    for path in sorted(run.storage.list_details(), reverse=backwards):
        try:
            data = run.storage.read_bytes(path)
        except FileNotFoundError:
            continue
        place = target / path
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(data)
    return copy


def run_copy_problems(run: RolloutRun) -> list[str]:
    """Commits whose files came too late for the copy; a start sets them aside."""
    return [state.path for state in run.inventory().problems()]
