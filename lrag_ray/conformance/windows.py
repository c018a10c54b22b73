"""Golden rollouts in rolling windows: traces and token maps are stored per window and call.

A call is the window's joint denoising call or its clean-context pass.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from lrag_ray.conformance.case import Bound, Sheet
from lrag_ray.conformance.files import Vectors
from lrag_ray.conformance.recording import Recording
from lrag_ray.conformance.token_rows import TokenRows, whole_frames
from lrag_ray.context.trace import TraceRow

TIMESTEPS = Bound(relative=1e-6)

_TOKENS = re.compile(r"ctx\.window(\d+)\.(joint|clean)\.layer(\d+)\.(origin_token|temporal_index)")


class Call(NamedTuple):
    """One call of a window, with what it attends to."""

    window: int
    clean: bool
    rows: list[TraceRow]

    @property
    def own(self) -> list[TraceRow]:
        """Rows of the frames that the call computes."""
        return [row for row in self.rows if row.kind == "current"]


def calls(recording: Recording, element: int = 0) -> Iterator[Call]:
    """The calls of a recording in the order in which they ran; none where a block has one context."""
    rows = [row for block in recording.trace for row in block[element] if row.window is not None]
    for window in sorted({row.window for row in rows if row.window is not None}):
        for clean in (False, True):
            yield Call(window, clean, [row for row in rows if (row.window, row.clean) == (window, clean)])


def check_trace(recording: Recording, golden: list[Any], sheet: Sheet) -> None:
    """Every call up to the last stored window: its frames with timesteps and indices, and what layer 0 attends to."""
    last = max(entry["window"] for entry in golden)
    names = ("window", "clean", "first_frame", "frames", "query_index", "groups")
    ours, timesteps = [], []
    for call in (call for call in calls(recording) if call.window <= last):
        groups = _token_rows(recording, call).groups()
        indices = [row.temporal_index for row in call.own]
        ours.append([call.window, call.clean, call.own[0].frame, len(call.own), indices, groups])
        timesteps += [row.timestep for row in call.own]
    for i, name in enumerate(names):
        sheet.same(f"{name} of calls", [call[i] for call in ours], [entry[name] for entry in golden])
    stated = torch.tensor([timestep for entry in golden for timestep in entry["timesteps"]])
    sheet.close("timesteps of calls", torch.tensor(timesteps), stated, TIMESTEPS)


def check_tokens(recording: Recording, golden: Vectors, sheet: Sheet) -> None:
    """Origin and temporal index of every attended row in stored calls; all layers attend to the same."""
    by_place = {(call.window, call.clean): _token_rows(recording, call) for call in calls(recording)}
    tokens = recording.policies[0].layout.tokens_per_frame
    origins, indices = {}, {}
    for name in golden.shapes:
        if match := _TOKENS.fullmatch(name):
            ours = by_place[int(match[1]), match[2] == "clean"]
            if match[4] == "temporal_index":
                indices[name] = (ours.temporal_index, golden[name], Bound())
            else:
                origins[name] = (ours.frame * tokens + ours.token, golden[name], Bound())
    sheet.close_all("origin tokens", origins)
    sheet.close_all("temporal indices", indices)


def _token_rows(recording: Recording, call: Call) -> TokenRows:
    return whole_frames(call.rows, recording.policies[0].layout.tokens_per_frame)
