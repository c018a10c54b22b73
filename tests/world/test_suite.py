"""Suite world on mp4 files of rendered rides."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from lrag_ray.errors import ConfigError
from lrag_ray.scoring.scores import Scores
from lrag_ray.scoring.suite import UnscorableError
from lrag_ray.scoring.video_rows import ScoreTarget
from lrag_ray.scoring.world.measures import measures, things_back
from lrag_ray.scoring.world.suite import WORLD
from lrag_ray.store.address import Storage
from lrag_ray.video.mp4 import Mp4Writer, frames_at
from lrag_ray.world.reading import read_frames
from lrag_ray.world.scenes import (
    FRAMES_PER_LATENT,
    HELD_OUT,
    SLOT,
    SLOTS,
    STEP,
    TURN,
    Pixels,
    Scene,
    make_scene,
    setting_of,
    thing_picture,
)

FIRST = make_scene("suite", 1, among=HELD_OUT)
OTHER = Scene(FIRST.setting, tuple((thing + 5) % 24 for thing in FIRST.things))
TURN_FRAMES = TURN * FRAMES_PER_LATENT


def two_turns(first: Scene, second: Scene) -> Pixels:
    """A video whose second turn is that of another scene."""
    return np.concatenate([first.video(2 * TURN)[:TURN_FRAMES], second.video(2 * TURN)[TURN_FRAMES:]])


def per_latent_frame(video: Pixels) -> Pixels:
    return video[::FRAMES_PER_LATENT]


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return Storage(str(tmp_path))


def scored(storage: Storage, video: Pixels, latent_frames: int = 2 * TURN) -> ScoreTarget:
    """The target of a video that was encoded as runs encode it."""
    path = Path(storage.root) / "video.mp4"
    with Mp4Writer(path) as writer:
        writer.write(video)
    return ScoreTarget(
        rollout_path="rollouts/tiny/rag/00000-ab-0",
        backbone="tiny",
        method="rag",
        prompt_id="00000-ab",
        sample=0,
        latent_frames=latent_frames,
        video_path="video.mp4",
        video_sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
        video_frames=len(video),
        fps=16,
        prompt=FIRST.setting.prompt,
    )


def test_a_repeated_turn_keeps_its_things_and_other_things_do_not(storage: Storage) -> None:
    """Given a second turn whose first three things are those of the first, they alone are right, in this order."""
    worker = WORLD.worker(storage, storage, threads=1, device="cpu")
    begin = FIRST.setting.pose * FRAMES_PER_LATENT * STEP // SLOT
    kept = {(begin + i) % SLOTS for i in range(3)}
    things = tuple(a if slot in kept else b for slot, (a, b) in enumerate(zip(FIRST.things, OTHER.things, strict=True)))
    video = Path(storage.root) / "video.mp4"

    same = worker.row(scored(storage, two_turns(FIRST, FIRST)))
    target = scored(storage, two_turns(FIRST, Scene(FIRST.setting, things)))
    other = worker.row(target)
    pictures = list(frames_at(video, WORLD.marked_frames(target.video_frames)))
    marks = WORLD.frame_marks(pictures, target.prompt)

    assert same.reason is None and set(same.values) == {measure.name for measure in WORLD.measures}
    assert same.values["identity"] == 1 and same.values["psnr"] > 30
    assert same.values["pose_error"] < 0.05 and same.values["sky_drift"] < 0.02
    assert other.values["identity"] == 3 / 24 and other.values["psnr"] < same.values["psnr"] - 10
    assert [mark.right for mark in marks["turn 1"]] == [None] * 24
    assert [mark.right for mark in marks["turn 2"]] == [True] * 3 + [False] * 21
    for row, shown in (("turn 1", FIRST.things), ("turn 2", things)):
        for slot, mark in enumerate(marks[row]):
            _, colour = thing_picture(shown[(begin + slot) % SLOTS])
            assert mark.seen is not None and tuple(mark.seen[40, 22]) == (*colour, 255)
    assert WORLD.frame_marks(pictures, "a cat") == {}
    assert not WORLD.marked_frames(target.video_frames - FRAMES_PER_LATENT)


def test_a_table_is_said_in_words() -> None:
    said = WORLD.in_words({"base": {"identity": 0.09}, "rag": {"identity": 0.385}, "mine": {}})
    assert said.endswith("in the same place: rag 38% and base 9%; chance is 4%") and WORLD.in_words({}) == ""


def test_a_wrong_speed_is_a_pose_error() -> None:
    slow = np.stack([FIRST.frame(FIRST.setting.pose + 0.9 * i) for i in range(2 * TURN)])
    # In turn 2 the ride is behind by a tenth of 48 to 95 latent frames, read in steps of a pixel.
    assert measures(slow, FIRST.setting)["pose_error"] == pytest.approx(7.15, abs=0.02)


def test_a_ride_that_stands_still_brings_nothing_back() -> None:
    turn = per_latent_frame(two_turns(FIRST, FIRST))[:TURN]
    values = measures(np.concatenate([turn, np.repeat(turn[-1:], TURN, axis=0)]), FIRST.setting)
    assert values["identity"] < 0.15 and values["pose_error"] > 10


def test_random_things_agree_by_chance_only() -> None:
    shares = []
    for key in range(4):
        pair = (make_scene("chance", key, i, among=[FIRST.setting]) for i in range(2))
        shares.append(measures(per_latent_frame(two_turns(*pair)), FIRST.setting)["identity"])
    assert 0 < np.mean(shares) < 0.12


def test_unclear_things_are_wrong_and_a_wrong_sky_drifts() -> None:
    video = per_latent_frame(two_turns(FIRST, FIRST)).copy()
    video[:, 36:96] = 128
    video[TURN:, :24] = 0
    values = measures(video, FIRST.setting)
    assert values["identity"] == 0 and values["sky_drift"] > 0.1
    assert things_back(read_frames(video), 2) == [None] * SLOTS, "there is nothing to compare with"


def test_later_turns_have_columns_of_their_own() -> None:
    three = np.concatenate(
        [per_latent_frame(two_turns(FIRST, FIRST)), per_latent_frame(two_turns(FIRST, OTHER))[TURN:]]
    )
    values = measures(three, FIRST.setting)
    assert (values["identity"], values["identity_turn_3"]) == (1, 0)
    assert "identity_turn_4" not in values and set(values) <= {m.name for m in (*WORLD.measures, *WORLD.unranked)}


def test_what_cannot_be_scored_says_why(storage: Storage) -> None:
    score = WORLD.worker(storage, storage, threads=1, device="cpu")
    target = scored(storage, FIRST.video(12), latent_frames=12)
    assert score.row(target).reason == "video.mp4: 12 latent frames are less than two turns, which are 96"
    with pytest.raises(UnscorableError, match="'a cat' is not a prompt of the tiny world"):
        score.score(replace(target, prompt="a cat"), lambda: True)
    assert WORLD.plan_notes(1, 1, [12, 24], 1) == [
        "durations_s: 12 s is less than two turns, so suite world cannot score it; 24 s or more can be scored"
    ]


def test_prompts_of_another_world_are_refused() -> None:
    WORLD.check_prompts({"p.txt:1": FIRST.setting.prompt})
    with pytest.raises(
        ConfigError, match=r"p\.txt:2: 'a cat' is not a prompt of the tiny world.*Write it like 'A ride"
    ):
        WORLD.check_prompts({"p.txt:1": FIRST.setting.prompt, "p.txt:2": "a cat"})


def test_the_prompts_that_come_along_are_held_out() -> None:
    path = Path(__file__).parents[2] / "configs/prompts/tiny_world.txt"
    found = [setting_of(line) for line in path.read_text().splitlines()]
    assert len(set(found)) == 8 and set(found) <= set(HELD_OUT)
    words = [{getattr(each, name) for each in found} for name in ("sky", "ground", "start")]
    assert [len(each) for each in words] == [6, 6, 8]


def test_the_page_says_what_was_trained() -> None:
    banner = WORLD.banner(Scores())
    assert "was trained with retrieved frames" in banner.text and "does not replicate" in banner.text


def test_each_turn_is_a_row_of_frames_that_make_up_the_ring() -> None:
    video = FIRST.video(2 * TURN)
    rows = WORLD.frame_rows(len(video))
    assert [row.label for row in rows] == ["turn 1", "turn 2"]
    begin = FIRST.setting.pose * FRAMES_PER_LATENT * STEP
    for row in rows:
        flat = np.concatenate([video[index] for index in row.indices], axis=1)
        assert (flat == np.roll(FIRST.ring, -begin, axis=1)).all()
    assert WORLD.frame_rows(len(FIRST.video(TURN - 1))) == []
    assert len(WORLD.frame_rows(len(FIRST.video(TURN)))) == 1
    assert len(WORLD.frame_rows(10 * len(video))) == 5
