from __future__ import annotations

from lrag_ray.engine.attempts import AttemptLedger
from lrag_ray.engine.failures import Cause

DEATH = Cause("death", False, "the worker was lost", "")


def test_a_death_in_company_counts_like_any_other_and_is_barren_without_progress() -> None:
    ledger = AttemptLedger("rollouts", max_attempts=3)
    for key in ("kept", "barren"):
        ledger.start(key, progress=0)
    kept = ledger.failed("kept", "kept", "a", DEATH, 1, others=["barren"])
    barren = ledger.failed("barren", "barren", "b", DEATH, 0, others=["kept"])
    assert (ledger.is_barren("kept"), ledger.is_barren("barren")) == (False, True)
    assert not kept.counted and not barren.counted
    assert barren.reason == "the worker was lost (together with kept)"
    again = [ledger.failed("barren", "barren", "c", DEATH, 0, others=["kept"]) for _ in range(2)]
    assert [failure.counted for failure in again] == [False, True]
