"""Latent windows as a source of Ray Data: tasks read them by byte range, a block of windows at a time.

Columns: ``latents`` [window, C, H, W], ``key`` and ``rollout`` of the rollout, ``start``. Arrow has no bfloat16, so
such latents are the same bits as float16: ``torch.as_tensor(batch["latents"]).view(torch.bfloat16)``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import ray.data
import torch
from ray.data.block import BlockMetadata
from ray.data.datasource import Datasource, ReadTask
from ray.data.extensions import ArrowTensorArray

from lrag_ray.store.latent_windows import LatentWindows

_BLOCK_BYTES = 64 << 20
"""Of latents in one block."""


class LatentSource(Datasource):  # type: ignore[misc]
    """Items of a latent dataset in order."""

    def __init__(self, items: LatentWindows) -> None:
        super().__init__()
        self._items = items
        frames = items.latents.frames
        per_item = items.window if items.window is not None else float(frames.mean())
        self._item_bytes = max(1, int(per_item * items.latents.form.frame_bytes))

    def get_name(self) -> str:
        """Shown by Ray Data."""
        return "Latents"

    def estimate_inmemory_data_size(self) -> int:
        """Bytes of all items."""
        return self._item_bytes * len(self._items)

    def get_read_tasks(self, parallelism: int, *args: Any, **kwargs: Any) -> list[ReadTask]:
        """Consecutive items per task."""
        shares = np.array_split(np.arange(len(self._items)), min(parallelism, len(self._items)))
        return [
            ReadTask(
                partial(_blocks, self._items, int(share[0]), int(share[-1]) + 1, self._item_bytes),
                BlockMetadata(
                    num_rows=len(share), size_bytes=len(share) * self._item_bytes, input_files=None, exec_stats=None
                ),
            )
            for share in shares
        ]


def _blocks(items: LatentWindows, first: int, end: int, item_bytes: int) -> Iterator[pa.Table]:
    at_once = max(1, _BLOCK_BYTES // item_bytes)
    for start in range(first, end, at_once):
        yield _table(items, range(start, min(end, start + at_once)))


def _table(items: LatentWindows, indices: Iterable[int]) -> pa.Table:
    places = [items.place(index) for index in indices]
    entries = [items.latents.entry(rollout) for rollout, _ in places]
    latents = [items.latents.read(rollout, start, items.window) for rollout, start in places]
    arrays = [(each.view(torch.float16) if each.dtype == torch.bfloat16 else each).numpy() for each in latents]
    return pa.table(
        {
            "latents": ArrowTensorArray.from_numpy(arrays),
            "key": [entry.key for entry in entries],
            "rollout": [entry.rollout for entry in entries],
            "start": [start for _, start in places],
        }
    )


def latent_source(items: LatentWindows) -> ray.data.Dataset:
    """A Ray Data dataset of the windows, or rollouts, of `items`. Starts Ray where it does not run."""
    return ray.data.read_datasource(LatentSource(items))
