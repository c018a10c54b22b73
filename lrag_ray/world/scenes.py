"""A ride around a ring: procedural scenes whose every frame is known.

A view of 128 x 128 pixels moves along a panorama that closes on itself after 48 latent frames: one column of tokens
(32 pixels) per latent frame, 8 pixels per video frame. The prompt fixes the sky, the ground and the place where the
ride begins. The 24 things along the way (3 kinds in 8 colours) are free, so that only history can hold them. The wall
behind them has eight sides, each in one colour, and the rail's hue goes around in two of them: both tell the place.

Example::

    scene = make_scene("held out", 7)
    pixels = scene.video(96)  # two turns: [381, 128, 128, 3] in uint8
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lrag_ray.wan.keyed import key_digest

TURN = 48
"""Latent frames of one turn."""
VIEW = 128
"""Height and width of a frame, in pixels."""
STEP = 8
"""Pixels that the view moves per video frame; four times as many per latent frame."""
FRAMES_PER_LATENT = 4
RING = TURN * FRAMES_PER_LATENT * STEP
"""Pixels around the ring (1536)."""
SLOT = 64
"""Pixels of the ring for each thing, which stands in the middle of them."""
SLOTS = RING // SLOT
"""Things on the ring (24)."""
RAIL_HUES = 4
"""Times that the rail's hue goes around in one turn."""

HORIZON, FOOT, RAIL = slice(24, 96), 96, slice(104, 120)
"""Rows of the picture: the wall behind the things, where the things stand, the rail."""
THING_SIZE = (44, 60)
"""Width and height of a thing."""
_OUTLINE = 3

Colour = tuple[int, int, int]
Pixels = NDArray[np.uint8]

SKIES: dict[str, Colour] = {
    "blue": (150, 195, 240),
    "grey": (175, 180, 185),
    "pink": (245, 190, 205),
    "golden": (245, 215, 140),
    "violet": (195, 170, 235),
    "dark": (50, 55, 90),
}
GROUNDS: dict[str, Colour] = {
    "grass": (95, 155, 75),
    "sand": (225, 200, 145),
    "snow": (235, 240, 245),
    "earth": (135, 95, 65),
    "slate": (95, 105, 115),
    "clay": (190, 105, 80),
}
STARTS = ("red", "orange", "lime", "green", "turquoise", "blue", "purple", "rose")
"""Sides of the ring, by the colour of the wall there; the ride begins at the beginning of one of them."""
KINDS = ("block", "ball", "tent")
COLOURS: dict[str, Colour] = {
    "red": (215, 35, 35),
    "orange": (250, 140, 20),
    "yellow": (250, 225, 30),
    "green": (30, 140, 50),
    "blue": (35, 70, 210),
    "purple": (130, 40, 160),
    "white": (250, 250, 250),
    "black": (20, 20, 20),
}
THINGS = len(KINDS) * len(COLOURS)
"""Different things (24); number k is kind k // 8 in colour k % 8."""

_SENTENCE = re.compile(
    rf"A ride around the ring under a ({'|'.join(SKIES)}) sky, over ({'|'.join(GROUNDS)}), "
    rf"from the ({'|'.join(STARTS)}) side\."
)


@dataclass(frozen=True)
class Setting:
    """What a prompt fixes."""

    sky: str
    ground: str
    start: str

    @property
    def prompt(self) -> str:
        """The sentence that says it."""
        return f"A ride around the ring under a {self.sky} sky, over {self.ground}, from the {self.start} side."

    @property
    def pose(self) -> int:
        """Place of latent frame 0, in latent frames from the red side."""
        return STARTS.index(self.start) * (TURN // len(STARTS))

    def pose_at(self, video_frame: int) -> float:
        """True place of a video frame, in latent frames [0, 48) from the red side."""
        return (self.pose + video_frame / FRAMES_PER_LATENT) % TURN


def setting_of(prompt: str) -> Setting | None:
    """What a prompt of this world fixes; None for any other text."""
    match = _SENTENCE.fullmatch(prompt.strip())
    return Setting(*match.groups()) if match else None


def settings() -> Iterator[Setting]:
    """All 288 of them, in a fixed order."""
    for sky in SKIES:
        for ground in GROUNDS:
            for start in STARTS:
                yield Setting(sky, ground, start)


def held_out(setting: Setting) -> bool:
    """Whether no training scene has this combination: an eighth of all; every word of it is trained on."""
    indices = (list(SKIES).index(setting.sky), list(GROUNDS).index(setting.ground), STARTS.index(setting.start))
    return (3 * indices[0] + 5 * indices[1] + indices[2]) % 8 == 0


TRAINED = tuple(each for each in settings() if not held_out(each))
HELD_OUT = tuple(each for each in settings() if held_out(each))


@dataclass(frozen=True)
class Scene:
    """A setting, and the things that stand along the ring."""

    setting: Setting
    things: tuple[int, ...]
    """Number of the thing in each slot (see `THINGS`)."""

    @cached_property
    def ring(self) -> Pixels:
        """The whole panorama [128, 1536, 3]; not to be changed."""
        return self.ring_before(background(self.setting))

    def ring_before(self, background: Pixels) -> Pixels:
        """The things of this scene before a panorama [128, 1536, 3]."""
        ring = background.copy()
        width, height = THING_SIZE
        for slot, thing in enumerate(self.things):
            left = slot * SLOT + (SLOT - width) // 2
            part = ring[FOOT - height : FOOT, left : left + width]
            shape, colour = thing_picture(thing)
            part[shape > 0] = np.where(shape[shape > 0][:, None] == 1, colour, _DARK)
        return ring

    def frame(self, pose: float) -> Pixels:
        """The view [128, 128, 3] at a place in latent frames; multiples of 1/32 are whole pixels."""
        return view_of(self.ring, pose)

    def video(self, latent_frames: int) -> Pixels:
        """The first 1 + 4 (F - 1) video frames of the ride, [T, 128, 128, 3]."""
        frames = 1 + FRAMES_PER_LATENT * (latent_frames - 1)
        return np.stack([self.frame(self.setting.pose_at(i)) for i in range(frames)])


_DARK: Colour = (35, 30, 40)


def view_of(ring: Pixels, pose: float) -> Pixels:
    """The view [128, 128, 3] of a panorama [128, 1536, 3] at a place in latent frames."""
    left = round(pose * FRAMES_PER_LATENT * STEP)
    return ring[:, np.arange(left, left + VIEW) % RING]


@cache
def background(setting: Setting) -> Pixels:
    """The panorama [128, 1536, 3] without its things; not to be changed."""
    turn = np.arange(RING) / RING
    ring = _background(setting, wall=np.floor(turn * len(STARTS)) / len(STARTS), rail=RAIL_HUES * turn)
    ring.setflags(write=False)
    return ring


def background_of_every_hue(setting: Setting) -> Pixels:
    """The panorama with a wall that goes through all hues, for what must know more colours than the world has."""
    turn = np.arange(RING) / RING
    return _background(setting, wall=turn, rail=RAIL_HUES * turn)


def background_astray(setting: Setting, ahead: float) -> Pixels:
    """The panorama with a rail whose hues belong `ahead` latent frames farther, and all else in place."""
    ring = background(setting).copy()
    ring[RAIL] = _rail(RAIL_HUES * (np.arange(RING) / RING + ahead / TURN))
    return ring


def _background(setting: Setting, wall: NDArray[np.float64], rail: NDArray[np.float64]) -> Pixels:
    ring = np.empty((VIEW, RING, 3), np.uint8)
    ring[: HORIZON.start] = SKIES[setting.sky]
    ring[FOOT:] = GROUNDS[setting.ground]
    ring[HORIZON] = _hue(wall, saturation=0.45, value=0.92)
    ring[RAIL] = _rail(rail)
    return ring


def _rail(turn: NDArray[np.float64]) -> NDArray[np.float64]:
    return _hue(turn % 1, saturation=0.9, value=0.85)


@cache
def thing_picture(thing: int) -> tuple[NDArray[np.int8], Colour]:
    """Shape [60, 44] of a thing (0 outside, 1 inside, 2 outline), and its colour."""
    kind, colour = KINDS[thing // len(COLOURS)], list(COLOURS.values())[thing % len(COLOURS)]
    width, height = THING_SIZE
    y, x = np.mgrid[0:height, 0:width] + 0.5
    # Distance from the edge in pixels, positive inside.
    if kind == "block":
        inside = np.minimum(np.minimum(x, width - x), np.minimum(y - 12, height - y))
    elif kind == "ball":
        inside = width / 2 - np.hypot(x - width / 2, y - (height - width / 2))
    else:
        slope = (width / 2) / height
        inside = np.minimum((y * slope - np.abs(x - width / 2)) / np.hypot(1, slope), height - y)
    shape = np.where(inside < 0, 0, np.where(inside < _OUTLINE, 2, 1)).astype(np.int8)
    return shape, colour


def _hue(turn: NDArray[np.float64], saturation: float, value: float) -> NDArray[np.float64]:
    """Colours [n, 3] in 0..255 of hues 0..1."""
    phase = (turn[:, None] * 6 + np.array([5.0, 3.0, 1.0])) % 6
    colours: NDArray[np.float64] = 255 * value * (1 - saturation * np.clip(np.minimum(phase, 4 - phase), 0, 1))
    return colours


def make_scene(*key: str | int, among: Sequence[Setting] = TRAINED) -> Scene:
    """The scene of a key: equal keys give equal scenes on every machine."""
    digest = key_digest("world", *key)
    draw: Any = np.random.Generator(np.random.Philox(key=np.frombuffer(digest[:16], np.uint64)))
    setting = among[int(draw.integers(len(among)))]
    return Scene(setting, tuple(int(thing) for thing in draw.integers(0, THINGS, SLOTS)))


def things_in_view(pose: float) -> list[tuple[int, int]]:
    """Slots whose thing is wholly in view at a place, each with the column where its slot begins in the frame."""
    left = round(pose * FRAMES_PER_LATENT * STEP)
    margin = (SLOT - THING_SIZE[0]) // 2
    found = []
    for slot in range(SLOTS):
        column = (slot * SLOT - left + SLOT) % RING - SLOT
        if -margin <= column <= VIEW - SLOT + margin:
            found.append((slot, column))
    return found
