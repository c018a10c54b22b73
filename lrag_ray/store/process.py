"""A process, so that another one on the same machine can tell for sure that it is gone."""

from __future__ import annotations

import os
import platform
from pathlib import Path

from lrag_ray.store.records import Record

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_DEAD_STATES = {"Z", "X"}


class ProcessIdentity(Record):
    """Which process, of which machine since it booted."""

    host: str
    pid: int
    space: str
    """Boot of the machine and namespace in which `pid` counts; empty where the system does not tell."""
    started: str
    """Ticks between boot and its start, so that a process id that is used again is not mistaken for it."""

    @property
    def is_of_this_machine(self) -> bool:
        """Whether it certainly is, or was, a process that can be seen from here."""
        here = this_process()
        return bool(self.space) and (self.host, self.space) == (here.host, here.space)

    @property
    def is_gone(self) -> bool:
        """Whether it certainly has ended; False for what cannot be seen from here, as on another machine."""
        if not self.is_of_this_machine:
            return False
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        except PermissionError:
            pass
        state, started = _stat(self.pid)
        return bool(started) and (started != self.started or state in _DEAD_STATES)


def this_process() -> ProcessIdentity:
    """The process that asks."""
    try:
        space = f"{_BOOT_ID.read_text(encoding='ascii').strip()} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        space = ""
    pid = os.getpid()
    return ProcessIdentity(host=platform.node(), pid=pid, space=space, started=_stat(pid)[1])


def _stat(pid: int) -> tuple[str, str]:
    """State letter and start of a process, empty where they cannot be read."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return "", ""
    # The second field is the program's name in parentheses and may hold anything.
    fields = text.rpartition(")")[2].split()
    return fields[0], fields[19]
