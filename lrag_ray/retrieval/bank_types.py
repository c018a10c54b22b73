"""Names of the storage types of the history; `retrieval.payload` has what they do."""

from __future__ import annotations

from typing import Literal, get_args

BankType = Literal["exact", "bf16", "int8", "int4", "int8_hadamard", "int4_hadamard"]
"""exact is the rollout's own precision."""
BANK_TYPES: tuple[BankType, ...] = get_args(BankType)
