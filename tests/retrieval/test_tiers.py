"""Storage types of the history, and the tiers that keep it, on the CPU."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lrag_ray.context.policy import Exposure, bank_of
from lrag_ray.context.rag import Rag, RagSettings
from lrag_ray.retrieval.bank_types import BANK_TYPES, BankType
from lrag_ray.retrieval.history import TieredBank, Tiers
from lrag_ray.retrieval.payload import FrameShape, hadamard, make_payload
from lrag_ray.wan.rope import rotate
from tests.tiny import gathered, generate, start, tiny_layout, tiny_transformer

FULL_SIZE = FrameShape(30, 1560, 12, 128)
SETTINGS = RagSettings(window=8, top_k=2, recent_exclude=1, descriptor="avg_pool")


def rows(shape: FrameShape, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Tensor:
    """K with outlier channels, as trained generators have, and V without."""
    made = torch.randn(2, *shape, generator=torch.Generator().manual_seed(seed))
    made[0, ..., 3] *= 20
    return made.to(dtype)


def test_a_120_s_history_is_as_large_as_planned() -> None:
    sizes = {kind: 468 * make_payload(kind, FULL_SIZE, torch.bfloat16).frame_bytes / 1e9 for kind in BANK_TYPES}
    assert sizes["exact"] == sizes["bf16"] == pytest.approx(134.57, abs=0.01)
    assert sizes["int8"] < 70
    assert sizes["int4"] == sizes["int4_hadamard"] < 36
    assert 6 * sizes["int4"] < 256


@pytest.mark.parametrize(
    ("kind", "k_error", "v_error"),
    [
        ("exact", 0.0, 0.0),
        ("bf16", 0.0, 0.0),
        ("int8", 0.05, 0.01),
        ("int4", 0.16, 0.11),
        ("int8_hadamard", 0.05, 0.01),
        ("int4_hadamard", 1.0, 0.11),
    ],
)
def test_what_is_stored_comes_back_with_a_small_error(kind: BankType, k_error: float, v_error: float) -> None:
    shape = FrameShape(2, 40, 3, 32)
    payload, x = make_payload(kind, shape, torch.bfloat16), rows(shape)
    packed = payload.pack(x)
    assert (packed.dtype, list(packed.shape)) == (torch.uint8, [2, payload.layer_bytes])
    found = torch.stack([payload.unpack(packed[None, layer])[0] for layer in range(2)], dim=1)
    assert found.dtype == torch.bfloat16
    difference = (found - x).float()
    # Outlier channels aside: their steps are as large as they are.
    plain = [channel for channel in range(32) if channel != 3]
    assert difference[0][..., plain].pow(2).mean().sqrt() <= k_error
    assert difference[1].pow(2).mean().sqrt() <= v_error


@pytest.mark.parametrize("kind", BANK_TYPES)
def test_bits_depend_neither_on_the_number_of_frames_nor_on_threads(kind: BankType) -> None:
    shape = FrameShape(2, 30, 3, 12)
    payload = make_payload(kind, shape, torch.float32)

    def packed_frames() -> Tensor:
        packed = torch.zeros(5, 2, payload.layer_bytes, dtype=torch.uint8)
        for seed, each in enumerate(packed):
            payload.pack_into(each, rows(shape, torch.float32, seed))
        return packed

    packed = packed_frames()
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        again = packed_frames()
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(packed, again)
    together = payload.unpack(packed[:, 1])
    assert torch.equal(together, torch.cat([payload.unpack(each[None, 1]) for each in packed]))


@pytest.mark.parametrize(("kind", "levels"), [("int8", 127), ("int4", 15)])
def test_what_is_stored_is_half_a_step_off_at_most(kind: BankType, levels: int) -> None:
    """Rounding is to the nearest level and all levels are used: the rest of the error is the format's."""
    shape = FrameShape(1, 40, 3, 32)
    payload, x = make_payload(kind, shape, torch.float32), rows(shape, torch.float32)
    difference = (payload.unpack(payload.pack(x))[0] - x[:, 0]).abs()
    for index, along in enumerate((-1, -1) if kind == "int8" else (0, -1)):
        values = x[index, 0]
        spread = values.abs() if kind == "int8" else values - values.amin(dim=along, keepdim=True)
        steps = difference[index] / (spread.amax(dim=along, keepdim=True) / levels)
        assert 0.45 < steps.max() < 0.52
        assert steps.mean() == pytest.approx(0.25, abs=0.03)


@pytest.mark.parametrize("kind", ["int8", "int4", "int4_hadamard"])
def test_constant_and_broken_rows(kind: BankType) -> None:
    shape = FrameShape(1, 4, 2, 8)
    payload = make_payload(kind, shape, torch.float32)
    x = torch.full((2, *shape), 0.5)
    x[1] = 0
    assert torch.equal(payload.unpack(payload.pack(x))[0], x[:, 0])
    x[1, 0, 2, 1, 3] = float("nan")
    assert payload.unpack(payload.pack(x)).isnan().any(), "a broken value must not look like a number"


def test_the_hadamard_transform_is_its_own_inverse_and_keeps_lengths() -> None:
    x = torch.randn(3, 4, 24)
    for width in (1, 2, 8):
        once = hadamard(x, width)
        torch.testing.assert_close(hadamard(once, width), x)
        torch.testing.assert_close(once.norm(dim=-1), x.norm(dim=-1))
    expected = torch.tensor([[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]]) / 2
    torch.testing.assert_close(hadamard(torch.eye(4), 4), expected)


@pytest.mark.parametrize("kind", BANK_TYPES)
def test_tiers_never_change_a_bit(kind: BankType, tmp_path: Path) -> None:
    """Nor does a resumed rollout, whose history is quantised again."""
    frame = make_payload(kind, FrameShape(2, 6, 2, 12), torch.float32).frame_bytes
    model = tiny_transformer()
    whole = start(model, Rag, SETTINGS, make_bank=bank_of(kind))
    expected = list(whole.blocks(8))
    tiers = Tiers(host_bytes=5 * frame, disk=tmp_path, expected_frames=12)
    spilled = start(model, Rag, SETTINGS, make_bank=bank_of(kind, tiers))
    latents = generate(spilled, 8)
    assert torch.equal(latents, torch.cat([result.latents for result in expected], dim=1))
    (bank,) = spilled._banks
    assert isinstance(bank, TieredBank)
    # Room is made for the three frames of the next block.
    assert bank.usage()[:3] == (0, 2, 14)
    again = start(model, Rag, SETTINGS, make_bank=bank_of(kind, tiers))
    for result in expected[:6]:
        again.expect([row.frame for row in result.trace[0] if row.kind == "retrieved"])
        again.replay(result.latents, [result.state])
    for result in expected[6:]:
        (found,) = again.blocks(1)
        assert torch.equal(found.latents, result.latents)
        assert found.trace == result.trace
    if kind not in ("exact", "bf16"):
        assert not torch.equal(latents, generate(start(model, Rag, SETTINGS), 8)), "nothing was quantised"


class RagOfOneHead(Rag):
    """Head 1 retrieves; head 0 attends to sink and local frames alone."""

    def expose(self, layer: int) -> list[Exposure]:  # type: ignore[override]
        near = [row for row in self.context if row.kind != "retrieved"]
        spans = [span for row in near for span in self.window.spans(layer, [row.frame])]
        angles = self.rope.frames([row.temporal_index for row in near])
        return [Exposure(spans, angles, (0,)), super().expose(layer)._replace(heads=(1,))]


class HeadProbe:
    """What the retrieving head attends to in each block's last pass."""

    def __init__(self) -> None:
        self.attended: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}

    def on_pass(self, block: int, step: int, flow: Tensor, x0: Tensor) -> None: ...

    def on_attention(
        self, block: int, step: int, layer: int, q: Tensor, k: Tensor, v: Tensor, heads: tuple[int, ...] | None
    ) -> None:
        if heads == (1,):
            self.attended[block, layer] = k[0].clone(), v[0].clone()


@pytest.mark.parametrize("kind", ["exact", "int8", "int4", "int4_hadamard"])
def test_a_method_per_head_reads_what_was_stored(kind: BankType, tmp_path: Path) -> None:
    """Given a head that retrieves beside one that does not, its retrieved rows are those that were stored."""
    model, probe = tiny_transformer(), HeadProbe()
    whole = start(model, RagOfOneHead, SETTINGS, make_bank=bank_of(kind), probe=probe)
    policy: Any = whole.context.policies[0]
    kept: dict[int, Tensor] = {}
    append = policy.bank.append

    def noted(frame: int, rows: Tensor) -> None:
        kept[frame] = rows.clone()
        append(frame, rows)

    policy.bank.append = noted
    payload = make_payload(kind, FrameShape(2, 6, 2, 12), torch.float32)
    results, retrieved = list(whole.blocks(8)), 0
    for result in results:
        trace = result.trace[0]
        start_row = 6 * sum(row.kind == "sink" for row in trace)
        frames = [row.frame for row in trace if row.kind == "retrieved"]
        for layer in range(2):
            k, v = probe.attended[result.block, layer]
            rows = slice(start_row, start_row + 6 * len(frames))
            if not frames:
                continue
            stored = torch.cat([payload.unpack(payload.pack(kept[f])[None, layer]) for f in frames])
            assert torch.equal(v[rows, 0], stored[:, 1].flatten(0, 1)[:, 1])
            keys = rotate(stored[:, 0].flatten(0, 1), policy.rope.frames([0] * len(frames)))
            assert torch.equal(k[rows, 0], keys[:, 1])
            retrieved += len(frames)
    assert retrieved >= 16

    frame = payload.frame_bytes
    tiers = Tiers(host_bytes=4 * frame, disk=tmp_path, expected_frames=12)
    again = start(model, RagOfOneHead, SETTINGS, make_bank=bank_of(kind, tiers))
    for result in results[:6]:
        again.replay(result.latents, [result.state])
    assert torch.equal(generate(again, 2), torch.cat([result.latents for result in results[6:]], dim=1))


def test_the_least_recently_retrieved_frames_leave_first(tmp_path: Path) -> None:
    layout = tiny_layout()
    frame = make_payload("exact", FrameShape(2, 6, 2, 12), torch.float32).frame_bytes
    bank = bank_of("exact", Tiers(host_bytes=3 * frame, disk=tmp_path))(layout)
    assert isinstance(bank, TieredBank)
    for number in range(3):
        bank.append(number, torch.full((2, 2, 6, 2, 12), float(number)))
    bank.prefetch([0])
    bank.reserve(2)
    assert list(bank._host) == [0]
    for number in (3, 4):
        bank.append(number, torch.full((2, 2, 6, 2, 12), float(number)))
    assert bank.usage()[:3] == (0, 3, 2)
    assert bank.nbytes() == 5 * frame
    assert gathered(bank, [4, 1, 0, 2])[:, 0, 0, 0, 0, 0].tolist() == [4, 1, 0, 2]
    with pytest.raises(KeyError):
        bank.gather([9])


def test_a_full_host_without_a_disk_names_the_ways_out() -> None:
    bank = bank_of("exact", Tiers(host_bytes=1))(tiny_layout())
    bank.append(0, torch.zeros(2, 2, 6, 2, 12))
    with pytest.raises(MemoryError, match=r"engine\.bank\.disk"):
        bank.append(1, torch.zeros(2, 2, 6, 2, 12))


def test_a_full_disk_is_told_before_the_rollout_begins(tmp_path: Path) -> None:
    """The file is allocated at once; without that a full disk is a SIGBUS in the middle."""
    room = os.statvfs(tmp_path)
    shape = FrameShape(2, 6, 2, 12)
    payload = make_payload("exact", shape, torch.float32)
    frames = 2 * room.f_bavail * room.f_frsize // 4096
    with pytest.raises(OSError, match=r"no room for .* are free") as raised:
        TieredBank(torch.device("cpu"), payload, Tiers(host_bytes=1, disk=tmp_path, expected_frames=frames))
    assert raised.value.errno in (errno.ENOSPC, errno.EFBIG)
    with pytest.raises(OSError, match=r"engine\.bank\.disk to an existing"):
        TieredBank(torch.device("cpu"), payload, Tiers(host_bytes=1, disk=tmp_path / "none", expected_frames=9))


def test_a_disk_that_fills_up_in_the_middle_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bank = bank_of("exact", Tiers(host_bytes=1, disk=tmp_path))(tiny_layout())
    bank.append(0, torch.zeros(2, 2, 6, 2, 12))

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match="no room for"):
        bank.append(1, torch.ones(2, 2, 6, 2, 12))
    monkeypatch.undo()
    # Nothing was lost.
    bank.append(1, torch.ones(2, 2, 6, 2, 12))
    assert gathered(bank, [0, 1])[:, 0, 0, 0, 0, 0].tolist() == [0, 1]


def test_no_exit_leaves_a_file(tmp_path: Path) -> None:
    program = f"""
import os, pathlib, signal, torch
from lrag_ray.retrieval.disk import SpillFile
file = SpillFile(pathlib.Path({str(tmp_path)!r}), 5000, 3)
file.write(7, torch.ones(5000, dtype=torch.uint8))
assert int(file.read(7).sum()) == 5000
os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", program], check=False, cwd=Path(__file__).parents[2])
    assert done.returncode == -signal.SIGKILL
    assert list(tmp_path.iterdir()) == []
