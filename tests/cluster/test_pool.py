from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import pytest
import ray

from lrag_ray.engine import pool as pool_module
from lrag_ray.engine.pool import ActorPool
from lrag_ray.engine.sizing import PoolSize
from lrag_ray.errors import ClusterError
from lrag_ray.events import (
    AttemptFailed,
    Event,
    Notice,
    StageAdvanced,
    TaskFinished,
    TaskStarted,
    TaskYielded,
    WorkerLost,
)
from lrag_ray.stages.spec import Host, Outcome, Parted, Refused, Resources, Result, Stage, Task, Yielded
from lrag_ray.store.records import FailureRecord

pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("cluster")]


class Job(NamedTuple):
    """What a `Sleeper` does: sleep, write a line, then fail in one of several ways, `raises` or `dies` times."""

    name: str
    folder: Path
    seconds: float = 0.0
    raises: int = 0
    dies: int = 0
    parts_before_death: bool = False
    memory: bool = False
    refuses: bool = False


@dataclass(frozen=True)
class Slept(Result):
    """When and where a job was done."""

    pid: int = 0
    began: float = 0.0
    ended: float = 0.0


class Sleeper:
    """Does a job as it says."""

    def __init__(self, host: Host) -> None:
        self.host = host

    def work(self, payload: Job, attempt: str) -> Outcome:
        job, began = payload, time.monotonic()
        attempts = len(list(job.folder.glob(f"{job.name}.attempt-*")))
        (job.folder / f"{job.name}.attempt-{attempt}").touch()
        time.sleep(job.seconds)
        if job.refuses:
            return Refused(f"{job.name} is damaged")
        if attempts < job.raises:
            raise MemoryError("host memory") if job.memory else ValueError(f"{job.name} is poison")
        if attempts < job.dies:
            if job.parts_before_death:
                (job.folder / f"{job.name}.part-{attempt}").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return Slept(pid=os.getpid(), began=began, ended=time.monotonic())


class Pair(Sleeper):
    """Does nothing before two of these are at work: one may start much later than the other."""

    def work(self, payload: Job, attempt: str) -> Outcome:
        (payload.folder / f"{payload.name}.attempt-here").touch()
        while len(list(payload.folder.glob("*.attempt-here"))) < 2:
            time.sleep(0.01)
        return super().work(payload, attempt)


class Leaver(Sleeper):
    """Works until it must leave, and then takes a moment to store what it has."""

    def work(self, payload: Job, attempt: str) -> Outcome:
        (payload.folder / f"{payload.name}.attempt-here").touch()
        while not self.host.must_leave():
            time.sleep(0.01)
        time.sleep(0.5)
        (payload.folder / f"{payload.name}.stored").touch()
        return Yielded("it must leave")


class Together(Sleeper):
    """Does jobs one after the other as one attempt, and leaves out of it those that refuse company."""

    def work_together(self, payloads: Sequence[Job], attempts: Sequence[str]) -> list[Outcome | Parted]:
        names = "+".join(job.name for job in payloads)
        (payloads[0].folder / f"together-{names}").touch()
        company = len(payloads) > 1
        return [
            Parted("it is shy") if company and job.name == "shy" else self.work(job, attempt)
            for job, attempt in zip(payloads, attempts, strict=True)
        ]


class Stillborn(Sleeper):
    """Never starts."""

    def __init__(self, host: Host) -> None:
        raise RuntimeError("no CUDA on this node")


ONE_CPU = Resources(1)


@dataclass(frozen=True)
class Jobs(Stage[Job]):
    """Jobs, done by a worker of one's choice."""

    name = "rollouts"
    worker: type[Sleeper] = Sleeper
    needs: Resources = ONE_CPU
    at_once: int = 1

    @property
    def tasks_at_once(self) -> int:
        return self.at_once

    @property
    def resources(self) -> Resources:
        return self.needs

    def open(self, host: Host) -> Sleeper:
        return self.worker(host)

    def progress(self, task: Task[Job]) -> int:
        return len(list(task.payload.folder.glob(f"{task.key}.part-*")))


class Holder:
    """An actor of another user."""

    def ready(self) -> None:
        """Answer once it has its place."""


class Diary:
    """A listener that writes down what it hears."""

    def __init__(self) -> None:
        self.order: list[tuple[str, str]] = []
        self.results: dict[str, Slept] = {}
        self.failures: list[tuple[str, FailureRecord]] = []
        self.lost: list[str] = []
        self.notices: list[str] = []
        self.done: list[tuple[int, int]] = []

    def __call__(self, event: Event) -> None:
        match event:
            case TaskStarted():
                self.order.append((event.worker, event.task))
            case TaskFinished(result=Slept() as result):
                assert event.task not in self.results
                self.results[event.task] = result
            case AttemptFailed():
                self.failures.append((event.failure.task, event.failure))
            case WorkerLost():
                self.lost.append(event.reason)
            case Notice():
                self.notices.append(event.text)
            case StageAdvanced():
                self.done.append((event.done, event.total))
            case _:
                # How far a task is; nobody reports it here.
                raise AssertionError(event)


def sleeper_pool(diary: Diary, size: int, worker: type[Sleeper] = Sleeper) -> ActorPool[Job]:
    return ActorPool(Jobs(worker), PoolSize(size, size), max_attempts=3, listener=diary)


def tasks_of(*jobs: Job) -> list[Task[Job]]:
    return [Task(job.name, job, order, "g") for order, job in enumerate(jobs)]


def test_tasks_are_spread_with_one_in_flight_per_actor(tmp_path: Path) -> None:
    diary = Diary()
    jobs = [Job(f"job{i:02d}", tmp_path, seconds=0.1) for i in range(20)]
    assert sleeper_pool(diary, 2, Pair).run(tasks_of(*jobs)) == []
    assert [key for _, key in diary.order] == [job.name for job in jobs]
    assert len(diary.results) == 20 and diary.done == [(done, 20) for done in range(1, 21)]
    by_actor: dict[int, list[tuple[float, float]]] = {}
    for slept in diary.results.values():
        by_actor.setdefault(slept.pid, []).append((slept.began, slept.ended))
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
    quarantined = sleeper_pool(diary, 2).run(tasks_of(*jobs))
    assert [task.key for task in quarantined] == ["bad"]
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


def test_what_fails_together_is_tried_again_alone_and_only_then_counted(tmp_path: Path) -> None:
    class Shy(Diary):
        """Notes who was given back."""

        def __call__(self, event: Event) -> None:
            if isinstance(event, TaskYielded):
                self.notices.append(f"{event.worker} {event.task} {event.reason}")
            else:
                super().__call__(event)

    diary = Shy()
    jobs = [Job("good1", tmp_path), Job("bad", tmp_path, raises=9), Job("good2", tmp_path), Job("shy", tmp_path)]
    pool = ActorPool(Jobs(Together, at_once=2), PoolSize(1, 1), max_attempts=2, listener=diary)
    quarantined = pool.run([replace(task, batch="b") for task in tasks_of(*jobs)])
    assert [task.key for task in quarantined] == ["bad"]
    assert set(diary.results) == {"good1", "good2", "shy"}
    assert [(task, failure.counted, failure.reason) for task, failure in diary.failures] == [
        ("good1", False, "ValueError: bad is poison (together with bad)"),
        ("bad", False, "ValueError: bad is poison (together with good1)"),
        ("bad", True, "ValueError: bad is poison"),
        ("bad", True, "ValueError: bad is poison"),
    ]
    assert diary.order[:4] == [
        ("worker-0", "good1"),
        ("worker-0+1", "bad"),
        ("worker-0", "good2"),
        ("worker-0+1", "shy"),
    ]
    assert diary.notices == [
        "good1 failed together with bad: it is tried again alone",
        "bad failed together with good1: it is tried again alone",
        "worker-0+1 shy it is shy",
    ]
    names = {path.name.removeprefix("together-") for path in tmp_path.glob("together-*")}
    assert names == {"good1+bad", "good2+shy", "shy", "good1", "bad"}


def test_deaths_are_survived_and_do_not_count_while_they_bring_parts(tmp_path: Path) -> None:
    diary = Diary()
    jobs = [Job("taken", tmp_path, dies=4, parts_before_death=True), Job("other", tmp_path, seconds=0.2)]
    assert sleeper_pool(diary, 2).run(tasks_of(*jobs)) == []
    assert set(diary.results) == {"taken", "other"}
    assert [(f.kind, f.counted) for _, f in diary.failures] == [("death", False)] * 4
    assert len(diary.lost) == 4


def test_deaths_that_bring_nothing_count_from_the_third_in_a_row(tmp_path: Path) -> None:
    diary = Diary()
    quarantined = sleeper_pool(diary, 1).run(tasks_of(Job("killer", tmp_path, dies=99), Job("good", tmp_path)))
    assert [task.key for task in quarantined] == ["killer"]
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
        Task(f"{prompt:02d}{group}", Job(f"{prompt}{group}", tmp_path), prompt, group)
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
        Task(f"{prompt}{group}", Job(f"{prompt}{group}", tmp_path), prompt, group)
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

    def work(self, payload: Job, attempt: str) -> Outcome:
        if not list(payload.folder.glob("attempt-*")):
            (payload.folder / f"attempt-{attempt}").touch()
            (Path(payload.name) / "cgroup.procs").write_text(str(os.getpid()))
            hoard = [b"full" * (64 << 20) for _ in range(2)]
            raise AssertionError(f"the kernel let {len(hoard)} x 256 MB live")
        return Slept()


def test_a_worker_that_the_kernel_killed_for_memory_is_named_and_one_that_was_killed_otherwise_is_not(
    tmp_path: Path, small_memory: Path
) -> None:
    diary = Diary()
    assert sleeper_pool(diary, 1, Hog).run([Task("hog", Job(str(small_memory), tmp_path))]) == []
    ((_, failure),) = diary.failures
    assert (failure.kind, failure.counted) == ("out_of_memory", False)
    assert "the kernel ended a process" in failure.reason and "fewer actors per node" in failure.reason
    killed = Diary()
    sleeper_pool(killed, 1).run(tasks_of(Job("killed", tmp_path, dies=1)))
    assert [failure.kind for _, failure in killed.failures] == ["death"]


def test_workers_that_never_start_end_the_run_with_the_reason(tmp_path: Path) -> None:
    with pytest.raises(ClusterError, match=r"died before being ready.*RuntimeError: no CUDA on this node"):
        sleeper_pool(Diary(), 1, Stillborn).run(tasks_of(Job("job", tmp_path)))


def test_workers_without_room_are_waited_for_and_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool_module, "_UNPLACED_S", 1.0)

    holder = ray.remote(num_cpus=4)(Holder).remote()
    ray.get(holder.ready.remote())

    class Patient(Diary):
        def __call__(self, event: Event) -> None:
            super().__call__(event)
            if isinstance(event, Notice):
                ray.kill(holder)

    diary = Patient()
    sleeper_pool(diary, 1).run(tasks_of(Job("job", tmp_path)))
    assert set(diary.results) == {"job"}
    (notice,) = diary.notices
    assert "no worker has started for 1 s: each takes 1 CPUs and 0 GPUs of one node" in notice
    assert "other jobs use them" in notice and diary.lost == []


def test_a_refused_task_fails_at_once_with_one_record_and_the_rest_finishes(tmp_path: Path) -> None:
    diary = Diary()
    quarantined = sleeper_pool(diary, 1).run(tasks_of(Job("damaged", tmp_path, refuses=True), Job("good", tmp_path)))
    assert [task.key for task in quarantined] == ["damaged"] and set(diary.results) == {"good"}
    ((key, failure),) = diary.failures
    assert (key, failure.stage, failure.kind, failure.reason) == (
        "damaged",
        "rollouts",
        "refused",
        "damaged is damaged",
    )
    assert (failure.counted, failure.counted_attempts, failure.quarantined) == (True, 1, True)
    assert [task for _, task in diary.order] == ["damaged", "good"]
    assert len({worker for worker, _ in diary.order}) == 1 and diary.lost == [], "the worker went with the task"
    assert diary.done == [(1, 2), (2, 2)]


def test_an_interruption_lets_workers_store_what_they_have(tmp_path: Path) -> None:
    diary = Diary()

    def interrupt() -> None:
        if len(list(tmp_path.glob("*.attempt-here"))) == 2:
            raise KeyboardInterrupt

    pool = ActorPool(Jobs(Leaver), PoolSize(2, 2), listener=diary, tick=interrupt)
    with pytest.raises(KeyboardInterrupt):
        pool.run(tasks_of(Job("one", tmp_path), Job("two", tmp_path)))
    assert {path.name for path in tmp_path.glob("*.stored")} == {"one.stored", "two.stored"}
    assert "2 workers to store what is finished" in diary.notices[-1]
