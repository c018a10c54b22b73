"""A context method for tests of the runner: attends like infinity_rope, and is slow, hangs or fails when told."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lrag_ray.context.base import BaseSettings
from lrag_ray.context.infinity_rope import InfinityRope
from lrag_ray.context.rag import Rag, RagSettings


@dataclass(frozen=True)
class DisturbedSettings(BaseSettings):
    """When and how to disturb; once per `marker`."""

    block_s: float = 0.0
    """Every block takes so much longer."""
    at_block: int = -1
    """The block at whose beginning it happens."""
    how: str = ""
    """hang, gpu_memory, or wait."""
    marker: str = ""
    """File that says that it happened; or the folder in which a file is waited for."""


class Disturbed(InfinityRope):
    """Named as ``tests.engine.disturbed:Disturbed``."""

    Settings = DisturbedSettings

    def begin_block(self, block: int, state: dict[str, Tensor] | None = None) -> None:
        settings = self.settings
        time.sleep(settings.block_s)
        if settings.how == "wait":
            while block == settings.at_block and not any(p.is_file() for p in Path(settings.marker).rglob("[!.]*")):
                time.sleep(0.05)
        elif block == settings.at_block and not Path(settings.marker).exists():
            Path(settings.marker).touch()
            if settings.how == "hang":
                time.sleep(3600)
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        super().begin_block(block, state)


@dataclass(frozen=True)
class RememberingSettings(RagSettings):
    """Of `Remembering`."""

    block_s: float = 0.0
    """Every block takes so much longer."""


class Remembering(Rag):
    """A slow method with a history."""

    Settings = RememberingSettings

    def begin_block(self, block: int, state: dict[str, Tensor] | None = None) -> None:
        time.sleep(self.settings.block_s)
        super().begin_block(block, state)
