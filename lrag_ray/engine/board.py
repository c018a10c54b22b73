"""The progress board: an actor on which workers note their state, at most once a second each.

Nothing here is needed for correctness: a lost message is only a number that is shown late.
"""

from __future__ import annotations

import secrets
import time
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

WRITE_EVERY_S = 1.0
"""Shortest time between two messages of a worker."""


class ProgressBoard:
    """Latest state per worker; made into an actor by `start_board`."""

    def __init__(self) -> None:
        self._states: dict[str, Any] = {}
        self._stopping = False

    def write(self, worker: str, state: Any) -> None:
        """Replace the worker's state."""
        self._states[worker] = state

    def states(self) -> dict[str, Any]:
        """States written since the last call."""
        new, self._states = self._states, {}
        return new

    def stop(self) -> None:
        """The driver wants the workers to stop."""
        self._stopping = True

    def stopping(self) -> bool:
        """Whether it does."""
        return self._stopping


def start_board() -> Any:
    """Handle of a board: an actor that takes no CPU, lives on the driver's own node and dies with the driver.

    On another node it could be lost while the run continues.
    """
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    options = {
        "name": f"lrag-progress-{secrets.token_hex(4)}",
        "num_cpus": 0,
        "max_restarts": 0,
        "scheduling_strategy": here,
    }
    return ray.remote(ProgressBoard).options(**options).remote()


class BoardWriter:
    """A worker's side: writes at most once a second and never waits."""

    def __init__(self, board: Any, worker: str) -> None:
        self._board = board
        self._worker = worker
        self._last_s = 0.0

    def write(self, state: Any) -> None:
        """Write the state, or drop it if the last one is less than a second old."""
        now = time.monotonic()
        if now - self._last_s >= WRITE_EVERY_S:
            self._last_s = now
            self._board.write.options(num_returns=0).remote(self._worker, state)


class BoardReader:
    """The driver's side: asks at most once a second and never waits for the answer."""

    def __init__(self, board: Any) -> None:
        self._board = board
        self._last_s = 0.0
        self._asked: Any = None

    def new_states(self) -> dict[str, Any]:
        """What workers wrote since the last answer; mostly empty."""
        now = time.monotonic()
        if self._asked is None:
            if now - self._last_s >= WRITE_EVERY_S:
                self._last_s = now
                self._asked = self._board.states.remote()
            return {}
        done, _ = ray.wait([self._asked], timeout=0)
        if not done:
            return {}
        asked, self._asked = self._asked, None
        try:
            states: dict[str, Any] = ray.get(asked)
        except ray.exceptions.RayActorError:
            # The board's node is gone. The run continues unshown.
            return {}
        return states
