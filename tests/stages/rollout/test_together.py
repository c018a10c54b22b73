"""Several rollouts in the same passes, worked on without Ray."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lrag_ray.pipelines.identity import build_identity
from lrag_ray.stages.rollout.joint import placed
from lrag_ray.stages.rollout.restore import Damaged
from lrag_ray.stages.rollout.worker import RolloutResult, RolloutStage, RolloutTask, RolloutWorker
from lrag_ray.stages.spec import LocalHost, Parted, Yielded
from lrag_ray.store.embeddings import write_embedding
from lrag_ray.store.records import Commit, new_attempt_id
from lrag_ray.store.rollouts import RolloutRun
from lrag_ray.wan.keyed import keyed_generator
from tests.stages.make import METHODS, make_config, make_prompts, pending_tasks
from tests.stages.rollout.test_worker import DEEP, ROLLING, die_after

PROMPTS = make_prompts("a red fox in the snow", "an owl at night", "a bear that fishes")
FOX, OWL, BEAR = range(3)
BOTH = f"cpu, torch {torch.__version__}, flash attention, 2 prompts per pass"


class Shared:
    """A run of three prompts, one method and six blocks."""

    def __init__(self, uri: Path, method: dict[str, Any] = METHODS["rag"], rows: int = 2, **changes: Any) -> None:
        engine = {"checkpoint_every_blocks": 2, "prompts_per_pass": rows}
        changes = {"durations_s": [4.5], "video": {"enabled": False}, **changes}
        self.config = make_config(uri, methods={"m": method}, engine=engine, **changes)
        self.run = RolloutRun(str(uri))
        self.identity = self.run.ensure(build_identity(self.config, PROMPTS))
        self.tasks = {self.place(task): task for task in pending_tasks(self.run, self.identity)}
        self.reported: list[Any] = []
        for task in self.tasks.values():
            features = torch.randn(8, 8, generator=keyed_generator("text", task.prompt))
            write_embedding(self.run.storage, task.text_digest, task.prompt, features)

    def place(self, of: RolloutTask | Commit) -> int:
        return self.identity.prompts[of.rollout.prompt_id].index

    def worker(self, must_leave: Callable[[], bool] = lambda: False) -> RolloutWorker:
        return RolloutStage.of(self.run, self.config).open(LocalHost(self.reported.append, must_leave))

    def together(self, *prompts: int, worker: RolloutWorker | None = None) -> list[Any]:
        tasks = [self.tasks[prompt] for prompt in prompts]
        return list((worker or self.worker()).work_together(tasks, [new_attempt_id() for _ in tasks]))

    def commits(self) -> dict[int, Commit]:
        return {self.place(commit): commit for commit in self.run.commits()}

    def bits(self, prompt: int) -> list[tuple[str, str]]:
        commit = self.commits()[prompt]
        return [(a.sha256, b.sha256) for a, b in zip(commit.latent_parts, commit.trace_parts, strict=True)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shared]:
    """Fox and owl, undisturbed."""
    undisturbed = Shared(tmp_path_factory.mktemp("whole"))
    undisturbed.together(FOX, OWL)
    yield undisturbed


def made(outcomes: Sequence[Any]) -> list[tuple[int, int, int]]:
    """(commits, blocks resumed, blocks generated) of each."""
    assert all(isinstance(outcome, RolloutResult) for outcome in outcomes), outcomes
    return [(outcome.made, outcome.blocks_resumed, outcome.blocks_generated) for outcome in outcomes]


@pytest.mark.parametrize(
    "method", [METHODS["base"], METHODS["rag"], DEEP, ROLLING], ids=["base", "rag", "deep_forcing", "rolling_forcing"]
)
def test_a_rollout_is_the_same_alone_or_beside_any_other(tmp_path: Path, method: dict[str, Any]) -> None:
    pair, others = Shared(tmp_path / "pair", method), Shared(tmp_path / "others", method)
    assert made(pair.together(FOX, OWL)) == [(1, 0, 6)] * 2
    assert made([*others.together(FOX), *others.together(BEAR, OWL)]) == [(1, 0, 6)] * 3
    for prompt, row in ((FOX, 0), (OWL, 1)):
        assert pair.commits()[prompt].device_kind == others.commits()[prompt].device_kind == f"{BOTH}, row {row}"
        assert pair.bits(prompt) == others.bits(prompt)
    assert len({commit.latents_digest for commit in others.commits().values()}) == 3
    assert len({commit.attempt for commit in pair.commits().values()}) == 2


def test_after_a_death_each_goes_on_in_its_row_beside_whatever_is_there(
    tmp_path: Path, whole: Shared, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Given one that has stored four blocks and one that has two; a third one begins beside the first."""
    broken = Shared(tmp_path)
    with monkeypatch.context() as patch:
        die_after(patch, parts=3)
        with pytest.raises(OSError, match="the disk is gone"):
            broken.together(FOX, OWL)
    assert broken.commits() == {}
    assert made(broken.together(FOX, BEAR)) == [(1, 4, 2), (1, 0, 6)]
    assert made(broken.together(OWL)) == [(1, 2, 4)]
    assert [broken.bits(prompt) for prompt in (FOX, OWL)] == [whole.bits(prompt) for prompt in (FOX, OWL)]


def test_one_that_is_done_leaves_its_row_to_nobody(tmp_path: Path, whole: Shared) -> None:
    run = Shared(tmp_path)
    run.together(FOX)
    assert made(run.together(FOX, OWL)) == [(0, 0, 0), (1, 0, 6)]
    assert run.bits(FOX) == whole.bits(FOX)
    assert run.commits()[OWL].device_kind == f"{BOTH}, row 0"


def test_those_that_cannot_be_done_together_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two that were begun in the same row, and two of different lengths; the first of them is made."""
    run = Shared(tmp_path, durations_s=[1.5, 4.5])
    for prompt in (FOX, OWL):
        with monkeypatch.context() as patch:
            die_after(patch, parts=1)
            with pytest.raises(OSError, match="the disk is gone"):
                run.together(prompt)
    first, parted = run.together(FOX, OWL)
    assert parted == Parted("it was begun in the same row of a pass as another rollout")
    run.tasks[BEAR] = replace(run.tasks[BEAR], horizons=(6,))
    first, parted = run.together(OWL, BEAR)
    assert made([first]) == [(1, 2, 4)] and isinstance(parted, Parted) and "it ends elsewhere than" in parted.reason


def test_parts_of_passes_of_another_size_are_left_alone_unless_any_will_do(
    tmp_path: Path, whole: Shared, monkeypatch: pytest.MonkeyPatch
) -> None:
    single = Shared(tmp_path, rows=1)
    with monkeypatch.context() as patch:
        die_after(patch, parts=1)
        with pytest.raises(OSError, match="the disk is gone"):
            single.together(FOX)
    (result, _) = Shared(tmp_path).together(FOX, OWL)
    assert made([result]) == [(1, 0, 6)] and "flash attention are left unused" in result.notes[0]
    assert Shared(tmp_path).bits(FOX) == whole.bits(FOX)
    single.run.storage.remove(f"{single.commits()[FOX].rollout.path}/commit-18.json")
    any_kind = Shared(tmp_path, resume={"on": "any"})
    first, parted = any_kind.together(FOX, BEAR)
    assert made([first])[0][1] > 0 and isinstance(parted, Parted) and "another block" in parted.reason


def test_a_worker_that_must_leave_stores_what_all_have(tmp_path: Path, whole: Shared) -> None:
    run = Shared(tmp_path)

    def leave_after_three() -> bool:
        return any(state.step == "generating" and state.done == 3 for state in run.reported)

    outcomes = run.together(FOX, OWL, worker=run.worker(leave_after_three))
    assert [isinstance(each, Yielded) and "has stored 3 blocks" in each.reason for each in outcomes] == [True, True]
    assert made(run.together(OWL, FOX)) == [(1, 3, 3)] * 2
    digests = [[each.commits()[prompt].latents_digest for prompt in (FOX, OWL)] for each in (run, whole)]
    assert digests[0] == digests[1]


def test_damaged_files_are_made_again_in_the_row_that_made_them(tmp_path: Path) -> None:
    run = Shared(tmp_path)
    run.together(FOX, OWL)
    commit = run.commits()[OWL]
    lost = commit.latent_parts[1].path
    before = run.run.storage.read_bytes(lost)
    run.run.storage.write(lost, b"lost")
    damaged = Damaged(commits=(commit,), paths=frozenset({lost}))
    result = run.worker().work(replace(run.tasks[OWL], damaged=damaged), new_attempt_id())
    assert isinstance(result, RolloutResult) and result.restored is not None
    assert result.restored.paths == (lost,) and run.run.storage.read_bytes(lost) == before


def test_rows_are_kept_and_the_others_filled() -> None:
    assert placed([None, None], 2) == [0, 1]
    assert placed([1, None, None], 3) == [1, 0, 2]
    assert placed([None, 0, 0], 3) == [1, 0, None]
    assert placed([1, 1], 2) == [1, None]
