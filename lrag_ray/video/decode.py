"""Latents to frames as a stream: memory does not grow with the video and no seam shows where pieces meet."""

from __future__ import annotations

from contextlib import nullcontext

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lrag_ray.wan.streams import side_stream
from lrag_ray.wan.vae import WanVae

Frames = npt.NDArray[np.uint8]
"""uint8 RGB frames [N, H, W, 3]."""


class StreamingDecoder:
    """Decodes one video piece by piece; the pieces together are bit-equal to a whole decode, however it is cut.

    `cold_chunk` reproduces the released decoding: after so many latent frames (60 there) the feature cache is thrown
    away, so that each chunk begins like a new video, with one frame instead of four and a visible seam.

    On a GPU, `push` decodes on a stream of its own: called in another thread, it runs beside whatever generates the
    next block, and only that thread waits for it.
    """

    def __init__(self, vae: WanVae, *, cold_chunk: int | None = None) -> None:
        if cold_chunk is not None and cold_chunk < 1:
            raise ValueError(f"cold_chunk {cold_chunk} must be at least 1 latent frame, or None for a seamless decode")
        self._vae = vae
        self._cold_chunk = cold_chunk
        self._cache = vae.new_cache()
        self.latent_frames = 0
        """Latent frames decoded so far."""
        device = next(vae.model.parameters()).device
        self._stream = side_stream(device, "decode") if device.type == "cuda" else None
        if self._stream is not None:
            # The weights may still be on their way.
            self._stream.wait_stream(torch.cuda.current_stream(device))

    def push_pixels(self, latents: Tensor) -> Tensor:
        """Decode the next latents [F, C, H, W] to pixels [N, 3, H*8, W*8] in [-1, 1]."""
        pieces = []
        for latent in latents:
            if self._cold_chunk and self.latent_frames % self._cold_chunk == 0:
                self._cache = self._vae.new_cache()
            pieces.append(self._vae.decode_frame(latent, self._cache))
            self.latent_frames += 1
        if not pieces:
            raise ValueError("no latent frames to decode")
        return torch.cat(pieces)

    def push(self, latents: Tensor) -> Frames:
        """Decode the next latents [F, C, H, W], on the host, to uint8 frames [N, H*8, W*8, 3] there.

        Raises OverflowError where float16 could not hold the values of the decoder.
        """
        with torch.cuda.stream(self._stream) if self._stream is not None else nullcontext():
            pixels = self.push_pixels(latents)
            if pixels.dtype == torch.float16 and not bool(pixels.isfinite().all()):
                raise OverflowError("vae.dtype float16 cannot hold these frames. Fix: vae.dtype: bfloat16 or float32")
            return to_uint8(pixels)


def to_uint8(pixels: Tensor) -> Frames:
    """Pixels [N, 3, H, W] in [-1, 1] as uint8 frames [N, H, W, 3], rounded to nearest."""
    levels = pixels.float().add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8)
    frames: Frames = levels.permute(0, 2, 3, 1).contiguous().cpu().numpy()
    return frames
