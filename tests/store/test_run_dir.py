from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from lrag_ray.errors import IdentityError, StorageError
from lrag_ray.store.failures import write_failure
from lrag_ray.store.identity import MethodIdentity
from lrag_ray.store.records import FailureRecord, now_utc
from lrag_ray.store.rollouts import RolloutRun
from lrag_ray.store.seal import is_sealed_json, opened_json, sealed_json
from lrag_ray.store.status import run_status
from lrag_ray.store.videos import committed_videos
from tests.store.make import make_identity, rollout_id, store_commit, store_part

RAG = MethodIdentity(method="rag", settings={}, nested=True)


@pytest.fixture
def run(run_uri: str) -> RolloutRun:
    return RolloutRun(run_uri)


def test_a_run_is_created_grows_and_refuses_another_identity(run: RolloutRun) -> None:
    identity = make_identity()
    assert run.read() is None
    assert run.ensure(identity) == identity
    assert run.ensure(make_identity(methods={"rag": RAG})).methods.keys() == {"base", "rag"}
    before = run.storage.read_bytes("run.json")
    with pytest.raises(IdentityError, match=r"run\.seed") as caught:
        run.ensure(make_identity(seed=1, samples=5))
    assert "Two ways out" in str(caught.value)
    assert run.storage.read_bytes("run.json") == before


def test_a_run_does_not_grow_past_what_its_readers_take(run: RolloutRun) -> None:
    many = {f"m{number:04}": RAG for number in range(2000)}
    run.ensure(make_identity(methods=many))
    with pytest.raises(IdentityError, match=r"come to 7,000; a run has at most 5,000") as caught:
        run.ensure(make_identity(methods={f"n{number}": RAG for number in range(1500)}))
    assert "set run.uri to a new address" in str(caught.value)
    content = json.loads(opened_json(run.storage.read_bytes("run.json")))
    content["methods"] |= {f"n{number}": RAG.model_dump() for number in range(3000)}
    run.storage.write("run.json", sealed_json(json.dumps(content)))
    with pytest.raises(StorageError, match=r"is not a run of format 1 \(.*come to 10,000; a run has at most 5,000"):
        run.read()


def test_a_damaged_or_foreign_run_file_is_refused(run: RolloutRun) -> None:
    run.storage.write("run.json", b'{"format_version": 1')
    with pytest.raises(StorageError, match="another version of lrag-ray or damaged"):
        run.read()
    run.storage.write("run.json", make_identity(format_version=2).model_dump_json().encode())
    with pytest.raises(StorageError, match="format_version is 2"):
        run.read()


def test_a_run_of_a_version_before_seals_is_sealed_by_the_next_start(run: RolloutRun) -> None:
    identity = make_identity()
    run.storage.write("run.json", identity.model_dump_json(indent=1).encode())
    assert run.read() == identity and not run.is_damaged()
    assert run.ensure(identity) == identity
    assert is_sealed_json(run.storage.read_bytes("run.json")) and run.read() == identity


def test_what_another_version_wrote_is_refused_and_not_taken_for_damage(run: RolloutRun) -> None:
    later = json.loads(make_identity().model_dump_json()) | {"format_version": 2, "novel": [1]}
    data = sealed_json(json.dumps(later, indent=1))
    run.storage.write("run.json", data)
    assert not run.is_damaged()
    with pytest.raises(StorageError, match="written by another version"):
        run.read()
    run.storage.write("run.json", data.replace(b"novel", b"Novel"))
    assert run.is_damaged()


def test_a_commit_is_created_once_and_covers_shorter_horizons(run: RolloutRun) -> None:
    identity = run.ensure(make_identity())
    commit = store_commit(run, identity, rollout_id(), 12)
    assert not run.commit(commit.model_copy(update={"attempt": "two"}))
    inventory = run.inventory()
    assert run.commits() == [commit]
    assert inventory.covering(rollout_id(), 6, commit.rollout_key) == commit
    assert inventory.covering(rollout_id(), 15, commit.rollout_key) is None
    assert inventory.covering(rollout_id(), 6, "another key") is None


def test_a_commit_whose_files_are_missing_short_or_elsewhere_does_not_count(run: RolloutRun) -> None:
    identity = run.ensure(make_identity())
    commit = store_commit(run, identity, rollout_id(), 6)
    assert commit.video is not None
    run.storage.write(commit.video.path, b"short")
    (state,) = run.inventory().problems()
    assert state.problem is not None and "5 bytes instead of 36" in state.problem
    run.storage.remove(commit.video.path)
    (state,) = run.inventory().problems()
    assert state.problem is not None and "is missing" in state.problem
    assert run.commits() == []

    aside = run.set_aside(state.path)
    stolen = commit.model_copy(update={"video": commit.video.model_copy(update={"path": "run.json"})})
    assert run.commit(stolen)
    assert aside in run.storage.list_files()
    (state,) = run.inventory().problems()
    assert state.problem == "names run.json, a file of another rollout"


def test_a_commit_that_was_made_during_the_listing_counts(run: RolloutRun, monkeypatch: pytest.MonkeyPatch) -> None:
    identity = run.ensure(make_identity())
    commit = store_commit(run, identity, rollout_id(), 6)
    assert commit.video is not None
    whole, unseen = run.storage.list_files, [commit.video.path]

    def listed_while_it_was_made(prefix: str = "") -> dict[str, int]:
        found = whole(prefix)
        if unseen:
            del found[unseen.pop()]
        return found

    monkeypatch.setattr(run.storage, "list_files", listed_while_it_was_made)
    inventory = run.inventory()
    assert inventory.problems() == [] and commit.video.path in inventory.files
    assert inventory.valid_commits(rollout_id()) == {6: commit}


def test_a_commit_that_cannot_be_read_does_not_count(run: RolloutRun) -> None:
    run.storage.write(f"{rollout_id().path}/commit-6.json", b"not json")
    (state,) = run.inventory().problems()
    assert state.problem is not None and state.problem.startswith("not a commit record")


@pytest.mark.parametrize(
    ("was", "is_now"), [(r'"created_at": "2', '"created_at": "x'), (r"\+00:00", ""), (r'"fps": 16', '"fps": 0')]
)
def test_a_commit_with_a_damaged_value_does_not_count(run: RolloutRun, was: str, is_now: str) -> None:
    store_commit(run, run.ensure(make_identity()), rollout_id("00001-bb"), 12)
    path = f"{rollout_id('00001-bb').path}/commit-12.json"
    text = run.storage.read_bytes(path).decode()
    run.storage.write(path, re.sub(was, is_now, text).encode())
    (problem,) = run_status(run).problems
    assert problem.startswith(f"{path}: not a commit record")


def test_a_store_that_gives_half_of_a_commit_is_an_error_and_no_broken_commit(
    run: RolloutRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = store_commit(run, run.ensure(make_identity()), rollout_id(), 6)
    whole, halves = run.storage.read_many, [True]

    def halved(paths: list[str]) -> dict[str, bytes]:
        half = halves.pop() if halves else False
        return {path: data[: len(data) // 2] if half else data for path, data in whole(paths).items()}

    monkeypatch.setattr(run.storage, "read_many", halved)
    assert run.commits() == [commit]
    halves += [True, True]
    with pytest.raises(StorageError, match=r"commit-6\.json: the store gave \d+ bytes of \d+"):
        run.commits()


def test_a_commit_with_another_key_stops_the_run(run: RolloutRun) -> None:
    identity = run.ensure(make_identity())
    store_commit(run, make_identity(seed=3), rollout_id(), 6)
    with pytest.raises(IdentityError, match=r"commit-6\.json.*\n.*Two ways out"):
        run.refuse_foreign_commits(identity, run.inventory())


def test_a_record_of_another_run_hides_no_results(run: RolloutRun) -> None:
    run.ensure(make_identity())
    store_commit(run, make_identity(seed=3), rollout_id(), 6)
    for look in (run_status, lambda run: list(committed_videos(run))):
        with pytest.raises(IdentityError, match=r"run\.json is not the record of these results: 1 commits .*Fix: put"):
            look(run)


def test_status_counts_done_partial_failed_and_pending(run: RolloutRun) -> None:
    identity = run.ensure(make_identity(methods={**make_identity().methods, "rag": RAG}))
    store_part(run, 0, 1, key="k")
    store_commit(run, identity, rollout_id("00001-bb"), 12)
    failed = rollout_id("00000-aa", "rag")
    write_failure(
        run.storage,
        FailureRecord(
            task=failed.path,
            attempt="three",
            kind="exception",
            counted=True,
            counted_attempts=3,
            quarantined=True,
            reason="boom",
            traceback="Traceback",
            created_at=now_utc(),
        ),
    )
    status = run_status(run)
    counts = {(c.method, c.latent_frames): (c.done, c.partial, c.failed, c.pending, c.total) for c in status.cells}
    assert counts == {
        ("base", 6): (1, 1, 0, 0, 2),
        ("base", 12): (1, 1, 0, 0, 2),
        ("rag", 6): (0, 0, 1, 1, 2),
        ("rag", 12): (0, 0, 1, 1, 2),
    }
    assert not status.done
    assert [failure.reason for failure in status.failures] == ["boom"]
    run.storage.write("failures/tiny/rag/00000-aa-0/four.json", b'{"rollout": ')
    (problem,) = run_status(run).problems
    assert problem.startswith("failures/tiny/rag/00000-aa-0/four.json: not a failure record")

    for horizon in (6, 12):
        store_commit(run, identity, failed, horizon)
    assert run_status(run).failures == []


def test_status_needs_a_run(run: RolloutRun) -> None:
    with pytest.raises(StorageError, match=r"no run\.json"):
        run_status(run)


def test_a_bucket_is_listed_method_by_method_and_shows_what_a_folder_shows(s3_bucket: str, tmp_path: Path) -> None:
    identity = make_identity(methods={**make_identity().methods, "rag": RAG})
    runs = [RolloutRun(uri) for uri in (f"{s3_bucket}/{tmp_path.name}", str(tmp_path / "run"))]
    for run in runs:
        assert run.inventory().files == {}
        run.ensure(identity)
        for method in ("base", "rag"):
            store_commit(run, identity, rollout_id("00000-aa", method), 12)
        store_part(run, 0, 1, key="k")
        run.storage.write("rollouts/strangers/file", b"in no method's folder")
    bucket, folder = (run.inventory() for run in runs)
    assert bucket.files == {path: size for path, size in folder.files.items() if path != "rollouts/strangers/file"}
    assert bucket.part_records == folder.part_records
    assert bucket.commits.keys() == folder.commits.keys() == {rollout_id("00000-aa", m).path for m in ("base", "rag")}
    assert bucket.problems() == folder.problems() == []
