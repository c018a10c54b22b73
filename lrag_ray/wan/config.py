"""Sizes and sampler settings of the causal Wan generator, and the numbers that follow from them."""

from __future__ import annotations

from dataclasses import dataclass

_MOST = 1_000_000
"""No size of a generator is larger; it would be a slip."""


@dataclass(frozen=True)
class WanConfig:
    """Sizes of the transformer; the defaults are Wan2.1-T2V-1.3B."""

    dim: int = 1536
    """Width of the token stream."""
    ffn_dim: int = 8960
    """Hidden width of the feed-forward layers."""
    freq_dim: int = 256
    """Width of the sinusoidal time embedding."""
    text_dim: int = 4096
    """Width of the text features."""
    text_len: int = 512
    """Rows of text features per prompt, padding included (padding is attended)."""
    in_dim: int = 16
    """Latent channels in."""
    out_dim: int = 16
    """Latent channels out."""
    num_heads: int = 12
    """Attention heads."""
    num_layers: int = 30
    """Transformer blocks."""
    patch_size: tuple[int, int, int] = (1, 2, 2)
    """Latent frames, rows and columns per token."""
    eps: float = 1e-6
    """Epsilon of every norm."""

    def __post_init__(self) -> None:
        sizes = [(name, size) for name, size in vars(self).items() if name not in ("patch_size", "eps")]
        for name, size in [*sizes, *(("patch_size", size) for size in self.patch_size)]:
            if not 1 <= size <= _MOST:
                raise ValueError(f"{name} {size} must be at least 1 and at most {_MOST}")
        if self.dim % self.num_heads:
            raise ValueError(f"dim {self.dim} is not a multiple of num_heads {self.num_heads}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} must be even for RoPE")
        if self.patch_size[0] != 1:
            raise ValueError(f"patch_size {self.patch_size}: causal rollouts need one latent frame per token")

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.dim // self.num_heads

    def token_grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of tokens in a latent frame of `height` by `width`."""
        _, ph, pw = self.patch_size
        if height % ph or width % pw:
            raise ValueError(f"latent frame {height}x{width} is not a multiple of the patch {ph}x{pw}")
        return height // ph, width // pw

    def tokens_per_frame(self, height: int, width: int) -> int:
        """Tokens of a latent frame (1560 for 60x104)."""
        rows, columns = self.token_grid(height, width)
        return rows * columns

    def kv_bytes_per_frame(self, height: int, width: int, bytes_per_value: int) -> int:
        """Bytes of K and V of one latent frame over all layers (287,539,200 at full size in bf16)."""
        return self.num_layers * 2 * self.tokens_per_frame(height, width) * self.dim * bytes_per_value

    def parameter_count(self) -> int:
        """Number of parameters of the transformer."""
        d, f = self.dim, self.ffn_dim
        patch_values = self.patch_size[1] * self.patch_size[2]
        attention = 4 * (d * d + d) + 2 * d
        layer = 2 * attention + 2 * d + (d * f + f) + (f * d + d) + 6 * d
        embeddings = (
            (self.in_dim * patch_values * d + d)
            + (self.text_dim * d + d + d * d + d)
            + (self.freq_dim * d + d + d * d + d)
            + (d * 6 * d + 6 * d)
        )
        head = d * self.out_dim * patch_values + self.out_dim * patch_values + 2 * d
        return embeddings + self.num_layers * layer + head


@dataclass(frozen=True)
class SamplerConfig:
    """Few-step flow-matching sampler of the distilled causal generators."""

    denoising_steps: tuple[int, ...] = (1000, 750, 500, 250)
    """Entries of the 1000-step training schedule that are denoised at, highest first."""
    warp: bool = True
    """Replace entry d by the scheduler's timestep number 1000-d; otherwise d is the timestep itself."""
    shift: float = 5.0
    """Timestep shift of the flow-matching schedule."""
    context_timestep: float = 0.0
    """Timestep given to the network in the clean-context pass (no noise is added)."""
    frames_per_block: int = 3
    """Latent frames denoised together (n)."""
    first_block_denoising_steps: tuple[int, ...] | None = None
    """Denoising steps of the first block, where they are others; None takes `denoising_steps`."""

    def __post_init__(self) -> None:
        for name in ("denoising_steps", "first_block_denoising_steps"):
            steps = getattr(self, name)
            if steps is None:
                continue
            if not steps:
                raise ValueError(f"{name} is empty")
            if any(not 0 <= step <= 1000 for step in steps):
                raise ValueError(f"{name} {list(steps)} must be in 0..1000")
        if not 0 < self.shift <= _MOST:
            raise ValueError(f"shift {self.shift} must be above 0 and at most {_MOST}")
        if not 1 <= self.frames_per_block <= _MOST:
            raise ValueError(f"frames_per_block {self.frames_per_block} must be at least 1 and at most {_MOST}")

    def steps_of(self, block: int) -> tuple[int, ...]:
        """Denoising steps of a block."""
        if block == 0 and self.first_block_denoising_steps is not None:
            return self.first_block_denoising_steps
        return self.denoising_steps

    def passes(self, blocks: int) -> int:
        """Transformer passes of the first `blocks` blocks: the denoising passes, and a clean-context pass for each."""
        return sum(len(self.steps_of(block)) + 1 for block in range(blocks))
