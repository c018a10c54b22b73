"""What passes take, on the device that runs them."""

from __future__ import annotations

import time

import torch

Mark = float | torch.cuda.Event
"""A moment: of the host's clock, or in a GPU's queue."""


class PassClock:
    """Seconds per kind of work. A GPU is not waited for: what it has not finished yet is counted later."""

    def __init__(self, device: torch.device, *kinds: str) -> None:
        self._device = device
        self._totals_s = dict.fromkeys(kinds, 0.0)
        self._running: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    def mark(self) -> Mark:
        """Now; on a GPU the moment when it has done what was launched so far."""
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def add(self, kind: str, began: Mark, ended: Mark) -> None:
        """Count what lies between two marks."""
        if isinstance(began, torch.cuda.Event):
            assert isinstance(ended, torch.cuda.Event), "marks of one clock are of one kind"
            self._running.append((kind, began, ended))
        else:
            assert isinstance(ended, float), "marks of one clock are of one kind"
            self._totals_s[kind] += ended - began

    def totals_s(self) -> dict[str, float]:
        """Seconds of everything that is finished, by kind."""
        while self._running and self._running[0][2].query():
            kind, began, ended = self._running.pop(0)
            self._totals_s[kind] += began.elapsed_time(ended) / 1000
        return dict(self._totals_s)
