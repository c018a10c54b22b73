"""The vision transformers behind the consistency and aesthetic dimensions: DINO, DINOv2, CLIP and DreamSim's towers.

One module serves all of them; `VitConfig` says what differs. Parameter names are those of the DINO checkpoints;
`clip_name` gives the OpenAI CLIP name of each. (Caron et al. 2021, Oquab et al. 2023, Radford et al. 2021.)
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

GRID_OFFSET = 0.1
"""Added to the patch counts before the position embeddings are scaled, as DINO does against rounding."""


@dataclass(frozen=True)
class VitConfig:
    """Shape and habits of one vision transformer."""

    patch: int
    """Side of a patch in pixels."""
    grid: int
    """Side of the square of position embeddings, in patches."""
    width: int = 768
    depth: int = 12
    heads: int = 12
    eps: float = 1e-6
    """Of every LayerNorm."""
    patch_bias: bool = True
    pre_norm: bool = False
    """LayerNorm after the position embeddings (CLIP)."""
    quick_gelu: bool = False
    layer_scale: bool = False
    mask_token: bool = False
    """DINOv2 checkpoints hold one; it is never used here."""
    projection: int = 0
    """Columns of the output projection; 0 for none."""
    readout: Literal["norm", "block"] = "norm"
    """CLS token after the final norm, or as the last block leaves it."""


class Attention(nn.Module):
    """Multi-head self-attention with one fused projection."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, C] to [B, N, C]."""
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self._attend(q, k, v)

    def first(self, x: Tensor) -> Tensor:
        """[B, N, C] to the first token [B, 1, C] of what `forward` gives."""
        width = x.shape[2]
        weight, bias = self.qkv.weight, self.qkv.bias
        q = F.linear(x[:, :1], weight[:width], bias[:width]).unflatten(2, (self.heads, -1)).transpose(1, 2)
        k, v = F.linear(x, weight[width:], bias[width:]).unflatten(2, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self._attend(q, k, v)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Tensor = self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return out


class Mlp(nn.Module):
    """Two linear layers around a GELU."""

    def __init__(self, width: int, quick: bool) -> None:
        super().__init__()
        self.quick = quick
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, C] to [B, N, C]."""
        x = self.fc1(x)
        x = x * torch.sigmoid(1.702 * x) if self.quick else F.gelu(x)
        out: Tensor = self.fc2(x)
        return out


class LayerScale(nn.Module):
    """Learned factor per channel (DINOv2)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """Scale [..., C]."""
        return x * self.gamma


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, config: VitConfig) -> None:
        super().__init__()
        width = config.width
        self.norm1 = nn.LayerNorm(width, config.eps)
        self.attn = Attention(width, config.heads)
        self.ls1 = LayerScale(width) if config.layer_scale else nn.Identity()
        self.norm2 = nn.LayerNorm(width, config.eps)
        self.mlp = Mlp(width, config.quick_gelu)
        self.ls2 = LayerScale(width) if config.layer_scale else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, C] to [B, N, C]."""
        return self._mix(x + self.ls1(self.attn(self.norm1(x))))

    def first(self, x: Tensor) -> Tensor:
        """[B, N, C] to the first token [B, 1, C] of what `forward` gives, at a fifth of the work."""
        return self._mix(x[:, :1] + self.ls1(self.attn.first(self.norm1(x))))

    def _mix(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.ls2(self.mlp(self.norm2(x)))
        return out


class PatchEmbed(nn.Module):
    """Linear map of square patches."""

    def __init__(self, config: VitConfig) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, config.width, config.patch, config.patch, bias=config.patch_bias)

    def forward(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] to [B, C, H // patch, W // patch]; a rest at the right and bottom is not seen."""
        out: Tensor = self.proj(images)
        return out


class VisionTransformer(nn.Module):
    """Image to feature vector."""

    def __init__(self, config: VitConfig) -> None:
        super().__init__()
        self.config = config
        width = config.width
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + config.grid**2, width))
        if config.mask_token:
            self.mask_token = nn.Parameter(torch.zeros(1, width))
        self.patch_embed = PatchEmbed(config)
        self.pos_drop = nn.LayerNorm(width, config.eps) if config.pre_norm else nn.Identity()
        self.blocks = nn.Sequential(*(Block(config) for _ in range(config.depth)))
        self.norm = nn.LayerNorm(width, config.eps)
        if config.projection:
            self.proj = nn.Parameter(torch.zeros(width, config.projection))

    def forward(self, images: Tensor) -> Tensor:
        """Normalised images [B, 3, H, W] to features [B, width or projection], not L2-normalised."""
        last: Any = self.blocks[-1]
        return self.read_out(last.first(self.blocks[:-1](self.embed(images))))

    def embed(self, images: Tensor) -> Tensor:
        """Tokens [B, 1 + patches, width], the CLS token first, as they enter the blocks."""
        patches = self.patch_embed(images)
        tokens = patches.flatten(2).transpose(1, 2)
        tokens = torch.cat([self.cls_token.expand(len(tokens), -1, -1), tokens], dim=1)
        positioned: Tensor = self.pos_drop(tokens + self._positions(*patches.shape[2:]))
        return positioned

    def read_out(self, tokens: Tensor) -> Tensor:
        """Features [B, width or projection] of the first of the tokens [B, N, width] behind the last block."""
        cls: Tensor = tokens[:, 0]
        if self.config.readout == "block":
            return cls
        cls = self.norm(cls)
        return cls @ self.proj if self.config.projection else cls

    def _positions(self, rows: int, columns: int) -> Tensor:
        """Position embeddings for a patch grid, stretched bicubically from the trained square."""
        side = self.config.grid
        if rows == columns == side:
            return self.pos_embed
        square = self.pos_embed[:, 1:].unflatten(1, (side, side)).permute(0, 3, 1, 2)
        scale = ((rows + GRID_OFFSET) / math.sqrt(side**2), (columns + GRID_OFFSET) / math.sqrt(side**2))
        grid = F.interpolate(square.float(), scale_factor=scale, mode="bicubic", recompute_scale_factor=False)
        if grid.shape[2:] != (rows, columns):
            raise ValueError(f"position embeddings of {list(grid.shape[2:])} patches, expected {[rows, columns]}")
        return torch.cat([self.pos_embed[:, :1], grid.flatten(2).transpose(1, 2)], dim=1)


_CLIP_TOP = {
    "cls_token": "class_embedding",
    "pos_embed": "positional_embedding",
    "patch_embed.proj.weight": "conv1.weight",
    "pos_drop.weight": "ln_pre.weight",
    "pos_drop.bias": "ln_pre.bias",
    "norm.weight": "ln_post.weight",
    "norm.bias": "ln_post.bias",
    "proj": "proj",
}
_CLIP_BLOCK = {
    "norm1": "ln_1",
    "norm2": "ln_2",
    "attn.qkv.weight": "attn.in_proj_weight",
    "attn.qkv.bias": "attn.in_proj_bias",
    "attn.proj": "attn.out_proj",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}


def clip_name(name: str) -> str:
    """OpenAI CLIP's name of a parameter of `VisionTransformer`."""
    if name in _CLIP_TOP:
        return f"visual.{_CLIP_TOP[name]}"
    _, block, rest = name.split(".", 2)
    ours = next(known for known in _CLIP_BLOCK if rest.startswith(known))
    return f"visual.transformer.resblocks.{block}.{_CLIP_BLOCK[ours]}{rest.removeprefix(ours)}"
