from __future__ import annotations

from typing import Any

import pytest
import ray

from lrag_ray.engine.stalls import StallWatch

pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("cluster")]

TIMEOUT_S = 100.0


class Scene:
    """A clock that is set, and actors whose answers are set: a number, an exception, or none that comes."""

    def __init__(self) -> None:
        self.now = 0.0
        self.answers: dict[str, Any] = {}
        self.watch = StallWatch(TIMEOUT_S, self.ask, lambda: self.now)

    def ask(self, actor: str) -> Any:
        answer = self.answers[actor]
        if answer is None:
            return ray.remote(num_cpus=1000)(lambda: 0).remote()
        return ray.put(answer)

    def pass_time(self, seconds: float) -> list[str]:
        """Looks every second, as the pool does."""
        found: list[str] = []
        for _ in range(int(seconds)):
            self.now += 1
            found = self.watch.stalled()
        return found


def test_a_worker_whose_steps_stand_still_has_stalled_and_one_that_goes_on_has_not() -> None:
    scene = Scene()
    scene.answers = {"hung": 7, "alive": 0, "mute": None}
    for name in scene.answers:
        scene.watch.begin(name, name)
    for _ in range(6):
        scene.answers["alive"] += 1
        found = scene.pass_time(25)
    assert sorted(found) == ["hung", "mute"]
    scene.watch.end("hung")
    assert scene.pass_time(1) == ["mute"]


def test_a_driver_that_stood_still_itself_blames_nobody() -> None:
    scene = Scene()
    scene.answers = {"alive": 0}
    scene.watch.begin("alive", "alive")
    assert scene.pass_time(10) == []
    scene.now += 10 * TIMEOUT_S
    scene.answers["alive"] = 9
    assert scene.pass_time(90) == []
    assert scene.pass_time(30) == ["alive"]
