"""VBench-Long rows of a run, read back: what counts, for which duration, and what never does."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from zlib import crc32

import pytest

from lrag_ray.report import ReportData, collect
from lrag_ray.report.page import render_page
from lrag_ray.report.tables import comparison_note, warnings
from lrag_ray.scoring.scores import Scores
from lrag_ray.scoring.vbench_long.aggregate import aggregate
from lrag_ray.scoring.vbench_long.names import DIMENSION_NAMES, Mode
from lrag_ray.scoring.vbench_long.parquet import UNTRAINED, rollout_folder, rows_from_parquet
from lrag_ray.scoring.vbench_long.slow_fast import map_score
from lrag_ray.store.records import RolloutId
from lrag_ray.store.rollouts import RolloutRun
from tests.report.make_run import make_identity, make_run, store_rollout
from tests.report.vbench_rows import SLOW, by_rollout, row, score_run, store_frozen, store_rows, video_rows

PROMPTS = ["a red fox", "a river at dawn"]
HORIZONS = (12, 18)
"""45 and 69 video frames: two clips of 32, the second overlapping, and three."""


def falling(rollout: RolloutId, dimension: str, first_frame: int) -> float:
    """rag is better; scores fall with time."""
    return (0.9 if rollout.method == "rag" else 0.8) - first_frame / 1000


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> RolloutRun:
    return make_run(str(tmp_path_factory.mktemp("vbench") / "run"), PROMPTS, horizons=HORIZONS)


@pytest.fixture
def run(made: RolloutRun) -> RolloutRun:
    """The run without scores."""
    for path in made.storage.list_files("scores"):
        made.storage.remove(path)
    return made


def scores_of(run: RolloutRun, mode: Mode = "compat") -> Scores:
    return collect([run], "vbench_long", mode).scores


def means(data: ReportData, latent_frames: int, method: str) -> dict[str, float]:
    (block,) = [block for block in data.blocks if block.latent_frames == latent_frames]
    (found,) = [row for row in block.rows if row.method == method]
    return dict(found.means)


def test_every_duration_is_the_mean_over_its_own_clips(run: RolloutRun) -> None:
    score_run(run, falling)
    data = collect([run])
    assert (data.suite.name, data.suite.mode) == ("vbench_long", "compat")
    assert [block.latent_frames for block in data.blocks] == list(HORIZONS)
    clips = {12: [0, 13], 18: [0, 32, 37]}
    for frames, starts in clips.items():
        inside = sum(0.9 - start / 1000 for start in starts) / len(starts)
        found = means(data, frames, "rag")
        assert found.keys() == set(DIMENSION_NAMES)
        assert found["motion_smoothness"] == found["imaging_quality"] == pytest.approx(inside)
        fused = (inside + map_score("subject_consistency", SLOW)) / 2
        assert found["subject_consistency"] == pytest.approx(fused)
    assert all(row.average_rank == (1 if row.method == "rag" else 2) for row in data.blocks[0].rows)
    assert data.scores.pending == 0 and data.scores.computed and data.scores.networks == {"clip_vitb32:1a2b"}


def test_a_table_holds_the_official_global_scores(run: RolloutRun) -> None:
    """Against the aggregation that is held to the official numbers, over all rows of a method at once."""
    score_run(run, lambda rollout, name, first: 0.5 + crc32(f"{rollout.path} {name} {first}".encode()) % 997 / 2000)
    rollouts = {rollout: videos for rollout, videos in by_rollout(run).items() if rollout.method == "rag"}
    data = collect([run])
    for position, latent_frames in enumerate(HORIZONS):
        rows, durations = [], {}
        for rollout, videos in rollouts.items():
            for path in run.storage.list_files(rollout_folder("compat", rollout.path)):
                rows += rows_from_parquet(run.storage.read_bytes(path))
            durations[rows[-1].video] = videos[position].frames
        official = aggregate(rows, durations)
        assert not official.unscored
        assert means(data, latent_frames, "rag") == pytest.approx(official.mean_over_clips)


def test_curves_show_the_score_within_the_clip(run: RolloutRun) -> None:
    score_run(run, falling)
    points = [p for p in collect([run]).drift if (p.latent_frames, p.method) == (18, "base")]
    subject = [point for point in points if point.measure == "subject_consistency"]
    assert [point.start_s for point in subject] == [0, 2, 37 / 16]
    assert [point.in_clip.mean for point in subject] == pytest.approx([0.8, 0.768, 0.763])
    assert subject[0].final == pytest.approx((0.8 + map_score("subject_consistency", SLOW)) / 2)


def test_modes_never_share_a_table(run: RolloutRun) -> None:
    score_run(run, falling, "direct")
    rollout, videos = next(iter(by_rollout(run).items()))
    store_rows(run, rollout, video_rows(videos, falling, "compat"), "compat")
    assert {row.method for row in collect([run]).blocks[0].rows} == {"base", "rag"}
    compat, direct = collect([run], mode="compat"), collect([run], mode="direct")
    assert len(compat.scores.videos) == 2 and len(direct.scores.videos) == 8
    assert compat.blocks[0].prompts == 0, "one method alone is not ranked"
    assert direct.other_suites == ["vbench_long, compat mode"]


def test_rows_of_another_mode_or_another_rollout_do_not_count(run: RolloutRun) -> None:
    (first, videos), (second, others) = list(by_rollout(run).items())[:2]
    store_rows(run, first, video_rows(videos, falling, "direct"), "compat")
    store_rows(run, second, video_rows(videos, falling, "compat"), "compat")
    assert scores_of(run).videos == []
    run.storage.write(f"scores/vbench_long-compat/{second.path.removeprefix('rollouts/')}/rows-b.parquet", b"junk")
    store_rows(run, second, video_rows(others, falling, "compat"), "compat")
    assert len(scores_of(run).videos) == 2


def test_a_duration_counts_once_all_its_clips_are_there(run: RolloutRun) -> None:
    rollout, videos = next(iter(by_rollout(run).items()))
    rows = video_rows(videos, falling)
    without_last = [row for row in rows if row.first_frame != 37]
    store_rows(run, rollout, without_last)
    found = scores_of(run)
    assert [video.latent_frames for video in found.videos] == [12]
    assert (found.pending, found.failures) == (7, {})


def test_a_duration_added_later_leaves_the_scores_of_the_older_file(tmp_path: Path) -> None:
    run = RolloutRun(str(tmp_path / "run"))
    identity = run.ensure(make_identity(PROMPTS[:1], ["rag"], HORIZONS))
    rollout = RolloutId(backbone="tiny", method="rag", prompt_id=next(iter(identity.prompts)))
    store_rollout(run, identity, rollout, HORIZONS)
    videos = by_rollout(run)[rollout]
    shorter = video_rows(videos[:1], lambda *_: 0.25)
    longer = video_rows(videos, lambda *_: 0.75)
    longer_alone = [row for row in longer if row.kind == "clip_to_clip" and row.frame_count == 69]
    longer_alone += [row for row in longer if row.kind == "clip" and row.first_frame in (0, 32, 37)]
    store_rows(run, rollout, shorter + longer_alone)
    found = {video.latent_frames: video.values["motion_smoothness"] for video in scores_of(run).videos}
    assert found == {12: 0.25, 18: 0.75}
    store_rows(run, rollout, longer + shorter)
    found = {video.latent_frames: video.values["motion_smoothness"] for video in scores_of(run).videos}
    assert found == {12: 0.25, 18: 0.75}, "the file that is committed for a duration goes before the longer one"


def test_a_video_that_could_not_be_scored_has_its_reason(run: RolloutRun) -> None:
    score_run(run, falling)
    rollout, videos = next(iter(by_rollout(run).items()))
    rows = video_rows(videos, falling)
    store_rows(run, rollout, [row(rows[0].video, "failure", "", 0, 0, None, reason="it is <truncated>")])
    data = collect([run])
    assert data.scores.failures == dict.fromkeys((video.video.path for video in videos), "it is <truncated>")
    assert [block.prompts for block in data.blocks] == [1, 1]


def test_the_frozen_control_is_shown_over_the_prompts_of_the_table_and_never_ranked(run: RolloutRun) -> None:
    score_run(run, falling)
    first, second = collect([run]).identity.prompts
    store_frozen(run, "tiny", first, 0, 0.99)
    store_frozen(run, "tiny", second, 0, 0.97)
    data = collect([run])
    frozen = data.frozen_means(data.blocks[0])
    assert frozen["imaging_quality"] == frozen["motion_smoothness"] == pytest.approx(0.98)
    assert {row.method for row in data.blocks[0].rows} == {"base", "rag"}


def test_the_control_of_the_first_run_counts(tmp_path: Path) -> None:
    runs = [make_run(str(tmp_path / method), PROMPTS[:1], [method], (12,)) for method in ("base", "rag")]
    for each, value in zip(runs, (0.99, 0.5), strict=True):
        score_run(each, falling)
        store_frozen(each, "tiny", next(iter(each.require().prompts)), 0, value)
    for first, value in ((0, 0.99), (1, 0.5)):
        data = collect([runs[first], runs[1 - first]])
        assert data.frozen_means(data.blocks[0])["imaging_quality"] == pytest.approx(value)


def test_what_must_be_known_first_is_said(run: RolloutRun) -> None:
    assert collect([run]).suite.title == "preview suite, not VBench"
    for rollout, videos in by_rollout(run).items():
        rows = video_rows(videos, falling, dimensions=DIMENSION_NAMES[:2])
        if rollout.method == "rag":
            rows = [replace(row, networks=f"clip_vitb32:{UNTRAINED}00", precision="float32") for row in rows]
        store_rows(run, rollout, rows)
    data = collect([run])
    assert [measure.name for measure in data.suite.measures] == list(DIMENSION_NAMES[:2])
    untrained, mixed, few, ways = warnings(data)
    assert "random weights: the numbers mean nothing" in untrained
    assert "Scores of 2 of the 6 dimensions" in few
    assert "different weights of clip_vitb32" in mixed
    assert "float32 precision, official precision" in ways


def test_a_video_without_one_dimension_keeps_the_others(run: RolloutRun) -> None:
    """Means are over what exists, ranks over the prompts that have every dimension, and both are said."""
    score_run(run, falling)
    rollout, videos = next(iter(by_rollout(run).items()))
    assert rollout.method == "base"
    rows = [
        replace(each, score=None, per_frame=(), reason="needs three frames")
        if each.dimension == "motion_smoothness"
        else each
        for each in video_rows(videos, lambda *_: 0.5)
    ]
    store_rows(run, rollout, rows)
    data = collect([run])
    (kept,) = [
        v for v in data.scores.videos if (v.method, v.latent_frames, v.prompt_id) == ("base", 12, rollout.prompt_id)
    ]
    assert kept.values.keys() == set(DIMENSION_NAMES) - {"motion_smoothness"}
    assert kept.values["imaging_quality"] == pytest.approx(0.5)
    reason = "motion_smoothness: needs three frames"
    assert data.scores.failures == dict.fromkeys((video.video.path for video in videos), reason)
    assert data.scores.pending == 0
    assert [(block.prompts, block.prompts_left_out) for block in data.blocks] == [(1, 1), (1, 1)]
    assert "1 prompt left out because some methods lack scores of them" in comparison_note(data.blocks[0])
    assert means(data, 12, "base")["imaging_quality"] == pytest.approx(0.8 - 13 / 2000)
    table = data.suite.table(data.scores).to_pylist()
    assert {row["motion_smoothness"] for row in table if row["imaging_quality"] == 0.5} == {None}


def test_a_dimension_that_a_method_never_has_leaves_its_other_means(run: RolloutRun) -> None:
    for rollout, videos in by_rollout(run).items():
        rows = video_rows(videos, falling)
        if rollout.method == "rag":
            rows = [each for each in rows if each.dimension != "dynamic_degree"]
            span = video_rows(videos, falling, dimensions=["dynamic_degree"])
            rows += [replace(each, score=None, per_frame=(), reason="too small") for each in span]
        store_rows(run, rollout, rows)
    data = collect([run])
    found = means(data, 18, "rag")
    assert found.keys() == set(DIMENSION_NAMES) - {"dynamic_degree"}
    assert means(data, 18, "base").keys() == set(DIMENSION_NAMES)
    assert comparison_note(data.blocks[0]).startswith("Not ranked: no prompt has complete scores for several methods")


def test_a_control_without_one_dimension_shows_the_others(run: RolloutRun) -> None:
    score_run(run, falling)
    first, _ = run.require().prompts
    store_frozen(run, "tiny", first, 0, 0.99, without="dynamic_degree")
    data = collect([run])
    frozen = data.frozen_means(data.blocks[0])
    assert frozen.keys() == set(DIMENSION_NAMES) - {"dynamic_degree"}
    assert render_page(data, [], [], lambda _, path: path).count('<th scope="row">Frozen</th>') == 2
