"""Fixtures shared by all tests."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def golden() -> Path:
    """Folder of the golden vectors: $LRAG_GOLDEN, else ../shared/golden beside the checkout."""
    named = os.environ.get("LRAG_GOLDEN")
    folder = Path(named) if named else REPOSITORY.parent / "shared" / "golden"
    if not folder.is_dir():
        pytest.skip(f"no golden vectors: {folder} is not a folder (set LRAG_GOLDEN)")
    return folder
