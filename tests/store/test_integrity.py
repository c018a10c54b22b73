"""One real small run, damaged in every way, and what notices and repairs it."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from lrag_ray.cli.app import app
from lrag_ray.config.schema import RunConfig
from lrag_ray.errors import StorageError
from lrag_ray.pipelines.human_raters import export_page, import_answers
from lrag_ray.pipelines.identity import build_identity
from lrag_ray.pipelines.repair import plan_repair
from lrag_ray.pipelines.stored_config import store_config
from lrag_ray.report import build_report
from lrag_ray.report.inspect import inspect_rollout
from lrag_ray.scoring.judge.settings import JudgeSettings
from lrag_ray.scoring.preview.suite import PREVIEW
from lrag_ray.stages.backbone import pixels_identity
from lrag_ray.stages.decode import DecodeStage, DecodeTask
from lrag_ray.stages.rollout.worker import RolloutResult, RolloutStage
from lrag_ray.stages.spec import LocalHost
from lrag_ray.store.address import Storage
from lrag_ray.store.decoded import decode_settings
from lrag_ray.store.failures import write_failure
from lrag_ray.store.integrity import Coverage, Damage, find_damage
from lrag_ray.store.lease import new_record, take_lease
from lrag_ray.store.local_copy import DamagedVideoError
from lrag_ray.store.records import FailureRecord, new_attempt_id, now_utc
from lrag_ray.store.rollouts import RolloutRun
from lrag_ray.store.seal import DamagedError, opened_json, sealed_json
from tests.chat.servers import ChatProxy
from tests.scoring.judge.test_suite import judge, score
from tests.stages.make import METHODS, do_all, make_config, make_prompts

PROMPTS = make_prompts("a red fox", "a river")
KINDS = {
    "rollouts/*/*/*/commit-*.json": "commit",
    "rollouts/*/*/*/attempt-*/*.safetensors": "latents",
    "rollouts/*/*/*/attempt-*/*.parquet": "trace",
    "rollouts/*/*/*/attempt-*/*.mp4": "video",
    "rollouts/*/*/*/attempt-*/part-*.json": "part record",
    "embeddings/*/*": "text features",
    "decoded/*/*/*/*/video-*.json": "decoded record",
    "decoded/*/*/*/*/attempt-*/*": "decoded video",
    "scores/preview/**/*.parquet": "scores",
    "scores/judge/*/*/cases/**/*.json": "answers",
    "scores/judge/*/*/judge.json": "answers",
    "scores/judge/*/human/*/key.json": "answers",
    "scores/judge/*/human/*/raters/*.json": "answers",
    "chat/answers/*/*.json": "answers",
    "chat/calls/*/*.json": "answers",
    "failures/**/*.json": "failure record",
    "lease/*": "lease",
    "summary/**/*": "report",
    "config.json": "configuration",
    "run.json": "run",
}
"""Every file of a run. Whoever adds one adds its check to `lrag_ray.store.integrity`."""


def config_of(folder: Path) -> RunConfig:
    return make_config(folder, methods={"rag": METHODS["rag"]}, scoring={"suite": "preview"})


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rollouts, a decode, scores, a failure, a lease and a report."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    config, run = config_of(folder), RolloutRun(str(folder))
    do_all(run, config, PROMPTS)
    store_config(run, config)
    settings = decode_settings(pixels_identity(config.backbones["tiny"]), config.video.model_dump()) | {"crf": 30}
    video = config.video.model_copy(update={"crf": 30})
    stage = DecodeStage(run.storage.address, config.storage, config.backbones, video, config.engine)
    stage.open(LocalHost()).work(DecodeTask(tuple(run.commits()[:2]), settings), new_attempt_id())
    scorer = PREVIEW.worker(run.storage, run.storage, threads=1, device="cpu")
    for task in PREVIEW.pending(run):
        scorer.score(task.payload, lambda: True)
    failure = FailureRecord(
        task="prompt",
        stage="text",
        attempt="one",
        kind="exception",
        counted=True,
        counted_attempts=1,
        quarantined=False,
        reason="out of ink",
        traceback="",
        created_at=now_utc(),
    )
    write_failure(run.storage, failure)
    take_lease(run.storage, new_record("run", 60), print).release()
    ask_and_export(run, folder.parent)
    build_report(run)
    return folder


def ask_and_export(run: RolloutRun, scratch: Path) -> None:
    """Two judges' answers, two pages for people, and what two of them answered."""
    with ChatProxy(None, lambda number, body: f"text:<score>{number % 6}</score>") as proxy:
        for max_side in (32, 48):
            assert score(judge(proxy, max_side=max_side), run) == {}
    for number in range(2):
        page = export_page(run.uri, str(scratch / f"page-{number}.html"), JudgeSettings(max_side=32))
        for rater in ("Ann", "Bob"):
            answers = scratch / "answers.json"
            answers.write_text(json.dumps({"export": page.export, "rater": rater, "answers": {}}))
            import_answers(run.uri, str(answers))


@pytest.fixture
def run(whole: Path, tmp_path: Path) -> RolloutRun:
    """A copy to damage."""
    shutil.copytree(whole, tmp_path / "run")
    return RolloutRun(str(tmp_path / "run"))


def files_of(run: RolloutRun) -> dict[str, tuple[bytes, int]]:
    root = Path(run.uri)
    return {
        str(path.relative_to(root)): (path.read_bytes(), path.stat().st_mtime_ns)
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }


def flip(run: RolloutRun, path: str, seed: int = 0) -> None:
    file = Path(run.uri) / path
    data = bytearray(file.read_bytes())
    bit = random.Random(f"{path} {seed}").randrange(8 * len(data))
    data[bit // 8] ^= 1 << bit % 8
    file.write_bytes(data)


def some(run: RolloutRun, pattern: str, at: int = 0) -> str:
    return str(sorted(Path(run.uri).glob(pattern))[at].relative_to(run.uri))


def damage_of(run: RolloutRun) -> list[Damage]:
    return list(find_damage(run, Coverage()))


def damaged_paths(run: RolloutRun) -> set[str]:
    return {found.path for found in damage_of(run)}


def test_a_whole_run_is_whole_and_every_file_of_it_is_checked(run: RolloutRun) -> None:
    coverage = Coverage()
    assert list(find_damage(run, coverage)) == []
    assert coverage.unnamed == [] and coverage.files == len(files_of(run))
    known = {str(path.relative_to(run.uri)) for pattern in KINDS for path in Path(run.uri).glob(pattern)}
    assert set(files_of(run)) <= known, "a kind of file that no check is known for"


def test_one_flipped_bit_in_any_file_is_noticed_and_named(run: RolloutRun) -> None:
    files = {file: kind for pattern, kind in KINDS.items() for file in Path(run.uri).glob(pattern) if file.is_file()}
    for file, kind in files.items():
        data, path = file.read_bytes(), str(file.relative_to(run.uri))
        flip(run, path)
        assert [(each.path, each.kind) for each in damage_of(run)] == [(path, kind)]
        file.write_bytes(data)


@pytest.mark.parametrize("pattern", [pattern for pattern in KINDS if "lease" not in pattern])
def test_a_truncated_file_is_noticed(run: RolloutRun, pattern: str) -> None:
    path = some(run, pattern)
    os.truncate(Path(run.uri) / path, 5)
    assert damaged_paths(run) == {path}


def test_missing_files_that_something_names_are_noticed(run: RolloutRun) -> None:
    gone = {some(run, pattern) for pattern, kind in KINDS.items() if kind in ("latents", "trace", "video", "run")}
    gone |= {some(run, "decoded/**/*.mp4"), some(run, "summary/*.csv"), some(run, "rollouts/**/part-*.json")}
    for path in gone:
        (Path(run.uri) / path).unlink()
    assert damaged_paths(run) == gone


@pytest.mark.parametrize(
    "pattern", [p for p, kind in KINDS.items() if kind not in ("lease", "configuration", "run", "failure record")]
)
def test_two_swapped_files_are_noticed(run: RolloutRun, pattern: str) -> None:
    # The index of the report says of the others whether they are whole.
    found = sorted(Path(run.uri).glob(pattern))
    paths = [path for path in found if path.is_file() and path.name != "files.json"]
    first = paths[0]
    second = next(path for path in paths if path.read_bytes() != first.read_bytes())
    one, two = first.read_bytes(), second.read_bytes()
    first.write_bytes(two)
    second.write_bytes(one)
    assert {str(path.relative_to(run.uri)) for path in (first, second)} <= damaged_paths(run)


def test_another_table_in_place_of_scores_is_noticed(run: RolloutRun) -> None:
    path = some(run, "scores/preview/**/*.parquet")
    for other in ("summary/scores.parquet", some(run, "rollouts/**/*.trace.parquet")):
        shutil.copy(Path(run.uri) / other, Path(run.uri) / path)
        assert damaged_paths(run) == {path}


def test_a_sample_reads_less_and_says_so(run: RolloutRun) -> None:
    coverage = Coverage()
    assert list(find_damage(run, coverage, sample=2)) == []
    assert coverage.left_out > 0 and coverage.files < len(files_of(run))


def test_the_command_lists_damage_with_its_repair_and_fails(run: RolloutRun) -> None:
    path = some(run, "rollouts/**/*.mp4")
    assert CliRunner().invoke(app, ["verify", "--run", run.uri, "--bytes"]).exit_code == 0
    flip(run, path)
    result = CliRunner().invoke(app, ["verify", "--run", run.uri, "--bytes"])
    assert result.exit_code == 1
    assert f"video  {path}: does not have the recorded checksum. Fix: lrag-ray run CONFIG --repair" in result.output
    assert CliRunner().invoke(app, ["verify", "--run", run.uri, "--sample", "3"]).exit_code == 2


def restore(run: RolloutRun, **changes: int) -> list[RolloutResult]:
    """Plan the repair and do its rollouts in this process."""
    config = config_of(Path(run.uri))
    inventory = run.inventory()
    commits = {
        folder: [state.commit for state in states.values() if state.commit is not None]
        for folder, states in inventory.commits.items()
    }
    identity = build_identity(config, PROMPTS)
    plan = plan_repair(damage_of(run), identity, inventory, commits, lambda *_: 0)
    for record in plan.part_records:
        run.storage.write(f"{record.latents.path.removesuffix('.safetensors')}.json", record.sealed())
    stage = RolloutStage.of(run, config)
    for name, value in changes.items():
        object.__setattr__(stage, name, value)
    worker = stage.open(LocalHost())
    outcomes = [worker.work(task.payload, new_attempt_id()) for task in plan.restores]
    return [outcome for outcome in outcomes if isinstance(outcome, RolloutResult)]


def test_damaged_files_of_commits_come_back_byte_for_byte_and_nothing_else_is_touched(run: RolloutRun) -> None:
    before = files_of(run)
    broken = {
        some(run, "rollouts/**/part-00000-*.safetensors"),
        some(run, "rollouts/**/part-00006-*.trace.parquet", 1),
        some(run, "rollouts/**/video-6.mp4", 1),
        some(run, "rollouts/**/part-00006-*.json"),
    }
    for path in broken:
        flip(run, path)
    gone = some(run, "rollouts/**/video-12.mp4")
    (Path(run.uri) / gone).unlink()
    restored = [result.restored for result in restore(run)]
    assert {path for each in restored if each for path in each.paths} == {
        path for path in {*broken, gone} if not path.endswith(".json")
    }
    after = files_of(run)
    assert {path: data for path, (data, _) in after.items()} == {path: data for path, (data, _) in before.items()}
    assert {path for path in after if after[path] != before[path]} == {*broken, gone}
    assert damage_of(run) == []


def test_answers_of_models_are_asked_for_again_and_those_of_people_are_not(run: RolloutRun) -> None:
    asked, call = some(run, "chat/answers/*/*.json"), some(run, "chat/calls/*/*.json")
    case, by = some(run, "scores/judge/*/*/cases/**/*.json"), some(run, "scores/judge/*/*/judge.json")
    human = {some(run, "scores/judge/*/human/*/key.json"), some(run, "scores/judge/*/human/*/raters/*.json")}
    for path in (asked, call, case, by, *human):
        flip(run, path)
    plan = plan_repair(
        damage_of(run), build_identity(config_of(Path(run.uri)), PROMPTS), run.inventory(), {}, lambda *_: 0
    )
    assert set(plan.set_aside) == {asked, call}
    assert set(plan.scores) == {case, by}
    assert set(plan.beyond) == human
    assert all("people's answers" in reason for reason in plan.beyond.values())


def test_latents_that_come_out_as_others_are_not_written(run: RolloutRun) -> None:
    path = some(run, "rollouts/**/part-00006-*.safetensors")
    flip(run, path)
    before = files_of(run)
    (result,) = restore(run, seed=1)
    assert result.restored is not None and result.restored.paths == () and result.restored.other_latents == (12,)
    assert files_of(run) == before


def test_a_commit_that_another_driver_has_made_again_gets_its_name_back(run: RolloutRun) -> None:
    path = some(run, "rollouts/**/commit-6.json")
    good = run.storage.read_bytes(path)
    with pytest.raises(StorageError, match="made again by another driver"):
        run.set_aside(path, examined=b"what was damaged")
    assert run.storage.read_bytes(path) == good
    assert not list(Path(run.uri).rglob("*.invalid-*"))
    assert run.storage.read_bytes(run.set_aside(path, examined=good)) == good


def test_readers_say_what_is_damaged_and_how_to_repair_it(run: RolloutRun) -> None:
    repair = "lrag-ray run CONFIG --repair"
    trace = some(run, "rollouts/**/*.trace.parquet")
    flip(run, trace)
    with pytest.raises(StorageError, match=repair):
        inspect_rollout(f"{run.uri}/{trace.rpartition('/attempt-')[0]}")
    scored = next(Path(run.uri).glob("scores/preview/1/**/6-*.parquet"))
    scored.unlink()
    (task,) = PREVIEW.pending(run)
    flip(run, task.payload.video_path)
    worker = PREVIEW.worker(run.storage, run.storage, threads=1, device="cpu")
    with pytest.raises(DamagedVideoError, match=repair):
        worker.score(task.payload, lambda: True)
    assert not scored.exists(), "storage damage must not become a score row"
    flip(run, "run.json")
    with pytest.raises(StorageError, match=repair):
        run.require()


@pytest.mark.parametrize("of", ["record", "scores"])
def test_every_single_bit_of_a_seal_counts(of: str, run: RolloutRun) -> None:
    if of == "record":
        data = sealed_json('{"a": 1}')
        refused: Callable[[bytes], bool] = _refuses_json
    else:
        path = some(run, "scores/**/*.parquet")
        data = run.storage.read_bytes(path)

        def refused(changed: bytes) -> bool:
            from lrag_ray.store.parquet import damage_of as damage_in

            return damage_in(changed, path, ()) is not None

    assert not refused(data)
    for bit in range(0, 8 * len(data), 1 if of == "record" else 13):
        changed = bytearray(data)
        changed[bit // 8] ^= 1 << bit % 8
        assert refused(bytes(changed)), bit


def _refuses_json(data: bytes) -> bool:
    try:
        return opened_json(data) != b'{"a": 1\n}'
    except DamagedError:
        return True


def test_records_of_earlier_versions_have_no_seal_and_are_read(run: RolloutRun) -> None:
    path = some(run, "rollouts/**/commit-6.json")
    commit = run.commits()[0]
    run.storage.write(path, commit.model_dump_json(indent=1).encode())
    assert commit in run.commits() and path not in damaged_paths(run)


def test_a_link_that_is_swapped_in_after_the_check_is_not_followed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "secret").write_bytes(b"secret")
    storage = Storage(str(tmp_path / "run"))
    storage.write("folder/kept", b"kept")
    # The check has passed, and only then a folder becomes a link.
    monkeypatch.setattr(Storage, "_refuse_links", lambda *_: None)
    (tmp_path / "run" / "link").symlink_to(tmp_path / "elsewhere")
    for act in (
        lambda: storage.read_bytes("link/secret"),
        lambda: storage.read_many(["link/secret"]),
        lambda: storage.digest("link/secret"),
        lambda: storage.get_file("link/secret", tmp_path / "copy"),
        lambda: storage.write("link/new", b"new"),
        lambda: storage.create("link/new", b"new"),
        lambda: storage.put_file(tmp_path / "run" / "folder" / "kept", "link/new"),
        lambda: storage.move("folder/kept", "link/new"),
        lambda: storage.remove("link/secret"),
    ):
        with pytest.raises(StorageError, match="not inside the run"):
            act()
    assert [path.name for path in (tmp_path / "elsewhere").iterdir()] == ["secret"]


def test_a_pipe_in_place_of_a_file_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    os.mkfifo(tmp_path / "run.json")
    with pytest.raises(StorageError, match="not a regular file"):
        storage.read_bytes("run.json")
