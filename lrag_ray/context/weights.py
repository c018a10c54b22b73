"""Weights of a method's own: which settings name them, what they are, and how they are loaded.

A policy lists its files in `ContextPolicy.weight_files`. Everything else follows from that list: relative paths are
resolved, digests enter the run's identity, ``weights list`` and ``weights verify``, ``doctor`` and the check before a
start read the files, and the loaded objects reach the policy as ``PolicyInputs.weights[key]``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from lrag_ray.errors import LragError, WeightsError

Loaded = nn.Module | Mapping[str, Tensor]
"""What a weights file becomes."""


@dataclass(frozen=True)
class WeightFile:
    """One file or folder of weights of a method."""

    key: str
    """Settings field that holds its address (text, or None), and its name in `PolicyInputs.weights`."""
    kind: str
    """What it is, in snake case, for people: ``retrieval_encoder``."""
    load: Callable[[Path], Loaded]
    """Reads the file into CPU memory; raises WeightsError where it is not what the method needs. Use one function, not
    a new one per call, so that methods that share a file are known to."""
    used: bool = True
    """Whether these settings load it, so that an address is required. The address of an unused file may be given; the
    file is then checked and part of the identity, but not loaded."""
    hint: str = "name the file"
    """What to do where the address is missing."""

    def address(self, settings: object) -> str | None:
        """Path or fsspec address in a method's settings, or None. TypeError where the field holds anything else."""
        value = getattr(settings, self.key)
        if value is not None and not isinstance(value, str):
            raise TypeError(f"settings field {self.key} names a weights file, so it holds text or None, not {value!r}")
        return value or None

    def read(self, path: Path) -> Loaded:
        """What `load` makes of the file; WeightsError, naming the file, for whatever `load` could not make sense of."""
        try:
            return self.load(path)
        except (LragError, OSError, MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            raise WeightsError(
                f"{self.kind.replace('_', ' ')} {path} cannot be loaded: {type(error).__name__}: {error}. "
                f"Fix: point {self.key} to a file that fits the method"
            ) from error


def tensors_of(loaded: Loaded) -> Mapping[str, Tensor]:
    """The tensors of loaded weights by name."""
    return loaded.state_dict() if isinstance(loaded, nn.Module) else loaded


def on_device(loaded: Loaded, device: torch.device) -> Loaded:
    """Loaded weights on the device of the rollout."""
    if isinstance(loaded, nn.Module):
        return loaded.to(device)
    return {name: tensor.to(device) for name, tensor in loaded.items()}
