"""Whole runs on a real cluster: spread, killed, poisoned, grown, restarted."""

from __future__ import annotations

import os
import shutil
import signal
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from lrag_ray.config.schema import RunConfig
from lrag_ray.errors import ClusterError, IdentityError, StorageError
from lrag_ray.events import AttemptFailed, Event, Notice, RunPlanned, StageBegan, TaskFinished, WorkerLost
from lrag_ray.pipelines.evaluate import evaluate
from lrag_ray.stages.rollout.worker import RolloutResult
from lrag_ray.stages.spec import Host, Result, Yielded
from lrag_ray.stages.text import TextStage, TextTask, TextWorker
from lrag_ray.store.failures import read_failures
from lrag_ray.store.integrity import Coverage, find_damage
from lrag_ray.store.rollouts import RolloutRun
from lrag_ray.store.status import run_status
from tests.cluster.drivers import Driver, actors_below, driver, write_config
from tests.cluster.nodes import is_at_work, wait_for_end
from tests.cluster.quiet import Gate, open_parts, quiet_run
from tests.cluster.quiet import assert_equal as same_results
from tests.cluster.quiet import make_config as long_config
from tests.stages import make
from tests.stages.make import BACKBONE, METHODS, digests, make_prompts, part_bytes
from tests.waiting import wait_until

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600), pytest.mark.usefixtures("cluster")]

NO_VIDEO = {"enabled": False}
"""Spares every worker the seconds that importing diffusers takes; tests/engine decodes."""

PROMPTS = make_prompts("a red fox in the snow", "a river at dawn", "two dancers")


def make_config(uri: Path | str, actors: int = 1, *, encoded: bool = True, **changes: Any) -> RunConfig:
    """The configuration of a run that has the text features of its prompts already where `encoded`."""
    engine = {"actors": actors, "checkpoint_every_blocks": 2}
    config = make.make_config(uri, **{"video": NO_VIDEO, "engine": engine, **changes})
    return make.store_features(config, PROMPTS) if encoded else config


class Recorder:
    """A listener that keeps the events."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    def __call__(self, event: Event) -> None:
        self.events.append(event)

    def of(self, kind: type[Any]) -> list[Any]:
        return [event for event in self.events if isinstance(event, kind)]

    def rollouts(self) -> list[tuple[str, RolloutResult]]:
        """Folders and results of the rollouts that finished."""
        return [
            (event.task, event.result)
            for event in self.events
            if isinstance(event, TaskFinished) and isinstance(event.result, RolloutResult)
        ]


@pytest.fixture(scope="module")
def quiet(cluster: None, tmp_path_factory: pytest.TempPathFactory) -> RolloutRun:
    """The run with one actor that nothing disturbed."""
    folder = tmp_path_factory.mktemp("quiet")
    outcome = evaluate(make_config(folder, encoded=False), PROMPTS)
    assert (outcome.exit_code, outcome.commits_total, outcome.commits_made) == (0, 12, 12)
    return RolloutRun(str(folder))


@pytest.fixture
def finished(quiet: RolloutRun, tmp_path: Path) -> RolloutRun:
    """A copy of the quiet run, to be damaged."""
    return RolloutRun(str(shutil.copytree(quiet.uri, tmp_path / "run")))


def assert_equal(found: RolloutRun, expected: RolloutRun) -> None:
    """Equal latents and traces for every commit, byte for byte where parts are cut alike."""
    assert digests(found.commits()) == digests(expected.commits())
    assert part_bytes(found, found.commits()) == part_bytes(expected, expected.commits())


def test_two_actors_and_reversed_prompts_give_the_same_bytes(quiet: RolloutRun, tmp_path: Path) -> None:
    reversed_lines = make_prompts(*[prompt.text for prompt in reversed(PROMPTS)])
    recorder = Recorder()
    outcome = evaluate(make_config(tmp_path, actors=2), reversed_lines, listener=recorder)
    assert (outcome.exit_code, outcome.commits_made) == (0, 12)
    assert_equal(RolloutRun(str(tmp_path)), quiet)
    assert len(recorder.rollouts()) == 6
    assert recorder.of(RunPlanned)[0].blocks_to_do == 6 * 4


def test_a_second_start_does_nothing_and_makes_again_what_is_deleted_or_damaged(
    quiet: RolloutRun, finished: RolloutRun
) -> None:
    config, storage = make_config(finished.uri), finished.storage
    before = storage.list_files("rollouts")
    idle = Recorder()
    outcome = evaluate(config, PROMPTS, listener=idle)
    assert (outcome.exit_code, outcome.commits_made) == (0, 0)
    assert not {"connect", "text", "rollouts", "scoring"} & {event.stage for event in idle.of(StageBegan)}
    assert storage.list_files("rollouts") == before

    damaged, *_, deleted = finished.commits()
    record = f"{deleted.rollout.path}/commit-{deleted.latent_frames}.json"
    storage.remove(record)
    storage.remove(damaged.trace_parts[0].path)
    redone = Recorder()
    outcome = evaluate(config, PROMPTS, listener=redone)
    assert (outcome.exit_code, outcome.commits_total) == (0, 12)
    assert (deleted.rollout.path, (deleted.latent_frames,)) in [
        (folder, result.committed) for folder, result in redone.rollouts()
    ]
    assert {folder for folder, _ in redone.rollouts()} == {deleted.rollout.path, damaged.rollout.path}
    assert any("is missing" in notice.text and notice.warning for notice in redone.of(Notice))
    after = storage.list_files("rollouts")
    assert any(".json.invalid-" in path for path in after)
    untouched = {path: size for path, size in before.items() if not path.startswith(damaged.rollout.path)}
    del untouched[record]
    assert untouched.items() <= after.items()
    assert_equal(finished, quiet)


def test_a_history_that_this_machine_can_never_hold_ends_the_run_before_any_rollout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lrag_ray.pipelines.evaluate.history_bytes", lambda *_: 2**60)
    config = make_config(tmp_path, methods={"rag": METHODS["rag"]}, durations_s=[1.5])
    with pytest.raises(ClusterError, match=r"grows to 1152921504\.6 GB of host memory.* Use nodes with more memory"):
        evaluate(config, PROMPTS[:1])
    assert RolloutRun(str(tmp_path)).commits() == []


class Deadly(TextStage):
    """Every worker dies at its first prompt."""

    def open(self, host: Host) -> TextWorker:
        return _Deadly(self, host)


class _Deadly(TextWorker):
    def work(self, payload: TextTask, attempt: str) -> Result | Yielded:
        os._exit(1)


class Full(TextStage):
    """The encoder does not fit into the memory of the node."""

    def open(self, host: Host) -> TextWorker:
        return _Full(self, host)


class _Full(TextWorker):
    def work(self, payload: TextTask, attempt: str) -> Result | Yielded:
        raise MemoryError


class Picky(TextStage):
    """Cannot encode rivers."""

    def open(self, host: Host) -> TextWorker:
        return _Picky(self, host)


class _Picky(TextWorker):
    def work(self, payload: TextTask, attempt: str) -> Result | Yielded:
        if "river" in payload.prompt:
            raise ValueError("no tokens for rivers")
        return super().work(payload, attempt)


@pytest.mark.parametrize(
    ("stage", "reason"),
    [(Deadly, "ActorDiedError: .*"), (Full, "MemoryError.*the host memory of the node is full")],
)
def test_an_encoder_of_prompts_that_cannot_live_ends_the_run_with_the_reason(
    stage: type[TextStage], reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # How often each is tried is the pool's to test.
    monkeypatch.setattr("lrag_ray.engine.attempts.BARREN_DEATHS", 1)
    monkeypatch.setattr("lrag_ray.pipelines.text_features.TextStage", stage)
    config = make_config(tmp_path, encoded=False, engine={"actors": 1, "max_attempts": 1})
    with pytest.raises(ClusterError, match=f"the prompts cannot be encoded: {reason}.*The same command continues"):
        evaluate(config, PROMPTS[:1])
    assert RolloutRun(str(tmp_path)).commits() == []


def test_prompts_that_cannot_be_encoded_or_rolled_out_cost_their_own_rollouts_alone(
    quiet: RolloutRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Given one prompt of either kind, both are quarantined; the start after the repair makes what they lack."""
    _, unread, poisoned = (prompt.prompt_id for prompt in PROMPTS)
    poison = {"tiny": {**BACKBONE, "fail_on_prompt": "dancers"}}
    directory = RolloutRun(str(tmp_path))
    monkeypatch.setattr("lrag_ray.pipelines.text_features.TextStage", Picky)
    outcome = evaluate(make_config(tmp_path, encoded=False, backbones=poison), PROMPTS)
    assert (outcome.exit_code, outcome.commits_made) == (1, 4)
    assert {commit.rollout.prompt_id for commit in directory.commits()} == {PROMPTS[0].prompt_id}
    assert {(rollout.method, rollout.prompt_id) for rollout in outcome.failed} == {
        (method, prompt) for method in METHODS for prompt in (unread, poisoned)
    }
    title = f"prompt {unread} of tiny"
    assert outcome.missing.keys() == {title, *(rollout.path for rollout in outcome.failed)}
    assert outcome.missing[title] == "ValueError: no tokens for rivers"
    assert {outcome.missing[rollout.path] for rollout in outcome.failed if rollout.prompt_id == unread} == {
        "its prompt could not be encoded"
    }
    status = run_status(directory)
    (text,) = [failure for failure in status.failures if failure.stage == "text"]
    assert (text.task, text.kind, text.counted_attempts) == (title, "exception", 3)
    assert {(cell.method, cell.done, cell.failed) for cell in status.cells} == {("base", 1, 1), ("rag", 1, 1)}
    failures = [failure for failure in read_failures(directory.storage)[0] if "/rag/" in failure.task]
    assert [failure.counted_attempts for failure in failures] == [1, 2, 3]
    assert all("fail_on_prompt: the prompt contains 'dancers'" in failure.reason for failure in failures)
    assert all("rollout/worker.py" in failure.traceback and "line" in failure.traceback for failure in failures)

    monkeypatch.undo()
    outcome = evaluate(make_config(tmp_path, encoded=False), PROMPTS)
    assert (outcome.exit_code, outcome.commits_made, outcome.missing) == (0, 8, {})
    assert run_status(directory).failures == []
    assert read_failures(directory.storage) == ([], [])
    assert_equal(directory, quiet)


def test_a_run_grows_by_methods_prompts_and_durations(quiet: RolloutRun, tmp_path: Path) -> None:
    directory = RolloutRun(str(tmp_path))
    only_base = {"base": METHODS["base"]}
    make.do_all(directory, make_config(tmp_path, methods=only_base, durations_s=[1.5]), PROMPTS[:1])
    assert len(directory.commits()) == 1
    grown = Recorder()
    assert evaluate(make_config(tmp_path), PROMPTS, listener=grown).commits_made == 11
    assert_equal(directory, quiet)
    continued = [(folder, result) for folder, result in grown.rollouts() if result.blocks_resumed]
    assert [(folder.split("/")[2], result.blocks_resumed, result.blocks_generated) for folder, result in continued] == [
        ("base", 2, 2)
    ]
    with pytest.raises(IdentityError, match=r"run\.seed"):
        evaluate(make_config(tmp_path, run={"uri": str(tmp_path), "seed": 1}), PROMPTS)


def test_a_killed_worker_costs_nothing_but_time(cluster: None, tmp_path: Path) -> None:
    """SIGKILL to the actor's own process as soon as it has stored a part that no commit names."""
    opened, gate = Gate(tmp_path / "open", opened=True), Gate(tmp_path / "gate")
    rag: dict[str, Any] = {"methods": {"rag": METHODS["rag"]}, "engine": {"actors": 1}}
    undisturbed = quiet_run(long_config(tmp_path / "undisturbed", None, 1, [opened], **rag))
    config = long_config(tmp_path / "disturbed", None, 1, [gate], **rag)
    directory, recorder = RolloutRun(config.run.uri), Recorder()
    killed: list[int] = []

    def kill() -> None:
        try:
            wait_until(lambda: bool(open_parts(directory)))
            (actor,) = filter(is_at_work, actors_below(os.getpid()))
            actor.kill()
            killed.append(actor.pid)
        finally:
            gate.open()

    thread = threading.Thread(target=kill)
    thread.start()
    outcome = evaluate(config, listener=recorder)
    thread.join()
    assert len(killed) == 1 and len(recorder.of(WorkerLost)) == 1
    assert outcome.exit_code == 0
    assert [(event.failure.kind, event.failure.counted) for event in recorder.of(AttemptFailed)] == [("death", False)]
    assert sum(result.blocks_resumed > 0 for _, result in recorder.rollouts()) == 1
    same_results(directory, undisturbed)


def test_an_address_that_cannot_be_written_is_refused_before_any_actor(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    recorder = Recorder()
    with pytest.raises(StorageError, match=r"cannot read .*Not a directory"):
        evaluate(make_config(tmp_path / "file" / "run", encoded=False), PROMPTS, listener=recorder)
    assert recorder.of(StageBegan) == []


@pytest.mark.proof
def test_a_driver_is_interrupted_and_killed_and_the_run_ends_with_the_same(cluster: None, tmp_path: Path) -> None:
    opened = [Gate(tmp_path / f"open-{number}", opened=True) for number in range(2)]
    undisturbed = quiet_run(long_config(tmp_path / "undisturbed", None, 1, opened))
    gates = [Gate(tmp_path / f"gate-{number}", behind_commit=True) for number in range(2)]
    config = long_config(tmp_path / "disturbed", None, 1, gates, engine={"actors": 1})
    path, directory = write_config(tmp_path / "config.yaml", config), RolloutRun(config.run.uri)

    def in_the_middle(of: Driver) -> list[psutil.Process]:
        """Wait for the next commit, after which a gate is closed; all processes of the driver."""
        before = len(directory.commits())
        of.wait_until(lambda: len(directory.commits()) > before)
        return psutil.Process(of.process.pid).children(recursive=True)

    with driver(path) as interrupted:
        started = in_the_middle(interrupted)
        interrupted.process.send_signal(signal.SIGINT)
        # The rollout at the gate stores nothing before it opens.
        interrupted.wait_until(lambda: "again ends them now" in interrupted.text)
        interrupted.process.send_signal(signal.SIGINT)
        assert interrupted.wait() == 130
        assert "Traceback" not in interrupted.text and "the same command continues" in interrupted.text
    wait_for_end(started)
    done = len(directory.commits())

    gates[0].open()
    with driver(path) as killed:
        started = in_the_middle(killed)
        killed.process.kill()
        killed.wait()
    for process in psutil.wait_procs(started, timeout=5)[1]:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    assert 1 <= done < len(directory.commits()) < len(undisturbed.commits())

    gates[1].open()
    outcome = evaluate(config)
    assert (outcome.exit_code, outcome.commits_total) == (0, len(undisturbed.commits()))
    same_results(directory, undisturbed)


def test_a_repair_makes_again_what_is_damaged_and_touches_nothing_else(finished: RolloutRun) -> None:
    run, folder = finished, Path(finished.uri)
    expected = digests(run.commits())

    def files() -> dict[Path, tuple[bytes, int]]:
        found = (path for path in folder.rglob("*") if path.is_file() and path.parent.name != "lease")
        return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in found}

    before = files()
    in_place = [next(folder.glob("rollouts/tiny/base/*/attempt-*/part-00000-*.safetensors"))]
    in_place += [
        sorted(folder.glob("rollouts/tiny/rag/*/attempt-*/*.trace.parquet"))[0],
        next(folder.glob("embeddings/*/*")),
    ]
    anew = [sorted(folder.glob("rollouts/tiny/rag/*/commit-12.json"))[-1], folder / "run.json"]
    for path in [*in_place, *anew]:
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    assert {found.path for found in find_damage(run, Coverage())} == {
        str(path.relative_to(folder)) for path in [*in_place, *anew]
    }
    with pytest.raises(StorageError, match="--repair"):
        evaluate(make_config(folder), PROMPTS)
    outcome = evaluate(make_config(folder), PROMPTS, repair=True)
    assert (outcome.exit_code, outcome.missing, outcome.commits_made) == (0, {}, 1)
    assert list(find_damage(run, Coverage())) == []
    after = files()
    assert all(after[path][0] == before[path][0] for path in in_place)
    derived = {path for path in before if path.parent.name == "summary"} | {folder / "config.json"}
    untouched = before.keys() - {*in_place, *anew} - derived
    assert {path for path in untouched if after[path] != before[path]} == set()
    assert digests(run.commits()) == expected
