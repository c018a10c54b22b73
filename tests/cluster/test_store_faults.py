"""A run that began on a disk, was copied to a bucket, and continues there through a store that fails now and then."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lrag_ray.config.schema import PromptsSection, RunConfig
from lrag_ray.store.rollouts import RolloutRun
from lrag_ray.store.status import run_status
from tests.cluster.drivers import command, write_config
from tests.stages.make import digests, do_all, make_config, make_prompts, part_bytes
from tests.store.fault_proxy import Fault, FaultProxy, seeded

pytestmark = [pytest.mark.proof, pytest.mark.cluster, pytest.mark.timeout(600)]

PROMPTS = make_prompts("a red fox in the snow", "a river at dawn")
SHARE = 0.05
SEED = 11

DRIVER = """
import json, sys
from lrag_ray.events import AttemptFailed
from lrag_ray.pipelines.evaluate import evaluate
from lrag_ray.engine.session import ray_session
from tests.cluster.test_run import Recorder
from tests.cluster.test_store_faults import PROMPTS, config

moved, broken = sys.argv[2:]
# A silence is noticed soon; where one try is all there is, a slow machine is none.
moved_config = config(moved, endpoint_url=sys.argv[1], read_timeout_s=1)
configs = [moved_config, config(broken, endpoint_url=sys.argv[1], attempts=1)]
with ray_session(configs[0].engine):
    for one in configs:
        recorder = Recorder()
        outcome = evaluate(one, PROMPTS, listener=recorder)
        print(json.dumps({
            "exit_code": outcome.exit_code,
            "commits_made": outcome.commits_made,
            "resumed": sorted(result.blocks_resumed for _, result in recorder.rollouts()),
            "failures": [event.failure.reason for event in recorder.of(AttemptFailed)],
        }))
"""


def config(uri: Path | str, **storage: Any) -> RunConfig:
    return make_config(
        uri,
        video={"enabled": False},
        engine={"actors": 2, "checkpoint_every_blocks": 2, "max_attempts": 2},
        storage={"attempts": 3, **storage},
    )


@pytest.fixture(scope="module")
def quiet(tmp_path_factory: pytest.TempPathFactory) -> RolloutRun:
    """The run on a local disk that nothing disturbed."""
    made = config(tmp_path_factory.mktemp("quiet"))
    run = RolloutRun(made.run.uri)
    do_all(run, made, PROMPTS)
    return run


@pytest.fixture
def proxy(s3_bucket: str) -> Iterator[FaultProxy]:
    with FaultProxy(os.environ["AWS_ENDPOINT_URL"]).running() as running:
        yield running


def copy_run(source: RolloutRun, target: RolloutRun) -> None:
    for path in source.storage.list_files():
        target.storage.write(path, source.storage.read_bytes(path))


def stop_in_the_middle(run: RolloutRun) -> None:
    """One rollout without its last commit, one with nothing but its first part, one not begun."""
    done, shorter, parts_only, absent = sorted({commit.rollout.path for commit in run.commits()})
    assert done
    for path in run.storage.list_files("rollouts"):
        name = path.rsplit("/", 1)[-1]
        beyond_the_first = "00006-00012" in name
        if (
            path.startswith(absent)
            or (path.startswith(shorter) and name == "commit-12.json")
            or (path.startswith(parts_only) and (name.startswith("commit-") or beyond_the_first))
        ):
            run.storage.remove(path)


def test_a_run_moved_to_a_failing_bucket_continues_and_ends_like_a_quiet_one(
    quiet: RolloutRun, proxy: FaultProxy, s3_bucket: str, tmp_path: Path
) -> None:
    local = RolloutRun(str(tmp_path / "run"))
    copy_run(quiet, local)
    stop_in_the_middle(local)
    (cells,) = [{(c.method, c.latent_frames): (c.done, c.partial, c.pending) for c in run_status(local).cells}]
    assert cells == {
        ("base", 6): (2, 0, 0),
        ("base", 12): (1, 1, 0),
        ("rag", 6): (0, 1, 1),
        ("rag", 12): (0, 1, 1),
    }
    moved = RolloutRun(f"{s3_bucket}/{tmp_path.name}/moved")
    broken = RolloutRun(f"{s3_bucket}/{tmp_path.name}/broken")
    copy_run(local, moved)
    before = moved.storage.list_files("rollouts")
    assert run_status(moved).cells == run_status(local).cells

    background = seeded(SHARE, SEED)
    victim = PROMPTS[1].prompt_id

    def choose(method: str, path: str) -> Fault | None:
        if "broken" not in path:
            return background(method, path)
        return "InternalError" if method == "PUT" and victim in path and "/rollouts/tiny/base/" in path else None

    proxy.choose = choose
    first, second = run_driver(proxy, moved.storage.address, broken.storage.address)

    assert (first["exit_code"], first["commits_made"]) == (0, 5)
    assert first["resumed"] == [0, 2, 4]
    assert proxy.injected.total() >= 5
    assert digests(moved.commits()) == digests(quiet.commits())
    assert part_bytes(moved, moved.commits()) == part_bytes(quiet, quiet.commits())
    assert before.items() <= moved.storage.list_files("rollouts").items()
    assert run_status(moved).done

    # A store that refuses one rollout for good costs that rollout, after its attempts, and not the run.
    assert (second["exit_code"], second["commits_made"]) == (1, 6)
    assert len(second["failures"]) == 2
    assert all("StorageError" in reason and "InternalError" in reason for reason in second["failures"])
    assert digests(broken.commits()).items() <= digests(quiet.commits()).items()


def test_damage_on_a_bucket_is_found_and_repaired_by_the_commands(
    quiet: RolloutRun, s3_bucket: str, tmp_path: Path
) -> None:
    run = RolloutRun(f"{s3_bucket}/{tmp_path.name}/damaged")
    copy_run(quiet, run)
    (tmp_path / "prompts.txt").write_text("\n".join(prompt.text for prompt in PROMPTS), encoding="utf-8")
    again = config(run.storage.address).model_copy(
        update={"prompts": PromptsSection(path=str(tmp_path / "prompts.txt"))}
    )
    file = write_config(tmp_path / "config.yaml", again)
    verify = ["verify", "--run", run.storage.address, "--bytes", "--json"]
    before = {path: (run.storage.read_bytes(path), details) for path, details in run.storage.list_details().items()}

    parts = sorted(path for path in before if path.endswith("-00006.safetensors"))
    commits = sorted(path for path in before if path.endswith("commit-12.json"))
    # Of a rollout whose commits can be read: without them nothing needs its parts, and it goes on in a new attempt.
    readable = {path.rpartition("/")[0] for path in commits[:-1]}
    trace = max(path for path in before if path.endswith(".trace.parquet") and path.split("/attempt-")[0] in readable)
    flipped = [parts[0], next(path for path in before if path.startswith("embeddings/")), commits[-1], "run.json"]
    for path in flipped:
        data = bytearray(before[path][0])
        data[len(data) // 2] ^= 1
        run.storage.write(path, bytes(data))
    run.storage.write(trace, before[trace][0][:-1])
    run.storage.remove(parts[1])
    damaged = {*flipped, trace, parts[1]}

    with command(tmp_path / "found", *verify) as found:
        assert found.wait() == 1, found.text
    shown = json.loads(found.text)
    assert {each["path"] for each in shown["damaged"]} == damaged and not shown["whole"]
    with command(tmp_path / "repaired", "run", str(file), "--repair") as repaired:
        assert repaired.wait() == 0, repaired.text
    with command(tmp_path / "whole", *verify) as whole:
        assert whole.wait() == 0, whole.text
    assert json.loads(whole.text)["damaged"] == []

    # In their place, byte for byte, but for the records that say when they were made; all else was not touched.
    after = {path: (run.storage.read_bytes(path), details) for path, details in run.storage.list_details().items()}
    anew = {commits[-1], "run.json"}
    assert {path for path in before if after[path][0] != before[path][0]} == anew
    assert {path for path in before if after[path] != before[path]} == damaged
    assert digests(run.commits()) == digests(quiet.commits())


def run_driver(proxy: FaultProxy, *addresses: str) -> list[dict[str, Any]]:
    """One driver for all addresses, which knows the store by the configuration alone, as do its workers."""
    unset = ("RAY_ADDRESS", "AWS_ENDPOINT_URL")
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, proxy.endpoint, *addresses],
        cwd=Path(__file__).resolve().parents[2],
        env={name: value for name, value in os.environ.items() if name not in unset},
        capture_output=True,
        text=True,
        timeout=290,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]
