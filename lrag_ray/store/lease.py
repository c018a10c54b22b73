"""The run lease: one driver works on a run at a time, and a dead one does not stand in the way.

::

    RUN/lease/
      00000007.json   who holds the lease (`LeaseRecord`), created once
      00000007.beat   its sign of life (`Beat`), written again every twelfth of `ttl_s`

The numbers are epochs; whoever created the highest one holds the lease, and taking it over is creating the next. That
needs nothing but create-only writes, so it works alike on a disk, on NFS and on object stores. Clocks need not agree:
who waits compares the bytes of the beat, by its own clock. A beat that changes is a live driver; one that stays as it
is for `ttl_s` is a dead one. A lease that was given back, or whose process on this machine has ended, is free at once.

The lease saves double work and keeps drivers from confusing people. It does not guard the results: commits are created
once, so a driver that was only asleep and writes on can do no harm before it notices.
"""

from __future__ import annotations

import getpass
import re
import secrets
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import NamedTuple, NoReturn

from pydantic import Field, ValidationError

from lrag_ray import __version__
from lrag_ray.errors import LeaseError, StorageError
from lrag_ray.store.address import Storage
from lrag_ray.store.process import ProcessIdentity, this_process
from lrag_ray.store.records import Record, now_utc

FOLDER = "lease"
BEATS_PER_TTL = 12
"""Signs of life that a driver shows within the time after which it is presumed dead."""

_RECORD = re.compile(rf"^{FOLDER}/(\d{{8}})\.json$")
_ANY = re.compile(rf"^{FOLDER}/(\d{{8}})\.")
_LOOK_EVERY_S = 1.0


class LeaseRecord(Record):
    """Who holds the lease."""

    id: str
    """Unlike that of any other driver."""
    user: str
    process: ProcessIdentity
    command: str
    """What it does, e.g. ``run``."""
    version: str
    """Of lrag-ray."""
    started_at: str
    """UTC, ISO 8601."""
    ttl_s: float = Field(gt=0, le=3600)
    """After this many seconds without a sign of life another driver takes over."""

    def __str__(self) -> str:
        return (
            f"{self.user} on {self.process.host} (lrag-ray {self.command}, process {self.process.pid}) "
            f"since {self.started_at}"
        )


class Beat(Record):
    """A sign of life."""

    count: int
    at: str
    """By the holder's clock; for people."""
    released: bool = False
    """The holder ended and gave the lease back."""


@dataclass(frozen=True)
class LeaseHolder:
    """The driver that took the lease last, as found on storage."""

    epoch: int
    record: LeaseRecord | None
    """None where it cannot be read."""
    beat: bytes | None
    """Content of the beat file."""

    @property
    def sign(self) -> Beat | None:
        """The last sign of life, or None where there is none yet."""
        try:
            return None if self.beat is None else Beat.model_validate_json(self.beat)
        except ValidationError:
            return None

    @property
    def is_free(self) -> bool:
        """The holder gave the lease back, or has certainly ended. If not, it may be dead all the same."""
        return self.is_released or (self.record is not None and self.record.process.is_gone)

    @property
    def is_released(self) -> bool:
        """The holder gave the lease back."""
        sign = self.sign
        return sign is not None and sign.released

    def __str__(self) -> str:
        return str(self.record) if self.record is not None else "a driver whose record cannot be read"


def new_record(command: str, ttl_s: float) -> LeaseRecord:
    """A record for this process."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):
        user = "someone"
    return LeaseRecord(
        id=secrets.token_hex(8),
        user=user,
        process=this_process(),
        command=command,
        version=__version__,
        started_at=now_utc(),
        ttl_s=ttl_s,
    )


def holder(storage: Storage) -> LeaseHolder | None:
    """Who took the lease last, whether alive or not; None if nobody ever did."""
    epoch = max((int(match[1]) for path in storage.list_files(FOLDER) if (match := _RECORD.match(path))), default=None)
    if epoch is None:
        return None
    found = storage.read_many([_record_path(epoch), _beat_path(epoch)])
    try:
        record = LeaseRecord.model_validate_json(found[_record_path(epoch)])
    except (KeyError, ValidationError):
        record = None
    return LeaseHolder(epoch, record, found.get(_beat_path(epoch)))


class AtWork(NamedTuple):
    """Who works on a run, for people; both are None where nobody does and the last driver ended properly."""

    held_by: str | None
    """The driver, since when, and its last sign of life by its own clock."""
    lost: str | None
    """The last driver, where it neither ended properly nor showed a sign of life lately: it probably died."""


def at_work(storage: Storage) -> AtWork:
    """Who works on the run."""
    last = holder(storage)
    if last is None:
        return AtWork(None, None)
    described = f"{last}, last sign of life {last.sign.at if last.sign else 'not yet'}"
    if not last.is_free and _is_alive(last):
        return AtWork(described, None)
    return AtWork(None, None if last.is_released else described)


def _is_alive(found: LeaseHolder) -> bool:
    """Whether a holder of whom no end is known showed a sign of life within its time, by this machine's clock."""
    last = found.sign.at if found.sign is not None else found.record.started_at if found.record is not None else None
    if last is None or found.record is None:
        return True
    try:
        return datetime.now(UTC) - datetime.fromisoformat(last) <= timedelta(seconds=2 * found.record.ttl_s)
    except (ValueError, TypeError):
        return False


class Lease:
    """A lease that is held."""

    def __init__(self, storage: Storage, epoch: int, record: LeaseRecord) -> None:
        self.epoch = epoch
        self.record = record
        self._storage = storage
        self._count = 0

    def renew(self) -> None:
        """Show a sign of life; LeaseError if another driver has taken over."""
        self._write_beat()
        # After the write: on NFS a client's own change to a folder makes it list the folder afresh.
        now = holder(self._storage)
        if now is None or now.record != self.record:
            _remove(self._storage, _beat_path(self.epoch))
            raise LeaseError(
                f"{self._storage.uri} was taken over by {now or 'a person who removed the lease'}, so this driver "
                f"({self.record}) stops. What it committed stays; the other one continues with the run"
            )

    def release(self) -> None:
        """Give the lease back: the next driver need not wait."""
        self._write_beat(released=True)

    def remove_older(self) -> None:
        """Remove what drivers before this one left of their leases."""
        for path in self._storage.list_files(FOLDER):
            if (match := _ANY.match(path)) and int(match[1]) < self.epoch:
                _remove(self._storage, path)

    def _write_beat(self, *, released: bool = False) -> None:
        self._count += 1
        beat = Beat(count=self._count, at=now_utc(), released=released)
        self._storage.write(_beat_path(self.epoch), beat.model_dump_json().encode())


def take_lease(storage: Storage, record: LeaseRecord, tell: Callable[[str], None]) -> Lease:
    """Take the lease, waiting up to its `ttl_s` where the last holder may be dead; `tell` then receives a message.

    Raises LeaseError if the holder shows a sign of life meanwhile.
    """
    while True:
        found = holder(storage)
        if found is not None and not found.is_free:
            _wait_for_end(storage, found, record.ttl_s, tell)
        epoch = found.epoch + 1 if found else 1
        created = storage.create(_record_path(epoch), record.model_dump_json(indent=1).encode())
        # Read back, because a create may be ours although its answer was lost, and ours may be below a higher
        # epoch where older ones have been removed meanwhile.
        now = holder(storage)
        if now is not None and now.record == record:
            lease = Lease(storage, epoch, record)
            lease.renew()
            lease.remove_older()
            return lease
        if created:
            _remove(storage, _record_path(epoch))


def _wait_for_end(storage: Storage, found: LeaseHolder, ttl_s: float, tell: Callable[[str], None]) -> None:
    """Return when `found` is dead, has given the lease back or was replaced; LeaseError when it is alive."""
    ttl_s = found.record.ttl_s if found.record else ttl_s
    tell(
        f"{storage.uri} is held by {found}. Waiting for a sign of life; without one this driver takes over in "
        f"{ttl_s:g} s"
    )
    left = ttl_s
    while left > 0:
        nap = min(left, _LOOK_EVERY_S, ttl_s / BEATS_PER_TTL)
        time.sleep(nap)
        # Not by the clock: while this machine or its storage stood still, the holder's signs could not be seen either.
        left -= nap
        now = holder(storage)
        if now is None or now.epoch != found.epoch or now.is_free:
            return
        if now.beat != found.beat:
            _refuse(storage, now)
    tell(f"{found} showed no sign of life for {ttl_s:g} s; this driver takes over")


def _refuse(storage: Storage, found: LeaseHolder) -> NoReturn:
    raise LeaseError(
        f"{storage.uri} is being worked on by {found}. Two drivers on one run would do everything twice: wait until "
        "that one ends, stop it there, or set run.uri to another address"
    )


def _remove(storage: Storage, path: str) -> None:
    # Another driver may remove it at the same time, and what stays below the highest epoch means nothing.
    with suppress(StorageError):
        storage.remove(path)


def _record_path(epoch: int) -> str:
    return f"{FOLDER}/{epoch:08d}.json"


def _beat_path(epoch: int) -> str:
    return f"{FOLDER}/{epoch:08d}.beat"
