"""The retrieval encoder: a small convolutional auto-encoder of single latent frames.

Its L2-normalised embedding is the ``ae`` descriptor of a latent frame; the decoder exists for training only.
Parameter names are those of the released checkpoints.

    encoder = load_encoder("encoder.pt")
    descriptors = encoder.encode(latents)        # [N, C, H, W] -> [N, latent_dim], unit length
"""

from __future__ import annotations

import copy
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lrag_ray.errors import WeightsError
from lrag_ray.wan.state_dict import load_strict, read_checkpoint, refuse_non_finite, state_dict_digest, unwrapped

_MAX_SIZE, _MAX_LEVELS = 1 << 16, 16
"""Sizes come from the checkpoint, and modules are made before its tensors show that they do not fit."""


def known_fields(kind: type[Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of a checkpoint's ``config`` that are fields of the dataclass `kind`; the others are dropped."""
    return {field.name: config[field.name] for field in fields(kind) if field.name in config}


@dataclass(frozen=True)
class EncoderConfig:
    """Sizes of the auto-encoder; the defaults are the released full size (30,231,696 parameters)."""

    in_channels: int = 16
    """Latent channels."""
    spatial_h: int = 60
    """Latent rows."""
    spatial_w: int = 104
    """Latent columns."""
    latent_dim: int = 1024
    """Width of the embedding."""
    hidden_dims: tuple[int, ...] = (64, 128, 256)
    """Channels after each halving of the resolution."""

    def __post_init__(self) -> None:
        for name in ("in_channels", "spatial_h", "spatial_w", "latent_dim"):
            if not _is_size(getattr(self, name)):
                raise ValueError(
                    f"{name} {reprlib.repr(getattr(self, name))} must be a whole number from 1 to {_MAX_SIZE}"
                )
        widths = self.hidden_dims
        if not isinstance(widths, tuple) or not 1 <= len(widths) <= _MAX_LEVELS or not all(map(_is_size, widths)):
            raise ValueError(f"hidden_dims {reprlib.repr(widths)} must be 1 to {_MAX_LEVELS} such numbers")

    @classmethod
    def from_checkpoint(cls, config: Mapping[str, Any]) -> EncoderConfig:
        """Sizes from a checkpoint's ``config``: its training settings are not fields here and are dropped."""
        known = known_fields(cls, config)
        if isinstance(known.get("hidden_dims"), list):
            known["hidden_dims"] = tuple(known["hidden_dims"])
        return cls(**known)

    @property
    def feature_shape(self) -> tuple[int, int, int]:
        """Channels, rows and columns of the encoder's last feature map."""
        height, width = self.spatial_h, self.spatial_w
        for _ in self.hidden_dims:
            height, width = (height + 1) // 2, (width + 1) // 2
        return self.hidden_dims[-1], height, width


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= _MAX_SIZE


def _group_norm(channels: int) -> nn.GroupNorm:
    groups = next(groups for groups in (32, 16, 8, 4, 1) if channels % groups == 0)
    return nn.GroupNorm(groups, channels)


class _ResidualBlock(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for _ in range(2):
            layers += [_group_norm(channels), nn.SiLU(), nn.Conv2d(channels, channels, 3, padding=1)]
        self.block = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        update: Tensor = self.block(x)
        return x + update


class _Encoder(nn.Module):
    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, after in pairwise((config.in_channels, *config.hidden_dims)):
            layers += [nn.Conv2d(before, after, 3, stride=2, padding=1), _group_norm(after), nn.SiLU()]
            layers += [_ResidualBlock(after)]
        self.conv_stack = nn.Sequential(*layers)
        self.final_norm = nn.Sequential(_group_norm(config.hidden_dims[-1]), nn.SiLU())
        self.fc = nn.Linear(config.hidden_dims[-1], config.latent_dim)

    def forward(self, x: Tensor) -> Tensor:
        features: Tensor = self.final_norm(self.conv_stack(x))
        embedding: Tensor = self.fc(features.mean(dim=(-2, -1)))
        return embedding


class _Decoder(nn.Module):
    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.feature_shape = config.feature_shape
        self.frame_size = (config.spatial_h, config.spatial_w)
        channels, height, width = config.feature_shape
        self.fc = nn.Sequential(nn.Linear(config.latent_dim, channels * height * width), nn.SiLU())
        layers: list[nn.Module] = []
        for before, after in pairwise(config.hidden_dims[::-1]):
            layers += [nn.Upsample(scale_factor=2, mode="nearest"), nn.Conv2d(before, after, 3, padding=1)]
            layers += [_group_norm(after), nn.SiLU(), _ResidualBlock(after)]
        self.upsample_stack = nn.Sequential(*layers)
        self.final = nn.Sequential(
            nn.Upsample(scale_factor=2, mode="nearest"),
            nn.Conv2d(config.hidden_dims[0], config.in_channels, 3, padding=1),
        )

    def forward(self, embedding: Tensor) -> Tensor:
        features = self.fc(embedding).reshape(-1, *self.feature_shape)
        frames: Tensor = self.final(self.upsample_stack(features))
        # Halving rounds odd sizes up, so doubling may overshoot.
        height, width = self.frame_size
        return frames[..., :height, :width]


class _ProductConv(nn.Module):
    """A convolution as one matrix product.

    By default cuDNN rounds float32 convolutions to TF32, whose 10 bits tie almost like bfloat16's 7. The switch is one
    for the whole process, and a decoder beside this encoder needs it on; matrix products are exact by default.
    """

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.weight, self.bias = conv.weight, conv.bias
        self.stride, self.padding = conv.stride[0], int(conv.padding[0])

    def forward(self, x: Tensor) -> Tensor:
        size, step = self.weight.shape[-1], self.stride
        patches = F.pad(x, (self.padding,) * 4).unfold(2, size, step).unfold(3, size, step)
        frames, _, height, width = patches.shape[:4]
        rows = patches.permute(0, 2, 3, 1, 4, 5).reshape(frames * height * width, -1)
        y = F.linear(rows, self.weight.flatten(1), self.bias)
        return y.view(frames, height, width, -1).permute(0, 3, 1, 2).contiguous()


class LatentAutoencoder(nn.Module):
    """Encoder and decoder of single latent frames [N, C, H, W]."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = _Encoder(config)
        self.decoder = _Decoder(config)

    def encode(self, x: Tensor, normalize: bool = True) -> Tensor:
        """Embeddings [N, latent_dim] of latent frames [N, C, H, W], of unit length unless `normalize` is false."""
        embedding: Tensor = self.encoder(x)
        return F.normalize(embedding, dim=-1, eps=1e-12) if normalize else embedding

    def by_products(self) -> LatentAutoencoder:
        """The same auto-encoder, with the same weights in memory, whose encoder is exact in float32 on any device."""
        made = copy.copy(self)
        made._modules = {**self._modules, "encoder": copy.deepcopy(self.encoder, {id(p): p for p in self.parameters()})}
        for module in list(made.encoder.modules()):
            for name, child in module.named_children():
                if isinstance(child, nn.Conv2d):
                    setattr(module, name, _ProductConv(child))
        return made

    def decode(self, embedding: Tensor) -> Tensor:
        """Reconstructed frames [N, C, H, W] from un-normalised embeddings [N, latent_dim]."""
        frames: Tensor = self.decoder(embedding)
        return frames

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Un-normalised embeddings [N, latent_dim] and reconstructions [N, C, H, W] of frames [N, C, H, W]."""
        embedding = self.encode(x, normalize=False)
        return embedding, self.decode(embedding)

    def digest(self) -> str:
        """SHA-256 of the weights; part of a method's identity."""
        return state_dict_digest(self.state_dict())


def load_encoder(path: str | Path) -> LatentAutoencoder:
    """Retrieval encoder from a released or trained checkpoint (``config`` + ``model``), float32, in eval mode.

    Raises WeightsError if the file is not such a checkpoint or any weight is missing, unexpected, misshapen or not
    finite.
    """
    checkpoint = read_checkpoint(path)
    config, weights = checkpoint.get("config"), checkpoint.get("model")
    if not isinstance(config, Mapping) or not isinstance(weights, Mapping):
        raise WeightsError(
            f"retrieval encoder {path} holds the keys {sorted(map(str, checkpoint))[:8]}, "
            "expected 'config' and 'model'. Fix: use a checkpoint as the encoder trainer writes it"
        )
    try:
        sizes = EncoderConfig.from_checkpoint(config)
    except ValueError as error:
        raise WeightsError(f"retrieval encoder {path}: its config is wrong: {error}") from error
    with torch.device("meta"):
        model = LatentAutoencoder(sizes)
    fix = f"the sizes are those of the file's own config ({sizes}); use a checkpoint whose config and model agree"
    bare = {unwrapped(str(name)).removeprefix("model."): value for name, value in weights.items()}
    if len(bare) < len(weights):
        bare = {str(name): value for name, value in weights.items()}
    load_strict(model, bare, f"retrieval encoder {path}", fix)
    refuse_non_finite(model.state_dict(), f"retrieval encoder {path}")
    return model.float().eval().requires_grad_(False)
