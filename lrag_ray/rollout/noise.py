"""Noise of a rollout: keyed by what it is for, so that it depends on nothing else."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, Protocol

import torch
from torch import Tensor

from lrag_ray.rollout.normal import standard_normal
from lrag_ray.wan.keyed import key_digest, keyed_generator

NoiseVersion = Literal[1, 2]
"""1: torch.randn, whose bits depend on the instructions of the CPU. 2: `rollout.normal`, the same on every CPU."""
NOISE_VERSION: NoiseVersion = 2
"""Of new runs; a run continues with the version that it was begun with."""


class NoiseSource(Protocol):
    """Standard normal draws, float32 on the CPU, each [B, n, C, H, W]."""

    def initial(self, block: int) -> Tensor:
        """What the block's first denoising pass starts from."""

    def renoise(self, block: int, step: int) -> Tensor:
        """The draw added back after denoising pass `step` of the block."""


class KeyedNoise:
    """Draws keyed by (run seed, prompt text, sample, block, pass).

    Independent of backbone, method, line number, duration, order and worker, so methods are compared on equal noise.
    """

    def __init__(
        self,
        run_seed: int,
        prompts: Sequence[str],
        samples: Sequence[int],
        block_shape: tuple[int, int, int, int],
        version: NoiseVersion = NOISE_VERSION,
    ) -> None:
        """One prompt and sample per batch element; `block_shape` is (n, C, H, W)."""
        self._version = version
        self._keys = [(run_seed, prompt, sample) for prompt, sample in zip(prompts, samples, strict=True)]
        self._shape = block_shape

    def initial(self, block: int) -> Tensor:
        """Pass 0 of the block."""
        return self._draw(block, 0)

    def renoise(self, block: int, step: int) -> Tensor:
        """Pass step + 1 of the block."""
        return self._draw(block, step + 1)

    def _draw(self, block: int, step: int) -> Tensor:
        return torch.stack([self._normal("noise", *key, block, step) for key in self._keys])

    def _normal(self, *key: str | int) -> Tensor:
        if self._version == 1:
            return torch.randn(self._shape, generator=keyed_generator(*key))
        draws = standard_normal(math.prod(self._shape), key_digest(*key)[:16])
        return torch.from_numpy(draws).view(self._shape)


class RecordedNoise:
    """Recorded draws, for conformance."""

    def __init__(self, noise: Tensor, renoise: Tensor, frames_per_block: int) -> None:
        """`noise` [B, F, C, H, W]; `renoise` [blocks, steps - 1, B, n, C, H, W]."""
        self._noise, self._renoise, self._n = noise, renoise, frames_per_block

    def initial(self, block: int) -> Tensor:
        """The block's frames of `noise`."""
        return self._noise[:, block * self._n : (block + 1) * self._n]

    def renoise(self, block: int, step: int) -> Tensor:
        """The recorded draw."""
        return self._renoise[block, step]
