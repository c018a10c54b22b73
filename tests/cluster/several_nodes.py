"""What `test_several_nodes` runs in a process of its own: a cluster whose nodes come, go and drain under the pool."""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray
from ray.cluster_utils import Cluster
from ray.core.generated import autoscaler_pb2

from lrag_ray.engine.pool import ActorPool
from lrag_ray.engine.sizing import PoolSize, draining_nodes
from lrag_ray.events import AttemptFailed, Event, Notice, TaskStarted, TaskYielded, WorkerLost
from lrag_ray.pipelines.evaluate import evaluate
from lrag_ray.stages.spec import Outcome, Resources, Task
from lrag_ray.store.failures import read_failures
from lrag_ray.store.rollouts import RolloutRun
from tests.cluster.nodes import PatientCluster
from tests.cluster.test_pool import Diary, Job, Jobs, Sleeper, tasks_of
from tests.cluster.test_run import NO_VIDEO, Recorder
from tests.stages.make import digests, do_all, make_config, make_prompts, store_features
from tests.waiting import wait_until

MB = 1 << 20


class Watched(Diary):
    """A diary that does the next of `doings`, in the main thread, as soon as its condition holds."""

    def __init__(self, *doings: tuple[Callable[[Diary], bool], Callable[[], object]]) -> None:
        super().__init__()
        self.doings = list(doings)

    def tick(self) -> None:
        if self.doings and self.doings[0][0](self):
            self.doings.pop(0)[1]()


class Waiter(Sleeper):
    """Is at its job until the file ``release`` appears."""

    def work(self, payload: Job, attempt: str) -> Outcome:
        while not (payload.folder / "release").exists():
            time.sleep(0.05)
        return super().work(payload, attempt)


class Reserving(Sleeper):
    """Notes the memory that its actor has reserved, and works once three actors have noted theirs."""

    def work(self, payload: Job, attempt: str) -> Outcome:
        memory = int(ray.get_runtime_context().get_assigned_resources().get("memory", 0))
        (payload.folder / f"{self.host.name}.memory").write_text(str(memory))
        while len(list(payload.folder.glob("*.memory"))) < 3:
            time.sleep(0.05)
        return super().work(payload, attempt)


def pool(diary: Watched, size: PoolSize, stage: Jobs) -> ActorPool[Job]:
    address = ray.get_runtime_context().gcs_address
    return ActorPool(stage, size, max_attempts=3, address=address, listener=diary, tick=diary.tick)


def per_gpu_follows_nodes(cluster: Cluster, folder: Path) -> None:
    """Halves of a GPU on a node with one; another node joins, then the first is taken away while all are at work."""
    first = cluster.add_node(num_cpus=1, num_gpus=1)
    second: list[Any] = []

    def workers(diary: Diary) -> int:
        return len({worker for worker, _ in diary.order})

    diary = Watched(
        (lambda diary: workers(diary) == 2, lambda: second.append(cluster.add_node(num_cpus=1, num_gpus=1))),
        (lambda diary: workers(diary) == 4, lambda: cluster.remove_node(first, allow_graceful=False)),
        (lambda diary: len(diary.failures) == 2, (folder / "release").touch),
    )
    jobs = [Job(f"job{i:02d}", folder) for i in range(10)]
    assert pool(diary, PoolSize(1, None), Jobs(Waiter, Resources(0.5, 0.5))).run(tasks_of(*jobs)) == []
    assert len(diary.results) == 10 and diary.doings == []
    assert [(failure.kind, failure.counted) for _, failure in diary.failures] == [("death", False)] * 2
    # What was lost goes first, on the node that is left.
    lost = {key for key, _ in diary.failures}
    assert lost == {key for _, key in diary.order[:2]} == {key for _, key in diary.order[4:6]}
    cluster.remove_node(second[0])


def memory_is_shared(cluster: Cluster, folder: Path) -> None:
    """Room for one worker with a history and two without; one rollout needs more than any node has, until one joins."""
    small = cluster.add_node(num_cpus=3, memory=300 * MB)
    large: list[Any] = []
    needs = [200 * MB, 0, 0, 200 * MB, 0, 0, 0, 0, 1000 * MB]
    diary = Watched(
        (
            lambda diary: len(diary.results) == len(needs) - 1,
            lambda: large.append(cluster.add_node(num_cpus=1, memory=2000 * MB)),
        )
    )
    jobs = [Job(f"job{i}", folder, seconds=0.5) for i in range(len(needs))]
    tasks = [Task(job.name, job, i, "g", memory=need) for i, (job, need) in enumerate(zip(jobs, needs, strict=True))]
    assert pool(diary, PoolSize(3, 3), Jobs(Reserving)).run(tasks) == []
    assert len(diary.results) == len(needs) and diary.failures == []
    reserved = Counter(int(path.read_text()) for path in folder.glob("*.memory"))
    assert reserved[200 * MB] == 1 and reserved[0] == 2, reserved
    assert diary.results["job0"].pid == diary.results["job3"].pid
    too_large = [text for text in diary.notices if "job8: this task grows to 1.0 GB of host memory" in text]
    assert len(too_large) == 1 and "It waits for a larger node" in too_large[0], diary.notices
    for node in (small, *large):
        cluster.remove_node(node)


def drain(cluster: Cluster, node: str) -> None:
    reason = autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
    deadline_ms = int(time.time() * 1000) + 60_000
    client = ray._raylet.GcsClient(address=cluster.gcs_address)
    assert client.drain_node(node, reason, "a test", deadline_ms)[0]
    wait_until(lambda: node in draining_nodes())


def busy_node() -> str:
    """The node of the one actor, by the memory that it has reserved."""
    has = {node["NodeID"]: node["Resources"].get("memory", 0) for node in ray.nodes() if node["Alive"]}

    def busy() -> list[str]:
        left = ray._private.state.available_resources_per_node()
        return [node for node, memory in has.items() if left[node].get("memory", 0) < memory]

    # Nodes tell the head now and then.
    wait_until(lambda: len(busy()) == 1)
    return busy()[0]


def a_draining_node_hands_its_rollout_on(cluster: Cluster, folder: Path) -> None:
    """The node of the only actor is drained while it works; the rollout continues elsewhere from the flushed part."""
    nodes = [cluster.add_node(num_cpus=1, memory=500 * MB) for _ in range(2)]
    prompts = make_prompts("a red fox in the snow")
    rag = {"method": "tests.cluster.disturbed:Remembering", "window": 9, "top_k": 2, "recent_exclude": 0}
    gate = folder / "gate"
    gate.mkdir()
    held = {**rag, "descriptor": "avg_pool", "at_block": 3, "marker": str(gate)}

    def config(name: str, method: dict[str, Any]) -> Any:
        engine = {"actors": 1, "checkpoint_every_blocks": 100}
        made = make_config(folder / name, methods={"m": method}, video=NO_VIDEO, durations_s=[15], engine=engine)
        return store_features(made, prompts)

    drained: list[str] = []
    recorder = Recorder()

    def listener(event: Event) -> None:
        recorder(event)
        if isinstance(event, TaskStarted) and event.stage == "rollouts" and not drained:
            wait_until((folder / "gate.waiting").exists)
            drained.append(busy_node())
            drain(cluster, drained[0])
            (gate / "open").touch()

    assert evaluate(config("drained", held), prompts, listener=listener).exit_code == 0
    # An idle draining node goes.
    staying = {node["NodeID"] for node in ray.nodes() if node["Alive"]} - draining_nodes()
    assert len(drained) == 1 and drained[0] not in staying
    (yielded,), ((_, finished),) = recorder.of(TaskYielded), recorder.rollouts()
    assert recorder.of(AttemptFailed) == [] and recorder.of(WorkerLost) == []
    directory = RolloutRun(str(folder / "drained"))
    assert read_failures(directory.storage) == ([], [])
    (commit,) = directory.commits()
    # Parts end at the end alone, but for the one that was flushed.
    flushed, rest = commit.latent_parts
    assert (finished.blocks_resumed, finished.blocks_generated) == (flushed.frames // 3, rest.frames // 3)
    assert f"it has stored {finished.blocks_resumed} block" in yielded.reason

    quiet = RolloutRun(str(folder / "quiet"))
    do_all(quiet, config("quiet", held), prompts)
    assert digests([commit]) == digests(quiet.commits())
    for node in nodes:
        cluster.remove_node(node)


def a_hanging_rollout_is_taken_from_its_actor(cluster: Cluster, folder: Path) -> None:
    """A block that never ends, with a short engine.stall_timeout_s."""
    node = cluster.add_node(num_cpus=1)
    marker = folder / "hung"
    method = {
        "method": "tests.cluster.disturbed:Disturbed",
        "window": 9,
        "at_block": 3,
        "how": "hang",
        "marker": str(marker),
    }
    engine = {"actors": 1, "checkpoint_every_blocks": 2, "stall_timeout_s": 15}
    recorder = Recorder()
    made = make_config(folder / "run", methods={"m": method}, video=NO_VIDEO, durations_s=[3], engine=engine)
    prompts = make_prompts("a river")
    assert evaluate(store_features(made, prompts), prompts, listener=recorder).exit_code == 0
    # On a machine that stands still now and then itself, more than the one that hangs.
    assert recorder.of(AttemptFailed)
    for failed in recorder.of(AttemptFailed):
        assert (failed.failure.kind, failed.failure.counted) == ("death", False)
        assert "no new block for 15 s (engine.stall_timeout_s)" in failed.failure.reason, failed
    ((_, finished),) = recorder.rollouts()
    assert finished.blocks_resumed >= 2 and finished.blocks_resumed + finished.blocks_generated == 4
    assert not [notice for notice in recorder.of(Notice) if notice.warning]
    cluster.remove_node(node)


SCENES = [
    per_gpu_follows_nodes,
    memory_is_shared,
    a_draining_node_hands_its_rollout_on,
    a_hanging_rollout_is_taken_from_its_actor,
]


def main(names: list[str]) -> None:
    os.environ["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] = "0"
    # Ray's sockets are below its folder and their paths may have 107 characters.
    with tempfile.TemporaryDirectory(prefix="lr", ignore_cleanup_errors=True) as temporary:
        head = {"num_cpus": 0, "memory": 0, "include_dashboard": False, "temp_dir": temporary}
        cluster = PatientCluster(initialize_head=True, head_node_args=head)
        ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
        try:
            for scene in SCENES:
                if scene.__name__ in names:
                    folder = Path(temporary) / scene.__name__
                    folder.mkdir()
                    scene(cluster, folder)
                    print("done", scene.__name__, flush=True)
        finally:
            ray.shutdown()
            cluster.shutdown()


if __name__ == "__main__":
    main(sys.argv[1:] or [scene.__name__ for scene in SCENES])
