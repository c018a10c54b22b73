"""The frame of every job: lease, stages, interruption, failures, outcome and exit code.

A job is a subclass that says what to prepare and what to do; everything that all starts have in common is here. One
rule gives the exit code of every job: 0 if all that was asked for is made, 1 if a rollout, decode or score that was
asked for could not be made, 130 after an interruption. Errors of the environment and of the configuration are raised.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import ClassVar, Generic, TypeVar

from lrag_ray.config.schema import WorkersSection
from lrag_ray.engine.cluster_address import cluster_address
from lrag_ray.engine.pool import ActorPool
from lrag_ray.engine.sizing import PoolSize
from lrag_ray.errors import INTERRUPTED, StorageError
from lrag_ray.events import AttemptFailed, Event, Listener, Notice, StageBegan, StageEnded, TaskFinished, silent
from lrag_ray.pipelines.failure_log import FailureLog
from lrag_ray.pipelines.lease import keep_lease
from lrag_ray.stages.spec import Payload, Stage, StageName, Task
from lrag_ray.store.address import Storage

Outcome = TypeVar("Outcome")

LISTED_WITHIN_S = 120.0
"""An object store, or a folder on NFS, lists what other nodes have made within this time."""
_LIST_AGAIN_S = 1.0


class Job(ABC, Generic[Outcome]):
    """One start of a job. `start` does it all."""

    command: ClassVar[str]
    """Name of the job in messages about who is at work."""

    def __init__(self, storage: Storage, engine: WorkersSection, listener: Listener = silent) -> None:
        """`storage` is where results and failure records go; `listener` receives the events."""
        self.storage = storage
        self.engine = engine
        self.missing: dict[str, str] = {}
        """What was asked for and could not be made: the reason, by title."""
        self.made: Counter[StageName] = Counter()
        """Results that this start has made, by stage."""
        self.finished: dict[StageName, set[str]] = {}
        """Titles of the tasks that this start has finished, by stage."""
        self._listener = listener
        self._began = time.monotonic()
        self._failures = FailureLog(storage, self.warn)
        self._quarantined: set[tuple[str, str]] = set()
        """Stage and title, since the last stage began."""

    @property
    @abstractmethod
    def kinds(self) -> Sequence[str]:
        """Kinds of work (`lrag_ray.store.lease`) that no other driver may do at the same time."""

    @abstractmethod
    def do(self) -> None:
        """The work. Leaves what could not be made in `missing`."""

    @abstractmethod
    def outcome(self, exit_code: int) -> Outcome:
        """What the caller gets."""

    def start(self) -> Outcome:
        """Run the job. Ctrl-C ends the actors and gives exit code 130; nothing committed or stored is lost.

        Raises ClusterError for an address that no job can use, before anything is written.
        """
        cluster_address(self.engine)
        try:
            with self.leased(self.kinds):
                self.do()
        except KeyboardInterrupt:
            self.warn("interrupted; the same command continues")
            return self.outcome(INTERRUPTED)
        return self.outcome(1 if self.missing else 0)

    @property
    def seconds(self) -> float:
        """Since the job was created."""
        return time.monotonic() - self._began

    def report(self, event: Event) -> None:
        """Take in an event and pass it on."""
        if isinstance(event, TaskFinished):
            self.made[event.stage] += event.result.made
            self.finished.setdefault(event.stage, set()).add(event.task)
            # Where each duration is a rollout of its own, several tasks have one title: the others stay missing.
            if (event.stage, event.task) not in self._quarantined:
                self.missing.pop(event.task, None)
                self._failures.clear(event.stage, event.task)
        elif isinstance(event, AttemptFailed):
            if event.failure.quarantined:
                self._quarantined.add((event.failure.stage, event.failure.task))
                self.missing[event.failure.task] = event.failure.reason
            self._failures.add(event.failure)
        self._listener(event)

    def note(self, text: str) -> None:
        """Report something that a person should read."""
        self.report(Notice(text))

    def warn(self, text: str) -> None:
        """Report something that a person should look into."""
        self.report(Notice(text, warning=True))

    @contextmanager
    def stage(self, name: StageName, total: int = 1) -> Iterator[None]:
        """Bracket a stage with its events; failures are on storage when it ends."""
        began = time.monotonic()
        self._quarantined.clear()
        self.report(StageBegan(name, total))
        yield
        self._failures.write(force=True)
        self.report(StageEnded(name, time.monotonic() - began))

    def run_stage(
        self,
        stage: Stage[Payload],
        tasks: Sequence[Task[Payload]],
        *,
        size: PoolSize | None = None,
        listener: Listener | None = None,
    ) -> list[Task[Payload]]:
        """Run tasks on the pool of actors that the engine section describes; returns the quarantined ones. Needs Ray.

        `listener` receives the events instead of `report`, which it must call. Raises ClusterError where no worker can
        be started, and StorageError where failures could not be written for ten minutes.
        """
        engine = self.engine
        with self.stage(stage.name, len(tasks)):
            pool = ActorPool(
                stage,
                size or PoolSize(engine.least_actors, engine.most_actors),
                max_attempts=engine.max_attempts,
                stall_timeout_s=engine.stall_timeout_s,
                address=engine.address,
                listener=listener or self.report,
                tick=self._failures.write,
            )
            return pool.run(tasks)

    def wait_until_listed(self, hidden: Callable[[], Collection[str]]) -> None:
        """Wait until listings show all that this start has made; `hidden` looks what they do not show.

        What comes after goes by listings, and would leave it out. Raises StorageError after `LISTED_WITHIN_S`.
        """
        began_s, told = time.monotonic(), False
        while missed := hidden():
            some = next(iter(missed))
            if time.monotonic() - began_s > LISTED_WITHIN_S:
                raise StorageError(
                    f"{self.storage.uri} has {some}, and its listings have not shown that for {LISTED_WITHIN_S:g} s. "
                    "Everything is stored; the same command continues once the store (or the mount) lists it"
                )
            if not told:
                self.note(f"waiting until the store lists what was made: {len(missed)} are hidden, such as {some}")
            told = True
            time.sleep(_LIST_AGAIN_S)

    def leased(self, kinds: Sequence[str], *, patient: bool = False) -> AbstractContextManager[None]:
        """Hold leases for the time of a block."""
        return keep_lease(
            self.storage,
            self.command,
            kinds,
            ttl_s=self.engine.lease_ttl_s,
            listener=self.report,
            patient=patient,
        )
