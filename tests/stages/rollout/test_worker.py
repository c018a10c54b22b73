from __future__ import annotations

import json
import threading
import traceback
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lrag_ray.config.schema import RunConfig
from lrag_ray.errors import StorageError, WeightsError
from lrag_ray.pipelines.identity import build_identity
from lrag_ray.stages.horizon_videos import HorizonVideos
from lrag_ray.stages.rollout.restore import Damaged
from lrag_ray.stages.rollout.worker import RolloutResult, RolloutStage, RolloutTask, RolloutWorker
from lrag_ray.stages.spec import LocalHost, Yielded
from lrag_ray.store.records import Commit, new_attempt_id
from lrag_ray.store.rollouts import RolloutRun
from lrag_ray.store.seal import opened_json
from lrag_ray.video.mp4 import read_video
from tests.stages.make import BACKBONE, METHODS, encode_texts, make_config, make_prompts, pending_tasks

CPU = f"cpu, torch {torch.__version__}, flash attention"
PROMPTS = make_prompts("a red fox in the snow")
DEEP = {"method": "deep_forcing", "window": 9, "budget": 9, "recent": 3, "sink": 3}
ROLLING = {"method": "rolling_forcing", "window": 9}


class Bench:
    """One run with one prompt and one method, worked on without Ray."""

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self.run = RolloutRun(config.run.uri)
        self.told: list[Any] = []
        self.identity = self.run.ensure(build_identity(config, PROMPTS))
        self.worker = self.open()

    def open(self, must_leave: Callable[[], bool] = lambda: False) -> RolloutWorker:
        return RolloutStage.of(self.run, self.config).open(LocalHost(self.told.append, must_leave))

    def tasks(self) -> list[RolloutTask]:
        self.identity = self.run.ensure(build_identity(self.config, PROMPTS))
        tasks = pending_tasks(self.run, self.identity)
        encode_texts(self.run, self.config, tasks)
        return tasks

    def work(self) -> RolloutResult:
        (task,) = self.tasks()
        result = self.worker.work(task, new_attempt_id())
        assert isinstance(result, RolloutResult)
        return result

    def commits(self) -> dict[int, Commit]:
        return {commit.latent_frames: commit for commit in self.run.commits()}


def bench(uri: Path, method: dict[str, Any] = METHODS["rag"], **changes: Any) -> Bench:
    return Bench(make_config(uri, methods={"m": method}, **changes))


@pytest.fixture(scope="module")
def quiet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    """The undisturbed run that the others must equal."""
    undisturbed = bench(tmp_path_factory.mktemp("quiet"))
    undisturbed.work()
    yield undisturbed


def test_every_horizon_is_committed_with_parts_trace_and_video(quiet: Bench) -> None:
    commits = quiet.commits()
    assert list(commits) == [6, 12]
    for frames, commit in commits.items():
        assert sum(part.frames for part in commit.latent_parts) == frames
        assert len(commit.trace_parts) == len(commit.latent_parts)
        assert commit.video is not None and commit.video_frames == 1 + 4 * (frames - 1)
        video = read_video(quiet.run.storage.full(commit.video.path))
        assert video.shape == (commit.video_frames, 32, 48, 3)
        assert {"load", "denoise", "context", "retrieval", "decode", "store"} <= commit.timings_s.keys()
    assert commits[6].latent_parts == commits[12].latent_parts[:1]
    assert quiet.tasks() == []
    assert {state.step for state in quiet.told} == {"loading", "generating"}


@pytest.mark.parametrize(
    "method", [METHODS["base"], METHODS["rag"], DEEP, ROLLING], ids=["base", "rag", "deep_forcing", "rolling_forcing"]
)
def test_an_attempt_that_dies_is_continued_from_its_parts_with_the_same_result(
    tmp_path: Path, method: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Lossless: x264 is not reproducible otherwise.
    lossless = {"crf": 0}
    whole = bench(tmp_path / "whole", method, durations_s=[4.5], video=lossless)
    whole.work()

    broken = bench(tmp_path / "broken", method, durations_s=[4.5], video=lossless)
    with monkeypatch.context() as patch:
        die_after(patch, parts=2)
        with pytest.raises(OSError, match="the disk is gone"):
            broken.work()
    assert broken.commits() == {}
    result = broken.work()
    assert (result.blocks_resumed, result.blocks_generated) == (4, 2)

    (expected,), (found,) = whole.commits().values(), broken.commits().values()
    assert found.latents_digest == expected.latents_digest
    assert [part.sha256 for part in found.latent_parts] == [part.sha256 for part in expected.latent_parts]
    assert [part.sha256 for part in found.trace_parts] == [part.sha256 for part in expected.trace_parts]
    assert found.video is not None and expected.video is not None
    frames = [read_video(b.run.storage.full(c.video.path)) for b, c in ((whole, expected), (broken, found))]  # type: ignore[union-attr]
    assert np.array_equal(frames[0], frames[1])
    assert len({part.path.split("/")[-2] for part in found.latent_parts}) == 2


def test_where_a_history_is_kept_changes_no_result_and_how_it_is_stored_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Quantised, spread over tiers, killed and continued from its parts."""
    digests = {}
    engine = {"checkpoint_every_blocks": 2}
    bank = {"host_gb": 4e-6, "disk": str(tmp_path)}
    for history, places in (("exact", {}), ("int4", {}), ("int4", {"bank": bank})):
        method = {**METHODS["rag"], "history": history}
        folder, video = tmp_path / f"{history}{len(places)}", {"enabled": False}
        made = bench(folder, method, durations_s=[4.5], video=video, engine={**engine, **places})
        if places:
            with monkeypatch.context() as patch:
                die_after(patch, parts=2)
                with pytest.raises(OSError, match="the disk is gone"):
                    made.work()
            assert made.work().blocks_resumed == 4
        else:
            made.work()
        (commit,) = made.commits().values()
        digests[history, bool(places)] = commit.latents_digest
    assert digests["int4", False] == digests["int4", True] != digests["exact", False]


def die_after(patch: pytest.MonkeyPatch, parts: int) -> None:
    """Let the storage fail when more than `parts` parts are to be written."""
    import lrag_ray.stages.rollout.block_writer as module

    real = module.write_part  # type: ignore[attr-defined]
    written: list[object] = []

    def write_part(*args: Any, **named: Any) -> Any:
        if len(written) == parts:
            raise OSError("the disk is gone")
        written.append(1)
        return real(*args, **named)

    patch.setattr(module, "write_part", write_part)


def test_a_worker_that_must_leave_stores_its_open_part_and_another_goes_on_from_there(
    tmp_path: Path, quiet: Bench
) -> None:
    """Asked between blocks; with two blocks per part the third block is in an open part."""
    run = bench(tmp_path)
    (task,) = run.tasks()
    made: list[int] = []

    def leave_after_three() -> bool:
        made[:] = [state.done for state in run.told if state.step == "generating"]
        return bool(made) and made[-1] == 3

    leaver = run.open(leave_after_three)
    yielded = leaver.work(task, new_attempt_id())
    assert isinstance(yielded, Yielded) and "it has stored 3 blocks" in yielded.reason
    assert list(run.commits()) == [6]
    result = run.work()
    assert (result.committed, result.blocks_resumed, result.blocks_generated) == ((12,), 3, 1)
    assert {f: c.latents_digest for f, c in run.commits().items()} == {
        f: c.latents_digest for f, c in quiet.commits().items()
    }
    assert [part.first_frame for part in run.commits()[12].latent_parts] == [0, 6, 9]


def test_a_worker_that_must_leave_at_once_does_nothing(tmp_path: Path) -> None:
    run = bench(tmp_path)
    (task,) = run.tasks()
    leaver = run.open(lambda: True)
    assert isinstance(leaver.work(task, new_attempt_id()), Yielded)
    assert not [path for path in run.run.storage.list_files() if "attempt-" in path]


def relabelled(run: Bench, device_kind: str) -> None:
    """Let the parts of a run be those of another kind of device."""
    for path in run.run.storage.list_files("rollouts"):
        if "/part-" in path and path.endswith(".json"):
            record = json.loads(opened_json(run.run.storage.read_bytes(path)))
            run.run.storage.write(path, json.dumps({**record, "device_kind": device_kind}).encode())


@pytest.mark.parametrize("resume_on", ["same_device_kind", "any"])
def test_parts_of_another_kind_of_device_are_continued_only_where_that_is_wanted(
    tmp_path: Path, resume_on: str
) -> None:
    run = bench(tmp_path, durations_s=[1.5])
    run.work()
    relabelled(run, "NVIDIA H100")
    grown = bench(tmp_path, resume={"on": resume_on})
    before = grown.run.storage.list_files("rollouts")
    result = grown.work()
    if resume_on == "any":
        assert (result.committed, result.blocks_resumed, result.blocks_generated) == ((12,), 2, 2)
        assert result.notes == ()
    else:
        assert (result.committed, result.blocks_resumed, result.blocks_generated) == ((12,), 0, 4)
        (note,) = result.notes
        assert f"parts made on NVIDIA H100 are left unused, this is {CPU} (resume.on: any" in note
    assert before.items() <= grown.run.storage.list_files("rollouts").items()
    assert grown.tasks() == []


@pytest.mark.parametrize(("former", "resumed"), [("cpu", 2), ("cpu, torch 2.9.0, flash attention", 0)])
def test_an_upgrade_of_torch_is_noticed_and_named(tmp_path: Path, former: str, resumed: int) -> None:
    """Parts of a version that recorded no torch are continued from, as before."""
    run = bench(tmp_path, durations_s=[1.5])
    run.work()
    relabelled(run, former)
    result = bench(tmp_path).work()
    assert (result.committed, result.blocks_resumed) == ((12,), resumed)
    assert len(result.notes) == (resumed == 0)
    assert all(f"parts made on {former} are left unused, this is {CPU}" in note for note in result.notes)


def test_another_kernel_of_attention_is_another_kind_of_device(tmp_path: Path) -> None:
    run = bench(tmp_path, durations_s=[1.5])
    run.work()
    result = bench(tmp_path, engine={"attention": "math"}).work()
    assert (result.committed, result.blocks_resumed) == ((12,), 0)
    assert "flash attention are left unused" in result.notes[0]


def test_a_lost_commit_of_another_kind_of_device_is_made_again_from_its_parts(tmp_path: Path) -> None:
    """Nothing is generated, so nothing is continued on another device."""
    run = bench(tmp_path)
    run.work()
    relabelled(run, "NVIDIA H100")
    lost = run.commits()[6]
    run.run.storage.remove(f"{lost.rollout.path}/commit-6.json")
    result = run.work()
    assert (result.committed, result.blocks_generated, result.notes) == ((6,), 0, ())
    assert run.commits()[6].latents_digest == lost.latents_digest


def test_a_run_begun_with_the_former_noise_goes_on_with_it(tmp_path: Path, quiet: Bench) -> None:
    begun = bench(tmp_path / "run").config
    wanted = build_identity(begun, PROMPTS)
    run = RolloutRun(str(tmp_path / "former"))
    run.ensure(wanted.model_copy(update={"noise": 1}))
    former = bench(tmp_path / "former")
    former.work()
    assert run.require().noise == 1 and run.continued(wanted).noise == 1
    assert former.commits()[6].latents_digest != quiet.commits()[6].latents_digest
    run.refuse_foreign_commits(run.continued(wanted), run.inventory())
    assert pending_tasks(run, run.continued(wanted)) == []


def test_a_failure_behind_has_its_own_traceback_and_commits_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Decoding fails in its own thread while the next block is generated."""
    run = bench(tmp_path)
    frames: list[int] = []
    real = HorizonVideos.add

    def add(videos: HorizonVideos, latents: torch.Tensor) -> None:
        assert threading.current_thread() is not threading.main_thread()
        frames.append(len(latents))
        if len(frames) == 2:
            raise OSError("no codec")
        real(videos, latents)

    monkeypatch.setattr(HorizonVideos, "add", add)
    with pytest.raises(OSError, match="no codec") as caught:
        run.work()
    assert "block_writer.py" in "".join(traceback.format_exception(caught.value))
    assert run.commits() == {}
    # The part was stored before its video was decoded.
    assert [path for path in run.run.storage.list_files() if path.endswith("part-00000-00006.json")]


def test_a_corrupt_part_is_cut_off_and_said(tmp_path: Path, quiet: Bench) -> None:
    damaged = bench(tmp_path)
    damaged.work()
    for commit in damaged.commits().values():
        damaged.run.storage.remove(f"{commit.rollout.path}/commit-{commit.latent_frames}.json")
    last = quiet.commits()[12].latent_parts[-1]
    (path,) = [p for p in damaged.run.storage.list_files() if p.endswith(last.path.rsplit("/", 1)[-1])]
    damaged.run.storage.write(path, b"\0" * last.size_bytes)
    result = damaged.work()
    assert (result.blocks_resumed, result.blocks_generated) == (2, 2)
    assert any(path in note and "cut back to frame 6" in note for note in result.notes)
    assert damaged.commits()[12].latents_digest == quiet.commits()[12].latents_digest


def test_a_deleted_commit_is_made_again_from_the_parts(tmp_path: Path, quiet: Bench) -> None:
    run = bench(tmp_path)
    run.work()
    kept = run.commits()[12]
    run.run.storage.remove(f"{kept.rollout.path}/commit-6.json")
    result = run.work()
    assert (result.committed, result.blocks_resumed, result.blocks_generated) == ((6,), 2, 0)
    assert run.commits()[12] == kept
    assert run.commits()[6].latents_digest == quiet.commits()[6].latents_digest


def test_a_longer_duration_continues_from_the_parts(tmp_path: Path) -> None:
    whole = bench(tmp_path / "whole", durations_s=[1.5, 3, 6])
    whole.work()
    bench(tmp_path / "grown").work()
    grown = bench(tmp_path / "grown", durations_s=[1.5, 3, 6])
    result = grown.work()
    assert (result.committed, result.blocks_resumed, result.blocks_generated) == ((24,), 4, 4)
    assert {f: c.latents_digest for f, c in grown.commits().items()} == {
        f: c.latents_digest for f, c in whole.commits().items()
    }


def test_a_duration_inside_a_stored_part_is_cut_exactly(tmp_path: Path) -> None:
    bench(tmp_path, durations_s=[3], engine={"checkpoint_every_blocks": 8}).work()
    grown = bench(tmp_path, durations_s=[1.5, 3])
    result = grown.work()
    assert (result.committed, result.blocks_generated) == ((6,), 0)
    commits = grown.commits()
    assert [(part.first_frame, part.frames) for part in commits[6].latent_parts] == [(0, 6)]
    assert [(part.first_frame, part.frames) for part in commits[12].latent_parts] == [(0, 12)]


def test_independent_durations_are_rollouts_of_their_own(tmp_path: Path, quiet: Bench) -> None:
    alone = bench(tmp_path, independent_durations=True)
    tasks = alone.tasks()
    assert [task.horizons for task in tasks] == [(6,), (12,)]
    assert len({task.rollout_key for task in tasks}) == 2
    for task in tasks:
        alone.worker.work(task, new_attempt_id())
    assert alone.tasks() == []
    # Both methods at hand are horizon-free, so the latents are those of the nested run.
    assert {f: c.latents_digest for f, c in alone.commits().items()} == {
        f: c.latents_digest for f, c in quiet.commits().items()
    }


def test_durations_of_rolling_windows_are_rollouts_of_their_own_and_can_be_restored(tmp_path: Path) -> None:
    """Given a part that is lost in the middle, its gap is made again from the noisy latents stored before it."""
    rolling = bench(tmp_path, ROLLING)
    tasks = rolling.tasks()
    assert [task.horizons for task in tasks] == [(6,), (12,)]
    for task in tasks:
        rolling.worker.work(task, new_attempt_id())
    commits = rolling.commits()
    assert commits[6].latent_parts[0].sha256 != commits[12].latent_parts[0].sha256
    lost = frozenset({commits[12].latent_parts[1].path, commits[12].trace_parts[1].path})
    before = {path: rolling.run.storage.read_bytes(path) for path in lost}
    for path in lost:
        rolling.run.storage.write(path, b"lost")
    damaged = Damaged(commits=(commits[12],), paths=lost)
    result = rolling.worker.work(replace(tasks[1], damaged=damaged), new_attempt_id())
    assert isinstance(result, RolloutResult) and result.restored is not None
    assert result.restored.paths == tuple(sorted(lost))
    assert {path: rolling.run.storage.read_bytes(path) for path in lost} == before


def test_of_two_attempts_the_first_commit_stands(tmp_path: Path) -> None:
    run = bench(tmp_path)
    (task,) = run.tasks()
    first = run.worker.work(task, "first")
    again = run.worker.work(task, "second")
    assert isinstance(first, RolloutResult) and isinstance(again, RolloutResult)
    assert (first.committed, again.committed) == ((6, 12), ())
    assert {commit.attempt for commit in run.commits().values()} == {"first"}


def test_a_commit_that_came_to_harm_meanwhile_is_not_taken_for_done(tmp_path: Path) -> None:
    run = bench(tmp_path)
    (task,) = run.tasks()
    run.run.storage.write(f"{task.rollout.path}/commit-12.json", b"{}")
    with pytest.raises(StorageError, match="a commit for 12 frames that does not count"):
        run.worker.work(task, "first")
    (state,) = run.run.inventory().problems()
    run.run.set_aside(state.path)
    assert run.work().blocks_generated == 0 and run.commits().keys() == {6, 12}


def test_a_prompt_can_be_made_to_fail(tmp_path: Path) -> None:
    run = bench(tmp_path, backbones={"tiny": {**BACKBONE, "fail_on_prompt": "red fox"}})
    with pytest.raises(RuntimeError, match="fail_on_prompt: the prompt contains 'red fox'"):
        run.work()


def test_decoding_as_released_has_fewer_frames_and_the_same_latents(tmp_path: Path, quiet: Bench) -> None:
    """Given cold chunks of 4 latent frames and a bfloat16 VAE, each chunk begins with one video frame."""
    backbone = {**BACKBONE, "vae": {"kind": "tiny", "dtype": "bfloat16"}}
    cold = bench(tmp_path, backbones={"tiny": backbone}, video={"cold_chunk": 4})
    cold.work()
    commits = cold.commits()
    assert {horizon: commit.video_frames for horizon, commit in commits.items()} == {6: 13 + 5, 12: 3 * 13}
    assert commits[12].latents_digest == quiet.commits()[12].latents_digest
    video = commits[6].video
    assert video is not None and len(read_video(cold.run.storage.full(video.path))) == 18


def test_without_video_no_file_is_named(tmp_path: Path, quiet: Bench) -> None:
    run = bench(tmp_path, video={"enabled": False})
    run.work()
    assert {(c.video, c.video_frames) for c in run.commits().values()} == {(None, 0)}
    assert run.commits()[12].latents_digest == quiet.commits()[12].latents_digest


def test_other_weights_on_a_node_are_refused(tmp_path: Path) -> None:
    run = bench(tmp_path)
    (task,) = run.tasks()
    with pytest.raises(WeightsError, match="Put the same files on every node"):
        run.worker.work(replace(task, weights_digest="another"), new_attempt_id())
