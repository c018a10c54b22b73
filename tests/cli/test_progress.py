from __future__ import annotations

import dataclasses
import io
from datetime import UTC, datetime, timedelta
from typing import get_args

import pytest
from rich.console import Console

from lrag_ray.cli.live import LiveView
from lrag_ray.cli.progress import PlainProgress, shown_progress
from lrag_ray.cli.run_view import RunView
from lrag_ray.events import (
    AttemptFailed,
    Event,
    Notice,
    RunPlanned,
    StageAdvanced,
    StageBegan,
    StageEnded,
    TaskAdvanced,
    TaskFinished,
    TaskStarted,
    TrainingAdvanced,
    WorkerLost,
    log_record,
)
from lrag_ray.pipelines.submit.follow import show
from lrag_ray.printable import json_text
from lrag_ray.stages.spec import Result, StageName
from lrag_ray.store.records import FailureRecord, RolloutId, now_utc


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


BEGAN = datetime(2026, 1, 1, tzinfo=UTC)


def at(second: float, event: Event) -> Event:
    """`event` as if it had happened then."""
    return dataclasses.replace(event, at=BEGAN + timedelta(seconds=second))


def rollout(number: int) -> RolloutId:
    return RolloutId(backbone="tiny", method="rag", prompt_id=f"{number:05d}-aa")


def advanced(number: int, blocks: int, worker: str = "worker-0") -> TaskAdvanced:
    return TaskAdvanced("rollouts", rollout(number).path, worker, blocks, 12, "generating")


def failed(number: int, quarantined: bool) -> AttemptFailed:
    return AttemptFailed(
        FailureRecord(
            task=rollout(number).path,
            attempt="t0",
            kind="exception",
            counted=True,
            counted_attempts=1,
            quarantined=quarantined,
            reason="RuntimeError: no",
            traceback="",
            created_at=now_utc(),
        )
    )


PLANNED = RunPlanned(uri="runs/x", commits_total=8, commits_done=2, rollouts_to_do=3, blocks_to_do=36)


@pytest.fixture
def view() -> RunView:
    view = RunView()
    view.take(at(0, PLANNED))
    view.take(at(0, StageBegan("rollouts", 3)))
    return view


@pytest.mark.parametrize("stage", get_args(StageName))
def test_every_stage_has_a_title(view: RunView, stage: StageName) -> None:
    view.take(StageBegan(stage, 1))
    assert view.headline()
    line = view.take(StageEnded(stage, 2.0))
    assert line is not None and line.endswith(": done in 2 s")


def test_the_headline_counts_finished_and_running_blocks(view: RunView) -> None:
    view.take(at(0, TaskStarted("rollouts", rollout(0).path, "t0", "worker-0")))
    assert view.headline() == "rollouts 0/3, blocks 0/36"
    view.take(at(4, advanced(0, 8)))
    assert view.headline() == "rollouts 0/3, blocks 8/36, 2 blocks/s, about 14 s left"
    view.take(at(6, TaskFinished("rollouts", rollout(0).path, Result(units=12, seconds=6.0))))
    assert view.headline() == "rollouts 1/3, blocks 12/36, 2 blocks/s, about 12 s left"


def test_the_pace_is_that_of_the_last_two_minutes(view: RunView) -> None:
    for second in range(0, 600):
        slow, fast = second // 60, max(0, second - 300)
        view.take(at(second, advanced(0, slow + fast)))
        if second == 299:
            assert view.blocks_per_s == pytest.approx(1 / 60, rel=0.1)
    assert view.blocks_per_s == pytest.approx(1 + 1 / 60, rel=0.1)


def test_the_pace_of_a_log_that_is_read_at_once_is_that_of_its_times() -> None:
    """As after `logs --follow` of a job that has worked for hours."""
    events = [at(0, PLANNED), at(0, StageBegan("rollouts", 3))]
    events += [at(60 * minute, advanced(0, minute)) for minute in range(1, 10)]
    view = RunView()
    for event in events:
        show(json_text(log_record(event)), view.count)
    assert view.headline() == "rollouts 0/3, blocks 9/36, 0.0167 blocks/s, about 27 min 0 s left"


def test_a_clock_that_is_set_back_costs_the_pace_for_a_moment(view: RunView) -> None:
    for second, blocks in ((1000, 2), (1004, 4), (500, 6)):
        view.take(at(second, advanced(0, blocks)))
    assert view.blocks_per_s is None
    view.take(at(504, advanced(0, 8)))
    assert view.blocks_per_s == 0.5


def test_there_is_no_pace_before_something_moves(view: RunView) -> None:
    view.take(at(0, advanced(0, 0)))
    view.take(at(5, advanced(0, 0)))
    assert view.blocks_per_s is None and view.eta_s is None


def test_a_training_that_loads_says_no_step_yet(view: RunView) -> None:
    """A resumed training does not look as if it began anew."""
    loading = TrainingAdvanced(1, 3, 0, 60, 2, "loading", [], [], None, None, None)
    view.take(StageBegan("training", 60))
    view.take(loading)
    assert view.headline() == "loading on 2 workers"
    view.take(dataclasses.replace(loading, epoch=2, step=40, doing="training"))
    assert view.headline() == "epoch 2/3, step 40/60"


def test_a_failed_attempt_frees_its_worker_and_is_told(view: RunView) -> None:
    view.take(TaskStarted("rollouts", rollout(0).path, "t0", "worker-0"))
    view.take(advanced(0, 5))
    line = view.take(failed(0, quarantined=False))
    assert line == (
        "warning: rollouts/tiny/rag/00000-aa-0: RuntimeError: no (will be retried; "
        "failures/tiny/rag/00000-aa-0/t0.json)"
    )
    assert view.flights == {} and view.blocks_done == 0
    assert "quarantined" in (view.take(failed(0, quarantined=True)) or "")
    assert view.headline().endswith("2 failed attempts")


def test_a_lost_worker_is_told_and_forgotten(view: RunView) -> None:
    view.take(advanced(0, 5))
    assert view.take(WorkerLost("worker-0", "node died")) == "warning: worker-0 was lost and is replaced: node died"
    assert view.flights == {}


def test_plain_lines_say_what_matters_and_the_headline_now_and_then() -> None:
    lines: list[str] = []
    clock = Clock()
    plain = PlainProgress(lines.append, clock)

    def happens(second: float, event: Event) -> None:
        clock.now = second
        plain(at(second, event))

    happens(0, PLANNED)
    happens(0, Notice("careful", warning=True))
    happens(1, StageBegan("rollouts", 3))
    for second in range(2, 22):
        happens(second, advanced(0, second // 2))
    happens(22, StageEnded("rollouts", 21.0))
    happens(23, StageBegan("scoring", 4))
    happens(34, StageAdvanced("scoring", 2, 4))
    assert lines == [
        "runs/x: 2 of 8 results are there, 3 rollouts (36 blocks) to do",
        "warning: careful",
        "rollouts 0/3, blocks 5/36, 0.5 blocks/s, about 1 min 2 s left",
        "rollouts 0/3, blocks 10/36, 0.5 blocks/s, about 52 s left",
        "rollouts: done in 21 s",
        "scoring videos 2/4",
    ]


def test_the_live_display_has_a_line_per_worker(view: RunView) -> None:
    view.take(advanced(0, 8, "worker-0"))
    view.take(advanced(1, 3, "worker-1"))
    out = io.StringIO()
    Console(file=out, width=100).print(LiveView(view))
    shown = out.getvalue().splitlines()
    assert shown[0].startswith("rollouts 0/3, blocks 11/36")
    assert [line.split() for line in shown if line.startswith("worker")] == [
        ["worker-0", "tiny/rag/00000-aa-0", "block", "8/12", "generating", "0", "s"],
        ["worker-1", "tiny/rag/00001-aa-0", "block", "3/12", "generating", "0", "s"],
    ]


def drawn(view: RunView, width: int, height: int) -> list[str]:
    """As the display is a minute and a quarter after it began."""
    out = io.StringIO()
    Console(file=out, width=width, height=height).print(LiveView(view, lambda: BEGAN.timestamp() + 75))
    return [line.rstrip() for line in out.getvalue().splitlines()]


@pytest.mark.parametrize(("width", "height"), [(80, 24), (200, 50), (40, 12)])
@pytest.mark.parametrize("workers", [1, 6, 128])
def test_the_live_display_fits_any_terminal_and_number_of_workers(workers: int, width: int, height: int) -> None:
    """Given 12 cells and workers on 8-worker nodes, no line is wider and no frame higher than the terminal."""
    view = RunView()
    methods = ["base", "infinity_rope", "deep_forcing", "rag"]
    cells = {f"{backbone}/{method}": 128 for backbone in ("a", "b", "c") for method in methods}
    view.take(RunPlanned("runs/x", 4608, 0, 1536, 245760, cells))
    view.take(at(0, StageBegan("rollouts", 1536)))
    for number in range(workers):
        task = RolloutId(backbone="a", method=methods[number % 4], prompt_id=f"{number:05d}-aa").path
        view.take(TaskStarted("rollouts", task, "t0", f"worker-{number}", f"{number // 8:06x}" * 5))
        view.take(TaskAdvanced("rollouts", task, f"worker-{number}", number, 160, "generating"))
    lines = drawn(view, width, height)
    assert max(map(len, lines)) <= width and len(lines) < height
    text = "\n".join(lines)
    assert "1 min 15 s so far" in text.replace("\n", " ")
    if workers == 128 and width > 40:
        assert ("32 workers" in text) == (height < 30) and ("node 00000f  8 workers" in text) == (height > 30)
    if workers == 1:
        assert "worker-0" in text and "0/160" in text


def test_cells_count_what_is_done_at_work_and_failed() -> None:
    view = RunView()
    view.take(RunPlanned("runs/x", 8, 0, 4, 48, {"tiny/rag": 3, "tiny/base": 1}))
    view.take(StageBegan("rollouts", 4))
    view.take(TaskStarted("rollouts", rollout(0).path, "t0", "worker-0"))
    view.take(TaskFinished("rollouts", rollout(0).path, Result(units=12)))
    view.take(failed(1, quarantined=True))
    view.take(TaskStarted("rollouts", rollout(2).path, "t0", "worker-0"))
    (line,) = [line for line in drawn(view, 100, 30) if line.startswith("tiny/rag ")]
    assert line.endswith("1/3, 1 at work, 1 failed")


def test_control_characters_of_prompts_and_errors_do_not_reach_the_terminal(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with shown_progress("log") as listener:
        listener(Notice("a\x1b[31mb\x07"))
    assert capsys.readouterr().err == "a\N{REPLACEMENT CHARACTER}[31mb\N{REPLACEMENT CHARACTER}\n"
