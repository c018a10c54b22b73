"""Ctrl-C and SIGTERM (``kill``, a scheduler, ``ray job stop``): a command then ends with exit code 130.

Example::

    with ends_with_130():
        ...  # KeyboardInterrupt from either signal; whatever it turns into on its way out, the exit code is 130

Imports nothing but the standard library, so that it can be in force before anything slow is imported.
"""

from __future__ import annotations

import _thread
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from lrag_ray.errors import INTERRUPTED

CLEAN_UP_S = 10.0
"""Seconds after a signal in which others are ignored: pressing Ctrl-C again must not cut the clean-up short."""
_IMPORT_S = 5.0
"""Longest time for which an import keeps a signal waiting."""
_ABOVE_WORK = tuple(
    os.path.join(Path(__file__).parents[1], name)  # noqa: PTH118 - keeps the slash at the end
    for name in ("lrag_ray/__main__.py", "lrag_ray/cli/", "jobs/")
)
"""Where the program imports before it has begun anything that would have to be ended."""
_AGAIN_S = 0.02
_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_DEFERRED = (*_SIGNALS, signal.SIGURG)
"""SIGURG is that of a lease that is lost (`lrag_ray.pipelines.lease`)."""


class _State:
    """Of this process: signals are too."""

    received_s: float | None = None
    """When the first signal arrived, by the monotonic clock."""
    raised_s: float | None = None
    """When it was raised last."""
    number: int = 0
    """The signal that was raised last."""
    main_thread: int = 0
    waits: bool = False
    """A thread will deliver it again."""


@contextmanager
def ends_with_130() -> Iterator[None]:
    """Raise KeyboardInterrupt for the signals in the block; if one arrived, the process exits with code 130.

    Signals that the process was started to ignore (``nohup``, a shell's background job) stay ignored. After the block
    all are: the exit code is decided.
    """
    _State.main_thread = _thread.get_ident()
    sys.unraisablehook = _unraisable
    for number in _SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _raise)
    try:
        yield
    except BaseException as error:
        _ignore()
        if _State.received_s is None:
            raise
        if not (isinstance(error, SystemExit) and error.code == INTERRUPTED):
            # Libraries translate it: an ImportError, click's own exit code.
            print("interrupted", file=sys.stderr, flush=True)
        # Python would end by SIGINT where a KeyboardInterrupt has left an `exec` (of dataclasses); this forgets it.
        exec("")
        raise SystemExit(INTERRUPTED) from None
    _ignore()
    if _State.received_s is not None:
        raise SystemExit(INTERRUPTED)


@contextmanager
def signals_wait() -> Iterator[None]:
    """Signals that arrive in the block take effect at its end; does nothing in other threads than the main one."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    arrived: list[int] = []
    handlers = {number: signal.getsignal(number) for number in _DEFERRED}
    for number, handler in handlers.items():
        if callable(handler):
            signal.signal(number, lambda number, _: arrived.append(number))
    try:
        yield
    finally:
        for number, handler in handlers.items():
            if callable(handler):
                signal.signal(number, handler)
        for missed in arrived:
            signal.raise_signal(missed)


def take_next() -> None:
    """Raise the next signal even if it comes soon after the first: the user may end the wait."""
    _State.raised_s = None


def _ignore() -> None:
    _State.raised_s = float("inf")
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _raise(number: int, frame: FrameType | None) -> None:
    now_s = time.monotonic()
    if _State.received_s is None:
        _State.received_s = now_s
    if _State.raised_s is not None and now_s - _State.raised_s < CLEAN_UP_S:
        return
    importer = _importer(frame)
    if importer is not None and importer.f_code.co_filename.startswith(_ABOVE_WORK):
        # Torch and Ray take seconds, and half a minute on a busy machine.
        print("interrupted", file=sys.stderr, flush=True)
        os._exit(INTERRUPTED)
    if importer is not None and now_s - _State.received_s < _IMPORT_S:
        # A module that is half imported may swallow the exception, or translate it.
        _later(number)
        return
    _State.raised_s, _State.number = now_s, number
    raise KeyboardInterrupt


def _unraisable(ignored: sys.UnraisableHookArgs) -> None:
    """Raise a signal again that was raised where Python lets no exception out, as in a destructor or around a fork."""
    if isinstance(ignored.exc_value, KeyboardInterrupt) and _State.raised_s not in (None, float("inf")):
        _State.raised_s = None
        _later(_State.number)
    else:
        sys.__unraisablehook__(ignored)


def _later(number: int) -> None:
    if not _State.waits:
        _State.waits = True
        _thread.start_new_thread(_deliver_again, (number,))


def _deliver_again(number: int) -> None:
    time.sleep(_AGAIN_S)
    _State.waits = False
    # To that thread, because it may be asleep by now.
    signal.pthread_kill(_State.main_thread, number)


def _importer(frame: FrameType | None) -> FrameType | None:
    """Who began the import that is under way, the outermost one; None where there is none."""
    importer = None
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            importer = frame.f_back
        frame = frame.f_back
    return importer
