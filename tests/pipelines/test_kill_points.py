"""SIGKILL at every step of what scoring, the report and gc write: nothing is lost, and the next start finishes.

Each start is a process of its own that kills itself at its n-th change of the disk; n grows until a start gets through.
A file that is being written is cut in half first, as after a power failure.
"""

from __future__ import annotations

import os
import signal
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lrag_ray.pipelines.gc import collect_garbage
from lrag_ray.pipelines.report import report
from lrag_ray.report.collect import collect
from lrag_ray.scoring.preview.suite import PREVIEW
from lrag_ray.store.create_only import TEMPORARY_PREFIX
from lrag_ray.store.lease import holders
from lrag_ray.store.rollouts import RolloutRun
from lrag_ray.store.run_dir import SUMMARY_INDEX
from lrag_ray.store.status import run_status
from tests.report.make_run import make_run

Work = Callable[[RolloutRun], None]


def score(run: RolloutRun) -> None:
    """What a scoring worker does with all that is pending."""
    worker = PREVIEW.worker(run.storage, run.storage, threads=1, device="cpu")
    for task in PREVIEW.pending(run):
        worker.score(task.payload, lambda: True)


def write_report(run: RolloutRun) -> None:
    report([run], strips=1)


def remove_leftovers(run: RolloutRun) -> None:
    collect_garbage(run, remove=True, older_than_s=-1)


def start(work: Work, address: str, kill_at: int) -> bool:
    """Do `work` in a process that kills itself before its change number `kill_at`; True if it got through."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            kill_before(kill_at)
            work(RolloutRun(address))
            status = 0
        except BaseException:  # noqa: BLE001 - the parent sees the exit code
            traceback.print_exc()
        finally:
            os._exit(status)
    _, ended = os.waitpid(child, 0)
    assert os.WIFSIGNALED(ended) or os.WEXITSTATUS(ended) == 0, "it failed instead of being killed"
    return not os.WIFSIGNALED(ended)


def kill_before(change: int) -> None:
    """Let this process die at that change: a write, a link, a rename or a removal."""
    done = 0

    def counted(function: Callable[..., Any], before: Callable[..., None] = lambda *_: None) -> Callable[..., Any]:
        def count(*arguments: Any, **options: Any) -> Any:
            nonlocal done
            done += 1
            if done == change:
                before(*arguments)
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **options)

        return count

    os.fsync = counted(os.fsync, lambda file, *_: os.ftruncate(file, os.fstat(file).st_size // 2))
    for name in ("link", "replace", "rename", "unlink", "remove"):
        setattr(os, name, counted(getattr(os, name)))


def contents(run: RolloutRun, prefix: str = "") -> dict[str, bytes]:
    """Files that readers see, but for leases."""
    files = run.storage.list_files(prefix)
    return run.storage.read_many([path for path in files if not path.startswith("lease/")])


@pytest.fixture
def run(tmp_path: Path) -> RolloutRun:
    return make_run(str(tmp_path / "run"), ["a red fox"], horizons=[6])


@pytest.mark.parametrize("work", [score, write_report, remove_leftovers])
def test_killed_at_every_step_it_loses_nothing_and_the_next_start_finishes(
    run: RolloutRun, tmp_path: Path, work: Work
) -> None:
    prepare(run, work)
    before = contents(run)
    kept = {path: data for path, data in before.items() if not is_leftover(path)}
    undisturbed = RolloutRun(str(tmp_path / "undisturbed"))
    for path, data in before.items():
        undisturbed.storage.write(path, data)
    work(undisturbed)
    expected = contents(undisturbed)
    for path, data in expected.items():
        # The page names the address.
        expected[path] = data.replace(undisturbed.uri.encode(), run.uri.encode())

    kills = 0
    while not start(work, run.storage.address, kills + 1):
        kills += 1
        found = contents(run)
        assert kept.items() <= found.items(), "something is lost"
        # Whatever is there is as it was before or as it is in the end, as a whole.
        for path, data in found.items():
            assert data == before.get(path) or same(path, data, expected), f"{path} after {kills} kills"
        assert not collect([run]).scores.damaged and run_status(run).problems == []
        assert all(one.is_free for one in holders(run.storage).values())
        assert kills < 400, "it makes no progress"
    assert kills >= 4
    found = contents(run)
    assert found.keys() == expected.keys() and all(same(path, data, expected) for path, data in found.items())

    left = [path for path in run.storage.list_details() if path.rpartition("/")[2].startswith(TEMPORARY_PREFIX)]
    collect_garbage(run, remove=True, older_than_s=-1)
    hour_ago = {path for path in left if path.startswith(("scores/", "summary/"))}
    assert {path for path in run.storage.list_details() if path in left} == hour_ago, "gc removes the others"


def is_leftover(path: str) -> bool:
    return "attempt-died/" in path or ".invalid-" in path or path.startswith("probe-")


def prepare(run: RolloutRun, work: Work) -> None:
    """What `work` needs."""
    if work is write_report:
        score(run)
    if work is remove_leftovers:
        rollout = run.commits()[0].rollout.path
        for name in ("part-00000-00006.safetensors", "part-00000-00006.json", "video-6.mp4"):
            run.storage.write(f"{rollout}/attempt-died/{name}", b"{}")
        run.storage.write(f"{rollout}/commit-6.json.invalid-0a1b2c3d", b"{}")
        run.storage.write("probe-0123", b"probe")


def same(path: str, data: bytes, expected: dict[str, bytes]) -> bool:
    """Whether a file is what the undisturbed run has.

    Rows of scores say when they were made, and the list of the report holds the checksum of a page that names the run.
    """
    if path.startswith("scores/") or path == SUMMARY_INDEX:
        return path in expected
    return data == expected.get(path)
