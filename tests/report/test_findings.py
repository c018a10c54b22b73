"""What the page says beside its tables: the headline, costs, ablations and both ends of a video."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from lrag_ray.report import collect
from lrag_ray.report.ablations import sweep_figures, sweeps
from lrag_ray.report.collect import ReportData
from lrag_ray.report.costs import cost_tables
from lrag_ray.report.data_files import ends_csv, videos_csv
from lrag_ray.report.ends import both_ends, ends_tables
from lrag_ray.report.headline import headline
from lrag_ray.report.tables import terminal_tables
from lrag_ray.scoring.bootstrap import Interval, lead_shares
from lrag_ray.scoring.drift import VideoClips
from lrag_ray.scoring.ranks import VideoScore
from lrag_ray.scoring.vbench_long.parquet import video_identity
from lrag_ray.store.identity import MethodIdentity
from lrag_ray.store.records import Commit, FileRecord, RolloutId
from lrag_ray.store.rollouts import RolloutRun
from lrag_ray.video.decode import Frames
from lrag_ray.wan.vae import video_frames
from tests.report.make_run import make_run, store_video
from tests.report.vbench_rows import by_rollout, row, score_run, store_rows, video_rows

PROMPTS = [f"prompt {i}" for i in range(6)]


@pytest.fixture(scope="module", autouse=True)
def one_video() -> Iterator[None]:
    """All videos of these runs are one file, since nothing here looks into them."""
    encoded: list[tuple[str, FileRecord, bytes]] = []

    def store(run: RolloutRun, path: str, frames: Frames) -> FileRecord:
        if not encoded:
            made = store_video(run, path, frames[:2])
            encoded.append((path, made, run.storage.read_bytes(path)))
        _, made, content = encoded[0]
        run.storage.write(path, content)
        return made.model_copy(update={"path": path})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tests.report.make_run.store_video", store)
        yield


def made(folder: Path, methods: Sequence[str] = ("base", "rag"), prompts: Sequence[str] = PROMPTS) -> RolloutRun:
    return make_run(str(folder / "run"), prompts, methods, horizons=(48,))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, one_video: None) -> RolloutRun:
    """Base and rag of six prompts; each test scores them as it likes."""
    return made(tmp_path_factory.mktemp("findings"))


def scored(run: RolloutRun, value: Callable[[RolloutId, str, int], float]) -> ReportData:
    score_run(run, value)
    return collect([run])


def test_the_headline_says_who_leads_and_how_sure_that_is(run: RolloutRun) -> None:
    data = scored(run, lambda rollout, *_: 0.9 if rollout.method == "rag" else 0.8)
    found = headline(data)
    assert found is not None
    assert found.text == "rag has the lowest average rank: a firm lead."
    (finding,) = found.findings
    assert (finding.where, finding.who) == ("tiny, 12 s", "rag leads with an average rank of 1.00")
    assert finding.how_sure.startswith("a firm lead: it leads in 100 of 100 draws of the 6 prompts. Against base")
    assert "Against base, the next, it is" in finding.how_sure
    assert "better in subject consistency (" in finding.how_sure
    assert finding.how_sure.endswith(" and imaging quality (90.00 against 80.00)")
    assert "worse" not in finding.how_sure


def test_a_tie_for_the_next_place_is_said(tmp_path: Path) -> None:
    run = made(tmp_path, ("base", "infinity_rope", "rag"))
    found = headline(scored(run, lambda rollout, *_: 0.9 if rollout.method == "rag" else 0.8))
    assert found is not None
    assert "Against base, which shares the next place with infinity_rope, it is" in found.findings[0].how_sure


def test_a_lead_that_hangs_on_the_prompts_is_an_open_race(run: RolloutRun) -> None:
    """Given a method that wins 10 points on one prompt and loses 1 on the others, its lead is not sure."""

    def value(rollout: RolloutId, *_: object) -> float:
        wins = rollout.prompt_id.startswith("00000")
        return 0.8 if rollout.method == "base" else 0.9 if wins else 0.79

    found = headline(scored(run, value))
    assert found is not None and found.text == "rag has the lowest average rank: an open race."
    assert "undecided in 6 measures" in found.findings[0].how_sure


def test_ties_and_few_prompts_are_said(run: RolloutRun, tmp_path: Path) -> None:
    found = headline(scored(run, lambda *_: 0.8))
    assert found is not None and found.text == "No method leads alone."
    assert found.findings[0].who == "base and rag share the lowest average rank, 1.50"
    data = scored(made(tmp_path, prompts=PROMPTS[:2]), lambda rollout, *_: 0.9 if rollout.method == "rag" else 0.8)
    few = headline(data)
    assert few is not None and few.text.endswith("nothing says yet how sure that is.")
    assert few.findings[0].how_sure == "2 prompts cannot say how sure that is: it takes 6 and more"


def test_shares_of_a_lead_add_up_and_follow_the_direction_of_each_measure() -> None:
    values = np.zeros((8, 2, 1))
    values[:, 1, 0] = 1
    weights = np.ones(8)
    assert lead_shares(weights, values, [False]).tolist() == [0.0, 1.0]
    assert lead_shares(weights, values, [True]).tolist() == [1.0, 0.0]
    assert lead_shares(weights, np.zeros((8, 2, 1)), [True]).tolist() == [0.5, 0.5]


def identity(**settings: object) -> MethodIdentity:
    return MethodIdentity(method="rag", settings=dict(settings), nested=True)


def test_methods_that_differ_in_one_number_are_a_sweep() -> None:
    methods = {
        "k6": identity(top_k=6, sink=1, choose="best"),
        "k2": identity(top_k=2, sink=1, choose="best"),
        "sink3": identity(top_k=2, sink=3, choose="best"),
        "random": identity(top_k=2, sink=1, choose="random"),
        "other": MethodIdentity(method="base", settings={"top_k": 4, "sink": 1, "choose": "best"}, nested=True),
    }
    found = {sweep.setting: dict(sweep.methods) for sweep in sweeps(methods)}
    assert found == {"top_k": {"k2": 2.0, "k6": 6.0}, "sink": {"k2": 1.0, "sink3": 3.0}}


def test_a_sweep_is_drawn_as_a_curve_per_measure(tmp_path: Path) -> None:
    scores = {"a": 0.7, "b": 0.9}
    data = scored(made(tmp_path, ("a", "b"), PROMPTS[:1]), lambda rollout, *_: scores[rollout.method])
    methods = {name: identity(top_k=k) for name, k in (("a", 2), ("b", 4))}
    (figure,) = sweep_figures(replace(data, identity=data.identity.model_copy(update={"methods": methods})))
    panels = dict(figure.panels)
    assert list(panels)[:2] == ["Average rank ↓", "Subject consistency ↑"]
    assert "12 s from 2 to 1" in panels["Average rank ↓"] and "12 s from 70 to 90" in panels["Imaging quality ↑"]


def clips(scores: list[float], first_frames: list[int]) -> VideoClips:
    video = VideoScore("tiny", "rag", 48, "p", 0, {})
    return VideoClips(video, first_frames, 32, 16, {"imaging_quality": np.array(scores)}, {})


def test_both_ends_are_means_of_the_clips_inside_five_seconds() -> None:
    """Given clips of two seconds, two lie in the first five and two begin in the last five of twelve."""
    found = both_ends(clips([0.9, 0.7, 0.5, 0.5, 0.3, 0.1], [0, 32, 64, 96, 128, 160]), "imaging_quality")
    assert found == pytest.approx((0.8, 0.2))
    assert both_ends(clips([0.9, 0.7, 0.5], [0, 32, 64]), "imaging_quality") is None, "the second clip is in both ends"
    assert both_ends(clips([0.9], [0]), "aesthetic_quality") is None


def test_the_table_of_both_ends_gives_the_change_with_its_interval(run: RolloutRun) -> None:
    data = scored(run, lambda rollout, _, first: 0.8 - (first / 320 if rollout.method == "base" else 0))
    (table,) = ends_tables(data)
    imaging, aesthetic = table.rows["base"]
    assert (imaging.measure, aesthetic.measure) == ("imaging_quality", "aesthetic_quality")
    assert imaging.change.mean == pytest.approx(imaging.last - imaging.first) and imaging.change.excludes_zero
    assert imaging.change.mean < 0 == table.rows["rag"][0].change.mean


def test_flow_discontinuity_stands_beside_the_ranks_where_every_video_has_it(run: RolloutRun) -> None:
    """Given rows of rag whose boundaries jump three times as much, and of base without such rows."""
    score_run(run, lambda *_: 0.5)
    before = collect([run])
    assert not ends_tables(before)[0].flow
    for rollout, (video,) in by_rollout(run).items():
        if rollout.method != "rag":
            continue
        pairs = np.arange(1, video.frames - 2)
        starts = [video_frames(3 * block) for block in range(1, 16)]
        at_boundary = np.isin(pairs + 1, starts)
        flow = row(
            video_identity(rollout.path, video.video.sha256), "flow", "flow_discontinuity", 0, video.frames, 1.0,
            per_frame=tuple(np.where(at_boundary, 3.0, 1.0)),
        )  # fmt: skip
        store_rows(run, rollout, [*video_rows([video], lambda *_: 0.5), flow])
    data = collect([run])
    (table,) = ends_tables(data)
    assert table.flow == {"rag": Interval(0.5, 0.5, 0.5)}
    assert [block.rows for block in data.blocks] == [block.rows for block in before.blocks], "it is never ranked"
    csv = ends_csv(data, [table]).splitlines()
    assert next(line for line in csv if "flow" in line).endswith("6,rag,flow_discontinuity,mean,0.5,0.5,0.5")
    assert "flow_discontinuity" in videos_csv(data).splitlines()[0]
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(*terminal_tables(data))
    assert "Flow discontinuity ↓, not ranked │" in console.export_text()


def test_costs_are_seconds_per_second_of_video_beside_infinity_rope(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Given twelve seconds of video, a method that generates 10 % longer costs +10 %."""
    seconds = {"infinity_rope": 1.0, "rag": 1.1}

    def timed(**values: object) -> Commit:
        rollout = values["rollout"]
        assert isinstance(rollout, RolloutId)
        spent = seconds[rollout.method]
        timings_s = {
            "denoise": 96 * spent,
            "context": 24 * spent,
            "retrieval": 6 * spent,
            "load": 3.0,
            "decode": 12.0,
            "other": 1.0,
        }
        return Commit(**{**values, "timings_s": timings_s})  # type: ignore[arg-type]

    monkeypatch.setattr("tests.report.make_run.Commit", timed)
    data = scored(made(tmp_path, ("infinity_rope", "rag"), PROMPTS[:2]), lambda *_: 0.5)
    (table,) = cost_tables(data)
    assert (table.device, table.duration_s, table.load_s) == ("cpu", 12, 12)
    assert table.kinds == ["denoise", "context", "retrieval", "decode"]
    plain, rag = table.rows
    assert dict(plain.seconds) == pytest.approx({"denoise": 8, "context": 2, "retrieval": 0.5, "decode": 1})
    assert plain.relative == 0 and rag.relative == pytest.approx(0.1) and rag.rollouts == 2
    assert rag.history_bytes is None, "this run does not say how large its generator is"
