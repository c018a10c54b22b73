from __future__ import annotations

import io

import pyarrow.parquet as pq
import pytest
import torch

from lrag_ray.store.parts import BrokenPartError, read_chain, read_part, read_trace, trace_bytes
from lrag_ray.store.rollouts import RolloutRun
from tests.store.make import FRAMES_PER_BLOCK, make_blocks, rollout_id, store_part


@pytest.fixture
def run(run_uri: str) -> RolloutRun:
    return RolloutRun(run_uri)


def test_a_part_reads_back_as_it_was_written(run: RolloutRun) -> None:
    record = store_part(run, 2, 3, key="k")
    assert (record.first_frame, record.end_frame) == (6, 15)
    stored = read_part(run.storage, record, FRAMES_PER_BLOCK)
    for read, written in zip(stored.blocks, make_blocks(2, 3), strict=True):
        assert read.block == written.block
        assert torch.equal(read.latents, written.latents) and read.latents.dtype == torch.bfloat16
        assert read.trace == written.trace
        assert torch.equal(read.state["kept"], written.state["kept"])


def test_equal_blocks_give_equal_bytes_whatever_the_attempt(run: RolloutRun) -> None:
    one = store_part(run, 0, 2, key="k", attempt="one")
    two = store_part(run, 0, 2, key="k", attempt="two")
    assert (one.latents.sha256, one.trace.sha256) == (two.latents.sha256, two.trace.sha256)
    assert one.latents.path != two.latents.path


@pytest.mark.parametrize("damage", [b"", b"short", "flip"], ids=["empty", "short", "one bit"])
def test_damage_is_found(run: RolloutRun, damage: bytes | str) -> None:
    record = store_part(run, 0, 2, key="k")
    data = bytearray(run.storage.read_bytes(record.latents.path))
    data[-1] ^= 1
    run.storage.write(record.latents.path, bytes(data) if damage == "flip" else damage)  # type: ignore[arg-type]
    with pytest.raises(BrokenPartError, match=r"part-00000-00006\.safetensors"):
        read_part(run.storage, record, FRAMES_PER_BLOCK)


def test_the_chain_joins_attempts_and_ends_before_the_first_broken_part(run: RolloutRun) -> None:
    store_part(run, 0, 2, key="k", attempt="one")
    store_part(run, 2, 2, key="k", attempt="two")
    last = store_part(run, 4, 2, key="k", attempt="three")
    store_part(run, 0, 9, key="another key", attempt="four")
    records, _ = run.part_records(run.inventory(rollout_id()), rollout_id())
    chain = read_chain(run.storage, records, rollout_key="k", frames_per_block=FRAMES_PER_BLOCK)
    assert (chain.end_frame, chain.broken) == (18, [])
    assert [part.record.attempt for part in chain.parts] == ["one", "two", "three"]

    run.storage.write(last.trace.path, b"")
    chain = read_chain(run.storage, records, rollout_key="k", frames_per_block=FRAMES_PER_BLOCK)
    assert chain.end_frame == 12
    assert len(chain.broken) == 1 and last.trace.path in chain.broken[0]


def test_a_broken_part_is_replaced_by_the_same_frames_of_another_attempt(run: RolloutRun) -> None:
    broken = store_part(run, 0, 4, key="k", attempt="one")
    store_part(run, 0, 2, key="k", attempt="two")
    run.storage.remove(broken.latents.path)
    records, _ = run.part_records(run.inventory(rollout_id()), rollout_id())
    chain = read_chain(run.storage, records, rollout_key="k", frames_per_block=FRAMES_PER_BLOCK)
    assert chain.end_frame == 6
    assert [part.record.attempt for part in chain.parts] == ["two"]


def test_a_part_without_its_record_does_not_exist(run: RolloutRun) -> None:
    store_part(run, 0, 2, key="k")
    run.storage.remove(f"{rollout_id().path}/attempt-one/part-00000-00006.json")
    assert run.part_records(run.inventory(rollout_id()), rollout_id()) == ([], [])


def test_an_unreadable_part_record_is_reported(run: RolloutRun) -> None:
    store_part(run, 0, 2, key="k")
    path = f"{rollout_id().path}/attempt-one/part-00000-00006.json"
    run.storage.write(path, b"{")
    assert run.part_records(run.inventory(rollout_id()), rollout_id()) == ([], [f"{path} is not a part record"])


def test_traces_name_heads_where_they_differ() -> None:
    """Given a trace without groups of heads, its file is that of earlier versions; given one with, both come back."""
    (block,) = make_blocks(1, 1)
    plain, grouped = block.trace, [row._replace(layer=2, heads=(0, 3)) for row in block.trace]
    columns = pq.read_schema(io.BytesIO(trace_bytes([block]))).names
    assert "heads" not in columns
    assert read_trace(trace_bytes([block])) == plain
    both = trace_bytes([block._replace(trace=plain + grouped)])
    assert pq.read_schema(io.BytesIO(both)).names == [*columns, "heads"]
    assert read_trace(both) == plain + grouped


def test_traces_name_windows_where_blocks_are_denoised_together() -> None:
    """Given rows of calls, the columns that they fill are stored, and come back in their places."""
    (block,) = make_blocks(1, 1)
    columns = pq.read_schema(io.BytesIO(trace_bytes([block]))).names
    rows = [row._replace(window=3, clean=i > 0, timestep=937.5 if i else None) for i, row in enumerate(block.trace)]
    stored = trace_bytes([block._replace(trace=rows)])
    assert pq.read_schema(io.BytesIO(stored)).names == [*columns, "window", "clean", "timestep"]
    assert read_trace(stored) == rows
