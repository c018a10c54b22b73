"""How large histories become, and where `engine.bank` puts them: arithmetic on a configuration."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch

from lrag_ray.config.bank import BankSection
from lrag_ray.config.methods import Method
from lrag_ray.config.schema import BackboneConfig
from lrag_ray.retrieval.bank_types import BankType
from lrag_ray.retrieval.history import Tiers
from lrag_ray.retrieval.payload import FrameShape, make_payload


class HistoryPlaces(NamedTuple):
    """Bytes of one rollout's history at its end, by tier."""

    device: int
    host: int
    disk: int
    homeless: int
    """What exceeds all budgets."""

    @property
    def total(self) -> int:
        """The whole history."""
        return sum(self)


def stored_frame_bytes(backbone: BackboneConfig, kind: BankType) -> int:
    """K and V of one latent frame over all layers, stored as `kind`."""
    sizes, latent = backbone.transformer, backbone.latent
    tokens = sizes.tokens_per_frame(latent.height, latent.width)
    shape = FrameShape(sizes.num_layers, tokens, sizes.num_heads, sizes.head_dim)
    return make_payload(kind, shape, getattr(torch, backbone.dtype)).frame_bytes


def history_frames(backbone: BackboneConfig, method: Method, total_frames: int) -> int:
    """Latent frames in the history at the end of a rollout of `total_frames`."""
    return method.policy.history_frames(method.settings, backbone.sampler.frames_per_block, total_frames)


def history_places(
    backbone: BackboneConfig, method: Method, total_frames: int, bank: BankSection, *, on_gpu: bool
) -> HistoryPlaces:
    """Where the history of a rollout of `total_frames` latent frames is at its end."""
    frames, each = history_frames(backbone, method, total_frames), stored_frame_bytes(backbone, method.history)
    most_on_device, most_on_host = tiers_of(bank).frames(each, has_device=on_gpu)
    device = min(frames, most_on_device)
    host = frames - device if most_on_host is None else min(frames - device, most_on_host)
    rest = frames - device - host
    disk = rest if bank.disk is not None else 0
    return HistoryPlaces(device * each, host * each, disk * each, (rest - disk) * each)


def tiers_of(bank: BankSection, expected_frames: int = 0) -> Tiers:
    """The section in terms of the bank."""
    return Tiers(
        device_bytes=round(bank.device_gb * 1e9),
        host_bytes=None if bank.host_gb is None else round(bank.host_gb * 1e9),
        disk=None if bank.disk is None else Path(bank.disk),
        expected_frames=expected_frames,
    )
