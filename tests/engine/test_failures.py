from __future__ import annotations

import pytest
import torch
from ray.core.generated.common_pb2 import ActorDiedErrorContext
from ray.exceptions import ActorDiedError, NodeDiedError, OutOfMemoryError, RayTaskError

from lrag_ray.engine.failures import WorkerStalledError, explain

GPU_TEXT = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.1 GiB"


def raised(cause: Exception) -> RayTaskError:
    return RayTaskError("work", f"Traceback …\n{cause}", cause)


def died(text: str) -> ActorDiedError:
    context = ActorDiedErrorContext(class_name="RolloutActor", actor_id=b"0" * 16, pid=7, error_message=text)
    return ActorDiedError(context)


@pytest.mark.parametrize(
    ("error", "kind", "words"),
    [
        (raised(ValueError("no such frame")), "exception", ["ValueError: no such frame"]),
        (raised(torch.OutOfMemoryError(GPU_TEXT)), "out_of_memory", ["Tried to allocate", "engine.gpus_per_actor: 1"]),
        (raised(RuntimeError("CUDA error: out of memory")), "out_of_memory", ["top_k", "lrag-ray decode"]),
        (raised(MemoryError()), "out_of_memory", ["fewer actors per node"]),
        (
            raised(RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried 9 bytes")),
            "out_of_memory",
            ["fewer actors per node"],
        ),
        (
            died("1 worker(s) were killed due to the node running low on memory. Memory on the node was 22 GB / 23 GB"),
            "out_of_memory",
            ["killed due to the node running low on memory", "nodes with more memory"],
        ),
        (OutOfMemoryError("Task was killed"), "out_of_memory", ["fewer actors per node"]),
        (
            died("The actor is dead because its worker process has died. Worker exit type: SYSTEM_ERROR"),
            "death",
            ["ActorDiedError: The actor is dead because its worker process has died"],
        ),
        (NodeDiedError("its node is gone"), "death", ["NodeDiedError: its node is gone"]),
        (WorkerStalledError("no new block for 9 s"), "death", ["no new block for 9 s"]),
    ],
)
def test_what_ended_an_attempt_is_named_with_what_to_change(error: Exception, kind: str, words: list[str]) -> None:
    cause = explain(error)
    assert cause.kind == kind
    assert "\n" not in cause.reason and len(cause.reason) < 900
    for word in words:
        assert word in cause.reason


def test_secrets_stay_out_of_reasons_and_tracebacks() -> None:
    cause = explain(raised(OSError("cannot open s3://key:hidden@bucket/run?secret_token=hidden")))
    assert "hidden" not in cause.reason + cause.traceback
