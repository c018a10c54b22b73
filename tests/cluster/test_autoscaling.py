"""Pending actors make a cluster scale up: Ray's autoscaler with its provider of pretended nodes on this machine."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from ray._private.services import get_node_ip_address
from ray.autoscaler._private.fake_multi_node.node_provider import FAKE_HEAD_NODE_ID

from lrag_ray.store.rollouts import RolloutRun
from tests.cluster.drivers import REPOSITORY, actors_below, driver, write_config
from tests.cluster.nodes import free_port, private_folder, ray_start
from tests.cluster.pretended_nodes import PretendedNodes
from tests.cluster.quiet import Gate, assert_equal, make_config, quiet_run

pytestmark = [pytest.mark.proof, pytest.mark.cluster, pytest.mark.timeout(600)]


def autoscaling(address: str) -> dict[str, object]:
    """A head without room, and up to two nodes of one CPU: cluster/autoscaler/gpu.yaml at the size of this machine."""
    text = (REPOSITORY / "cluster" / "autoscaler" / "gpu.yaml").read_text(encoding="utf-8")
    published = yaml.safe_load(text)
    declared = published["available_node_types"]["gpu"]["resources"]
    sizes = {"CPU": 1, "memory": 4 * 1024**3}
    store = 150 * 1024**2
    head = {"resources": {"CPU": 0, "object_store_memory": store}, "node_config": {}, "max_workers": 0}
    # Actors reserve memory, so a node type must say how much it has, or no node is ever started for them.
    room = {name: sizes[name] for name in declared if name != "GPU"} | {"object_store_memory": store}
    worker = {"resources": room, "node_config": {}, "max_workers": 2}
    return {
        "cluster_name": "pretended",
        "max_workers": 2,
        "upscaling_speed": published["upscaling_speed"],
        "idle_timeout_minutes": published["idle_timeout_minutes"],
        "provider": {
            "type": "external",
            "module": f"{PretendedNodes.__module__}.{PretendedNodes.__name__}",
            "gcs_address": address,
            "head_node_id": FAKE_HEAD_NODE_ID,
            "launch_multiple": True,
        },
        "available_node_types": {"ray.head.default": head, "worker": {**worker, "min_workers": 0}},
        "head_node_type": "ray.head.default",
        "auth": {},
        "file_mounts": {},
        "cluster_synced_files": [],
        "file_mounts_sync_continuously": False,
        "rsync_exclude": [],
        "rsync_filter": [],
        "initialization_commands": [],
        "setup_commands": [],
        "head_setup_commands": [],
        "worker_setup_commands": [],
        "head_start_ray_commands": [],
        "worker_start_ray_commands": [],
    }


def test_actors_without_room_bring_nodes_and_are_placed_there(tmp_path: Path) -> None:
    quiet = quiet_run(make_config(tmp_path / "quiet", prompts=2, gates=[Gate(tmp_path / "open", opened=True)]))
    port = free_port()
    address = f"{get_node_ip_address()}:{port}"
    (tmp_path / "autoscaling.json").write_text(json.dumps(autoscaling(address)), encoding="utf-8")
    with (
        private_folder() as folder,
        ray_start(
            "--head",
            f"--port={port}",
            "--num-cpus=0",
            "--include-dashboard=false",
            f"--temp-dir={folder}",
            f"--autoscaling-config={tmp_path / 'autoscaling.json'}",
            PYTHONPATH=str(REPOSITORY),
            RAY_FAKE_CLUSTER="1",
            AUTOSCALER_UPDATE_INTERVAL_S="1",
            RAY_enable_autoscaler_v2="1",
            RAY_CLOUD_INSTANCE_ID=FAKE_HEAD_NODE_ID,
            RAY_OVERRIDE_NODE_ID_FOR_TESTING=FAKE_HEAD_NODE_ID,
        ) as head,
    ):
        started_all = head.parent()
        assert started_all is not None
        # Of each prompt a rollout waits, so that there is work until both nodes are there.
        gate = Gate(tmp_path / "gate")
        config = make_config(tmp_path / "run", address, prompts=2, gates=[gate])
        with driver(write_config(tmp_path / "config.yaml", config)) as started:
            started.wait_until(lambda: len(actors_below(started_all.pid)) == 2)
            assert actors_below(head.pid) == []
            gate.open()
            assert started.wait() == 0, started.text
    assert_equal(RolloutRun(config.run.uri), quiet)
