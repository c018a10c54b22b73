"""A latent dataset for torch: every run of consecutive latent frames, or whole rollouts."""

from __future__ import annotations

from typing import Self

import numpy as np
import torch.utils.data
from torch import Tensor

from lrag_ray.config.schema import StorageSection
from lrag_ray.errors import UsageError
from lrag_ray.printable import counted
from lrag_ray.store.datasets import LatentDataset


class LatentWindows(torch.utils.data.Dataset[Tensor]):
    """Windows of the rollouts of one or more runs, as a map-style torch dataset::

        data = LatentWindows.from_run("runs/latents", window=8)
        data[0]   # [8, 16, 60, 104]: frames 0 to 7 of the first rollout

    Windows begin at every frame of a rollout from which `window` frames are left. Picklable: workers of a DataLoader
    open their own files.
    """

    def __init__(self, latents: LatentDataset, window: int | None = None) -> None:
        """Windows of `window` latent frames; None: each rollout is one item, [frames, C, H, W].

        Raises UsageError for a window below 1, and where rollouts are shorter than it, which are named.
        """
        self.latents = latents
        """The rollouts."""
        self.window = window
        frames = latents.frames
        if window is None:
            windows = np.ones(len(frames), np.int64)
        else:
            if window < 1:
                raise UsageError(f"window {window} must be at least 1")
            windows = frames - window + 1
            if short := np.flatnonzero(windows < 1).tolist():
                shown = ", ".join(f"{latents.entry(i).rollout} ({frames[i]})" for i in short[:5])
                raise UsageError(
                    f"{len(short):,} of {counted(len(frames), 'rollout')} have fewer latent frames than a "
                    f"window of {window}: "
                    f"{shown}{', …' if len(short) > 5 else ''}. Fix: a smaller window, or leave these runs out"
                )
        self._ends = np.cumsum(windows)

    @classmethod
    def from_run(
        cls, uri: str, *more_uris: str, window: int | None = None, storage: StorageSection | None = None
    ) -> Self:
        """The dataset of one or more runs; see `LatentDataset.open` for errors."""
        return cls(LatentDataset.open(uri, *more_uris, storage=storage), window)

    def __len__(self) -> int:
        """Windows, or rollouts."""
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> Tensor:
        """A window [window, C, H, W], or a rollout [frames, C, H, W], in the stored precision, on the CPU."""
        rollout, start = self.place(index)
        return self.latents.read(rollout, start, self.window)

    def place(self, index: int) -> tuple[int, int]:
        """Rollout and first latent frame of a window."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"the dataset has {counted(len(self), 'item')}, not one with index {index}")
        index %= len(self)
        rollout = int(np.searchsorted(self._ends, index, side="right"))
        return rollout, index - (int(self._ends[rollout - 1]) if rollout else 0)
