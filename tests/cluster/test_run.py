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


def test_a_second_start_does_nothing_and_a_deleted_commit_is_made_again(quiet: RolloutRun, tmp_path: Path) -> None:
    config = make_config(tmp_path)
    assert evaluate(config, PROMPTS[:1]).commits_made == 4
    directory = RolloutRun(str(tmp_path))
    before = directory.storage.list_files("rollouts")
    again = Recorder()
    outcome = evaluate(config, PROMPTS[:1], listener=again)
    assert (outcome.exit_code, outcome.commits_made) == (0, 0)
    assert not {"connect", "text", "rollouts", "scoring"} & {event.stage for event in again.of(StageBegan)}
    assert directory.storage.list_files("rollouts") == before

    victim = directory.commits()[-1]
    directory.storage.remove(f"{victim.rollout.path}/commit-{victim.latent_frames}.json")
    redone = Recorder()
    outcome = evaluate(config, PROMPTS[:1], listener=redone)
    assert outcome.commits_made == 1
    assert [(folder, result.committed) for folder, result in redone.rollouts()] == [
        (victim.rollout.path, (victim.latent_frames,))
    ]
    after = directory.storage.list_files("rollouts")
    del before[f"{victim.rollout.path}/commit-{victim.latent_frames}.json"]
    assert before.items() <= after.items()
    assert digests(directory.commits()).items() <= digests(quiet.commits()).items()


def test_a_poisoned_prompt_is_quarantined_and_the_rest_finishes(tmp_path: Path) -> None:
    config = make_config(tmp_path, backbones={"tiny": {**BACKBONE, "fail_on_prompt": "river"}}, durations_s=[1.5])
    outcome = evaluate(config, PROMPTS[:2])
    assert (outcome.exit_code, outcome.commits_made) == (1, 2)
    assert {rollout.prompt_id for rollout in outcome.failed} == {PROMPTS[1].prompt_id}
    assert outcome.missing.keys() == {rollout.path for rollout in outcome.failed}
    directory = RolloutRun(str(tmp_path))
    failures, _ = read_failures(directory.storage)
    assert [failure.counted_attempts for failure in failures if "/rag/" in failure.task] == [1, 2, 3]
    assert all("fail_on_prompt: the prompt contains 'river'" in failure.reason for failure in failures)
    assert all("rollout/worker.py" in failure.traceback and "line" in failure.traceback for failure in failures)
    status = run_status(directory)
    assert {(cell.method, cell.done, cell.failed) for cell in status.cells} == {("base", 1, 1), ("rag", 1, 1)}

    fixed = evaluate(make_config(tmp_path, durations_s=[1.5]), PROMPTS[:2])
    assert (fixed.exit_code, fixed.commits_made, fixed.missing) == (0, 2, {})
    assert run_status(directory).failures == []
    assert read_failures(directory.storage) == ([], [])


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


def test_an_encoder_of_prompts_that_cannot_live_ends_the_run_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(tmp_path, encoded=False, durations_s=[1.5], methods={"base": METHODS["base"]})
    full = "MemoryError.*the host memory of the node is full"
    for stage, reason in ((Deadly, "ActorDiedError: .*"), (Full, full)):
        monkeypatch.setattr("lrag_ray.pipelines.text_features.TextStage", stage)
        with pytest.raises(ClusterError, match=f"the prompts cannot be encoded: {reason}.*The same command continues"):
            evaluate(config, PROMPTS[:1])
        assert RolloutRun(str(tmp_path)).commits() == []
    monkeypatch.undo()
    assert evaluate(config, PROMPTS[:1]).exit_code == 0
    assert read_failures(RolloutRun(str(tmp_path)).storage) == ([], [])


def test_a_prompt_that_cannot_be_encoded_costs_its_own_rollouts_alone(
    quiet: RolloutRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, directory = make_config(tmp_path, encoded=False), RolloutRun(str(tmp_path))
    poisoned = PROMPTS[1].prompt_id
    monkeypatch.setattr("lrag_ray.pipelines.text_features.TextStage", Picky)
    outcome = evaluate(config, PROMPTS)
    assert (outcome.exit_code, outcome.commits_made) == (1, 8)
    assert {commit.rollout.prompt_id for commit in directory.commits()} == {PROMPTS[0].prompt_id, PROMPTS[2].prompt_id}
    assert {(rollout.method, rollout.prompt_id) for rollout in outcome.failed} == {
        ("base", poisoned),
        ("rag", poisoned),
    }
    title = f"prompt {poisoned} of tiny"
    assert outcome.missing == {
        title: "ValueError: no tokens for rivers",
        **{rollout.path: "its prompt could not be encoded" for rollout in outcome.failed},
    }
    (failure,) = run_status(directory).failures
    assert (failure.stage, failure.task, failure.kind, failure.counted_attempts) == ("text", title, "exception", 3)

    monkeypatch.undo()
    outcome = evaluate(config, PROMPTS)
    assert (outcome.exit_code, outcome.commits_made, outcome.missing) == (0, 4, {})
    assert run_status(directory).failures == []
    assert read_failures(directory.storage) == ([], [])
    assert_equal(directory, quiet)


def test_a_run_grows_by_methods_prompts_and_durations(quiet: RolloutRun, tmp_path: Path) -> None:
    directory = RolloutRun(str(tmp_path))
    only_base = {"base": METHODS["base"]}
    assert evaluate(make_config(tmp_path, methods=only_base, durations_s=[1.5]), PROMPTS[:1]).commits_made == 1
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
    undisturbed = quiet_run(long_config(tmp_path / "undisturbed", None, 1, [Gate(tmp_path / "open", opened=True)]))
    gate = Gate(tmp_path / "gate")
    config = long_config(tmp_path / "disturbed", None, 1, [gate], engine={"actors": 1})
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


def test_a_commit_whose_file_is_gone_is_set_aside_and_made_again(tmp_path: Path) -> None:
    config = make_config(tmp_path, durations_s=[1.5], methods={"base": METHODS["base"]})
    assert evaluate(config, PROMPTS[:1]).exit_code == 0
    directory = RolloutRun(str(tmp_path))
    (victim,) = directory.commits()
    directory.storage.remove(victim.trace_parts[0].path)
    recorder = Recorder()
    assert evaluate(config, PROMPTS[:1], listener=recorder).commits_made == 1
    assert any("is missing" in notice.text and notice.warning for notice in recorder.of(Notice))
    assert any(".json.invalid-" in path for path in directory.storage.list_files("rollouts"))
    (again,) = directory.commits()
    assert again.latents_digest == victim.latents_digest
    assert [part.sha256 for part in again.trace_parts] == [part.sha256 for part in victim.trace_parts]


def test_an_address_that_cannot_be_written_is_refused_before_any_actor(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    recorder = Recorder()
    with pytest.raises(StorageError, match=r"cannot read .*Not a directory"):
        evaluate(make_config(tmp_path / "file" / "run", encoded=False), PROMPTS, listener=recorder)
    assert recorder.of(StageBegan) == []


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


def test_a_repair_makes_again_what_is_damaged_and_touches_nothing_else(quiet: RolloutRun, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(quiet.uri, folder)
    run = RolloutRun(str(folder))
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
