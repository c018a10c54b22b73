from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import ray

from lrag_ray.engine import pool as pool_module
from lrag_ray.engine.oom import Place, this_place
from lrag_ray.engine.pool import ActorPool, AttemptFailure
from lrag_ray.engine.queue import WorkItem
from lrag_ray.engine.sizing import PoolSize, WorkerShape
from lrag_ray.errors import ClusterError

pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("cluster")]


class Job(NamedTuple):
    """What a `Sleeper` does: sleep, write a line, then fail in one of several ways as often as told."""

    name: str
    folder: Path
    seconds: float = 0.0
    raises: int = 0
    dies: int = 0
    parts_before_death: bool = False
    memory: bool = False


class Sleeper:
    def ready(self) -> Place:
        return this_place()

    def work(self, job: Job, attempt: str) -> tuple[int, float, float]:
        began = time.monotonic()
        attempts = len(list(job.folder.glob(f"{job.name}.attempt-*")))
        (job.folder / f"{job.name}.attempt-{attempt}").touch()
        time.sleep(job.seconds)
        if attempts < job.raises:
            raise MemoryError("host memory") if job.memory else ValueError(f"{job.name} is poison")
        if attempts < job.dies:
            if job.parts_before_death:
                (job.folder / f"{job.name}.part-{attempt}").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return os.getpid(), began, time.monotonic()


class Pair(Sleeper):
    """Does nothing before two of these are at work: one may start much later than the other."""

    def work(self, job: Job, attempt: str) -> tuple[int, float, float]:
        (job.folder / f"{job.name}.attempt-here").touch()
        while len(list(job.folder.glob("*.attempt-here"))) < 2:
            time.sleep(0.01)
        return super().work(job, attempt)


class Diary:
    """A listener that writes down what it is reported."""

    def __init__(self) -> None:
        self.order: list[tuple[str, str]] = []
        self.results: dict[str, tuple[int, float, float]] = {}
        self.failures: list[tuple[str, AttemptFailure]] = []
        self.lost: list[str] = []
        self.unplaced_s: list[float] = []

    def started(self, item: WorkItem[Job], attempt: str, worker: str) -> None:
        self.order.append((worker, item.key))

    def finished(self, item: WorkItem[Job], result: tuple[int, float, float]) -> None:
        assert item.key not in self.results
        self.results[item.key] = result

    def failed(self, item: WorkItem[Job], attempt: str, failure: AttemptFailure) -> None:
        self.failures.append((item.key, failure))

    def yielded(self, item: WorkItem[Job], worker: str, reason: str) -> None:
        self.lost.append(f"{item.key} yielded: {reason}")

    def too_large(self, item: WorkItem[Job], largest_node: float) -> None:
        self.lost.append(f"{item.key} is too large")

    def worker_lost(self, worker: str, reason: str) -> None:
        self.lost.append(reason)

    def progress_of(self, item: WorkItem[Job]) -> int:
        return len(list(item.payload.folder.glob(f"{item.key}.part-*")))

    def unplaced(self, seconds: float) -> None:
        self.unplaced_s.append(seconds)

    def tick(self) -> None:
        return


def sleeper_pool(diary: Diary, size: int, actor: type[Any] = Sleeper) -> ActorPool[Job, tuple[int, float, float]]:
    return ActorPool(
        spawn=lambda _, memory: ray.remote(actor).options(num_cpus=1, max_restarts=0, max_task_retries=0).remote(),
        submit=lambda handle, job, attempt: handle.work.remote(job, attempt),
        listener=diary,
        size=PoolSize(size, size),
        shape=WorkerShape(1, 0),
        max_attempts=3,
    )


def items(*jobs: Job) -> list[WorkItem[Job]]:
    return [WorkItem(job.name, order, "g", job) for order, job in enumerate(jobs)]


def test_items_are_spread_with_one_in_flight_per_actor(tmp_path: Path) -> None:
    diary = Diary()
    jobs = [Job(f"job{i:02d}", tmp_path, seconds=0.1) for i in range(20)]
    assert sleeper_pool(diary, 2, Pair).run(items(*jobs)) == []
    assert [key for _, key in diary.order] == [job.name for job in jobs]
    assert len(diary.results) == 20
    by_actor: dict[int, list[tuple[float, float]]] = {}
    for pid, began, ended in diary.results.values():
        by_actor.setdefault(pid, []).append((began, ended))
    assert len(by_actor) == 2
    for spans in by_actor.values():
        spans.sort()
        assert all(end <= begin for (_, end), (begin, _) in pairwise(spans))


def test_poison_is_quarantined_with_its_traceback_and_the_rest_finishes(tmp_path: Path) -> None:
    diary = Diary()
    jobs = [
        Job("good1", tmp_path),
        Job("bad", tmp_path, raises=9),
        Job("good2", tmp_path),
        Job("big", tmp_path, raises=1, memory=True),
    ]
    quarantined = sleeper_pool(diary, 2).run(items(*jobs))
    assert [item.key for item in quarantined] == ["bad"]
    assert set(diary.results) == {"good1", "good2", "big"}
    bad = [failure for key, failure in diary.failures if key == "bad"]
    assert [(f.kind, f.counted, f.counted_attempts, f.quarantined) for f in bad] == [
        ("exception", True, 1, False),
        ("exception", True, 2, False),
        ("exception", True, 3, True),
    ]
    assert bad[0].reason == "ValueError: bad is poison"
    assert "in work" in bad[0].traceback
    assert [failure.kind for key, failure in diary.failures if key == "big"] == ["out_of_memory"]
    assert diary.lost == []


def test_deaths_are_survived_and_do_not_count_while_they_bring_parts(tmp_path: Path) -> None:
    diary = Diary()
    jobs = [Job("taken", tmp_path, dies=4, parts_before_death=True), Job("other", tmp_path, seconds=0.2)]
    assert sleeper_pool(diary, 2).run(items(*jobs)) == []
    assert set(diary.results) == {"taken", "other"}
    assert [(f.kind, f.counted) for _, f in diary.failures] == [("death", False)] * 4
    assert len(diary.lost) == 4


def test_deaths_that_bring_nothing_count_from_the_third_in_a_row(tmp_path: Path) -> None:
    diary = Diary()
    quarantined = sleeper_pool(diary, 1).run(items(Job("killer", tmp_path, dies=99), Job("good", tmp_path)))
    assert [item.key for item in quarantined] == ["killer"]
    assert [(f.counted, f.counted_attempts) for _, f in diary.failures] == [
        (False, 0),
        (False, 0),
        (True, 1),
        (True, 2),
        (True, 3),
    ]
    assert set(diary.results) == {"good"}


def test_a_worker_keeps_to_the_group_it_holds_within_a_few_prompts(tmp_path: Path) -> None:
    diary = Diary()
    work = [
        WorkItem(f"{prompt:02d}{group}", prompt, group, Job(f"{prompt}{group}", tmp_path))
        for prompt in range(12)
        for group in ("a", "b")
    ]
    sleeper_pool(diary, 1).run(work)
    keys = [key for _, key in diary.order]
    furthest = max(int(key[:2]) - int(waiting[:2]) for i, key in enumerate(keys) for waiting in keys[i:])
    assert furthest <= 4
    changes = sum(before[-1] != after[-1] for before, after in pairwise(keys))
    assert changes <= 5


def test_workers_take_different_groups(tmp_path: Path) -> None:
    diary = Diary()
    work = [
        WorkItem(f"{prompt}{group}", prompt, group, Job(f"{prompt}{group}", tmp_path))
        for prompt in range(2)
        for group in ("a", "b")
    ]
    sleeper_pool(diary, 2, Pair).run(work)
    (one, first), (other, second) = diary.order[:2]
    assert one != other and (first, second) == ("0a", "0b")


@pytest.fixture
def small_memory() -> Iterator[Path]:
    """A control group that may use 200 MB; the kernel kills what uses more."""
    own = [line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines()]
    places = {controllers: path.lstrip("/") for _, controllers, path in own}
    if "memory" in places:
        group, limit = Path("/sys/fs/cgroup/memory") / places["memory"] / "lrag-test", "memory.limit_in_bytes"
    else:
        group, limit = Path("/sys/fs/cgroup") / places.get("", "") / "lrag-test", "memory.max"
    try:
        group.mkdir()
    except OSError as error:
        pytest.skip(f"no control group can be made here: {error}")
    try:
        if not (group / limit).exists():
            pytest.skip(f"the memory controller is not delegated: {group} has no {limit}")
        (group / limit).write_text("200M")
        yield group
    finally:
        group.rmdir()


class Hog(Sleeper):
    """Takes more memory than its control group may have, the first time."""

    def work(self, job: Job, attempt: str) -> tuple[int, float, float]:
        if not list(job.folder.glob("attempt-*")):
            (job.folder / f"attempt-{attempt}").touch()
            (Path(job.name) / "cgroup.procs").write_text(str(os.getpid()))
            hoard = [b"full" * (64 << 20) for _ in range(2)]
            raise AssertionError(f"the kernel let {len(hoard)} x 256 MB live")
        return os.getpid(), 0.0, 0.0


def test_a_worker_that_the_kernel_killed_for_memory_is_named_and_one_that_was_killed_otherwise_is_not(
    tmp_path: Path, small_memory: Path
) -> None:
    diary = Diary()
    assert sleeper_pool(diary, 1, Hog).run([WorkItem("hog", 0, "g", Job(str(small_memory), tmp_path))]) == []
    ((_, failure),) = diary.failures
    assert (failure.kind, failure.counted) == ("out_of_memory", False)
    assert "the kernel ended a process" in failure.reason and "fewer actors per node" in failure.reason
    killed = Diary()
    sleeper_pool(killed, 1).run(items(Job("killed", tmp_path, dies=1)))
    assert [failure.kind for _, failure in killed.failures] == ["death"]


class Stillborn:
    def __init__(self) -> None:
        raise RuntimeError("no CUDA on this node")

    def ready(self) -> None:
        return


def test_workers_that_never_start_end_the_run_with_the_reason(tmp_path: Path) -> None:
    with pytest.raises(ClusterError, match=r"died before they were ready.*RuntimeError: no CUDA on this node"):
        sleeper_pool(Diary(), 1, Stillborn).run(items(Job("job", tmp_path)))


def test_workers_without_room_are_waited_for_and_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool_module, "_UNPLACED_S", 1.0)
    holder = ray.remote(Sleeper).options(num_cpus=4).remote()
    ray.get(holder.ready.remote())

    class Patient(Diary):
        def unplaced(self, seconds: float) -> None:
            super().unplaced(seconds)
            ray.kill(holder)

    diary = Patient()
    sleeper_pool(diary, 1).run(items(Job("job", tmp_path)))
    assert set(diary.results) == {"job"}
    assert diary.unplaced_s == [1.0] and diary.lost == []
