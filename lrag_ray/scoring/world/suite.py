"""The suite of the tiny world as a `Suite`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lrag_ray.errors import ConfigError
from lrag_ray.printable import listed
from lrag_ray.scoring.per_video import PerVideoSuite, VideoScorer
from lrag_ray.scoring.scores import Scores
from lrag_ray.scoring.suite import Banner, FrameMark, FrameRow, NoSettings, UnscorableError
from lrag_ray.scoring.video_rows import ScoreTarget
from lrag_ray.scoring.world.measures import LAST_TURN, LATER_TURNS, MEASURES, measures, things_back, things_of
from lrag_ray.store.rollouts import RolloutRun
from lrag_ray.video.mp4 import frames_at
from lrag_ray.world.reading import ABSENT, UNCLEAR, read_frames
from lrag_ray.world.scenes import (
    FRAMES_PER_LATENT,
    HELD_OUT,
    SLOT,
    SLOTS,
    STEP,
    THINGS,
    TURN,
    VIEW,
    Pixels,
    setting_of,
    thing_picture,
)

_LEAST_S = 2 * TURN / 4
"""Two turns at 16 video frames, 4 latent frames, per second."""


class World(PerVideoSuite[NoSettings]):
    """Whether later turns around the ring show what the first one did; runs on the CPU."""

    name = "world"
    measures = MEASURES
    unranked = LATER_TURNS
    strips = 8
    strips_note = (
        "Each row is one turn around the ring, laid out flat: frames that touch, from the start of the turn to its "
        "end, at the times of turn 1. Below stands what is read in each of the 24 places: a thing of one of 3 kinds "
        "and 8 colours, or – for what is like none of them. Every video is compared with its own turn 1, which no "
        "prompt describes: ✓ says that the same kind and colour is back, ✗ that it is not. Identity is the share of ✓ "
        "of all places; one that reads – in turn 1 has no mark and counts as not back."
    )

    @property
    def title(self) -> str:
        """Says that it is a world of its own."""
        return "world suite, tiny world only"

    def banner(self, scores: Scores) -> Banner:
        """Says what the numbers do not show."""
        return Banner(
            "A tiny world, not a benchmark.",
            f"The view rides around a ring, {TURN / 4:g} s per turn, and should pass the same things in every turn. No "
            "prompt names them: they are decided in the first turn of each video, and only what a method keeps of it "
            "can bring them back. The generator of preset tiny_world was trained with retrieved frames, as rag gives "
            "them to it. The generators of the paper that rag comes from (arXiv 2606.02553) were not, so this does not "
            "replicate its result; nor was that of preset tiny_world_zero_shot, which rag does not help.",
        )

    def in_words(self, means: Mapping[str, Mapping[str, float]]) -> str:
        """How many things come back."""
        best_first = sorted(means.items(), key=lambda item: -item[1].get("identity", 0))
        shares = [f"{method} {row['identity']:.0%}" for method, row in best_first if "identity" in row]
        if not shares:
            return ""
        again = "Of the things of turn 1, turn 2 shows again in the same place"
        return f"{again}: {listed(shares)}; chance is {1 / THINGS:.0%}"

    def frame_rows(self, frames: int) -> Sequence[FrameRow]:
        """A row for every whole turn, whose frames make up the ring."""
        turn = TURN * FRAMES_PER_LATENT
        return [
            FrameRow(
                f"turn {i + 1}",
                range(i * turn, (i + 1) * turn, VIEW // STEP),
                ("", "identity", *(f"identity_turn_{later}" for later in range(3, LAST_TURN + 1)))[i],
            )
            for i in range(_turns(frames))
        ]

    def marked_frames(self, frames: int) -> Sequence[int]:
        """One per latent frame of every whole turn, where there is a later one."""
        turns = _turns(frames)
        return range(0, turns * TURN * FRAMES_PER_LATENT, FRAMES_PER_LATENT) if turns > 1 else ()

    def frame_marks(self, pictures: Sequence[Pixels], prompt: str) -> Mapping[str, Sequence[FrameMark]]:
        """The things of each turn, and which of turn 1 a later one shows again, as the measure identity counts them."""
        setting = setting_of(prompt)
        if setting is None or not pictures or pictures[0].shape != (VIEW, VIEW, 3):
            return {}
        seen = read_frames(np.stack(pictures))
        begin = setting.pose * FRAMES_PER_LATENT * STEP // SLOT
        marks = {}
        for i in range(1, len(pictures) // TURN + 1):
            right = things_back(seen, i) if i > 1 else [None] * SLOTS
            row = [FrameMark(_icon(thing), back) for thing, back in zip(things_of(seen, i), right, strict=True)]
            marks[f"turn {i}"] = [*row[begin:], *row[:begin]]
        return marks

    def plan_notes(self, backbones: int, methods: int, durations_s: Sequence[float], units: int) -> Sequence[str]:
        """Durations without a second turn."""
        return [
            f"durations_s: {each:g} s is less than two turns, so suite world cannot score it; "
            f"{_LEAST_S:g} s or more can be scored"
            for each in durations_s
            if each < _LEAST_S
        ]

    def check_prompts(self, prompts: Mapping[str, str]) -> None:
        """ConfigError for the first prompt that is not of this world."""
        for place, text in prompts.items():
            if setting_of(text) is None:
                raise ConfigError(
                    f"{place}: '{text}' is not a prompt of the tiny world, so suite world has no truth for it. Write "
                    f"it like '{HELD_OUT[0].prompt}', or choose another scoring.suite"
                )

    def pending_targets(self, run: RolloutRun) -> list[ScoreTarget]:
        """With the prompt, which says the truth."""
        targets = super().pending_targets(run)
        prompts = run.require().prompts if targets else {}
        return [replace(target, prompt=prompts[target.prompt_id].text) for target in targets]

    def scorer(self, *, threads: int, device: str) -> VideoScorer:
        """Nothing to load."""
        return _score


def _turns(frames: int) -> int:
    """Whole turns in `frames` video frames, of those that are measured."""
    return min((frames + FRAMES_PER_LATENT - 1) // (TURN * FRAMES_PER_LATENT), LAST_TURN)


def _icon(thing: int) -> NDArray[np.uint8] | None:
    """A thing [60, 44, 4] as the scenes draw it, with an outline that can be seen on light and on dark pages."""
    if thing in (ABSENT, UNCLEAR):
        return None
    shape, colour = thing_picture(thing)
    icon = np.zeros((*shape.shape, 4), np.uint8)
    icon[shape > 0] = np.where(shape[shape > 0][:, None] == 1, (*colour, 255), (128, 128, 136, 255))
    return icon


def _score(video: Path, target: ScoreTarget) -> dict[str, float]:
    setting = setting_of(target.prompt)
    if setting is None:
        raise UnscorableError(f"'{target.prompt}' is not a prompt of the tiny world")
    frames = list(frames_at(video, range(0, target.video_frames, FRAMES_PER_LATENT)))
    try:
        return measures(np.stack(frames), setting)
    except ValueError as error:
        raise UnscorableError(f"{video}: {error}") from None


WORLD = World(NoSettings())
