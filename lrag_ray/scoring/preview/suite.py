"""The preview suite as a `Suite`."""

from __future__ import annotations

import torch

from lrag_ray.scoring.flow_discontinuity import FLOW_DISCONTINUITY
from lrag_ray.scoring.per_video import PerVideoSuite, VideoScorer, frames_of
from lrag_ray.scoring.preview.measures import MEASURES, measures
from lrag_ray.scoring.scores import Scores
from lrag_ray.scoring.suite import Banner, NoSettings


class Preview(PerVideoSuite[NoSettings]):
    """Cheap measures without networks; runs on the CPU."""

    name = "preview"
    measures = MEASURES
    unranked = (FLOW_DISCONTINUITY,)

    @property
    def title(self) -> str:
        """Says what it is not."""
        return "preview suite, not VBench"

    @property
    def note(self) -> str:
        """The notation of the formulas."""
        return (
            "Y is BT.709 luma, C its chroma pair, first and last an eighth of the frames, u the optical flow. A still "
            "video has perfect smoothness and no drift: read these together with motion amount and frozen share."
        )

    def banner(self, scores: Scores) -> Banner:
        """Says what the measures are good for."""
        return Banner(
            "Preview measures, not VBench.",
            "They are cheap and need no network weights: good for smoke runs and for early signs of drift. They do not "
            "compare with published numbers.",
            strong=True,
        )

    def scorer(self, *, threads: int, device: str) -> VideoScorer:
        """One thread whatever the reservation, so that sums do not depend on it."""
        torch.set_num_threads(1)
        return lambda video, target: measures(
            frames_of(video, target.video_frames), target.fps, target.frames_per_block, target.cold_chunk
        )


PREVIEW = Preview(NoSettings())
