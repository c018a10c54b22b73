"""Golden rollouts as one row of two: within the tolerances that they have alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from lrag_ray.conformance import methods
from lrag_ray.conformance.files import Folder
from lrag_ray.conformance.recording import Attended, Recording, record
from lrag_ray.conformance.verify import find_cases, run_case
from tests.conftest import REPOSITORY

CASES = [
    ("methods/longlive_rag", 0),
    ("methods/deep_forcing", 1),
    ("methods2/per_head/dummy_forcing", 0),
    ("methods2/rolling_forcing", 1),
]
"""Folder, and the row that the case is put into."""


class Beside:
    """`record` with another prompt and other noise in a second row."""

    def __init__(self, row: int) -> None:
        self.row, self.calls = row, 0

    def both(self, own: Tensor, other: Tensor, dim: int = 0) -> Tensor:
        return torch.cat([other, own] if self.row else [own, other], dim)

    def __call__(
        self,
        model: Any,
        sampler: Any,
        method: str,
        settings: Any,
        text: Tensor,
        noise: Tensor,
        renoise: Tensor,
        **more: Any,
    ) -> Recording:
        look: Callable[[int, Sequence[Any]], None] = more.pop("look", lambda block, policies: None)
        self.calls += 1
        found = record(
            model,
            sampler,
            method,
            settings,
            self.both(text, text.flip(1)),
            self.both(noise, noise.flip(1)),
            self.both(renoise, renoise.flip(0), 2),
            look=lambda block, policies: look(block, policies[self.row :]),
            **more,
        )
        own = slice(self.row, self.row + 1)
        assert not torch.equal(found.latents[0], found.latents[1])
        return replace(
            found,
            policies=found.policies[own],
            latents=found.latents[own],
            flow={at: value[own] for at, value in found.flow.items()},
            x0={at: value[own] for at, value in found.x0.items()},
            attended={at: Attended(*(x[own] for x in rows)) for at, rows in found.attended.items()},
            attended_by_head={at: Attended(*(x[own] for x in rows)) for at, rows in found.attended_by_head.items()},
            query_indices=[each[own] for each in found.query_indices],
            trace=[each[own] for each in found.trace],
            state=[each[own] for each in found.state],
        )


@pytest.mark.parametrize(("folder", "row"), CASES)
def test_a_golden_rollout_keeps_its_tolerances_beside_another(
    folder: str, row: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    beside = Beside(row)
    monkeypatch.setattr(methods, "record", beside)
    cases = find_cases(Folder(REPOSITORY / "tests" / "golden" / folder))
    rows = [found for case in cases for found in run_case(folder, case)]
    assert [found for found in rows if found.status == "fail"] == []
    assert beside.calls and any(found.tensor == "latents" and found.status == "pass" for found in rows)
