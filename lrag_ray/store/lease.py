"""Leases of a run: one driver does a kind of work at a time, and a dead one does not stand in the way.

::

    RUN/lease/
      00000007.json         who holds the lease (`LeaseRecord`), created once
      00000007.beat         its sign of life (`Beat`), written again every twelfth of `ttl_s`
      decode/…              the same for other kinds of work; the files above are those of `run`
      report/…
      scores/<suite>/…

The numbers are epochs; whoever created the highest one holds the lease, and taking it over is creating the next. That
needs nothing but create-only writes, so it works alike on a disk, on NFS and on object stores. Listings may lag: the
last few epochs are kept, and those after the last one listed are asked for by name. Clocks need not agree: who waits
compares the bytes of the beat, by its own clock. A beat that changes is a live driver; one that stays as it is for
`ttl_s` is a dead one. A lease that was given back, whose process on this machine has ended, or that came with a copy of
the run is free at once.

Leases save double work and keep drivers from confusing people. They do not guard the results: commits are created
once, so a driver that was only asleep and writes on can do no harm before it notices.
"""

from __future__ import annotations

import getpass
import re
import secrets
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import NamedTuple, NoReturn

from pydantic import Field

from lrag_ray import __version__
from lrag_ray.errors import LeaseError, StorageError
from lrag_ray.store.address import Storage
from lrag_ray.store.process import ProcessIdentity, this_process
from lrag_ray.store.records import Record, now_utc

FOLDER = "lease"
BEATS_PER_TTL = 12
"""Signs of life that a driver shows within the time after which it is presumed dead."""

RUN, DECODE, REPORT = "run", "decode", "report"
"""Kinds of work. That of scoring is the folder of a suite's scores (`scores/preview`)."""

_RECORD = re.compile(rf"^{FOLDER}/(?:(?P<kind>.+)/)?(?P<epoch>\d{{8}})\.json$")
_LOOK_EVERY_S = 1.0
_KEPT = 8
"""Epochs that stay for readers whose listing lags."""


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
    place: str = ""
    """The run that it was taken for, so that a copy of the run is not held; see `_place`."""

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
    copied: bool = False
    """The record came with a copy of the run: its driver works on the original."""

    @property
    def sign(self) -> Beat | None:
        """The last sign of life, or None where there is none yet."""
        try:
            return None if self.beat is None else Beat.opened(self.beat)
        except ValueError:
            return None

    @property
    def is_free(self) -> bool:
        """The holder gave the lease back, has certainly ended or works elsewhere. If not, it may still be dead."""
        return self.is_released or self.copied or (self.record is not None and self.record.process.is_gone)

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


def holder(storage: Storage, kind: str = RUN) -> LeaseHolder | None:
    """Who took the lease for a kind of work last, whether alive or not; None if nobody ever did."""
    return _holder(storage, kind, _epochs(storage, _folder(kind)).get(kind, []))


def holders(storage: Storage) -> dict[str, LeaseHolder]:
    """Who took each lease of a run last, by kind of work."""
    found = {kind: _holder(storage, kind, epochs) for kind, epochs in _epochs(storage, FOLDER).items()}
    return {kind: one for kind, one in found.items() if one is not None}


def _epochs(storage: Storage, folder: str) -> dict[str, list[int]]:
    """Epochs that a listing shows, by kind of work."""
    found: dict[str, list[int]] = {}
    for path in storage.list_files(folder):
        if match := _RECORD.match(path):
            found.setdefault(match["kind"] or RUN, []).append(int(match["epoch"]))
    return found


def _holder(storage: Storage, kind: str, listed: Sequence[int]) -> LeaseHolder | None:
    # A listing may miss the last ones, and show some that have been removed.
    last = max(listed, default=0)
    found = _read_records(storage, kind, [last, last + 1])
    while max(found, default=0) == last + 1:
        last += 1
        found |= _read_records(storage, kind, [last + 1])
    found = found or _read_records(storage, kind, listed)
    if not found:
        return None
    epoch = max(found)
    beat = storage.read_many([_beat_path(kind, epoch)]).get(_beat_path(kind, epoch))
    try:
        record = LeaseRecord.opened(found[epoch])
    except ValueError:
        return LeaseHolder(epoch, None, beat)
    return LeaseHolder(epoch, record, beat, copied=_is_elsewhere(record, _place(storage)))


def _read_records(storage: Storage, kind: str, epochs: Sequence[int]) -> dict[int, bytes]:
    paths = {_record_path(kind, epoch): epoch for epoch in epochs if epoch > 0}
    return {paths[path]: data for path, data in storage.read_many(list(paths)).items()}


def _place(storage: Storage) -> str:
    """What tells a run from its copies: the folder itself, whatever its path; or the address in an object store."""
    if not storage.is_local:
        return f"store {storage.root}"
    try:
        found = Path(storage.root).stat()
    except OSError:
        return ""
    return f"folder {found.st_dev} {found.st_ino}"


def _is_elsewhere(record: LeaseRecord, here: str) -> bool:
    """Whether `record` was certainly taken for another run than the one at the place `here`."""
    if not record.place or not here or record.place == here:
        return False
    if record.place.startswith("folder ") and here.startswith("folder "):
        # Another machine may know the same shared folder by other numbers.
        return record.process.is_of_this_machine
    return True


class AtWork(NamedTuple):
    """Who works on a run, for people."""

    held_by: str | None
    """The drivers, since when, and their last signs of life by their own clocks; None where nobody works."""
    lost: str | None
    """The last drivers, where nobody works and they neither ended properly nor showed a sign of life lately: they
    probably died."""
    kinds: frozenset[str]
    """What is worked on."""


def at_work(storage: Storage) -> AtWork:
    """Who works on the run."""
    last = holders(storage)
    working = {kind: one for kind, one in last.items() if not one.is_free and _is_alive(one)}
    lost = [one for kind, one in last.items() if kind not in working and not one.is_released and not one.copied]
    return AtWork(_described([*working.values()]), None if working else _described(lost), frozenset(working))


def _described(found: Sequence[LeaseHolder]) -> str | None:
    """Who, and the last sign of life; a driver that holds several leases once."""
    shown = {str(one): one.sign.at if one.sign else "not yet" for one in found}
    return "; ".join(f"{who}, last sign of life {at}" for who, at in shown.items()) or None


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

    def __init__(self, storage: Storage, kind: str, epoch: int, record: LeaseRecord) -> None:
        self.kind = kind
        self.epoch = epoch
        self.record = record
        self._storage = storage
        self._count = 0

    def renew(self) -> None:
        """Show a sign of life; LeaseError if another driver has taken over."""
        self._write_beat()
        # After the write: on NFS a client's own change to a folder makes it list the folder afresh.
        now = holder(self._storage, self.kind)
        if now is None or now.record != self.record:
            _remove(self._storage, _beat_path(self.kind, self.epoch))
            raise LeaseError(
                f"{self._storage.uri} was taken over by {now or 'a person who removed the lease'}, so this driver "
                f"({self.record}) stops. What it committed stays; the other one continues with the run"
            )

    def release(self) -> None:
        """Give the lease back: the next driver need not wait."""
        self._write_beat(released=True)

    def remove_older(self) -> None:
        """Remove what drivers well before this one left of their leases."""
        for epoch in _epochs(self._storage, _folder(self.kind)).get(self.kind, []):
            if epoch <= self.epoch - _KEPT:
                _remove(self._storage, _record_path(self.kind, epoch))
                _remove(self._storage, _beat_path(self.kind, epoch))

    def _write_beat(self, *, released: bool = False) -> None:
        self._count += 1
        beat = Beat(count=self._count, at=now_utc(), released=released)
        self._storage.write(_beat_path(self.kind, self.epoch), beat.sealed())


def take_lease(
    storage: Storage, record: LeaseRecord, tell: Callable[[str], None], kind: str = RUN, *, patient: bool = False
) -> Lease:
    """Take a lease, waiting up to its `ttl_s` where the last holder may be dead; `tell` then receives a message.

    Raises LeaseError if the holder shows a sign of life meanwhile; whoever is `patient` waits for its end instead.
    """
    while True:
        found = holder(storage, kind)
        if found is not None and not found.is_free:
            _wait_for_end(storage, kind, found, record.ttl_s, tell, patient=patient)
        epoch = found.epoch + 1 if found else 1
        path = _record_path(kind, epoch)
        storage.make_folder()
        record = record.model_copy(update={"place": _place(storage)})
        lease = Lease(storage, kind, epoch, record)
        created = False
        try:
            created = storage.create(path, record.sealed())
            # Read back, because a create may be ours although its answer was lost, and ours may be below a higher
            # epoch where older ones have been removed meanwhile.
            now = holder(storage, kind)
            if now is not None and now.record == record:
                lease.renew()
                lease.remove_older()
                return lease
        except KeyboardInterrupt:
            # Whether or not the record was created: nobody shall wait for this driver.
            with suppress(StorageError):
                lease.release()
            raise
        if created:
            _remove(storage, path)


def _wait_for_end(
    storage: Storage, kind: str, found: LeaseHolder, ttl_s: float, tell: Callable[[str], None], *, patient: bool
) -> None:
    """Return when `found` is dead, has given the lease back or was replaced; LeaseError when it is alive."""
    ttl_s = found.record.ttl_s if found.record else ttl_s
    tell(
        f"{storage.uri} is held by {found}. Waiting for its end"
        if patient
        else f"{storage.uri} is held by {found}. Waiting for a sign of life; without one this driver takes over in "
        f"{ttl_s:g} s"
    )
    left, beat = ttl_s, found.beat
    while left > 0:
        nap = min(left, _LOOK_EVERY_S, ttl_s / BEATS_PER_TTL)
        time.sleep(nap)
        # Not by the clock: while this machine or its storage stood still, the holder's signs could not be seen either.
        left -= nap
        now = holder(storage, kind)
        if now is None or now.epoch != found.epoch or now.is_free:
            return
        if now.beat != beat:
            if not patient:
                _refuse(storage, now)
            left, beat = ttl_s, now.beat
    tell(f"{found} showed no sign of life for {ttl_s:g} s; this driver takes over")


def _refuse(storage: Storage, found: LeaseHolder) -> NoReturn:
    raise LeaseError(
        f"{storage.uri} is being worked on by {found}. Two drivers at the same work would do everything twice: wait "
        "until that one ends, stop it there, or set run.uri to another address"
    )


def _remove(storage: Storage, path: str) -> None:
    # Another driver may remove it at the same time, and what stays below the highest epoch means nothing.
    with suppress(StorageError):
        storage.remove(path)


def _folder(kind: str) -> str:
    return FOLDER if kind == RUN else f"{FOLDER}/{kind}"


def _record_path(kind: str, epoch: int) -> str:
    return f"{_folder(kind)}/{epoch:08d}.json"


def _beat_path(kind: str, epoch: int) -> str:
    return f"{_folder(kind)}/{epoch:08d}.beat"
