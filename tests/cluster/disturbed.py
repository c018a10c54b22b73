"""A context method for tests of the runner: attends like infinity_rope, and waits, hangs or fails when told."""

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

    at_block: int = -1
    """The block at whose beginning it happens."""
    how: str = ""
    """hang, gpu_memory, or wait."""
    marker: str = ""
    """File that says that it happened; or the folder in which a file is waited for."""


def wait_for_a_file(folder: str) -> None:
    """Return when there is any file below `folder`; a file ``<folder>.waiting`` tells that someone waits."""
    Path(f"{folder}.waiting").touch()
    while not any(path.is_file() for path in Path(folder).rglob("[!.]*")):
        time.sleep(0.05)


class Disturbed(InfinityRope):
    """Named as ``tests.cluster.disturbed:Disturbed``."""

    Settings = DisturbedSettings
    settings: DisturbedSettings

    def begin_block(self, block: int, state: dict[str, Tensor] | None = None) -> None:
        settings = self.settings
        if settings.how == "wait":
            if block == settings.at_block:
                wait_for_a_file(settings.marker)
        elif block == settings.at_block and not Path(settings.marker).exists():
            Path(settings.marker).touch()
            if settings.how == "hang":
                time.sleep(3600)
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        super().begin_block(block, state)


@dataclass(frozen=True)
class RememberingSettings(RagSettings):
    """Of `Remembering`."""

    at_block: int = -1
    """The block at whose beginning it waits."""
    marker: str = ""
    """The folder in which a file is waited for."""


class Remembering(Rag):
    """A method with a history that waits when told."""

    Settings = RememberingSettings
    settings: RememberingSettings

    def begin_block(self, block: int, state: dict[str, Tensor] | None = None) -> None:
        if block == self.settings.at_block:
            wait_for_a_file(self.settings.marker)
        super().begin_block(block, state)
