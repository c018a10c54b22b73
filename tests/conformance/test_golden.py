"""Every golden case that is there, one test each: those beside the code, and the larger set where it is at hand.

`lrag-ray verify` runs the same checks.
"""

from __future__ import annotations

import filecmp
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lrag_ray.conformance.case import GoldenCase
from lrag_ray.conformance.files import Folder, case_stem
from lrag_ray.conformance.verify import find_cases, run_case
from tests.conftest import GOLDEN, REPOSITORY

KINDS = (
    *("checkpoints", "encoder", "lora", "methods", "rollout", "scheduler", "text_encoder", "vae"),
    *(f"methods2/{name}" for name in ("framewise", "memflow", "memrope", "per_head", "reward_forcing")),
    *(f"methods2/{name}" for name in ("rolling_forcing", "rolling_sink")),
)
"""Folders of the larger set that must hold at least one case; others are searched too."""
TRAVELLING = REPOSITORY / "tests" / "golden"
"""The subset that is part of the repository."""
TRAVELLING_CASES = [
    "encoder/tiny_ae",
    "methods/deep_forcing/df_equal_w12_s1_n12_r4",
    "methods/deep_forcing/df_literal_w12_s1_n16_r4",
    "methods/infinity_rope/inf_window6_sink1",
    "methods/longlive_rag/rag_latentmem_k6_avgpool",
    "methods/self_forcing/sf_window12_sink1",
    "methods2/memflow/mf_w9_s1_b3_r1",
    "methods2/memrope/mem_equal_w12_s1",
    "methods2/per_head/dummy_forcing/dummy_sf_ar1_c1_d6",
    "methods2/per_head/forcing_kv/fkv_sf_ar1",
    "methods2/reward_forcing/ema_w12_s3_a09",
    "methods2/rolling_forcing/roll_48",
    "methods2/rolling_sink/rs_w9",
    "scheduler/shift5",
]


def cases_under(root: Path, kinds: tuple[str, ...]) -> Iterator[tuple[str, GoldenCase]]:
    """(folder relative to `root`, case), or nothing where there are none."""
    for kind in kinds:
        for place, names, _ in os.walk(root / kind):
            names.sort()
            for case in find_cases(Folder(Path(place))):
                yield Path(place).relative_to(root).as_posix(), case


def is_copied(folder: str, name: str) -> bool:
    """Whether all files of a travelling case are byte by byte in the larger set, where it then runs."""
    files = [path for path in (TRAVELLING / folder).iterdir() if case_stem(path) == name]
    twins = [GOLDEN / folder / path.name for path in files]
    return bool(files) and all(
        twin.is_file() and filecmp.cmp(path, twin, False) for path, twin in zip(files, twins, strict=True)
    )


def golden_cases() -> list[tuple[str, str, GoldenCase]]:
    """(label, folder, case): the larger set, and what of the travelling one it does not repeat."""
    larger = [("shared", folder, case) for folder, case in cases_under(GOLDEN, KINDS)]
    travelling = [("travelling", folder, case) for folder, case in cases_under(TRAVELLING, KINDS)]
    return [*(found for found in travelling if not is_copied(found[1], found[2].name)), *larger]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" in metafunc.fixturenames:
        found = golden_cases()
        ids = [f"{label}/{folder}/{case.name}" for label, folder, case in found]
        metafunc.parametrize(("folder", "case"), [(folder, case) for _, folder, case in found], ids=ids)


def test_ours_is_the_golden_one(folder: str, case: GoldenCase) -> None:
    rows = run_case(folder, case)
    assert [row for row in rows if row.status == "fail"] == []
    if all(row.status == "skip" for row in rows):
        pytest.skip(rows[0].reason)


def test_the_travelling_cases_are_complete() -> None:
    """Given a clone without the larger set, every method, the scheduler and the encoder are proven."""
    assert sorted(f"{folder}/{case.name}" for folder, case in cases_under(TRAVELLING, KINDS)) == TRAVELLING_CASES
    assert sum(path.lstat().st_size for path in TRAVELLING.rglob("*")) < 3.3e6, "every clone carries them"


@pytest.mark.parametrize("path", sorted(TRAVELLING.rglob("*.safetensors")), ids=lambda path: path.stem)
def test_the_travelling_values_are_those_of_the_larger_set(golden: Path, path: Path) -> None:
    """Cut along their first axes, never changed."""
    original = load_file(golden / path.relative_to(TRAVELLING))
    for name, value in load_file(path).items():
        start = tuple(slice(0, size) for size in value.shape)
        assert torch.equal(value, original[name][start]), name


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_recognised(golden: Path, kind: str) -> None:
    if not (golden / kind).is_dir():
        pytest.skip(f"no golden vectors of kind {kind} in {golden}")
    folders = [golden / kind, *(entry for entry in (golden / kind).iterdir() if entry.is_dir())]
    assert any(find_cases(Folder(folder)) for folder in folders)
