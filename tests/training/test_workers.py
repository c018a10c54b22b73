"""Two workers that talk through torch's process group, without Ray: exact resume, unequal shares, stops in step."""

from __future__ import annotations

import json
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn

from lrag_ray.training.peers import ProcessGroup
from lrag_ray.training.windows import WindowSampler
from lrag_ray.wan.state_dict import state_dict_digest
from tests.training.small import LENGTH, Memory, latents, make_rollouts, make_trainer, reader_of

BATCH = 5
"""Odd, and the last batch of an epoch holds one window: one of two workers has nothing to do."""


def rollouts() -> Any:
    found = make_rollouts(16, fraction=0.0)
    assert len(found.keys) % BATCH == 1
    return found


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2, timeout=timedelta(minutes=5)
    )
    peers = ProcessGroup()
    found: dict[str, Any] = {}

    def note(name: str, sink: Memory, *ends: Any) -> None:
        digest = state_dict_digest(sink.last["model"]) if sink.last else None
        losses = [row[:9] for row in sink.rows]
        found[name] = {"digest": digest, "losses": losses, "ends": [[e.state, e.step, e.reason] for e in ends]}

    def train(sink: Memory, **changes: Any) -> Any:
        return make_trainer(sink, rollouts=rollouts(), batch_size=BATCH, peers=peers, **changes).run()

    quiet = Memory()
    note("quiet", quiet, train(quiet))
    # Worker 1 alone is asked to stop; both do, after the same step. Worker 0 alone stores.
    stopped = Memory(stop_at=5 if rank == 1 else None)
    first = train(stopped)
    texts = peers.gather(json.dumps(None))
    assert len(texts) == 2
    shared: list[Any] = [stopped.last]
    dist.broadcast_object_list(shared, src=0)
    stopped.last = shared[0]
    note("resumed", stopped, first, train(stopped))
    # Only worker 1 reads the damaged window.
    data = latents(rollouts())
    window = WindowSampler(rollouts(), LENGTH, BATCH, 7).batch(0, 1)[-1]
    data[window.rollout][window.start] = torch.nan
    damaged = Memory()
    note("damaged", damaged, train(damaged, reader=reader_of(data)))
    (Path(folder) / f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("workers")
    spawn(worker, (str(folder),), nprocs=2)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.fixture(scope="module")
def one() -> Memory:
    sink = Memory()
    make_trainer(sink, rollouts=rollouts(), batch_size=BATCH).run()
    return sink


def test_two_workers_take_the_steps_of_one_up_to_rounding(two: list[dict[str, Any]], one: Memory) -> None:
    """Same windows in the same order; every loss is over the whole batch, empty shares included."""
    losses = two[0]["quiet"]["losses"]
    assert [row[8] for row in losses] == [row.windows for row in one.rows]
    assert {row[8] for row in losses} == {1, 5}
    for ours, theirs in zip(losses, one.rows, strict=True):
        assert ours[3:8] == pytest.approx(list(theirs[3:8]), rel=2e-3, abs=1e-6)


def test_an_interrupted_training_of_two_workers_is_bit_equal(two: list[dict[str, Any]]) -> None:
    assert two[0]["resumed"]["ends"][0][:2] == ["stopped", 6]
    assert two[0]["resumed"]["digest"] == two[0]["quiet"]["digest"]
    assert two[0]["resumed"]["losses"] == two[0]["quiet"]["losses"]


def test_a_damaged_window_of_one_worker_stops_both_with_its_name(two: list[dict[str, Any]]) -> None:
    ends = [found["damaged"]["ends"][0] for found in two]
    assert ends[0] == ends[1]
    assert ends[0][:2] == ["failed", 1]
    assert "holds NaN" in ends[0][2]
