"""Decoded frames in RGB as decord gives them: it converts with a swscale of 2018, and later versions differ.

- A picture row's chroma comes from one or two chroma rows, which the old version does not weigh: where bilinear
  interpolation gives the second row less than half, it takes the first alone, else the plain mean of both. This holds
  for 4:2:0 of more than 8 bits a colour or of odd height; other 8-bit pictures take another way, equal in all versions.
  Later versions do the same with chroma that is on every second picture row, so rows are arranged to lie so.
- Interlaced frames are converted as whole pictures, not each field by itself.
- Where the file says that its chroma is has no influence.
- A picture that the file says to turn is turned before it is converted, which shows in 4:2:0 of odd sizes and in 4:2:2,
  whose chroma is spread to 4:4:4 before that.
"""

from __future__ import annotations

import re
from fractions import Fraction
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lrag_ray.scoring.vbench_long.clips import Frame

_HALF_HEIGHT = re.compile(r"yuv[ja]?420p(?:\d+le)?")
_HALF_WIDTH = re.compile(r"yuv[ja]?422p(?:\d+le)?")
_PLANES = re.compile(r"yuv[ja]?4(?:20|44)p(?:\d+le)?")
_ONE = 1 << 17
"""Distance of two chroma rows in swscale's fixed point."""
_HALF = 2047.5 / 4096
"""Weights are rounded to 4096ths."""
_NEGLIGIBLE = 0.002
"""Weights that are left out."""
_TAGS = ("colorspace", "color_range", "color_primaries", "color_trc")


class OldScaler:
    """Converter of the frames of one video."""

    def __init__(self) -> None:
        self._graphs: dict[tuple[Any, ...], Any] = {}

    def rgb(self, frame: Any, turns: int = 0) -> Frame:
        """uint8 [H, W, 3] of a frame of PyAV, after `turns` quarter turns against the clock."""
        if turns and _HALF_WIDTH.fullmatch(frame.format.name):
            deep = frame.format.components[0].bits > 8
            spread = "yuv444p12le" if deep else frame.format.name.replace("422", "444")
            frame = self._filtered(frame, "flags=bilinear", spread)
        if turns and _PLANES.fullmatch(frame.format.name):
            frame, turns = _turned(frame, turns), 0
        return np.ascontiguousarray(np.rot90(self._converted(frame), turns))

    def _converted(self, frame: Any) -> Frame:
        bits = frame.format.components[0].bits
        unusual = bits > 8 or frame.height % 2
        if unusual and _HALF_HEIGHT.fullmatch(frame.format.name):
            return self._by_arranged_rows(frame, bits)
        if (unusual and not frame.format.is_rgb) or frame.interlaced_frame:
            # Unlike PyAV's own conversion, a filter does not ask where the file says that its chroma is.
            rgb: Frame = self._filtered(frame, "flags=bilinear", "rgb24").to_ndarray()
            return rgb
        picture: Frame = frame.to_ndarray(format="rgb24")
        return picture

    def _by_arranged_rows(self, frame: Any, bits: int) -> Frame:
        arranged = _arrangement(frame.height)
        # With 8 bits, later versions take the other way for the even height that is made here.
        tall = _empty(frame, frame.width, len(arranged.chroma) * 2, f"yuv420p{max(bits, 9)}le")
        shift = bits == 8
        for index, target in enumerate(tall.planes):
            rows = _samples(frame.planes[index], bits).astype(np.uint16) << shift
            if index:
                _samples(target, 16)[:] = rows[arranged.chroma]
            else:
                _samples(target, 16)[arranged.rows] = rows
        picture = self._filtered(tall, "flags=bilinear:in_h_chr_pos=128:in_v_chr_pos=256", "rgb24").to_ndarray()
        rgb: Frame = picture[arranged.rows]
        return rgb

    def _filtered(self, frame: Any, scale: str, pixels: str) -> Any:
        import av

        key = (frame.width, frame.height, frame.format.name, frame.colorspace, frame.color_range, pixels)
        if key not in self._graphs:
            graph: Any = av.filter.Graph()
            source = graph.add_buffer(None, *key[:3], time_base=Fraction(1, 1))
            steps = [graph.add("scale", scale), graph.add("format", f"pix_fmts={pixels}"), graph.add("buffersink")]
            graph.link_nodes(source, *steps).configure()
            self._graphs[key] = graph
        self._graphs[key].vpush(frame)
        return self._graphs[key].vpull()


class _Arrangement(NamedTuple):
    """A picture in which a row 2k + 1 has chroma row k, and a row 2k the mean of k - 1 and k."""

    chroma: NDArray[np.int64]
    """Its chroma rows, by their number in the frame."""
    rows: NDArray[np.int64]
    """Where the frame's picture rows are."""


@lru_cache(maxsize=16)
def _arrangement(height: int) -> _Arrangement:
    """Of the rows of a frame in 4:2:0, so that each has the chroma that the old version gives it."""
    chroma: list[int] = []
    rows: list[int] = []
    for first, mixed in _old_chroma_rows(height):
        wanted = [first, first + 1] if mixed else [first]
        for have in range(len(wanted), -1, -1):
            if chroma[len(chroma) - have :] == wanted[:have]:
                missing = wanted[have:]
                row = 2 * (len(chroma) + len(missing) - 1) + (not mixed)
                if not rows or row > rows[-1]:
                    break
        else:
            missing = wanted
            row = 2 * (len(chroma) + len(missing) - 1) + (not mixed)
        chroma += missing
        rows.append(row)
    return _Arrangement(np.array(chroma), np.array(rows))


def _old_chroma_rows(height: int) -> list[tuple[int, bool]]:
    """Of every picture row: its first chroma row, and whether the next one is mixed in."""
    count = (height + 1) // 2
    step = ((count << 16) + (height >> 1)) // height
    found = []
    for row in range(height):
        first, rest = divmod(step * (2 * row + 1) - (1 << 16), _ONE)
        weight = rest / _ONE
        if weight >= 1 - _NEGLIGIBLE:
            first, weight = first + 1, 0.0
        if first >= count - 1:
            # Over the lower edge the filter moves up and keeps its length.
            found.append((max(count - 2, 0), count > 1))
        else:
            found.append((max(first, 0), weight >= _HALF and first >= 0))
    return found


def _turned(frame: Any, turns: int) -> Any:
    """A frame in 4:2:0 or 4:4:4 after quarter turns against the clock, without its alpha."""
    width, height = (frame.height, frame.width) if turns % 2 else (frame.width, frame.height)
    turned = _empty(frame, width, height, frame.format.name.replace("yuva", "yuv"))
    bits = frame.format.components[0].bits
    for source, target in zip(frame.planes, turned.planes, strict=False):
        _samples(target, bits)[:] = np.rot90(_samples(source, bits), turns)
    return turned


def _empty(frame: Any, width: int, height: int, pixels: str) -> Any:
    """A frame with the colour tags of another."""
    import av

    empty: Any = av.VideoFrame(width, height, pixels)
    for name in _TAGS:
        setattr(empty, name, getattr(frame, name))
    return empty


def _samples(plane: Any, bits: int) -> NDArray[Any]:
    """A view [H, W] of a plane."""
    return _lines(plane).view(np.uint16 if bits > 8 else np.uint8)[:, : plane.width]


def _lines(plane: Any) -> NDArray[np.uint8]:
    """A view [H, bytes] of a plane, padding included."""
    return np.frombuffer(plane, np.uint8).reshape(plane.height, -1)
