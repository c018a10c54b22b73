"""The world is what its documentation says."""

from __future__ import annotations

import numpy as np
import pytest

from lrag_ray.world.code import LinearCode, fit_code
from lrag_ray.world.scenes import (
    HELD_OUT,
    SLOT,
    THINGS,
    TRAINED,
    TURN,
    VIEW,
    Scene,
    make_scene,
    setting_of,
    settings,
    thing_picture,
    things_in_view,
)


@pytest.fixture(scope="module")
def code() -> LinearCode:
    return fit_code(0, scenes=4)


def test_a_prompt_says_its_setting() -> None:
    every = list(settings())
    assert len({each.prompt for each in every}) == len(every) == 288
    assert all(setting_of(each.prompt) == each for each in every)
    assert setting_of("A cat on a sofa.") is None


def test_every_word_of_a_held_out_setting_is_trained_on() -> None:
    assert len(HELD_OUT) == 36 and not set(HELD_OUT) & set(TRAINED)
    for name in ("sky", "ground", "start"):
        assert {getattr(each, name) for each in HELD_OUT} == {getattr(each, name) for each in TRAINED}


def test_one_turn_later_the_view_is_the_same_and_half_a_turn_later_another() -> None:
    scene = make_scene("test", 1)
    video = scene.video(TURN + 2)
    assert video.shape == (1 + 4 * (TURN + 1), VIEW, VIEW, 3)
    np.testing.assert_array_equal(video[0], video[4 * TURN])
    assert (video[0] != video[2 * TURN]).any()
    np.testing.assert_array_equal(video[0][:, 8:], video[1][:, :-8])


def test_things_stand_where_they_are_said_to(code: LinearCode) -> None:
    scene = make_scene("test", 2)
    for pose in range(TURN):
        for slot, column in things_in_view(pose):
            other = list(scene.things)
            other[slot] = (other[slot] + 1) % THINGS
            changed = (
                (Scene(scene.setting, tuple(other)).frame(pose) != scene.frame(pose)).any(axis=(0, 2)).nonzero()[0]
            )
            assert column <= changed.min() and changed.max() < column + SLOT


def test_no_two_things_look_alike() -> None:
    pictures = {(thing_picture(thing)[0].tobytes(), thing_picture(thing)[1]) for thing in range(THINGS)}
    assert len(pictures) == THINGS


def test_equal_keys_give_equal_scenes() -> None:
    assert make_scene("test", 3) == make_scene("test", 3) != make_scene("test", 4)


def test_latents_of_a_place_are_those_of_the_next_turn_and_move_by_two_cells(code: LinearCode) -> None:
    latents = code.of_scene(make_scene("test", 5), [0, 1, TURN])
    assert latents.shape == (3, 16, 8, 8)
    assert (latents[0] == latents[2]).all()
    assert (latents[0][:, :, 2:] == latents[1][:, :, :-2]).all()
    assert abs(float(latents.std()) - 1) < 0.5
