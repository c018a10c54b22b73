"""Keeps leases of a run while a driver works, and stops the driver when one is lost.

Example::

    with keep_lease(run.storage, "run", ["run", "scores/preview"], ttl_s=60, listener=listener):
        ...  # LeaseError out of the block as soon as another driver has taken over
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

from lrag_ray.errors import LeaseError, StorageError
from lrag_ray.events import Listener, Notice
from lrag_ray.printable import printable
from lrag_ray.store.address import Storage
from lrag_ray.store.lease import BEATS_PER_TTL, Lease, new_record, take_lease

STOP_WITHIN_S = 60.0
"""A driver that lost its lease and hangs for this long is killed; Ray ends its actors."""


@contextmanager
def keep_lease(
    storage: Storage, command: str, kinds: Sequence[str], *, ttl_s: float, listener: Listener, patient: bool = False
) -> Iterator[None]:
    """Hold the leases of some kinds of work for the time of the block and give them back at its end, however it ends.

    Raises LeaseError before the block if another driver is at such work (unless `patient`, which waits for its end),
    and out of the block if another driver took over or if a lease could not be renewed for `ttl_s`. That interrupts the
    thread that entered the block as Ctrl-C would. Nothing else is waited for unless the last holder's end cannot be
    reported; then up to its `ttl_s`.
    """
    record = new_record(command, ttl_s)
    leases: list[Lease] = []
    keeper: _Keeper | None = None
    try:
        for kind in kinds:
            leases.append(take_lease(storage, record, lambda text: listener(Notice(text)), kind, patient=patient))
        keeper = _Keeper(leases, ttl_s)
        keeper.start()
        yield
    except KeyboardInterrupt:
        if keeper is None or keeper.lost is None:
            raise
    finally:
        if keeper is not None:
            keeper.stop()
        if keeper is None or keeper.lost is None:
            _give_back(leases, ttl_s, listener)
    if keeper is not None and keeper.lost is not None:
        raise LeaseError(keeper.lost)


def _give_back(leases: Sequence[Lease], ttl_s: float, listener: Listener) -> None:
    for lease in leases:
        try:
            lease.release()
        except StorageError as error:
            text = f"the lease could not be given back, so the next start may wait {ttl_s:g} s: {error}"
            listener(Notice(text, warning=True))


_kept: list[_Keeper] = []
"""Keepers of the main thread, the innermost last."""


class _Keeper:
    """Two threads: one renews, the other sees to it that a hanging storage does not keep the driver going."""

    def __init__(self, leases: Sequence[Lease], ttl_s: float) -> None:
        self.lost: str | None = None
        """Why the lease is lost."""
        self._leases = leases
        self._ttl_s = ttl_s
        self._beat_s = ttl_s / BEATS_PER_TTL
        self._renewals = 0
        self._last_error = "no answer from the storage"
        self._stopped = threading.Event()
        self._losing = threading.Lock()
        self._renewer = threading.Thread(target=self._renew, name="lease-renewer", daemon=True)
        self._watch = threading.Thread(target=self._watch_renewals, name="lease-watch", daemon=True)
        self._worker = threading.get_ident()
        self._handler_before: Any = None

    def start(self) -> None:
        """Begin to renew."""
        if threading.current_thread() is threading.main_thread():
            self._handler_before = signal.signal(signal.SIGURG, _on_signal)
            _kept.append(self)
        self._renewer.start()
        self._watch.start()

    def stop(self) -> None:
        """Stop renewing; afterwards the thread of the block is not interrupted any more."""
        self._stopped.set()
        if self._handler_before is not None:
            _kept.remove(self)
            signal.signal(signal.SIGURG, self._handler_before)
        if self.lost is None:
            self._renewer.join()

    @property
    def stops(self) -> bool:
        """Whether the thread of the block is to be interrupted."""
        return self.lost is not None and not self._stopped.is_set()

    def _renew(self) -> None:
        pause_s = self._beat_s
        while not self._stopped.wait(pause_s):
            try:
                for lease in self._leases:
                    lease.renew()
            except LeaseError as error:
                self._lose(str(error))
                return
            except StorageError as error:
                self._last_error = str(error)
                pause_s = self._beat_s / 5
            else:
                self._renewals += 1
                pause_s = self._beat_s

    def _watch_renewals(self) -> None:
        # Counts beats in which this process was running: one that was asleep longer than the lease lasts (SIGSTOP)
        # continues if nobody has taken over meanwhile, and the renewer finds that out within a beat.
        missed = seen = 0
        while not self._stopped.wait(self._beat_s):
            missed = missed + 1 if self._renewals == seen else 0
            seen = self._renewals
            if missed >= BEATS_PER_TTL - 1:
                self._lose(
                    f"the lease of this run could not be renewed for {self._ttl_s:g} s, so another driver may have "
                    f"taken over and this one stops ({self._last_error}). The same command continues"
                )
                return

    def _lose(self, reason: str) -> None:
        with self._losing:
            if self.lost is not None or self._stopped.is_set():
                return
            self.lost = reason
        if self._handler_before is not None:
            # Not SIGINT: it may be ignored, as in a job that a script put into the background.
            signal.pthread_kill(self._worker, signal.SIGURG)
        else:
            ctypes.pythonapi.PyThreadState_SetAsyncExc(
                ctypes.c_ulong(self._worker), ctypes.py_object(KeyboardInterrupt)
            )
        if not self._stopped.wait(STOP_WITHIN_S):
            print(f"error: {printable(reason)}", file=sys.stderr, flush=True)
            os._exit(LeaseError.exit_code)


def _on_signal(number: int, frame: FrameType | None) -> None:
    # Of nested blocks, the outer one may be the one that has lost its lease.
    if any(keeper.stops for keeper in _kept):
        raise KeyboardInterrupt
