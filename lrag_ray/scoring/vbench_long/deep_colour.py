"""Video of more than 8 bits a colour, and interlaced video, in RGB as decord gives it.

decord converts with a swscale of 2018, newer decoders place the chroma of such frames elsewhere: of 4:2:0 it takes a
chroma row for lying on the second of its two picture rows, and it mixes the last picture row from two chroma rows. The
difference to PyAV's own conversion is 4 to 6 grey levels on average; here nothing is left of it. Nor does decord know
of interlaced frames, whose two fields PyAV converts each by itself.
"""

from __future__ import annotations

from typing import Any

from lrag_ray.scoring.vbench_long.clips import Frame

_SECOND_ROW = 256
_BELOW = 512
"""Vertical chroma positions, in 256ths of a picture row. With chroma one row below its two, a last row is mixed from
the two last chroma rows."""


def is_deep(frame: Any) -> bool:
    """Whether a decoded frame is YUV of more than 8 bits."""
    return not frame.format.is_rgb and any(component.bits > 8 for component in frame.format.components)


class DeepColour:
    """Converter of the frames of one PyAV stream."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        pixels = stream.codec_context.format
        moved = pixels.chroma_height(2) == 1 and any(component.bits > 8 for component in pixels.components)
        positions = [_SECOND_ROW, _BELOW] if moved else [None]
        self._graphs = [self._graph(position) for position in positions]

    def rgb(self, frame: Any) -> Frame:
        """uint8 [H, W, 3]."""
        pictures: list[Frame] = []
        for graph in self._graphs:
            graph.vpush(frame)
            pictures.append(graph.vpull().to_ndarray())
        picture = pictures[0]
        picture[-1] = pictures[-1][-1]
        return picture

    def _graph(self, chroma_row: int | None) -> Any:
        import av

        graph: Any = av.filter.Graph()
        scale = "flags=bilinear"
        if chroma_row is not None:
            scale += f":in_h_chr_pos=128:in_v_chr_pos={chroma_row}"
        source = graph.add_buffer(template=self._stream)
        steps = [graph.add("scale", scale), graph.add("format", "pix_fmts=rgb24"), graph.add("buffersink")]
        graph.link_nodes(source, *steps).configure()
        return graph
