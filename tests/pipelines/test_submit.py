"""What travels with a job: the code as a wheel, the resolved configuration, prompts, plug-ins, small files."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

import lrag_ray
from lrag_ray.cli.progress import PlainProgress
from lrag_ray.config.load import load_config
from lrag_ray.config.schema import RunConfig
from lrag_ray.engine.ray_jobs.client import JobClient, RayJob, TakenIdError
from lrag_ray.engine.ray_jobs.dashboard import Dashboard
from lrag_ray.errors import PromptError, UsageError
from lrag_ray.events import WorkerLost
from lrag_ray.pipelines.submit import bundle as bundle_module
from lrag_ray.pipelines.submit import submit as submit_module
from lrag_ray.pipelines.submit.bundle import CONFIG_NAME, make_bundle, run_address
from lrag_ray.pipelines.submit.follow import show
from lrag_ray.pipelines.submit.plugins import plugin_files
from lrag_ray.pipelines.submit.submit import prepare
from lrag_ray.pipelines.submit.wheel import build_wheel
from tests.config.make import SMALL, write
from tests.conftest import REPOSITORY

PLUGIN = """
from dataclasses import dataclass
import numpy
import helper_of_mine
from lrag_ray.context.base import Base

class Mine(Base):
    pass
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with prompts in it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.txt").write_text("a red fox\nrain\n", encoding="utf-8")
    return tmp_path


def names_in(archive: Path) -> set[str]:
    return set(zipfile.ZipFile(archive).namelist())


def test_the_wheel_is_the_code_that_runs_here(tmp_path: Path) -> None:
    wheel = build_wheel(tmp_path)
    (tmp_path / "again").mkdir()
    assert build_wheel(tmp_path / "again").path.read_bytes() == wheel.path.read_bytes()
    assert wheel.digest in wheel.path.name, "Ray takes wheels of one name for the same"
    names = names_in(wheel.path)
    assert {"lrag_ray/__init__.py", "lrag_ray/report/report.css", "jobs/evaluate.py"} <= names
    assert not [name for name in names if name.endswith(".pyc") or name.startswith("tests")]
    target = tmp_path / "installed"
    zipfile.ZipFile(wheel.path).extractall(target)
    program = (
        "import lrag_ray, jobs, importlib.metadata as m;"
        "print(lrag_ray.__file__, m.version('lrag-ray'), m.requires('lrag-ray'))"
    )
    shown = subprocess.run(
        [sys.executable, "-c", program], env={"PYTHONPATH": str(target)}, capture_output=True, text=True, check=True,
        cwd=tmp_path,
    )  # fmt: skip
    assert shown.stdout.split() == [f"{target}/lrag_ray/__init__.py", lrag_ray.__version__, "None"]


@pytest.mark.parametrize("name", ["demo", "table2", "ablation_budget", "ablation_embedding"])
def test_the_configuration_of_a_job_is_the_one_that_was_loaded(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(REPOSITORY)
    config = load_config(f"configs/{name}.yaml", ["preset=as_released", "video.cold_chunk=null"])
    made = make_bundle(config)
    monkeypatch.chdir(tmp_path)
    Path(CONFIG_NAME).write_text(made.config_text, encoding="utf-8")
    loaded = load_config(CONFIG_NAME)
    assert loaded == made.config
    changed = {"run": {"uri": str(REPOSITORY / config.run.uri), "seed": config.run.seed}}
    assert loaded.model_copy(update={}).run.model_dump() == changed["run"]
    assert (loaded.durations_s, loaded.video, loaded.engine) == (config.durations_s, config.video, config.engine)
    assert all(key.startswith(("run", "backbones", "methods", "scoring", "prompts")) for key, _ in made.on_nodes)


def test_relative_paths_are_resolved_here_and_what_travels_keeps_its_name(folder: Path) -> None:
    (folder / "weights").mkdir()
    (folder / ".gitignore").write_text("weights/\n", encoding="utf-8")
    (folder / "weights" / "prompts.txt").write_text("one\ntwo\n", encoding="utf-8")
    text = SMALL.replace("prompts.txt", "weights/prompts.txt") + "scoring: {weights: weights/networks}\n"
    text = text.replace("tiny: {preset: tiny}", "tiny: {preset: tiny, weights: {path: w.pt, random_seed: null}}")
    made = prepare(load_config(write(folder, text)))
    assert made.run == str(folder / "runs" / "small")
    assert made.travels == ["weights/prompts.txt"]
    assert dict(made.on_nodes) == {
        "run.uri": made.run,
        "backbones.tiny.weights.path": str(folder / "w.pt"),
        "scoring.weights": str(folder / "weights" / "networks"),
    }
    archive = made.bundle.write(folder)
    assert names_in(archive) == {CONFIG_NAME, "weights/prompts.txt"}, "a .gitignore changes nothing"
    sent = json.loads(zipfile.ZipFile(archive).read(CONFIG_NAME))
    assert sent["prompts"]["path"] == "weights/prompts.txt"


@pytest.mark.parametrize("how", ["absolute", "above"])
def test_prompts_from_elsewhere_travel(folder: Path, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "inside").mkdir()
    named = str(folder / "prompts.txt") if how == "absolute" else "../prompts.txt"
    path = write(folder, SMALL.replace("{path: prompts.txt}", f"{{path: {named}}}"))
    monkeypatch.chdir(folder / "inside")
    made = make_bundle(load_config(path))
    (name,) = made.files
    assert isinstance(made.config, RunConfig) and made.config.prompts.path == name and not name.startswith(("/", ".."))
    assert name.endswith("/prompts.txt")


def test_paths_that_mean_the_folder_of_the_configuration_are_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(folder)
    (folder / "elsewhere").mkdir()
    monkeypatch.chdir(folder / "elsewhere")
    with pytest.raises(UsageError, match="not in the working directory but beside the configuration"):
        load_config(path)


def test_a_cluster_of_the_configuration_is_not_used(folder: Path) -> None:
    made = make_bundle(load_config(write(folder), ["engine.address=head:6379"]))
    assert made.config.engine.address is None
    assert "engine.address head:6379" in made.notes[0]


def test_missing_prompts_are_found_here(folder: Path) -> None:
    with pytest.raises(PromptError, match=r"absent\.txt"):
        prepare(load_config(write(folder), ["prompts.path=absent.txt"]))


def test_the_digest_changes_with_what_travels(folder: Path) -> None:
    config = load_config(write(folder))
    before = make_bundle(config).digest
    assert make_bundle(config).digest == before
    (folder / "prompts.txt").write_text("a red fox\nhail\n", encoding="utf-8")
    assert make_bundle(config).digest != before


def test_plugins_travel_with_what_they_import_from_beside_them(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(folder))
    (folder / "methods_of_mine.py").write_text(PLUGIN, encoding="utf-8")
    (folder / "helper_of_mine.py").write_text("from package_of_mine.deep import thing\n", encoding="utf-8")
    (folder / "package_of_mine" / "__pycache__").mkdir(parents=True)
    (folder / "package_of_mine" / "__pycache__" / "x.pyc").touch()
    (folder / "package_of_mine" / "__init__.py").touch()
    (folder / "package_of_mine" / "deep.py").write_text("thing = 1\n", encoding="utf-8")
    (folder / "package_of_mine" / "data.json").write_text("{}", encoding="utf-8")
    (folder / "unrelated.py").touch()
    text = SMALL.replace("base: {}", 'mine: {method: "methods_of_mine:Mine"}')
    made = make_bundle(load_config(write(folder, text)))
    assert set(made.files) == {
        "prompts.txt",
        "methods_of_mine.py",
        "helper_of_mine.py",
        "package_of_mine/__init__.py",
        "package_of_mine/deep.py",
        "package_of_mine/data.json",
    }


def test_a_plugin_in_a_namespace_package_travels_alone(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(folder))
    for name in ("space/one.py", "space/two.py", "space/regular/__init__.py", "space/regular/three.py"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    assert set(plugin_files(["space.one"])) == {"space/one.py"}
    assert set(plugin_files(["space.regular.three"])) == {"space/regular/__init__.py", "space/regular/three.py"}


def test_an_installed_plugin_travels_without_its_dependencies() -> None:
    names = plugin_files(["pluggy"])
    assert "pluggy/__init__.py" in names
    assert all(name.startswith("pluggy/") for name in names)


def test_a_small_file_in_the_settings_of_a_plugin_travels(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(folder))
    plugin = "class Settings(Base.Settings):\n    table: str = ''\n\nclass Mine(Base):\n    Settings = Settings\n"
    source = (
        f"from dataclasses import dataclass\nfrom lrag_ray.context.base import Base\n@dataclass(frozen=True)\n{plugin}"
    )
    (folder / "settings_of_mine.py").write_text(source, encoding="utf-8")
    (folder / "table.json").write_text("{}", encoding="utf-8")
    for named, travels in (("table.json", True), (str(folder / "table.json"), False)):
        text = SMALL.replace("base: {}", f'mine: {{method: "settings_of_mine:Mine", table: {named}}}')
        made = make_bundle(load_config(write(folder, text)))
        assert isinstance(made.config, RunConfig)
        assert made.config.methods["mine"].settings["table"] == named, "it may be part of the identity"
        assert ("table.json" in made.files) == travels
        assert ("methods.mine.table" in dict(made.on_nodes)) != travels


def test_too_much_is_refused_before_it_is_sent(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundle_module, "MOST_BYTES", 100)
    monkeypatch.setattr(submit_module, "load_prompts", lambda *_: pytest.fail("it is measured first"))
    (folder / "prompts.txt").write_text("a red fox\n" * 50, encoding="utf-8")
    with pytest.raises(UsageError, match=r"500  prompts\.txt\nFix"):
        prepare(load_config(write(folder)))


@pytest.mark.parametrize("number", ["9" * 400, "-" + "9" * 400, "1e999", "NaN", "-Infinity"])
def test_a_log_with_numbers_that_no_event_has_is_text(number: str) -> None:
    """A log is written by whoever has the cluster; displays divide and round what events count."""
    lines: list[str] = []
    progress = PlainProgress(lines.append)
    for event in (
        f'{{"event": "StageEnded", "stage": "rollouts", "seconds": {number}}}',
        f'{{"event": "RunPlanned", "uri": "x", "commits_total": {number}, "commits_done": 0, "rollouts_to_do": 1, '
        '"blocks_to_do": 1}',
    ):
        show(event, progress)
        assert lines.pop() == event


def test_a_long_name_in_a_log_is_cut() -> None:
    events: list[object] = []
    show(json.dumps({"event": "WorkerLost", "worker": "w" * 10**6, "reason": "r"}), events.append)
    (lost,) = events
    assert isinstance(lost, WorkerLost) and lost.worker.endswith("… (1,000,000 characters)")
    assert len(lost.worker) < 3000


def test_addresses_of_runs(folder: Path) -> None:
    assert run_address("s3://b/run/") == "s3://b/run"
    assert run_address("runs/../runs/a/") == run_address(f"file://{folder}/runs/a") == str(folder / "runs" / "a")


def test_every_address_of_the_schema_is_looked_at(folder: Path) -> None:
    """A field of the type Address that is added later is resolved without more work."""
    from lrag_ray.config.addresses import addresses_of

    weights = "backbones.tiny.weights={path: p, lora: {path: l}, random_seed: null}"
    config = load_config(write(folder), ["scoring.weights=w", weights])
    assert {".".join(map(str, path)) for path, _ in addresses_of(config)} == {
        "run.uri", "prompts.path", "backbones.tiny.weights.path", "backbones.tiny.weights.lora.path", "scoring.weights",
    }  # fmt: skip


class Head(JobClient):
    """A head in memory, on which another submit of the same run starts its job while ours uploads."""

    def __init__(self) -> None:
        super().__init__(Dashboard("http://head:8265", "--address"), None)
        self.started: list[RayJob] = []

    def jobs(self) -> list[RayJob]:
        return list(self.started)

    def upload(self, package: Path) -> str:
        return f"gcs://{package.name}"

    def submit(self, job_id: str, entrypoint: str, runtime_env: Mapping[str, Any], metadata: Mapping[str, str]) -> None:
        if any(job.id == job_id for job in self.started):
            raise TakenIdError(job_id)
        self.started.append(RayJob(job_id, "RUNNING", "", None, metadata, 0, None))

    def job(self, job_id: str) -> RayJob:
        return next(job for job in self.started if job.id == job_id)


@pytest.mark.parametrize("moment", ["upload", "jobs", "submit"])
def test_of_two_submits_at_once_one_attaches(folder: Path, monkeypatch: pytest.MonkeyPatch, moment: str) -> None:
    prepared = prepare(load_config(write(folder)))
    head = Head()
    monkeypatch.setattr(submit_module, "connect", lambda address: head)
    original = getattr(head, moment)

    def after_the_other(*given: Any) -> Any:
        monkeypatch.setattr(head, moment, original)
        found = original(*given) if moment == "jobs" else None
        other = submit_module.submit(prepared)
        assert not other.attached
        return found if moment == "jobs" else original(*given)

    monkeypatch.setattr(head, moment, after_the_other)
    ours = submit_module.submit(prepared)
    assert [job.id for job in head.started] == [ours.id] and ours.attached


def test_question_files_and_the_template_travel_and_local_models_do_not(folder: Path) -> None:
    (folder / "mine.yaml").write_text("name: mood\nquestion: 'How?'\n", encoding="utf-8")
    (folder / "template.txt").write_text("Say more: {prompt}", encoding="utf-8")
    chat = "{backend: local, model: weights/judge}"
    text = SMALL.replace(
        "{path: prompts.txt}",
        "{path: prompts.txt, refine: {backend: local, model: weights/qwen, template: template.txt}}",
    )
    text += f"scoring: {{suite: judge, settings: {{questions: [exposure, mine.yaml], chat: {chat}}}}}\n"
    made = make_bundle(load_config(write(folder, text)))
    assert set(made.files) == {"prompts.txt", "mine.yaml", "template.txt"}
    assert isinstance(made.config, RunConfig)
    assert made.config.prompts.refine is not None
    assert made.config.prompts.refine.template == "template.txt"
    assert made.config.prompts.refine.model == str(folder / "weights" / "qwen")
    assert list(made.config.scoring.settings["questions"]) == ["exposure", "mine.yaml"]
    assert made.config.scoring.settings["chat"]["model"] == str(folder / "weights" / "judge")
    on_nodes = dict(made.on_nodes)
    assert on_nodes["prompts.refine.model"] == str(folder / "weights" / "qwen")
    assert on_nodes["scoring.settings.chat.model"] == str(folder / "weights" / "judge")
    served = load_config(write(folder, text.replace("local", "openai")))
    sent = make_bundle(served).config
    assert isinstance(sent, RunConfig) and sent.prompts.refine is not None
    assert sent.prompts.refine.model == "weights/qwen", "the name of a model at a server"
