"""Ratings of images with MUSIQ.

The network and its weights are pyiqa's; this is its forward pass with less work. Patches of images of one size are at
the same places, so their embeddings of position and scale are made once; pyiqa makes them again on the host for every
image, pads the two smaller scales to square token sequences that the attention masks out again, standardises the
kernels of its convolutions at every call, and computes the last block for all tokens, though only the first is read.
(Ke et al. 2021.)
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PATCHES_AT_ONCE = {"cpu": 128, "cuda": 4096}
"""Patches that the convolutions see at a time, by kind of device: these fit the caches of a CPU and bound the memory
of a GPU to 1 GB."""


class ImageRater:
    """Batched MUSIQ."""

    def __init__(self, network: nn.Module) -> None:
        self.network: Any = network
        """pyiqa's own module."""
        block: Any = self.network.block1
        convolutions: Any = (self.network.conv_root, block.conv_proj, block.conv1, block.conv2, block.conv3)
        self._root, self._side, *self._main = [_standardised(convolution.weight) for convolution in convolutions]
        self._places: dict[tuple[int, int], Tensor] = {}

    def rate(self, images: Tensor) -> Tensor:
        """Ratings [T], about 0..100, of 0..1 images [T, 3, H, W]."""
        encoder = self.network.transformer_encoder
        patches = torch.cat([_patches(image, self._patch) for image in self._scales((images - 0.5) * 2)], dim=1)
        at_once = PATCHES_AT_ONCE.get(images.device.type, 4096)
        features = [self._stem(part) for part in patches.flatten(0, 1).split(at_once)]
        tokens = torch.cat(features).unflatten(0, patches.shape[:2]) + self._placed(images)
        tokens = torch.cat([encoder.cls.expand(len(tokens), -1, -1), tokens], dim=1)
        *blocks, last = encoder.transformer.values()
        for block in blocks:
            tokens = _through(block, tokens, tokens.shape[1])
        first = encoder.encoder_norm(_through(last, tokens, 1)[:, 0])
        ratings: Tensor = self.network.head(first).squeeze(1)
        return ratings

    @property
    def _patch(self) -> int:
        return int(self.network.patch_size)

    def _scales(self, images: Tensor) -> Iterator[Tensor]:
        """The images at the smaller scales, then as they are."""
        height, width = images.shape[2:]
        for longer in sorted(self.network.data_preprocess_opts["longer_side_lengths"]):
            ratio = longer / max(height, width)
            size = round(height * ratio), round(width * ratio)
            yield F.interpolate(images, size, mode="bicubic", align_corners=False)
        yield images

    def _placed(self, images: Tensor) -> Tensor:
        """Embeddings of position and scale of all patches, [1, patches, width]."""
        height, width = images.shape[2:]
        if (height, width) not in self._places:
            encoder = self.network.transformer_encoder
            positions, scales = encoder.posembed_input.position_emb[0], encoder.scaleembed_input.scale_emb
            side = math.isqrt(len(positions))
            grid = positions.view(1, side, side, -1).permute(0, 3, 1, 2)
            parts = []
            for scale, image in enumerate(self._scales(images[:1])):
                counts = [math.ceil(length / self._patch) for length in image.shape[2:]]
                stretched = F.interpolate(grid, counts, mode="nearest").flatten(2).transpose(1, 2)
                parts.append(stretched + scales[scale])
            self._places[height, width] = torch.cat(parts, dim=1)
        return self._places[height, width]

    def _stem(self, patches: Tensor) -> Tensor:
        """Tokens [N, width] of patches [N, 3, patch, patch]."""
        network, block = self.network, self.network.block1
        x = network.gn_root(F.conv2d(F.pad(patches, _same(patches, 7, 2)), self._root, stride=2))
        # A rectifier behind the pooling gives the same with a quarter of the work, and stands for zeros at the border.
        # On a CPU the pooling is quick with channels last, and the norms without.
        x = F.max_pool2d(x.contiguous(memory_format=torch.channels_last), 3, 2, ceil_mode=True)
        x = F.relu(x.contiguous(), inplace=True)
        side = block.gn_proj(F.conv2d(x, self._side))
        x = F.relu(block.gn1(F.conv2d(x, self._main[0])), inplace=True)
        x = F.relu(block.gn2(F.conv2d(x, self._main[1], padding=1)), inplace=True)
        x = F.relu(block.gn3(F.conv2d(x, self._main[2])).add_(side), inplace=True)
        # The order of TensorFlow, in which the weights were trained.
        embedded: Tensor = network.embedding(x.permute(0, 2, 3, 1).flatten(1))
        return embedded


def _standardised(kernel: Tensor) -> Tensor:
    """A kernel [O, I, h, w] of zero mean and unit deviation per output channel."""
    centred = kernel.detach() - kernel.detach().mean((1, 2, 3), keepdim=True)
    scaled: Tensor = centred / (centred.std((1, 2, 3), keepdim=True) + 1e-5)
    return scaled


def _same(images: Tensor, kernel: int, stride: int) -> list[int]:
    """Padding left, right, above and below that leaves ceil(side / stride) positions, the odd pixel at the end."""
    padding = []
    for length in (images.shape[3], images.shape[2]):
        needed = (math.ceil(length / stride) - 1) * stride + kernel - length
        padding += [needed // 2, needed - needed // 2]
    return padding


def _patches(images: Tensor, side: int) -> Tensor:
    """[T, 3, H, W] to [T, patches, 3, side, side] by rows, zeros around a side that is not a multiple."""
    padded = F.pad(images, _same(images, side, side))
    tiles = padded.unflatten(3, (-1, side)).unflatten(2, (-1, side))
    by_rows: Tensor = tiles.permute(0, 2, 4, 1, 3, 5)
    return by_rows.flatten(1, 2)


def _through(block: Any, tokens: Tensor, count: int) -> Tensor:
    """The first `count` of the tokens [B, N, C] that a block makes of all."""
    attention = block.attention
    normed = block.norm1(tokens)
    q, k, v = (
        projection(part).unflatten(2, (attention.num_heads, -1)).transpose(1, 2)
        for projection, part in (
            (attention.query, normed[:, :count]),
            (attention.key, normed),
            (attention.value, normed),
        )
    )
    mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    x = tokens[:, :count] + attention.out(mixed)
    out: Tensor = x + block.mlp(block.norm2(x))
    return out
