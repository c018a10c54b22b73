"""Descriptors of latent frames and the cosine similarity between them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

NORM_EPSILON = 1e-8
"""Added to each norm, as released."""

Descriptor = Callable[[Tensor], Tensor]
"""Latent frames [n, C, H, W] to descriptors [n, D]."""


def average_pool(latents: Tensor) -> Tensor:
    """Mean over rows and columns: [n, C, H, W] to [n, C]."""
    return latents.mean(dim=(-2, -1))


class DescriptorIndex:
    """Descriptors of all finished frames of a rollout, in frame order; each is described and normed once."""

    def __init__(self, describe: Descriptor, dtype: torch.dtype = torch.float32) -> None:
        """`dtype` float32 keeps rankings exact; the released code runs in bfloat16, where similarities tie."""
        self._describe = describe
        self._dtype = dtype
        self._blocks: list[Tensor] = []
        self._unit = torch.empty(0)
        """Descriptors of length 1 [room, D]; room doubles, so that a long rollout copies each row a few times."""
        self._frames = 0

    def append(self, latents: Tensor) -> None:
        """Describe clean latents [n, C, H, W] of the next frames."""
        rows = self._describe(latents.to(self._dtype)).to(self._dtype)
        self._blocks.append(rows)
        end = self._frames + len(rows)
        if end > len(self._unit):
            larger = rows.new_empty(2 * end, rows.shape[1])
            if self._frames:
                larger[: self._frames] = self._unit[: self._frames]
            self._unit = larger
        self._unit[self._frames : end] = rows / (rows.norm(dim=-1, keepdim=True) + NORM_EPSILON)
        self._frames = end

    def __len__(self) -> int:
        return self._frames

    def descriptors(self) -> Tensor:
        """All descriptors [frames, D]."""
        return torch.cat(self._blocks)

    def similarities(self, query: int, first: int, count: int) -> Tensor:
        """Cosine similarity [count] of frame `query` to frames first .. first+count-1, on the descriptors' device."""
        return self._unit[first : first + count] @ self._unit[query]


def most_similar(scores: Tensor, count: int) -> list[int]:
    """Positions of the `count` highest of `scores` [n], best first; the earlier one where two are equal."""
    picked: list[int] = torch.sort(scores, descending=True, stable=True).indices[:count].tolist()
    return picked


class HostCopy:
    """A small tensor on its way from the device to the host.

    Reading it waits for this copy alone, so work launched in between keeps the device busy.
    """

    def __init__(self, x: Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        if x.device.type == "cuda":
            self._host = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
            self._host.copy_(x, non_blocking=True)
            self._event = torch.cuda.current_stream(x.device).record_event()
        else:
            self._host = x

    def read(self) -> Tensor:
        """The values, on the CPU."""
        if self._event is not None:
            self._event.synchronize()
        return self._host
