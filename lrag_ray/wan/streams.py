"""Streams beside the compute stream, one per device and purpose for the whole process.

torch's allocator keeps memory by stream: with new streams for every rollout, what one leaves behind is of no use to the
next, and a device fills up.
"""

from __future__ import annotations

from functools import cache
from typing import Literal

import torch

Purpose = Literal["to host", "to device", "decode"]
"""Copies, of which each direction has a stream, so that both are busy at once; and decoding beside generation."""


def side_stream(device: torch.device, purpose: Purpose) -> torch.cuda.Stream:
    """The stream of a CUDA device for this purpose."""
    index = device.index if device.index is not None else torch.cuda.current_device()
    return _stream(index, purpose)


@cache
def _stream(device_index: int, purpose: Purpose) -> torch.cuda.Stream:
    return torch.cuda.Stream(torch.device("cuda", device_index))
