"""Every golden case that is there, one test each. `lrag-ray verify` runs the same checks."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from lrag_ray.conformance.case import GoldenCase
from lrag_ray.conformance.files import Folder
from lrag_ray.conformance.verify import find_cases, run_case
from tests.conftest import REPOSITORY

KINDS = ("checkpoints", "encoder", "lora", "methods", "rollout", "scheduler", "text_encoder", "vae")
"""Folders that must hold at least one case; others are searched too."""


def golden_cases() -> Iterator[tuple[str, GoldenCase]]:
    """(folder, case) of all golden vectors, or nothing where there are none."""
    root = Path(os.environ.get("LRAG_GOLDEN") or REPOSITORY.parent / "shared" / "golden")
    for kind in KINDS:
        for place, names, _ in os.walk(root / kind):
            names.sort()
            folder = Path(place).relative_to(root).as_posix()
            for case in find_cases(Folder(Path(place))):
                yield folder, case


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" in metafunc.fixturenames:
        found = list(golden_cases())
        metafunc.parametrize(
            ("folder", "case"), found or [("", None)], ids=[f"{f}/{c.name}" for f, c in found] or ["-"]
        )


def test_ours_is_the_golden_one(folder: str, case: GoldenCase | None, request: pytest.FixtureRequest) -> None:
    if case is None:
        pytest.skip(f"no golden cases in {request.getfixturevalue('golden')}")
    rows = run_case(folder, case)
    assert [row for row in rows if row.status == "fail"] == []
    if all(row.status == "skip" for row in rows):
        pytest.skip(rows[0].reason)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_recognised(golden: Path, kind: str) -> None:
    if not (golden / kind).is_dir():
        pytest.skip(f"no golden vectors of kind {kind} in {golden}")
    folders = [golden / kind, *(entry for entry in (golden / kind).iterdir() if entry.is_dir())]
    assert any(find_cases(Folder(folder)) for folder in folders)
