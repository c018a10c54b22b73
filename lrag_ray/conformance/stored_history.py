"""Golden rollouts once more with a history that is stored less exactly: the quality gate of the storage types."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from lrag_ray.conformance.case import Bound, Sheet
from lrag_ray.conformance.recording import Recording
from lrag_ray.context.registry import policy_class
from lrag_ray.context.trace import TraceRow
from lrag_ray.retrieval.bank_types import BankType

LONG_FRAMES = 10_000
"""Latent frames after which every method that keeps a history has one."""
LATENTS: Mapping[BankType, Bound] = {
    "exact": Bound(5e-5),
    "bf16": Bound(2e-3),
    "int8": Bound(5e-3),
    "int4": Bound(5e-2),
    "int8_hadamard": Bound(5e-3),
    "int4_hadamard": Bound(5e-2),
}
"""Largest difference of a latent from a rollout with an exact history; latents have a standard deviation of about 1."""
CHANGED: Mapping[BankType, float] = {
    "exact": 0.0,
    "bf16": 0.0,
    "int8": 0.05,
    "int4": 0.1,
    "int8_hadamard": 0.05,
    "int4_hadamard": 0.1,
}
"""Largest share of retrieved frames that may be others."""


def check_stored_history(
    roll_out: Callable[[BankType], Recording], latents: Tensor, bank: BankType, sheet: Sheet
) -> None:
    """Compare a rollout whose history is stored as `bank` with golden latents and with the choices of an exact one."""
    stored, exact = roll_out(bank), roll_out("exact")
    sheet.close(f"latents, history {bank}", stored.latents, latents, LATENTS[bank])
    changed, total = changed_frames(_retrieved(stored), _retrieved(exact))
    share = changed / total if total else 0.0
    found = f"{changed} of {total} ({share:.1%})"
    sheet.add(f"changed selections, history {bank}", "pass" if share <= CHANGED[bank] else "fail", found)


def keeps_history(method: str, settings: Mapping[str, Any], frames_per_block: int, sheet: Sheet) -> bool:
    """Whether the method has a history to store; if not, the case is skipped."""
    policy = policy_class(method)
    if policy.history_frames(policy.Settings(**settings), frames_per_block, LONG_FRAMES) > 0:
        return True
    sheet.add("latents", "skip", f"{method} keeps no history with these settings")
    return False


def changed_frames(ours: list[list[int]], theirs: list[list[int]]) -> tuple[int, int]:
    """How many of their retrieved frames ours are without, and how many they are, over all blocks."""
    pairs = zip(ours, theirs, strict=True)
    return sum(len(set(b) - set(a)) for a, b in pairs), sum(map(len, theirs))


def _retrieved(recording: Recording) -> list[list[int]]:
    """Retrieved frames of every block and batch element."""
    return [retrieved(rows) for elements in recording.trace for rows in elements]


def retrieved(rows: list[TraceRow]) -> list[int]:
    """Retrieved frames of a block, best first."""
    return [row.frame for row in rows if row.kind == "retrieved"]
