"""Workers that hang: asked now and then how many steps they have taken, and named when the number stands still."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import ray

_QUESTIONS_PER_TIMEOUT = 5


@dataclass
class _Pulse:
    actor: Any
    moved_at: float
    asked_at: float
    steps: int | None = None
    answer: Any = None


@dataclass
class StallWatch:
    """Asks busy workers directly, because the progress board may lose what they tell it; never waits for an answer.

    A worker that cannot answer has stalled as well. The actor answers in a thread of its own (see `StageActor`).
    """

    timeout_s: float
    ask: Callable[[Any], Any] = lambda actor: actor.steps.remote()
    """Reference of the number of steps that an actor has taken; any change is a sign of life."""
    clock: Callable[[], float] = time.monotonic
    _pulses: dict[str, _Pulse] = field(default_factory=dict, init=False)
    _looked_at: float | None = field(default=None, init=False)

    def begin(self, worker: str, actor: Any) -> None:
        """The worker was given something to do."""
        now = self.clock()
        self._pulses[worker] = _Pulse(actor, now, now)

    def end(self, worker: str) -> None:
        """The worker has nothing to do, or is gone."""
        self._pulses.pop(worker, None)

    def stalled(self) -> list[str]:
        """Workers that took no step for `timeout_s`."""
        now = self.clock()
        away = now - self._looked_at if self._looked_at is not None else 0.0
        self._looked_at = now
        for pulse in self._pulses.values():
            if away > self.timeout_s / _QUESTIONS_PER_TIMEOUT:
                # The driver itself stood still (stopped, or waiting for storage) and could not hear anything.
                pulse.moved_at = min(pulse.moved_at + away, now)
            if pulse.answer is not None:
                self._listen(pulse, now)
            elif now - pulse.asked_at >= self.timeout_s / _QUESTIONS_PER_TIMEOUT:
                pulse.asked_at, pulse.answer = now, self.ask(pulse.actor)
        return [worker for worker, pulse in self._pulses.items() if now - pulse.moved_at > self.timeout_s]

    def _listen(self, pulse: _Pulse, now: float) -> None:
        if not ray.wait([pulse.answer], timeout=0)[0]:
            return
        answer, pulse.answer = pulse.answer, None
        try:
            steps = ray.get(answer)
        except ray.exceptions.RayError:
            # A dead worker shows in what it was doing.
            return
        if steps != pulse.steps:
            pulse.steps, pulse.moved_at = steps, now
