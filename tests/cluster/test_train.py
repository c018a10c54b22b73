"""Encoder trainings on a real cluster: two workers, one of them killed, and what a start refuses."""

from __future__ import annotations

import os
import re
import signal
import threading
import time
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import psutil
import pyarrow.compute as pc
import pytest
import ray
import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn

from lrag_ray.config.load import load_job
from lrag_ray.config.training import TrainEncoderConfig
from lrag_ray.events import Event, TaskFinished, TrainingAdvanced, WorkerLost
from lrag_ray.pipelines.train_encoder import TrainEncoderJob, train_encoder
from lrag_ray.retrieval.encoder import load_encoder
from lrag_ray.stages.training import LocalTrainingHost, TrainingWork
from lrag_ray.store.training_run import BEST, LAST, TrainingRun
from lrag_ray.store.training_status import training_status
from lrag_ray.training.peers import ProcessGroup
from lrag_ray.wan.state_dict import state_dict_digest
from tests.cluster.drivers import command
from tests.training.corpus import make_corpus, training_file

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900), pytest.mark.usefixtures("cluster")]

EPOCHS, BATCH = 60, 4


def make_config(folder: Path, corpus: str, uri: str, **changes: Any) -> TrainEncoderConfig:
    content = {"training": {"epochs": EPOCHS, "batch_size": BATCH}, **changes}
    loaded = load_job(training_file(folder / "training.yaml", corpus, uri, **content))
    assert isinstance(loaded, TrainEncoderConfig)
    return loaded


def plain_worker(rank: int, folder: str, work: TrainingWork) -> None:
    """A worker without Ray."""
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2, timeout=timedelta(minutes=10)
    )
    assert work(LocalTrainingHost(), ProcessGroup()).state == "done"
    dist.destroy_process_group()


def undisturbed(folder: Path, corpus: str) -> TrainingRun:
    """The same training by two processes that nothing disturbs and that know nothing of Ray."""
    job = TrainEncoderJob(make_config(folder, corpus, str(folder / "quiet")), lambda _: None)
    job.prepare()
    spawn(plain_worker, (str(folder), job.work()), nprocs=2)
    return TrainingRun(str(folder / "quiet"))


def training_workers() -> list[psutil.Process]:
    found = []
    with suppress(psutil.NoSuchProcess):
        for process in psutil.Process().children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                if "RayTrainWorker" in " ".join(process.cmdline()):
                    found.append(process)
    return found


class Killer(threading.Thread):
    """Kills a training worker once the run has stored some steps."""

    def __init__(self, run: TrainingRun, after_step: int) -> None:
        super().__init__(daemon=True)
        self.run_dir, self.after_step, self.killed = run, after_step, 0

    def run(self) -> None:
        deadline = time.monotonic() + 600
        while not self.killed and time.monotonic() < deadline:
            state = self.run_dir.state()
            if state is not None and state.step >= self.after_step and (workers := training_workers()):
                workers[-1].send_signal(signal.SIGKILL)
                self.killed = workers[-1].pid
            time.sleep(0.05)


@pytest.mark.proof
def test_a_training_that_loses_a_worker_equals_an_undisturbed_one(tmp_path: Path) -> None:
    """Two workers on Ray, one killed in the middle of an epoch, against two plain processes: the same bits."""
    corpus = make_corpus(tmp_path / "corpus")
    config = make_config(tmp_path, corpus, str(tmp_path / "run"))
    run = TrainingRun(str(tmp_path / "run"))
    killer = Killer(run, after_step=EPOCHS)
    killer.start()
    events: list[Event] = []
    outcome = train_encoder(config, listener=events.append)
    assert (outcome.exit_code, outcome.epochs_done, outcome.missing) == (0, EPOCHS, {})
    assert killer.killed
    assert any(isinstance(event, WorkerLost) for event in events)
    assert any(isinstance(event, TrainingAdvanced) and event.workers == 2 for event in events)
    assert any(isinstance(event, TaskFinished) and event.stage == "training" for event in events)

    quiet = undisturbed(tmp_path, corpus)
    for path in (LAST, BEST):
        ours, theirs = run.checkpoint(path), quiet.checkpoint(path)
        assert ours is not None and theirs is not None
        assert state_dict_digest(ours["model"]) == state_dict_digest(theirs["model"])
        assert ours["lrag_ray"] == theirs["lrag_ray"]
    columns = ["split", "epoch", "step", "recon", "delta", "smooth", "total", "grad_norm", "windows", "workers"]
    assert run.losses().select(columns).equals(quiet.losses().select(columns))
    losses = run.losses()
    assert pc.count_distinct(losses.filter(pc.equal(losses["split"], "train"))["step"]).as_py() == outcome.steps

    # The checkpoint is an encoder, nothing of Ray's is left, and a second start has nothing to do.
    assert load_encoder(run.storage.full(BEST)).config.spatial_h == 8
    files = run.storage.list_files()
    assert not [path for path in files if path.startswith("ray/")]
    assert {"summary/report.html", "summary/losses.parquet", "summary/losses.png"} <= files.keys()
    status = training_status(run)
    assert (status.done, status.step, status.failures, status.held_by) == (True, outcome.steps, [], None)
    again: list[Event] = []
    assert train_encoder(config, listener=again.append).exit_code == 0
    assert not any(isinstance(event, TrainingAdvanced) for event in again)


def test_nan_latents_end_the_training_at_once_with_their_name(tmp_path: Path) -> None:
    def poisoned(index: int, frames: int) -> torch.Tensor:
        values = torch.randn(frames, 4, 4, 6, generator=torch.Generator().manual_seed(index))
        if index == 3:
            values[:] = torch.nan
        return values

    corpus = make_corpus(tmp_path / "corpus", latents=poisoned)
    config = make_config(tmp_path, corpus, str(tmp_path / "run"), engine={"actors": 1})
    outcome = train_encoder(config)
    assert outcome.exit_code == 1
    (reason,) = outcome.missing.values()
    assert re.search(r"rollouts/tiny/base/00003-\S+ \(frames \d+ to \d+\) holds NaN", reason)
    status = training_status(TrainingRun(str(tmp_path / "run")))
    assert (status.exit_code, len(status.failures)) == (1, 1)
    assert os.path.exists(tmp_path / "run" / "summary" / "report.html")  # noqa: PTH110


@pytest.mark.proof
def test_one_ctrl_c_stops_a_training_at_a_step_and_a_second_one_at_once(tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path / "corpus")
    changes: dict[str, Any] = {
        "training": {"epochs": 100_000},
        "engine": {"actors": 1, "checkpoint_every_steps": 2, "address": ray.get_runtime_context().gcs_address},
    }
    run = TrainingRun(str(tmp_path / "run"))

    def step() -> int:
        state = run.state()
        return 0 if state is None else state.step

    interrupted = threading.Event()

    def interrupt(event: Event) -> None:
        if isinstance(event, TrainingAdvanced) and event.step > 2 and not interrupted.is_set():
            interrupted.set()
            raise KeyboardInterrupt

    outcome = train_encoder(make_config(tmp_path, corpus, run.uri, **changes), listener=interrupt)
    assert (outcome.exit_code, outcome.steps) == (130, step())
    assert outcome.steps > 2 and not psutil.wait_procs(training_workers(), timeout=30)[1]

    path = training_file(tmp_path / "training.yaml", corpus, run.uri, **changes)
    with command(tmp_path / "log", "run", str(path)) as driver:
        driver.wait_until(lambda: step() > outcome.steps)
        workers = training_workers()
        for worker in workers:
            worker.suspend()  # as in a step that takes very long
        driver.process.send_signal(signal.SIGINT)
        driver.wait_until(lambda: "a second Ctrl-C ends at once" in driver.text)
        driver.process.send_signal(signal.SIGINT)
        assert driver.wait(30) == 130
    assert "Traceback" not in driver.text and "the same command continues" in driver.text
    assert workers and not psutil.wait_procs(workers, timeout=30)[1]
