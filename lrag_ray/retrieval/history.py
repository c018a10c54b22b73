"""The history bank: K and V of the frames that left the window, kept until the rollout ends.

One latent frame is 287.5 MB at full size in bf16, a 120 s rollout evicts 468 of them. A frame is packed once, when it
is admitted (`retrieval.payload`), and then kept in one of three tiers, each with a budget: device memory, page-locked
host memory, a file on a local disk. Where a tier is full, the frames in it that were retrieved least recently move to
the next. What a frame's rows are does not depend on its tier.

Both directions of the bus have a stream of their own beside the compute stream: evicted frames are packed and leave
during the block that evicts them, and what the next block retrieves comes layer by layer while the clean-context pass
runs; a layer is awaited when it is read. The device keeps the frames retrieved last, twice as many as a block
retrieves, so that a frame that is chosen again does not cross the bus again.

The file is written while the device has the denoising passes to do, and read during the clean-context pass.
"""

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from lrag_ray.retrieval.disk import SpillFile
from lrag_ray.retrieval.payload import Payload
from lrag_ray.retrieval.slabs import PAGE_LOCKED, PAGEABLE, SlabPool
from lrag_ray.wan.streams import side_stream


class Retrieved(NamedTuple):
    """Gathered frames, valid until the bank's next `prefetch`."""

    layer: Callable[[int], list[Tensor]]
    """K and V of all frames in one layer, in order, in as few tensors [n, 2, f, H, head_dim] as their memory allows; on
    the rollout's device, which waits for this layer alone."""


class BankUsage(NamedTuple):
    """What a bank holds and has moved."""

    device_frames: int
    host_frames: int
    disk_frames: int
    frame_bytes: int
    """Of a packed frame."""
    to_host_bytes: int
    """Copied over the bus so far."""
    to_device_bytes: int
    fetched: int
    """Frames that were asked for and had to be brought to the device."""
    cached: int
    """Frames that were asked for and were still there."""


class HistoryBank(ABC):
    """Frames by global index. A frame's rows are unrotated K and V of all layers [2, layers, f, H, head_dim]."""

    def reserve(self, frames: int) -> None:
        """Called while the device is busy: `frames` appends will follow in the next block."""

    @abstractmethod
    def append(self, frame: int, rows: Tensor) -> None:
        """Keep a copy of `rows`, which must stay as they are until `settle`."""

    def settle(self) -> None:
        """What is queued on the current stream after this call may overwrite the rows of all appends.

        A rollout calls it ahead of each clean-context pass. A policy that overwrites cached rows earlier in a block
        calls it itself.
        """

    def expect(self, frames: Sequence[int]) -> None:
        """A guess at what will be prefetched in the block after next; those that are not held are ignored."""

    @abstractmethod
    def prefetch(self, frames: Sequence[int]) -> None:
        """Start to bring those of `frames` that are held to the device; the next `gather` will ask for them."""

    @abstractmethod
    def gather(self, frames: Sequence[int]) -> Retrieved:
        """Rows of `frames`. KeyError for an absent frame."""

    @abstractmethod
    def nbytes(self) -> int:
        """Bytes held."""

    def notes(self) -> list[str]:
        """What a person should know about how this history is kept."""
        return []


@dataclass(frozen=True)
class Tiers:
    """Where a bank may keep its frames, and how many it will be given."""

    device_bytes: int = 0
    """Device memory; on the CPU there is none beside the host's."""
    host_bytes: int | None = None
    """Host memory; None for all that is needed. One frame always passes through it."""
    disk: Path | None = None
    """Folder on a local disk for the rest."""
    expected_frames: int = 0
    """Frames at the end of the rollout: room for them is made at once. 0 where that is not known."""

    def frames(self, frame_bytes: int, *, has_device: bool) -> tuple[int, int | None]:
        """Most frames of this size on the device and in host memory."""
        host = None if self.host_bytes is None else max(1, self.host_bytes // frame_bytes)
        return self.device_bytes // frame_bytes if has_device else 0, host


class TieredBank(HistoryBank):
    """Packed frames in device memory, host memory and a file, in this order.

    On the CPU, host and device are the same memory: frames are packed where they stay, and plain payloads are gathered
    without a copy.
    """

    def __init__(self, device: torch.device, payload: Payload, tiers: Tiers = Tiers()) -> None:
        """MemoryError or OSError where there is no room for the frames that are expected."""
        self._device_of, self._payload, self._tiers = device, payload, tiers
        self._cuda = device.type == "cuda"
        self._pool = PAGE_LOCKED if self._cuda else PAGEABLE
        self._most_on_device, self._most_on_host = tiers.frames(payload.frame_bytes, has_device=self._cuda)
        # Each tier in order of the last retrieval.
        self._device: OrderedDict[int, Tensor] = OrderedDict()
        self._host: OrderedDict[int, Tensor] = OrderedDict()
        self._disk: SpillFile | None = None
        self._spare: list[Tensor] = []
        """Slabs whose frames moved on."""
        self._to_host = self._to_device = self._fetched = self._cached = 0
        if self._cuda:
            self._cache: OrderedDict[int, list[Tensor]] = OrderedDict()
            """The frames retrieved last, on the device, by layer."""
            self._staging: list[Tensor] = []
            """Page-locked memory that frames of the file pass through."""
            self._appended: torch.cuda.Event | None = None
            self._arrived: list[torch.cuda.Event] = []
            """By layer."""
            self._read: torch.cuda.Event | None = None
            # At exit the system takes everything; the driver may be gone by then.
            slabs = (self._host, self._spare, self._staging)
            weakref.finalize(self, _give_back, device, self._pool, *slabs).atexit = False
        self._make_room(tiers.expected_frames)

    def reserve(self, frames: int) -> None:
        """Have slabs ready for what will be appended, those of the least recently retrieved frames among them."""
        free = self._most_on_device - len(self._device)
        wanted = frames - (free if self._most_on_device > 0 else 0)
        if self._disk is not None or self._tiers.disk is not None:
            while self._host and self._room_on_host() < wanted - len(self._spare):
                self._spill()
        if self._cuda and wanted > len(self._spare):
            self._pool.reserve(self._payload.frame_bytes, min(wanted - len(self._spare), self._room_on_host()))

    def append(self, frame: int, rows: Tensor) -> None:
        """Pack a frame. MemoryError or OSError where no tier has room for one more."""
        if not self._cuda:
            slab = self._slab()
            self._payload.pack_into(self._layers(slab), rows)
            self._host[frame] = slab
            return
        stream = side_stream(self._device_of, "to host")
        stream.wait_event(torch.cuda.current_stream(self._device_of).record_event())
        with torch.cuda.stream(stream):
            packed = self._payload.pack(rows)
            if self._most_on_device == 0:
                self._leave_device(frame, packed)
            else:
                while len(self._device) >= self._most_on_device:
                    self._leave_device(*self._device.popitem(last=False))
                self._device[frame] = packed
            self._appended = stream.record_event()
        # The allocator must not hand this memory on while it is still read.
        rows.record_stream(stream)

    def settle(self) -> None:
        """The compute stream waits for the appends, which are done long before."""
        if self._cuda and self._appended is not None:
            torch.cuda.current_stream(self._device_of).wait_event(self._appended)

    def expect(self, frames: Sequence[int]) -> None:
        """Let the system read ahead what only the file holds."""
        for frame in frames:
            if self._disk is not None and frame in self._disk and not (self._cuda and frame in self._cache):
                self._disk.expect(frame)

    def prefetch(self, frames: Sequence[int]) -> None:
        """Copy to the device layer by layer, behind the appends but beside what was launched since."""
        held = [frame for frame in frames if self._holds(frame)]
        for frame in held:
            for tier in (self._device, self._host):
                if frame in tier:
                    tier.move_to_end(frame)
        if not self._cuda or self._appended is None or not held:
            return
        stream = side_stream(self._device_of, "to device")
        stream.wait_event(self._appended)
        if self._read is not None:
            stream.wait_event(self._read)
        with torch.cuda.stream(stream):
            coming = self._coming(held)
            self._arrived = []
            for layer in range(self._payload.shape.layers):
                for slot, source in coming:
                    slot[layer].copy_(source[layer], non_blocking=True)
                self._arrived.append(stream.record_event())
        for _, source in coming:
            if source.device.type == "cuda":
                source.record_stream(stream)

    def gather(self, frames: Sequence[int]) -> Retrieved:
        """Frames of the host's memory or the file as they are on the CPU, the device's copies on a GPU."""
        for frame in frames:
            if not self._holds(frame):
                raise KeyError(frame)
        if not self._cuda:
            packed = [self._layers(self._host[f] if f in self._host else self._file().read(f)) for f in frames]
            return Retrieved(lambda layer: self._payload.read_host([each[layer] for each in packed]))
        if any(frame not in self._cache for frame in frames):
            self.prefetch(frames)
        slots = [self._cache[frame] for frame in frames]
        for rows in (rows for slot in slots for rows in slot):
            rows.record_stream(torch.cuda.current_stream(self._device_of))
        return Retrieved(lambda layer: self._layer_on_device(slots, layer))

    def nbytes(self) -> int:
        """Packed bytes of all frames, retrieved copies aside."""
        frames = len(self._device) + len(self._host) + (len(self._disk) if self._disk is not None else 0)
        return frames * self._payload.frame_bytes

    def usage(self) -> BankUsage:
        """What is held where, and what has crossed the bus."""
        on_disk = len(self._disk) if self._disk is not None else 0
        return BankUsage(
            len(self._device), len(self._host), on_disk, self._payload.frame_bytes,
            self._to_host, self._to_device, self._fetched, self._cached,
        )  # fmt: skip

    def notes(self) -> list[str]:
        """Whether page-locked memory ran out."""
        if not self._cuda or not self._pool.pageable:
            return []
        return [
            f"{self._pool.pageable} slabs of history could not be page-locked ({self._pool.refusal}): copies of them "
            "stall the device. Fix: raise `ulimit -l`, or fewer actors on a node"
        ]

    def _layer_on_device(self, slots: list[list[Tensor]], layer: int) -> list[Tensor]:
        if not slots:
            return []
        current = torch.cuda.current_stream(self._device_of)
        current.wait_event(self._arrived[layer])
        rows = self._payload.unpack(torch.stack([slot[layer] for slot in slots]))
        self._read = current.record_event()
        return [rows]

    def _coming(self, frames: Sequence[int]) -> list[tuple[list[Tensor], Tensor]]:
        """Slots on the device and where their bytes [layers, layer_bytes] come from, for frames not there yet."""
        coming: list[tuple[list[Tensor], Tensor]] = []
        on_disk = 0
        for frame in frames:
            if frame in self._cache:
                self._cache.move_to_end(frame)
        self._cached += sum(frame in self._cache for frame in frames)
        for frame in dict.fromkeys(frame for frame in frames if frame not in self._cache):
            if frame in self._device:
                source = self._device[frame]
            else:
                if frame in self._host:
                    source = self._layers(self._host[frame])
                else:
                    source = self._layers(self._staged(frame, on_disk))
                    on_disk += 1
                self._to_device += self._payload.frame_bytes
            self._fetched += 1
            if len(self._cache) >= 2 * len(frames):
                # What is wanted now was moved to the end, so this is none of it.
                _, slot = self._cache.popitem(last=False)
            else:
                layers, layer_bytes = source.shape
                slot = [torch.empty(layer_bytes, dtype=torch.uint8, device=self._device_of) for _ in range(layers)]
            self._cache[frame] = slot
            coming.append((slot, source))
        return coming

    def _staged(self, frame: int, position: int) -> Tensor:
        """A frame of the file in page-locked memory; `position` counts such frames of one prefetch."""
        if position == 0 and self._arrived:
            # The copies of the block before, long done.
            self._arrived[-1].synchronize()
        if position == len(self._staging):
            self._staging.append(self._pool.take(self._payload.frame_bytes))
        self._staging[position].copy_(self._file().read(frame))
        return self._staging[position]

    def _leave_device(self, frame: int, packed: Tensor) -> None:
        """Copy a packed frame to host memory on the current stream."""
        slab = self._slab()
        if self._arrived:
            # The slab's last frame may still be on its way to the device.
            torch.cuda.current_stream(self._device_of).wait_event(self._arrived[-1])
        self._layers(slab).copy_(packed, non_blocking=True)
        self._to_host += self._payload.frame_bytes
        self._host[frame] = slab

    def _slab(self) -> Tensor:
        """Host memory for a frame: new, or that of the frame whose last retrieval is longest ago."""
        if not self._spare:
            if self._room_on_host() > 0:
                return self._pool.take(self._payload.frame_bytes)
            self._spill()
        return self._spare.pop()

    def _spill(self) -> None:
        """Move a frame from host memory to the file."""
        if self._tiers.disk is None:
            raise MemoryError(
                f"the history bank holds {len(self._device)} frames on the device and {len(self._host)} in host "
                f"memory, {self._payload.frame_bytes:,} bytes each, which is its budget. Fix: raise "
                "engine.bank.host_gb, name a folder in engine.bank.disk, or store less with methods.<name>.history"
            )
        frame, slab = next(iter(self._host.items()))
        if self._cuda and self._appended is not None:
            # Copied to the host a block ago or longer.
            self._appended.synchronize()
        self._file().write(frame, slab)
        del self._host[frame]
        self._spare.append(slab)

    def _room_on_host(self) -> int:
        """Slabs that may still be made."""
        return 1 << 30 if self._most_on_host is None else self._most_on_host - len(self._host) - len(self._spare)

    def _make_room(self, frames: int) -> None:
        """Slabs and file for a whole rollout, before it begins: page-locking takes longer than a block has time for."""
        behind_device = max(0, frames - self._most_on_device)
        on_host = behind_device if self._most_on_host is None else min(behind_device, self._most_on_host)
        if self._cuda:
            self._pool.reserve(self._payload.frame_bytes, on_host)
        if self._tiers.disk is not None and behind_device > on_host:
            self._disk = SpillFile(self._tiers.disk, self._payload.frame_bytes, behind_device - on_host)

    def _file(self) -> SpillFile:
        if self._disk is None:
            assert self._tiers.disk is not None, "frames are spilled where there is a disk"
            self._disk = SpillFile(self._tiers.disk, self._payload.frame_bytes)
        return self._disk

    def _holds(self, frame: int) -> bool:
        return frame in self._device or frame in self._host or (self._disk is not None and frame in self._disk)

    def _layers(self, slab: Tensor) -> Tensor:
        """Bytes of a frame by layer [layers, layer_bytes]."""
        return slab.view(self._payload.shape.layers, self._payload.layer_bytes)


def _give_back(device: torch.device, pool: SlabPool, host: OrderedDict[int, Tensor], *others: list[Tensor]) -> None:
    """Return the slabs of a bank that is gone, once no copy from or to them is under way."""
    try:
        torch.cuda.synchronize(device)
    except RuntimeError:
        # The device failed: nothing is known of its copies, so this memory is never used again.
        return
    slabs = [*host.values(), *(slab for each in others for slab in each)]
    # A bank may let frames share a slab; the pool must not hand one out twice.
    pool.give_back({slab.data_ptr(): slab for slab in slabs}.values())
