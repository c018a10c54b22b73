"""An elastic encoder training: it grows onto a node that joins, shrinks when one drains or dies, and stops on Ctrl-C.

The learning rate changes no weight by more than rounding, so the losses of a step say which windows it took.
"""

from __future__ import annotations

import io
import re
import signal
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import ray
import torch
from ray.core.generated import autoscaler_pb2

from lrag_ray.config.load import load_job
from lrag_ray.config.training import TrainEncoderConfig
from lrag_ray.pipelines.train_encoder import TrainEncoderJob
from lrag_ray.retrieval.losses import encoder_losses
from lrag_ray.store.datasets import LatentDataset
from lrag_ray.store.training_run import LOSS_SCHEMA, TrainingRun
from lrag_ray.training.loop import make_model
from lrag_ray.training.windows import WindowSampler
from tests.cluster.drivers import Driver, driver
from tests.cluster.nodes import nodes
from tests.training.corpus import make_corpus, training_file

pytestmark = [pytest.mark.cluster, pytest.mark.proof, pytest.mark.timeout(1500)]

BATCH, WINDOW, ROLLOUTS = 2, 6, 160


def drain(address: str, node: Any) -> None:
    reason = autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
    deadline_ms = int(time.time() * 1000) + 60_000
    assert ray._raylet.GcsClient(address=address).drain_node(node.node_id, reason, "a test", deadline_ms)[0]


def newest(run: TrainingRun) -> dict[str, Any]:
    """The last row that was stored."""
    parts = sorted(run.storage.list_files("metrics"))
    table = pq.read_table(io.BytesIO(run.storage.read_bytes(parts[-1]))) if parts else LOSS_SCHEMA.empty_table()
    return table.slice(table.num_rows - 1).to_pylist()[0] if parts else {"step": -1, "workers": 0}


def wait_for_workers(started: Driver, run: TrainingRun, count: int) -> int:
    """A step that `count` workers took after this call."""
    before = newest(run)["step"]
    started.wait_until(lambda: newest(run)["step"] > before and newest(run)["workers"] == count)
    return int(newest(run)["step"])


def test_a_training_follows_its_nodes_and_takes_every_window_in_order(tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path / "corpus", count=ROLLOUTS)
    run = TrainingRun(str(tmp_path / "run"))

    def file(epochs: int) -> Path:
        return training_file(
            tmp_path / "training.yaml", corpus, run.uri,
            optimizer={"lr": 1e-12, "weight_decay": 0.0},
            training={"epochs": epochs, "batch_size": BATCH},
            engine={
                "actors": {"min": 1, "max": 2}, "address": cluster.address, "resize_every_s": 1,
                "checkpoint_every_steps": 10**6,
            },
        )  # fmt: skip

    with nodes() as cluster:
        cluster.add()
        with driver(file(10**6)) as started:
            wait_for_workers(started, run, 1)
            second = cluster.add()
            grown = wait_for_workers(started, run, 2)
            rollouts = run.rollouts()
            assert rollouts is not None
            sampler = WindowSampler(rollouts, WINDOW, BATCH, 3)
            drain(cluster.address, second)
            started.wait_until(lambda: (newest(run)["step"] + 1) % sampler.batches_per_epoch)
            cluster.kill(second)
            drained = wait_for_workers(started, run, 1)
            third = cluster.add()
            regrown = wait_for_workers(started, run, 2)
            cluster.kill(third)
            shrunk = wait_for_workers(started, run, 1)
            assert 0 < grown < drained < regrown < shrunk

            started.process.send_signal(signal.SIGINT)
            assert started.wait() == 130, started.text
        stopped = run.state()
        assert stopped is not None
        assert stopped.step % sampler.batches_per_epoch, "it stopped at the end of an epoch"
        with driver(file(stopped.epoch + 2)) as again:
            assert again.wait() == 0, again.text
        assert re.search(r"worker \d", started.text)

    rows = [row for row in run.losses().to_pylist() if row["split"] == "train"]
    config = load_job(tmp_path / "training.yaml")
    assert isinstance(config, TrainEncoderConfig)
    assert [row["step"] for row in rows] == list(range(len(rows)))
    job = TrainEncoderJob(config, lambda _: None)
    settings = job.work().settings
    assert len(rows) == sampler.batches_per_epoch * (stopped.epoch + 2)
    data, model = LatentDataset.open(corpus), make_model(settings.sizes, settings.seed)
    places = {key: index for index, key in enumerate(data.keys)}
    latents = [data.read(places[key]) for key in rollouts.keys]
    with torch.no_grad():
        for row in rows[:: max(1, len(rows) // 300)]:
            windows = sampler.batch(*divmod(row["step"], sampler.batches_per_epoch))
            batch = torch.stack([latents[window.rollout][window.start : window.start + WINDOW] for window in windows])
            expected = encoder_losses(model, batch, settings.losses)
            assert row["windows"] == len(windows)
            assert [row["recon"], row["delta"], row["smooth"]] == pytest.approx(
                [float(value) for value in (expected.recon, expected.delta, expected.smooth)], rel=1e-4
            ), row
