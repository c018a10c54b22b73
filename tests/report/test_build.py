"""The report of a run with real videos: files, numbers, links, trust."""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import json
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pyarrow.parquet as pq
import pytest
from rich.console import Console

from lrag_ray.errors import StorageError
from lrag_ray.report import Report, build_report, collect
from lrag_ray.report.latex import latex_table
from lrag_ray.report.page import overview
from lrag_ray.report.prompt_columns import MOST_SHOWN
from lrag_ray.report.tables import Place, comparison_note, interval_note, places, signed
from lrag_ray.scoring.preview.measures import MEASURES
from lrag_ray.scoring.preview.suite import PREVIEW
from lrag_ray.scoring.ranks import VideoScore, average_ranks
from lrag_ray.scoring.vbench_long.names import DIMENSION_NAMES
from lrag_ray.scoring.video_rows import VideoRow, to_parquet
from lrag_ray.store.failures import write_failure
from lrag_ray.store.records import FailureRecord, RolloutId, now_utc
from lrag_ray.store.rollouts import RolloutRun
from lrag_ray.store.seal import opened_json
from tests.report.make_run import HORIZONS, make_identity, make_run, score_all, store_rollout
from tests.report.vbench_rows import by_rollout, score_run, store_frozen, store_rows, video_rows

NASTY = 'a fox <script>alert(1)</script> & "quotes" \'--> {{ 7*7 }}'
PAGE = "summary/report.html"
PROMPTS = [NASTY, "a river at dawn " * 30]


class Page(HTMLParser):
    """Tags, texts and addresses of a page; fails on tags that are not closed in order."""

    VOID = frozenset({"meta", "input", "br", "path", "link", "img"})

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.scripts: list[str] = []
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "script":
            self.scripts.append(data)
        elif "style" not in self.open:
            self.text += data

    def values(self, attribute: str, tag: str = "") -> list[str]:
        found = (attrs.get(attribute) for name, attrs in self.attributes if tag in ("", name))
        return [value for value in found if value is not None]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RolloutRun:
    return score_all(make_run(str(tmp_path_factory.mktemp("report") / "run"), PROMPTS))


@pytest.fixture(scope="module")
def report(run: RolloutRun) -> Report:
    return build_report(run)


@pytest.fixture(scope="module")
def page(run: RolloutRun, report: Report) -> Page:
    return Page(run.storage.read_bytes(PAGE).decode())


def test_the_csv_holds_every_block_and_method_unrounded(run: RolloutRun, report: Report) -> None:
    rows = list(csv.DictReader(io.StringIO(run.storage.read_bytes("summary/ranks.csv").decode())))
    assert [(row["latent_frames"], row["method"]) for row in rows] == [
        (str(frames), method) for frames in HORIZONS for method in ("base", "rag")
    ]
    for row, ours in zip(rows, [row for block in report.blocks for row in block.rows], strict=True):
        assert row["suite"] == "preview"
        assert row["backbone_label"] == "tiny, untrained"
        assert row["prompts"] == "2"
        assert float(row["average_rank"]) == ours.average_rank
        for measure in MEASURES:
            assert float(row[measure.name]) == ours.means[measure.name]
            assert float(row[f"rank_{measure.name}"]) == ours.ranks[measure.name]


def test_columns_of_the_data_files_stay_what_they_are(tmp_path: Path) -> None:
    run = make_run(str(tmp_path / "run"), ["a fox"], horizons=(12, 27))
    score_run(run, lambda *_: 0.5)
    build_report(run, strips=0)

    def columns(name: str) -> list[str]:
        return run.storage.read_bytes(f"summary/{name}").decode().splitlines()[0].split(",")

    block = ["suite", "mode", "backbone", "backbone_label", "duration_s", "latent_frames"]
    places_of = [f"rank_{name}" for name in DIMENSION_NAMES]
    video_means = [f"video_mean_{name}" for name in DIMENSION_NAMES]
    counts = ["prompts", "videos_per_method", "prompts_left_out", "method", "average_rank"]
    assert columns("ranks.csv") == [*block, *counts, *DIMENSION_NAMES, *places_of, *video_means]
    interval = ["method", "reference", "measure", "difference", "lower", "upper", "sample_deviation"]
    assert columns("differences.csv") == [*block, "prompts", *interval]
    in_clip = ["in_clip", "in_clip_lower", "in_clip_upper", "final"]
    assert columns("drift.csv") == [*block, "method", "measure", "clip", "start_s", "prompts", *in_clip]


def with_columns(run: RolloutRun, *columns: dict[str, object]) -> None:
    """Give the prompts of a run the other columns of a prompt table."""
    identity = run.require()
    prompts = {
        prompt_id: prompt.model_copy(update={"columns": dict(found)})
        for (prompt_id, prompt), found in zip(identity.prompts.items(), columns, strict=True)
    }
    run.storage.write("run.json", identity.model_copy(update={"prompts": prompts}).model_dump_json().encode())


def test_columns_of_the_prompt_table_stand_beside_the_scores(tmp_path: Path) -> None:
    run = make_run(str(tmp_path / "run"), ["a fox", "a bear"], horizons=(12,))
    score_run(run, lambda *_: 0.5)
    with_columns(run, {"id": "=A7", "dimension": ["color"], "method": "mine"}, {"id": 8, "reference": "<b>r.png"})
    build_report(run, strips=0)
    rows = list(csv.DictReader(io.StringIO(run.storage.read_bytes("summary/videos.csv").decode())))
    assert [row["prompt.id"] for row in rows] == ["'=A7", "'=A7", "8", "8"]
    assert [row["prompt"] for row in rows] == ["a fox", "a fox", "a bear", "a bear"]
    assert [(row["method"], row["prompt.method"]) for row in rows[:2]] == [("base", "mine"), ("rag", "mine")]
    assert rows[0]["prompt.dimension"] == '["color"]' and rows[0]["prompt.reference"] == ""
    assert {float(row["imaging_quality"]) for row in rows} == {0.5} and {row["duration_s"] for row in rows} == {"3.0"}
    clips = pq.read_table(io.BytesIO(run.storage.read_bytes("summary/scores.parquet"))).to_pylist()
    assert {(row["prompt"], row["prompt.id"], row["prompt.reference"]) for row in clips} == {
        ("a fox", "=A7", None),
        ("a bear", "8", "<b>r.png"),
    }
    page = Page(run.storage.read_bytes(PAGE).decode())
    assert "id=A7" in page.text and "<b>r.png" in page.text


def test_any_number_of_prompt_columns_is_shown_in_part(tmp_path: Path) -> None:
    run = make_run(str(tmp_path / "run"), ["a fox"], horizons=(6,))
    with_columns(run, {f"c{i}": i for i in range(MOST_SHOWN + 3)})
    score_all(run)
    build_report(run, strips=0)
    head = run.storage.read_bytes("summary/videos.csv").decode().splitlines()[0].split(",")
    assert sum(name.startswith("prompt.") for name in head) == MOST_SHOWN
    assert "3 further columns of the prompt table are in run.json alone." in run.storage.read_bytes(PAGE).decode()


def test_what_a_score_row_says_of_its_video_is_not_believed(tmp_path: Path) -> None:
    run = make_run(str(tmp_path / "run"), ["a fox"], ["rag"], horizons=(6,))
    target = PREVIEW.pending_targets(run)[0]
    other = replace(target, backbone="theirs", method="theirs", prompt_id="theirs", sample=7)
    run.storage.create(target.score_path(PREVIEW), to_parquet([VideoRow(other, {}, None, "", now_utc())], PREVIEW))
    (video,) = collect([run]).scores.videos
    assert (video.backbone, video.method, video.prompt_id, video.sample) == ("tiny", "rag", target.prompt_id, 0)
    build_report(run, strips=0)


def test_the_parquet_holds_every_video(run: RolloutRun) -> None:
    table = pq.read_table(io.BytesIO(run.storage.read_bytes("summary/scores.parquet")))
    assert table.num_rows == 2 * 2 * len(HORIZONS)
    assert {measure.name for measure in MEASURES} <= set(table.column_names)


def test_the_same_storage_gives_the_same_files(run: RolloutRun, report: Report) -> None:
    paths = [f"summary/{name}" for name in report.files]
    before = [run.storage.read_bytes(path) for path in paths]
    build_report(run)
    assert [run.storage.read_bytes(path) for path in paths] == before


def test_the_page_says_what_it_is(page: Page) -> None:
    assert "Of tiny, untrained: a test of the program, not of the methods." in page.text
    assert "Preview measures, not VBench." in page.text
    assert "Over the 2 prompts that all methods have." in page.text
    assert "Durations are prefixes of one rollout, not independent samples" in page.text
    assert "cpu (4 rollouts)" in page.text
    for measure in MEASURES:
        assert measure.formula in page.text


def test_a_prompt_is_only_text(page: Page, run: RolloutRun, report: Report) -> None:
    html = run.storage.read_bytes(PAGE).decode()
    assert NASTY in page.text
    assert "<script>alert" not in html
    assert "49" not in page.text.split("quotes")[1][:20]
    assert len(page.scripts) == 1


def test_nothing_but_the_pages_own_script_may_run(page: Page) -> None:
    (policy,) = [attrs["content"] or "" for tag, attrs in page.attributes if tag == "meta" and "http-equiv" in attrs]
    digest = base64.b64encode(hashlib.sha256(page.scripts[0].encode()).digest()).decode()
    assert "default-src 'none'" in policy
    assert f"script-src 'sha256-{digest}';" in policy
    assert not [name for _, attrs in page.attributes for name in attrs if name.startswith("on")]


def test_every_address_is_inside_the_run_and_is_there(page: Page, run: RolloutRun, report: Report) -> None:
    summary = Path(run.storage.full(PAGE)).parent
    sources = page.values("src", "video")
    assert len(sources) == 4
    assert all(source.startswith("../rollouts/") for source in sources)
    images = page.values("src", "img")
    assert len(images) == 6, "strips of two prompts and two methods, and the context of each method"
    assert all(image.startswith("strips/") for image in images)
    assert all((summary / unquote(source)).is_file() for source in [*sources, *images])
    links = set(page.values("href", "a"))
    played = {link for link in links if link.startswith("../rollouts/")}
    assert played == set(sources), "a link to open and one to download beside every video"
    beside = {link for link in links - played if not link.startswith("#")}
    assert beside == set(report.files) - {"report.html"} and all((summary / name).is_file() for name in beside)
    assert all(link[1:] in page.values("id") for link in links - played - beside)


def test_every_player_knows_all_durations_and_has_a_map(page: Page) -> None:
    videos = [attrs for tag, attrs in page.attributes if tag == "video"]
    for video in videos:
        assert json.loads(video["data-sources"] or "").keys() == {"6", "12"}
    assert [attrs.get("class") for tag, attrs in page.attributes if tag == "svg"] == ["map"] * 4
    assert "similarity 0.85 to 0.90" in page.text


def test_the_terminal_shows_the_same_ranks(report: Report) -> None:
    console = Console(width=80, record=True, file=io.StringIO())
    for table in report.terminal_tables():
        console.print(table)
    shown = console.export_text()
    assert "tiny (tiny, untrained), 1.5 s" in shown
    assert "not VBench" in shown
    for row in report.blocks[0].rows:
        assert f"{row.average_rank:.2f}" in shown


def test_failures_are_listed(tmp_path: Path) -> None:
    run = make_run(str(tmp_path / "run"), ["a red fox"])
    target = PREVIEW.pending_targets(run)[0]
    broken = VideoRow(target, {}, "it is <truncated>", "", now_utc())
    run.storage.create(target.score_path(PREVIEW), to_parquet([broken], PREVIEW))
    score_all(run)
    identity = run.ensure(make_identity(["a red fox", "a poisoned one"], ["base", "rag"]))
    poisoned = RolloutId(backbone="tiny", method="rag", prompt_id=list(identity.prompts)[1])
    write_failure(
        run.storage,
        FailureRecord(
            task=poisoned.path,
            attempt="three",
            kind="exception",
            counted=True,
            counted_attempts=3,
            quarantined=True,
            reason="RuntimeError: <poison>",
            traceback="Traceback …",
            created_at=now_utc(),
        ),
    )
    report = build_report(run)
    page = Page(run.storage.read_bytes(PAGE).decode())
    assert "RuntimeError: <poison>" in page.text and poisoned.path in page.text
    assert "it is <truncated>" in page.text
    first, second = report.blocks
    assert (first.prompts, second.prompts) == (0, 1), "the broken video takes its prompt out of its own block"
    assert "Not ranked: no scores yet for base" in page.text


def test_a_run_without_results_has_a_page(tmp_path: Path) -> None:
    run = RolloutRun(str(tmp_path / "run"))
    run.ensure(make_identity(["a red fox"], ["base"]))
    report = build_report(run)
    assert report.blocks == []
    assert "No scores yet." in Page(run.storage.read_bytes(PAGE).decode()).text


def test_a_half_scored_run_says_how_much_is_missing(tmp_path: Path) -> None:
    run = make_run(str(tmp_path / "run"), ["a fox"])
    rollout, videos = next(iter(by_rollout(run).items()))
    store_rows(run, rollout, video_rows(videos, lambda *_: 0.5))
    report = build_report(run, strips=0)
    text = Page(run.storage.read_bytes(PAGE).decode()).text
    assert "Not scored in full yet: 2 videos at their durations" in text
    assert "Not ranked: no scores yet for rag." in text and overview(report.data) is None


def test_a_missing_video_leaves_its_place_empty(tmp_path: Path) -> None:
    run = RolloutRun(str(tmp_path / "run"))
    identity = run.ensure(make_identity(["a red fox"], ["base", "rag"]))
    store_rollout(run, identity, RolloutId(backbone="tiny", method="rag", prompt_id=next(iter(identity.prompts))), [6])
    build_report(run)
    page = Page(run.storage.read_bytes(PAGE).decode())
    assert "no video yet" in page.text
    assert len(page.values("src", "video")) == 1


def test_there_must_be_a_run(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="no run at this address"):
        build_report(RolloutRun(str(tmp_path / "nowhere")))


def test_several_tables_have_their_average_ranks_in_one(page: Page, report: Report, tmp_path: Path) -> None:
    assert "Average ranks at a glance" in page.text
    shown = overview(report.data)
    assert shown is not None and shown.groups == {"tiny": ["1.5 s", "3 s"]}
    for i, row in enumerate(report.blocks[0].rows):
        assert [cell.average_rank for cell in shown.rows[row.method]] == [b.rows[i].average_rank for b in report.blocks]
        assert [cell.first for cell in shown.rows[row.method]] == [True, False]
    alone = replace(report.data, blocks=report.blocks[:1])
    assert overview(alone) is None


def test_a_difference_has_one_sign_wherever_it_is_written(run: RolloutRun, report: Report, page: Page) -> None:
    """Method minus reference, also of measures where lower is better."""
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(*report.terminal_tables())
    terminal = console.export_text()
    measures = {measure.name: measure for measure in MEASURES}
    rows = csv.DictReader(io.StringIO(run.storage.read_bytes("summary/differences.csv").decode()))
    checked = 0
    for row in (row for row in rows if not measures[row["measure"]].higher_is_better):
        shown = signed(float(row["difference"]), measures[row["measure"]])
        assert shown in page.text and shown in terminal
        checked += shown[0] in "+−"
    assert checked


def test_differences_come_before_means(page: Page) -> None:
    regions = page.values("aria-label", "div")
    assert regions.index("Differences, tiny, 6 latent frames") < regions.index("Rank table, tiny, 6 latent frames")


def test_best_and_second_are_marked_and_ties_share() -> None:
    def score(method: str, value: float) -> VideoScore:
        return VideoScore("tiny", method, 6, "p", 0, {measure.name: value for measure in MEASURES})

    values = {"a": 0.3, "b": 0.1, "c": 0.3, "d": 0.2}
    (block,) = average_ranks([score(*item) for item in values.items()], list(values), MEASURES)
    marks = places(block, MEASURES)
    sharp = {method: marks[method, "sharpness"] for method in values}
    assert sharp == {"a": Place.BEST, "b": Place.OTHER, "c": Place.BEST, "d": Place.SECOND}
    assert marks["b", "flicker"] == Place.BEST
    assert places(average_ranks([score("a", 0.3)], ["a"], MEASURES)[0], MEASURES) == {}


@pytest.mark.parametrize(
    ("prompts", "said"),
    [
        (5, "No intervals: 5 prompts"),
        (6, "it holds the true mean in about 86% of cases"),
        (10, "about 90%"),
        (20, None),
    ],
)
def test_the_note_says_what_intervals_of_few_prompts_are_worth(prompts: int, said: str | None) -> None:
    note = interval_note(prompts)
    assert said in note if said else "of cases" not in note and "BCa bootstrap over 20 prompts" in note


def test_the_note_counts_what_was_left_out() -> None:
    def score(method: str, prompt: str, sample: int = 0) -> VideoScore:
        return VideoScore("tiny", method, 6, prompt, sample, dict.fromkeys((m.name for m in MEASURES), 0.5))

    scores = [score("a", "p"), score("a", "p", 1), score("b", "p"), score("b", "p", 1), score("b", "q")]
    (block,) = average_ranks(scores, ["a", "b"], MEASURES)
    assert comparison_note(block) == (
        "Over the 1 prompt that all methods have (2 videos per method); "
        "1 prompt left out because some methods lack scores of them."
    )


def test_the_note_names_what_is_left_out_of_the_ranks() -> None:
    def score(method: str, prompt: str) -> VideoScore:
        return VideoScore("tiny", method, 6, prompt, 0, dict.fromkeys((m.name for m in MEASURES), 0.5))

    scores = [score("a", "p"), score("b", "p"), score("c", "q")]
    (block,) = average_ranks(scores, ["a", "b", "c", "d"], MEASURES)
    assert comparison_note(block) == (
        "Over the 1 prompt that all ranked methods have. Left out of the ranks: no scores yet for d; "
        "no completely scored prompt in common with the others for c."
    )
    (block,) = average_ranks([score("a", "p"), score("b", "q")], ["a", "b"], MEASURES)
    assert comparison_note(block) == (
        "Not ranked: no prompt has complete scores for several methods. Means are over each method's own videos."
    )


def test_a_vbench_page_says_what_its_numbers_are(tmp_path: Path) -> None:
    run = make_run(str(tmp_path / "run"), [f"<b>fox</b> {i}" for i in range(6)], horizons=(12, 27))
    score_run(run, lambda rollout, *_: 0.9 if rollout.method == "rag" else 0.8)
    for prompt_id in list(run.require().prompts)[:4]:
        store_frozen(run, "tiny", prompt_id, 0, 0.95)
    report = build_report(run, strips=0)
    page = Page(run.storage.read_bytes(PAGE).decode())
    assert "drift.csv" in page.values("href") and set(page.values("href")) >= set(report.files) - {"report.html"}
    rows = list(csv.DictReader(io.StringIO(run.storage.read_bytes("summary/ranks.csv").decode())))
    assert [row["prompts"] for row in rows] == ["6", "6", "4"] * 2, "the control counts its own prompts"
    assert "Preview measures" not in page.text and "<b>fox" in page.text
    for text in (
        "VBench-Long, compat mode",
        "of this mode, and of this mode alone, may stand beside published numbers",
        "Over the 6 prompts that all methods have.",
        "rag − base",
        "+10.00",
        "[+10.00, +10.00]",
        "95% interval: BCa bootstrap over 6 prompts",
        "not ranked",
        "the first frame held for the whole video (over 4 of the 6 prompts), a control that is never ranked",
        "Each stands for itself, not corrected for their number",
        "Paired by prompt and sample.",
        "Durations are prefixes of one rollout, not independent samples",
        "so the mean of per-video means is the same",
        "clip_vitb32:1a2b",
        "cpu, official precision, torch 2.12.1",
    ):
        assert text in page.text, text
    drawings = [attrs.get("class") for tag, attrs in page.attributes if tag == "svg"]
    assert drawings.count("drift") == 6 and drawings.count("key") == 2
    assert not page.values("src", "img")
    build_report(run, strips=0)


def test_direct_and_random_scores_are_kept_from_published_numbers(tmp_path: Path) -> None:
    run = make_run(str(tmp_path / "run"), ["a fox"])
    for rollout, videos in by_rollout(run).items():
        rows = video_rows(videos, lambda *_: 0.5, "direct")
        store_rows(run, rollout, [replace(row, networks="raft_things:random-1") for row in rows], "direct")
    report = build_report(run)
    page = Page(run.storage.read_bytes(PAGE).decode())
    assert "beside published numbers only scores of compat mode may stand" in page.text
    assert "random weights: the numbers mean nothing" in page.text
    assert "random weights: the numbers mean nothing" in run.storage.read_bytes("summary/table.tex").decode()
    console = Console(width=200, record=True, file=io.StringIO())
    for table in report.terminal_tables():
        console.print(table)
    assert "numbers mean nothing" in console.export_text()


def test_only_the_first_prompts_have_maps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lrag_ray.report.players.MAPS", 1)
    run = make_run(str(tmp_path / "run"), ["a fox", "a bear"], ["rag"])
    build_report(run, strips=0)
    page = Page(run.storage.read_bytes(PAGE).decode())
    assert [attrs.get("class") for tag, attrs in page.attributes if tag == "svg"] == ["map"]
    assert len(page.values("src", "video")) == 2


def test_names_of_a_strangers_run_neither_act_nor_steer(tmp_path: Path) -> None:
    """run.json may hold what no configuration would let through."""
    nasty = 'rag\x1b]0;owned\x07"><script>alert(1)</script>'
    run = make_run(str(tmp_path / "run"), ["a fox"], ["base", "rag"])
    score_all(run)
    described = json.loads(opened_json(run.storage.read_bytes("run.json")))
    described["backbones"]["tiny"]["label"] = nasty
    described["methods"][nasty] = described["methods"]["rag"]
    run.storage.write("run.json", json.dumps(described).encode())
    report = build_report(run)
    html = run.storage.read_bytes(PAGE).decode()
    assert "<script>alert" not in html and len(Page(html).scripts) == 1
    console = Console(width=200, record=True, file=io.StringIO())
    for table in report.terminal_tables():
        console.print(table)
    shown = console.export_text()
    assert "owned" in shown and "\x1b]" not in shown and "\x07" not in shown
    assert "$<$script$>$" in latex_table(report.data), "which LaTeX prints as it is"
