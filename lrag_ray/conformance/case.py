"""What a conformance check says: rows of case, tensor, difference, tolerance and verdict."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Status = Literal["pass", "fail", "skip"]


@dataclass(frozen=True)
class CaseResult:
    """One row of `lrag-ray verify`."""

    folder: str
    """Folder of the golden vectors, relative to the verified path."""
    case: str
    """Name of the case."""
    tensor: str
    """What was compared; ``name (n)`` stands for the worst of n tensors."""
    max_abs_diff: float | None
    """Absolute difference at the value that comes closest to its tolerance; None where nothing is subtracted."""
    tolerance: float | None
    """Difference allowed at that value."""
    status: Status
    """pass, fail or skip."""
    reason: str = ""
    """Why it failed or was skipped, or what was refused."""


class GoldenCase(NamedTuple):
    """A recognised case: its name and the check that fills a sheet."""

    name: str
    check: Callable[[Sheet], None]


class Bound(NamedTuple):
    """Allowed difference of each value: absolute + relative · |golden value|."""

    absolute: float = 0.0
    relative: float = 0.0


class _Worst(NamedTuple):
    """The value of a tensor that comes closest to its bound, or exceeds it most."""

    excess: float
    difference: float
    allowed: float
    reason: str


class Sheet:
    """Collects the rows of one case."""

    def __init__(self, folder: str, case: str, rounding: float = 0.0) -> None:
        """`rounding` is added to every bound: what the device may add to that of a CPU."""
        self.folder = folder
        self.case = case
        self._rounding = rounding
        self.rows: list[CaseResult] = []

    def close(self, tensor: str, got: Tensor, golden: Tensor, bound: Bound) -> None:
        """Compare two tensors value by value."""
        self._judge(tensor, {tensor: _worst(got, golden, self._widened(bound))})

    def close_all(self, label: str, pairs: Mapping[str, tuple[Tensor, Tensor, Bound]]) -> None:
        """Compare many (ours, golden, bound) as one row that shows the worst; nothing for no pairs."""
        if pairs:
            found = {name: _worst(got, golden, self._widened(bound)) for name, (got, golden, bound) in pairs.items()}
            self._judge(f"{label} ({len(pairs)})", found)

    def same(self, tensor: str, got: object, golden: object) -> None:
        """Compare plain values (indices, lists, strings) for equality."""
        if got == golden:
            self.add(tensor, "pass")
        else:
            self.add(tensor, "fail", _first_difference(got, golden))

    def add(self, tensor: str, status: Status, reason: str = "") -> None:
        """A row without numbers."""
        self.rows.append(CaseResult(self.folder, self.case, tensor, None, None, status, reason))

    def _widened(self, bound: Bound) -> Bound:
        return bound._replace(absolute=bound.absolute + self._rounding)

    def _judge(self, label: str, worst: Mapping[str, _Worst]) -> None:
        name, found = max(worst.items(), key=lambda item: item[1].excess)
        failed = found.excess > 1
        reason = found.reason
        if failed and name != label:
            reason = f"{name}: {reason}" if reason else f"worst: {name}"
        self.rows.append(
            CaseResult(
                self.folder,
                self.case,
                label,
                None if math.isnan(found.difference) else found.difference,
                found.allowed,
                "fail" if failed else "pass",
                reason if failed else "",
            )
        )


def one_line(error: Exception) -> str:
    """An error's message for a row."""
    return " ".join(str(error).split())


def _worst(got: Tensor, golden: Tensor, bound: Bound) -> _Worst:
    if got.shape != golden.shape:
        return _Worst(math.inf, math.nan, 0.0, f"shape {list(got.shape)}, golden {list(golden.shape)}")
    if golden.numel() == 0:
        return _Worst(0.0, 0.0, bound.absolute, "")
    golden64 = golden.detach().double().flatten()
    difference = (got.detach().cpu().double().flatten() - golden64).abs()
    # Equal infinities (masked scores) differ by nothing; any other non-number is beyond every bound.
    difference = torch.where(got.detach().cpu().double().flatten() == golden64, 0.0, difference)
    if not difference.isfinite().all():
        return _Worst(math.inf, math.nan, 0.0, "a value is not a number or not finite")
    allowed = bound.absolute + bound.relative * torch.where(golden64.isfinite(), golden64.abs(), 0.0)
    excess = torch.where(difference == 0, 0.0, difference / allowed)
    # Where all agree exactly, the largest allowance is the informative one.
    at = int(excess.argmax()) if float(excess.max()) > 0 else int(allowed.argmax())
    return _Worst(float(excess[at]), float(difference[at]), float(allowed[at]), "")


def _first_difference(got: object, golden: object) -> str:
    """Where two plain values differ, as a path to the place."""
    if isinstance(got, (list, tuple)) and isinstance(golden, (list, tuple)):
        for position, (ours, theirs) in enumerate(zip(got, golden, strict=False)):
            if ours != theirs:
                return f"[{position}] {_first_difference(ours, theirs)}"
        return f"{len(got)} entries, golden {len(golden)}"
    return f"{got!r}, golden {golden!r}"
