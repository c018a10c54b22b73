"""The public Python API: its names and signatures are frozen, and importing it costs nothing."""

from __future__ import annotations

import inspect
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import lrag_ray as lr
from lrag_ray.errors import StorageError, UsageError
from lrag_ray.scoring.preview.suite import PREVIEW
from lrag_ray.store.rollouts import RolloutRun
from tests.report.make_run import HORIZONS, make_run, score_all

FUNCTIONS = {
    "load_config": "(path: 'str | Path', overrides: 'Sequence[str]' = ()) -> 'JobConfig'",
    "plan": "(config: 'JobConfig', prompts: 'Sequence[Prompt] | None' = None) -> 'Plan | TrainingPlan'",
    "run": "(config: 'JobConfig | str | Path', prompts: 'Sequence[Prompt] | None' = None, *, "
    "listener: 'Listener' = <function silent>) -> 'JobOutcome'",
    "score": "(target: 'str', *, config: 'RunConfig | None' = None, overrides: 'Sequence[str]' = (), "
    "manifest: 'str | None' = None, to: 'str | None' = None, listener: 'Listener' = <function silent>) "
    "-> 'RunScores | VideoScores'",
    "progress": "() -> 'Iterator[Listener]'",
    "write_report": "(runs: 'str | Sequence[str] | Mapping[str, str]', *, to: 'str | None' = None, "
    "suite: 'str | None' = None, mode: 'str | None' = None, strips: 'int | None' = None) -> 'Report'",
    "prepare": "(config: 'JobConfig | str | Path') -> 'Preparation'",
    "submit": "(config: 'JobConfig | str | Path | Preparation', *, address: 'str | None' = None, "
    "upload: 'bool' = True, python: 'str' = 'python', listener: 'Listener' = <function silent>) -> 'SubmittedJob'",
    "jobs": "(address: 'str | None' = None, *, listener: 'Listener' = <function silent>) -> 'list[SubmittedJob]'",
    "find_job": "(name: 'str', *, address: 'str | None' = None, listener: 'Listener' = <function silent>) "
    "-> 'SubmittedJob'",
    "follow_job": "(job: 'SubmittedJob', *, storage: 'StorageSection | None' = None, "
    "listener: 'Listener' = <function silent>) -> 'JobEnd'",
    "job_log": "(job: 'SubmittedJob') -> 'str'",
    "stop_job": "(job: 'SubmittedJob', *, listener: 'Listener' = <function silent>) -> 'JobEnd'",
    "open_run": "(uri: 'str | Path', storage: 'StorageSection | None' = None) -> 'Run'",
}
METHODS = {
    "status": "(self) -> 'RunStatus'",
    "scores": "(self, suite: 'str | None' = None, mode: 'str | None' = None) -> 'pd.DataFrame'",
    "ranks": "(self, suite: 'str | None' = None, mode: 'str | None' = None) -> 'pd.DataFrame'",
    "videos": "(self, *, prompt: 'str | None' = None, method: 'str | None' = None, backbone: 'str | None' = None, "
    "duration_s: 'float | None' = None) -> 'list[Video]'",
    "latents": "(self, *, prompt: 'str | None' = None, method: 'str | None' = None, backbone: 'str | None' = None) "
    "-> 'Iterator[tuple[RolloutId, Tensor]]'",
}
PROMPTS = ("a red fox in the snow", "rain on a tin roof")
PROGRAM = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "typer":
            raise ModuleNotFoundError("No module named 'typer'", name="typer")
sys.meta_path.insert(0, Refuse())
from lrag_ray.__main__ import main
main()
"""


def _plain(text: str) -> str:
    """A signature without the addresses of its defaults."""
    return re.sub(r" at 0x[0-9a-f]+>", ">", text)


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> RolloutRun:
    """Two prompts, two methods, two durations: committed and scored."""
    return score_all(make_run(str(tmp_path_factory.mktemp("api") / "run"), PROMPTS))


def test_the_names_are_frozen() -> None:
    assert sorted(lr.__all__) == sorted([*FUNCTIONS, "Dataset", "Run", "NUMERICS_VERSION", "__version__"])
    assert dir(lr) == sorted(lr.__all__)
    public = {name for name, _ in inspect.getmembers(lr.Run) if not name.startswith("_")}
    assert public == {*METHODS, "uri"}


def test_a_dataset_of_a_run_is_a_torch_dataset(finished: RolloutRun) -> None:
    assert str(inspect.signature(lr.Dataset.from_run)) == (
        "(uri: 'str', *more_uris: 'str', window: 'int | None' = None, storage: 'StorageSection | None' = None) "
        "-> 'Self'"
    )
    whole, windows = lr.Dataset.from_run(finished.uri), lr.Dataset.from_run(finished.uri, window=5)
    assert isinstance(whole, torch.utils.data.Dataset)
    frames = whole.latents.frames.tolist()
    assert len(whole) == len(frames) and len(windows) == sum(each - 4 for each in frames)
    loader = torch.utils.data.DataLoader(windows, batch_size=7)
    assert sum(batch.shape[0] for batch in loader) == len(windows)
    for index in (0, frames[0] - 5, frames[0] - 4, len(windows) - 1):
        rollout, start = windows.place(index)
        assert torch.equal(windows[index], whole[rollout][start : start + 5])
    assert windows.place(frames[0] - 4) == (1, 0) and windows.place(-1) == (len(frames) - 1, frames[-1] - 5)
    with pytest.raises(IndexError):
        windows[len(windows)]
    with pytest.raises(UsageError, match="fewer latent frames than a window of 1000"):
        lr.Dataset.from_run(finished.uri, window=1000)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_are_frozen(name: str) -> None:
    assert _plain(str(inspect.signature(getattr(lr, name)))) == FUNCTIONS[name]


@pytest.mark.parametrize("name", METHODS)
def test_methods_of_a_run_are_frozen(name: str) -> None:
    assert _plain(str(inspect.signature(getattr(lr.Run, name)))) == METHODS[name]


def test_a_name_that_is_not_there_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'rum'"):
        lr.rum  # noqa: B018


def test_importing_is_lazy() -> None:
    heavy = ("torch", "ray", "pydantic", "pandas", "typer", "numpy")
    done = python("-c", f"import sys, lrag_ray; dir(lrag_ray); print([m for m in {heavy} if m in sys.modules])")
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr


def test_the_package_is_a_program() -> None:
    done = python("-m", "lrag_ray", "--help")
    assert done.returncode == 0, done.stderr
    assert "doctor" in done.stdout and "Exit codes" in done.stdout


def test_without_the_extra_the_program_names_it() -> None:
    done = python("-c", PROGRAM)
    assert done.returncode == 3
    assert "typer" in done.stderr and "pip install 'lrag-ray[run]'" in done.stderr
    assert "Traceback" not in done.stderr


def test_status(finished: RolloutRun) -> None:
    status = lr.open_run(finished.uri).status()
    assert status.done
    assert status.failures == []


def test_scores(finished: RolloutRun) -> None:
    table = lr.open_run(finished.uri).scores()
    assert list(table.columns) == [
        "prompt_id", "prompt", "sample", "backbone", "method", "duration_s", "dimension", "value",
    ]  # fmt: skip
    assert set(table["prompt"]) == set(PROMPTS)
    assert set(table["method"]) == {"base", "rag"}
    assert set(table["duration_s"]) == {frames / 4 for frames in HORIZONS}
    assert set(table["dimension"]) == {measure.name for measure in (*PREVIEW.measures, *PREVIEW.unranked)}
    assert len(table) == 2 * 2 * 2 * len(PREVIEW.measures) + 2 * 2 * 2, "a value of each, and the flow discontinuity"
    assert table["value"].notna().all()


def test_ranks(finished: RolloutRun) -> None:
    table = lr.open_run(finished.uri).ranks()
    assert {"backbone", "duration_s", "method", "average_rank", "prompts"} <= set(table.columns)
    assert len(table) == 2 * 2
    assert set(table["prompts"]) == {2}
    # Two methods share ranks 1 and 2, so that the mean of both is 1.5 at every duration.
    assert table.groupby("duration_s")["average_rank"].mean().tolist() == [1.5, 1.5]


def test_videos_by_prompt_and_method(finished: RolloutRun) -> None:
    run = lr.open_run(Path(finished.uri))
    assert len(run.videos()) == 8
    found = run.videos(prompt="red FOX", method="rag")
    assert [(video.prompt, video.method, video.duration_s) for video in found] == [
        (PROMPTS[0], "rag", frames / 4) for frames in HORIZONS
    ]
    assert [video.frames for video in found] == [1 + 4 * (frames - 1) for frames in HORIZONS]
    assert all(Path(video.address).is_file() for video in found)
    assert [video.duration_s for video in run.videos(prompt="fox", method="rag", duration_s=3.0)] == [3.0]
    assert run.videos(prompt=found[0].prompt_id, backbone="tiny", method="base") != []
    assert run.videos(method="deep_forcing") == []


def test_refined_prompts_and_their_originals(tmp_path: Path) -> None:
    """A prompt that a model refined and one that stays, as identity, videos and scores show them."""
    run = make_run(str(tmp_path / "run"), ["A red fox runs over fresh snow.", "rain"], ["base"], HORIZONS[:1])
    identity = run.require()
    first = next(iter(identity.prompts))
    origin = {"original": "ein Fuchs", "refined_by": "m (openai), template extend"}
    prompts = {**identity.prompts, first: identity.prompts[first].model_copy(update=origin)}
    (tmp_path / "run" / "run.json").write_bytes(identity.model_copy(update={"prompts": prompts}).sealed())
    score_all(run)
    opened = lr.open_run(run.uri)
    assert opened.identity.prompts[first].refined_by == "m (openai), template extend"
    pairs = [(video.prompt, video.original_prompt) for video in opened.videos()]
    assert pairs == [("A red fox runs over fresh snow.", "ein Fuchs"), ("rain", "")]
    assert opened.videos(prompt="FUCHS") == opened.videos(prompt="red fox") == opened.videos()[:1]
    table = opened.scores()
    assert list(table.columns[:3]) == ["prompt_id", "prompt", "original_prompt"]
    assert set(zip(table["prompt"], table["original_prompt"], strict=True)) == set(pairs)


def test_latents_of_the_longest_horizon(finished: RolloutRun) -> None:
    found = dict(lr.open_run(finished.uri).latents(prompt="rain", method="base"))
    assert [(rollout.method, rollout.backbone) for rollout in found] == [("base", "tiny")]
    (latents,) = found.values()
    assert latents.shape == (max(HORIZONS), 1, 2, 2)
    assert torch.equal(latents.float(), torch.zeros(max(HORIZONS), 1, 2, 2))


def test_runs_with_labels_stand_side_by_side(finished: RolloutRun, tmp_path: Path) -> None:
    other = shutil.copytree(finished.uri, tmp_path / "other")
    made = lr.write_report({"A": finished.uri, "B": str(other)}, to=str(tmp_path / "both"), strips=0)
    assert list(made.data.identity.methods) == ["base (A)", "base (B)", "rag (A)", "rag (B)"]
    assert (tmp_path / "both" / "report.html").is_file()


def test_an_address_without_a_run_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="run"):
        lr.open_run(tmp_path / "nothing")
