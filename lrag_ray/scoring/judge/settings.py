"""Settings of the judge suite: the keys below ``scoring.settings``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from lrag_ray.config.chat import ChatSection


@dataclass(frozen=True)
class JudgeSettings:
    """Who judges, what is asked, and about which videos."""

    chat: ChatSection | None = None
    """The model and how it is asked. Needed to score; stored answers are read without it."""
    questions: Annotated[tuple[str, ...], Field(min_length=1)] = ("exposure",)
    """Question sets: exposure, identity, text_alignment, artefacts, preference (a comparison), or YAML files."""
    votes: Annotated[int, Field(ge=1, le=100)] = 1
    """Answers per question and video; of a comparison per order. More than one needs a temperature above 0."""
    parse_retries: Annotated[int, Field(ge=0, le=20)] = 2
    """How often a vote is asked again, with the reason, after an answer without a score."""
    cases: Annotated[int | None, Field(ge=1)] = 20
    """Prompts and samples that are judged in every cell, drawn at random, the same for all methods; null: all."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Of the draw."""
    duration_s: Annotated[float | None, Field(gt=0)] = None
    """Only videos of this duration (the paper: 30); null: every duration."""
    media: Literal["auto", "frames", "video"] = "auto"
    """What the model gets: pictures, or the whole video as a file; auto: the video with backend gemini, else frames."""
    fps: Annotated[float, Field(gt=0, le=60)] = 1.0
    """Frames per second that the model sees."""
    max_frames: Annotated[int, Field(ge=1, le=2000)] = 32
    """Most pictures of a video; a longer one gets as many, evenly spread over its length."""
    max_side: Annotated[int, Field(ge=16, le=4096)] = 768
    """Longest side of pictures and videos in pixels; larger ones are made smaller."""
    ranks: bool = False
    """Rank methods by the judge's answers."""

    @property
    def whole_video(self) -> bool:
        """Whether the model gets a file."""
        if self.media == "auto":
            return self.chat is not None and self.chat.backend == "gemini"
        return self.media == "video"
