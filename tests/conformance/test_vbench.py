"""`lrag-ray verify` on VBench-Long vectors, in the dimension with the smallest network."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from lrag_ray.conformance import vbench, vbench_compat, vbench_parts
from lrag_ray.conformance.case import CaseResult, Sheet
from lrag_ray.conformance.files import Folder
from lrag_ray.conformance.verify import failed, run_case, verify_path
from lrag_ray.scoring.vbench_long.aggregate import aggregate
from tests.scoring.vbench_long.test_aggregate import row

DIMENSION = "motion_smoothness"


@pytest.fixture
def one_dimension(golden: Path, tmp_path: Path) -> Path:
    """The motion scores of one video, official frames and frames cut in memory."""
    place = tmp_path / "vbench"
    place.mkdir()
    for folder, pattern in (("clips", "slowpan_*.mp4"), ("videos", "slowpan.mp4")):
        (place / folder).mkdir()
        for file in (golden / "vbench" / folder).glob(pattern):
            shutil.copy(file, place / folder)
    for name in ("golden", "golden_inmemory"):
        content = json.loads((golden / "vbench" / f"{name}.json").read_text(encoding="utf-8"))
        content["clips"] = {clip: about for clip, about in content["clips"].items() if about["video"] == "slowpan"}
        own = content["dimensions"][DIMENSION]
        own["per_clip"] = {clip: own["per_clip"][clip] for clip in content["clips"]}
        own["global"] = sum(clip["score"] for clip in own["per_clip"].values()) / len(own["per_clip"])
        own["per_video_mean_of_clips_DERIVED"] = {"slowpan": own["global"]}
        content["dimensions"] = {DIMENSION: own}
        _write(place / f"{name}.json", content)
    return place


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content), encoding="utf-8")


def _rows(folder: Path, case: str) -> dict[str, CaseResult]:
    """What one case says, without the others: each opens videos and runs a network."""
    (chosen,) = [each for each in vbench.cases(Folder(folder)) if each.name == f"{case} {DIMENSION}"]
    return {row.tensor: row for row in run_case("", chosen)}


def test_every_dimension_of_every_record_is_a_case(golden: Path) -> None:
    names = {case.name for case in vbench.cases(Folder(golden / "vbench"))}
    assert {f"{record} {DIMENSION}" for record in ("golden", "golden_inmemory")} <= names
    parts = {"golden split", "golden_inmemory split", "features", "features_inmemory", "constants", "weights_check"}
    assert parts <= names
    compat = {"golden compat", "golden_semantic_hardcut compat"}
    assert compat <= names
    assert len(names) == 18 + len(parts) + len(compat) + 1


def test_below_the_given_folder_they_are_skipped_with_the_reason(one_dimension: Path) -> None:
    rows = verify_path(one_dimension.parent)
    assert {row.status for row in rows} == {"skip"}
    assert all(f"verify {one_dimension} by itself" in row.reason for row in rows)


def test_official_scores_pass_and_a_wrong_one_fails(one_dimension: Path) -> None:
    for case in ("golden", "golden_inmemory"):
        rows = _rows(one_dimension, case)
        assert {row.status for row in rows.values()} == {"pass"}
        assert set(rows) == {"clips (3)", "global (1)", "video means (1)"}

    path = one_dimension / "golden_inmemory.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    content["dimensions"][DIMENSION]["per_clip"]["slowpan_001"]["score"] += 1e-4
    _write(path, content)
    wrong = _rows(one_dimension, "golden_inmemory")["clips (3)"]
    assert (wrong.status, wrong.reason) == ("fail", "worst: slowpan_001")


def test_clips_are_re_encoded_as_the_official_splitter_does_it(
    one_dimension: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (case,) = vbench_compat.cases(Folder(one_dimension))
    assert case.name == "golden compat"
    rows = {row.tensor: row for row in run_case("", case)}
    assert {name: row.status for name, row in rows.items()} == {"frames (3)": "pass", f"{DIMENSION} (1)": "pass"}

    # The clips as they were decoded, never through the encoder.
    monkeypatch.setattr(vbench_compat, "reencode", lambda frames, fps: list(frames))
    rows = {row.tensor: row for row in run_case("", case)}
    assert rows["frames (3)"].status == "fail"


def test_missing_clips_are_told(one_dimension: Path) -> None:
    (one_dimension / "clips" / "slowpan_002.mp4").unlink()
    assert _rows(one_dimension, "golden")["clips"].status == "skip"
    (one_dimension / "videos" / "slowpan.mp4").write_bytes(b"")
    assert failed(verify_path(one_dimension))


def test_the_split_and_the_tables_pass_and_wrong_ones_fail(golden: Path, one_dimension: Path) -> None:
    shutil.copy(golden / "vbench" / "constants.json", one_dimension)
    folder = Folder(one_dimension)
    cases = {case.name: case for case in vbench_parts.cases(folder)}
    assert set(cases) == {"golden split", "golden_inmemory split", "constants"}
    assert {row.status for case in cases.values() for row in run_case("", case)} == {"pass"}

    record = folder.record(one_dimension / "golden.json")
    constants = folder.record(one_dimension / "constants.json")
    assert record is not None and constants is not None
    record.content["clips"]["slowpan_001"]["frames"] = 15
    constants.content["slow_fast"]["subject_consistency"]["w_inclip"] = 1.0
    rows = [row for name in ("golden split", "constants") for row in run_case("", cases[name])]
    assert [row.tensor for row in rows if row.status == "fail"] == ["slowpan clips", "subject_consistency weights"]


def test_a_clip_to_clip_score_that_the_official_code_lost_is_told_and_not_a_failure(one_dimension: Path) -> None:
    """Given a name with an underscore, the official fused scores are the in-clip ones."""
    record = Folder(one_dimension).record(one_dimension / "golden.json")
    assert record is not None
    rows = [row("slowpan", "subject_consistency", score, 16 * index) for index, score in enumerate((0.5, 0.6, 0.7))]
    rows.append(row("slowpan", "subject_consistency", 0.9, 0, 48, kind="clip_to_clip"))
    official = {
        "clip2clip_per_video": {"slowpan": 0.9},
        "per_clip": {clip: {"clip2clip": 0} for clip in record.content["clips"]},
    }
    sheet = Sheet("", "")
    looked_up = vbench._as_looked_up(rows, record, official, sheet)
    assert [clip.score for clip in aggregate(looked_up).clips] == [0.5, 0.6, 0.7]
    assert [(told.tensor, told.status) for told in sheet.rows] == [("slowpan fused", "skip")]
    assert aggregate(rows).clips[0].score > 0.7
