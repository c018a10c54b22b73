"""What ended an attempt: Ray's exceptions named, out of memory recognised, each with what to change."""

from __future__ import annotations

import traceback
from typing import NamedTuple

from ray.exceptions import (
    ActorDiedError,
    ActorUnavailableError,
    NodeDiedError,
    ObjectLostError,
    OutOfMemoryError,
    RayTaskError,
    WorkerCrashedError,
)

from lrag_ray.config.redaction import redact
from lrag_ray.store.records import FailureKind

WORKER_LOST = (
    ActorDiedError,
    ActorUnavailableError,
    NodeDiedError,
    WorkerCrashedError,
    ObjectLostError,
    OutOfMemoryError,
)
"""The worker or its node went away, or the answer was lost with it. Ray has no common base for these."""

HOST_MEMORY_FIX = (
    "the host memory of the node is full. Fix: fewer actors per node (a larger engine.cpus_per_actor or "
    "engine.gpus_per_actor), nodes with more memory, or shorter durations, whose history is smaller"
)
GPU_MEMORY_FIX = (
    "the memory of the GPU is full. Fix: engine.gpus_per_actor: 1, engine.prompts_per_pass: 1, a smaller window or "
    "top_k of the method, dtype: bfloat16, or video.enabled: false and `lrag-ray decode` afterwards"
)

_REASON_CHARACTERS = 500
_CREATION = "creation task"
_GPU_SIGNS = ("CUDA out of memory", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
_HOST_SIGNS = ("DefaultCPUAllocator: can't allocate memory", "not enough memory: you tried to allocate")


class WorkerStalledError(Exception):
    """A worker took no step for too long."""


class KernelKilledError(Exception):
    """The kernel killed a process of the worker's node for memory, and the worker died."""


class Cause(NamedTuple):
    """Why an attempt failed."""

    kind: FailureKind
    raised: bool
    """The task itself raised, as opposed to a worker that went away."""
    reason: str
    """One line, with the fix where there is one."""
    traceback: str


def explain(error: Exception) -> Cause:
    """Name what `ray.get` raised."""
    return _cause(error, isinstance(error, RayTaskError), str(error))


def explain_here(error: Exception) -> Cause:
    """Name what a task raised, in the worker's own process."""
    return _cause(error, True, "".join(traceback.format_exception(error)))


def _cause(error: Exception, raised: bool, text: str) -> Cause:
    fix = _memory_fix(error.cause if isinstance(error, RayTaskError) else error)
    kind: FailureKind = "exception" if raised else "death"
    reason = first_line(error)
    if fix is not None:
        kind, reason = "out_of_memory", f"{reason} ({fix})"
    return Cause(kind, raised, reason, redact(text))


def raised_at_start(error: Exception) -> bool:
    """Whether an actor's constructor or its `ready` raised, as opposed to a process that vanished."""
    return isinstance(error, RayTaskError) or (isinstance(error, ActorDiedError) and _CREATION in str(error))


def first_line(error: Exception) -> str:
    """One line that says what happened, without the remote traceback that Ray puts into its messages."""
    cause = error.cause if isinstance(error, RayTaskError) else error
    lines = str(cause).strip().splitlines() or [""]
    line = lines[0]
    if isinstance(cause, ActorDiedError) and len(lines) > 1:
        # Of a constructor that raised, Ray gives the traceback, its error last; of a death, facts in indented lines
        # before the cause.
        line = lines[-1] if _CREATION in line else next((x for x in lines[1:] if not x.startswith("\t")), line)
    return redact(f"{type(cause).__name__}: {line}"[:_REASON_CHARACTERS])


def _memory_fix(error: BaseException) -> str | None:
    text = str(error)
    if isinstance(error, OutOfMemoryError | MemoryError | KernelKilledError) or any(
        sign in text for sign in _HOST_SIGNS
    ):
        return HOST_MEMORY_FIX
    # Ray's memory monitor kills the worker of an actor: what arrives is an ActorDiedError that says so in its text.
    if isinstance(error, ActorDiedError) and "running low on memory" in text:
        return HOST_MEMORY_FIX
    # By name: the driver needs no torch to read what a worker raised.
    if type(error).__name__ == "OutOfMemoryError" or any(sign in text for sign in _GPU_SIGNS):
        return GPU_MEMORY_FIX
    return None
