"""An encoder training: everything that `lrag-ray run` does with ``job: train_encoder`` is `train_encoder`.

The same call again continues exactly where the last checkpoint stands. A training that is done is not started again;
more epochs continue it.
"""

from __future__ import annotations

import traceback
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any

from torch.amp.grad_scaler import GradScaler

from lrag_ray.config.paths import with_absolute_paths
from lrag_ray.config.training import TrainEncoderConfig
from lrag_ray.engine.session import ray_session
from lrag_ray.engine.train import RAY_FOLDER, WorkersFailedError, train
from lrag_ray.events import AttemptFailed, Listener, TaskFinished, silent
from lrag_ray.pipelines.job import Job
from lrag_ray.pipelines.training_data import training_rollouts
from lrag_ray.printable import counted
from lrag_ray.report.training import write_training_report
from lrag_ray.retrieval.encoder import EncoderConfig
from lrag_ray.retrieval.losses import LossConfig
from lrag_ray.retrieval.training import OptimizerConfig, make_optimizer
from lrag_ray.stages.spec import Result
from lrag_ray.stages.training import TrainingWork
from lrag_ray.store.datasets import LatentDataset
from lrag_ray.store.lease import RUN
from lrag_ray.store.records import FailureKind, FailureRecord, new_attempt_id, now_utc
from lrag_ray.store.run_dir import CONFIG_FILE
from lrag_ray.store.seal import sealed_json
from lrag_ray.store.training_run import TrainingIdentity, TrainingRun, rollouts_digest
from lrag_ray.store.versions import versions
from lrag_ray.training.checkpoint import load_state
from lrag_ray.training.loop import TrainingEnd, TrainingSettings, make_model
from lrag_ray.training.windows import Rollouts
from lrag_ray.wan.state_dict import read_checkpoint
from lrag_ray.weights.digests import weights_digest
from lrag_ray.weights.local import local_copy

TASK = "encoder"
"""Title of the one task of a training, in events and failure records."""
_MOST_NAMED = 8


@dataclass(frozen=True)
class TrainingOutcome:
    """How a start of a training ended."""

    exit_code: int
    """0 all epochs are done, 1 the training cannot go on, 130 interrupted."""
    uri: str
    epochs_done: int
    epochs: int
    steps: int
    """Optimiser steps since the training began."""
    best: float | None
    """Lowest validation total."""
    best_epoch: int | None
    missing: Mapping[str, str]
    """Why it could not be finished."""
    seconds: float


def train_encoder(config: TrainEncoderConfig, *, listener: Listener = silent) -> TrainingOutcome:
    """Train to the last epoch.

    Raises, before any worker starts: UsageError and StorageError for datasets that are absent, empty, too short or of
    different shapes; IdentityError for an address that holds another training; WeightsError for a file to start from;
    LeaseError; ClusterError. Ctrl-C stores a checkpoint and gives exit code 130.
    """
    return TrainEncoderJob(config, listener).start()


class TrainEncoderJob(Job[TrainingOutcome]):
    """One start of a training."""

    command = "run"

    def __init__(self, config: TrainEncoderConfig, listener: Listener) -> None:
        config = with_absolute_paths(config)
        run = TrainingRun(config.run.uri, config.storage)
        super().__init__(run.storage, config.engine, listener)
        self._config = config
        self._run = run
        self._end = TrainingEnd("stopped", 0, 0, None, None)
        stored = run.read()
        self._rollouts, self._sizes = self._plan(run.rollouts() if stored is not None else None)
        self._identity = _identity(config, self._sizes, self._rollouts)
        # Before anything is written: another user's run must not receive our lease.
        run.refuse_another_run(self._identity)
        if stored is None:
            self._check_start()

    @property
    def kinds(self) -> Sequence[str]:
        """All that a training's directory holds."""
        return [RUN]

    def do(self) -> None:
        """Train, then write the report."""
        if not self.storage.probe().create_only:
            self.warn(f"{self._run.uri} does not honour create-only writes: let one driver work at a time")
        self.prepare()
        if not self._done():
            with ExitStack() as cluster:
                with self.stage("connect"):
                    cluster.enter_context(ray_session(self.engine))
                self._train()
        with self.stage("report"):
            write_training_report(self._run)

    def prepare(self) -> None:
        """Write down what the training is and on which rollouts."""
        if self._run.read() is None:
            self._run.fix_rollouts(self._rollouts)
        self._run.ensure(self._identity)
        self.storage.write(CONFIG_FILE, sealed_json(self._config.model_dump_json(indent=1, exclude={"watch"})))

    def work(self) -> TrainingWork:
        """What every worker does; needs `prepare`."""
        config = self._config
        return TrainingWork(
            run=self.storage.address,
            data=config.data.uris,
            storage=config.storage,
            settings=_settings(config, self._sizes),
            batch_size=config.training.batch_size,
            window_frames=config.data.window_frames,
            threads=config.engine.threads_per_actor,
            start_from=config.training.start_from,
        )

    def outcome(self, exit_code: int) -> TrainingOutcome:
        """How far the training is."""
        end = self._end
        return TrainingOutcome(
            exit_code=exit_code,
            uri=self._run.uri,
            epochs_done=end.epoch,
            epochs=self._config.training.epochs,
            steps=end.step,
            best=end.best,
            best_epoch=end.best_epoch,
            missing=self.missing,
            seconds=self.seconds,
        )

    def _plan(self, stored: Rollouts | None) -> tuple[Rollouts, EncoderConfig]:
        """The rollouts of the training, as they were fixed when it began, and the sizes of the model."""
        config = self._config
        dataset = LatentDataset.open(*config.data.uris, storage=config.storage)
        if dataset.duplicates:
            self.note(f"several datasets hold {counted(dataset.duplicates, 'rollout')}, each counted once")
        channels, height, width = dataset.shape
        sizes = EncoderConfig(
            in_channels=channels,
            spatial_h=height,
            spatial_w=width,
            latent_dim=config.encoder.latent_dim,
            hidden_dims=config.encoder.hidden_dims,
        )
        return training_rollouts(dataset, config, stored, self.note, self.warn), sizes

    def _check_start(self) -> None:
        """WeightsError for a checkpoint to begin with that does not fit, before any worker is started."""
        address = self._config.training.start_from
        if address is not None:
            settings = _settings(self._config, self._sizes)
            model = make_model(self._sizes, settings.seed)
            optimizer, scaler = make_optimizer(model, settings.optimizer), GradScaler("cpu", enabled=False)
            source = f"checkpoint {address} (training.start_from)"
            load_state(read_checkpoint(local_copy(address)), source, model, optimizer, scaler)

    def _done(self) -> bool:
        state = self._run.state()
        if state is not None:
            self._end = TrainingEnd("stopped", state.epoch, state.step, state.best, state.best_epoch)
        return state is not None and state.epoch >= self._config.training.epochs

    def _train(self) -> None:
        config = self._config
        steps = -(-int((~self._rollouts.validation).sum()) // config.training.batch_size) * config.training.epochs
        # Ray keeps its state under the name, and does not check that it belongs to the same training.
        name = f"{self._identity.digest[:16]}-{new_attempt_id()}"
        with self.stage("training", steps):
            try:
                self._end = train(self.work(), config.engine, self.storage, name, listener=self.report)
            except WorkersFailedError as error:
                self._done()
                self._fail("exception", str(error), "".join(traceback.format_exception(error)))
            except KeyboardInterrupt:
                self._done()
                raise
            finally:
                # All that is needed to continue is in the checkpoint.
                self.storage.remove_many(list(self.storage.list_files(RAY_FOLDER)))
            if self._end.state == "failed":
                self._fail("refused", self._end.reason, "")
            elif self._end.state == "done":
                self.report(TaskFinished("training", TASK, Result(units=self._end.step)))

    def _fail(self, kind: FailureKind, reason: str, trace: str) -> None:
        self.report(
            AttemptFailed(
                FailureRecord(
                    stage="training",
                    task=TASK,
                    attempt=new_attempt_id(),
                    kind=kind,
                    counted=True,
                    counted_attempts=1,
                    quarantined=True,
                    reason=reason,
                    traceback=trace,
                    created_at=now_utc(),
                )
            )
        )


def _settings(config: TrainEncoderConfig, sizes: EncoderConfig) -> TrainingSettings:
    losses = config.losses
    return TrainingSettings(
        sizes=sizes,
        losses=LossConfig(delta_margin=losses.delta_margin, delta_window=losses.delta_window, **config.loss_weights),
        optimizer=OptimizerConfig(**config.optimizer.model_dump()),
        seed=config.run.seed,
        epochs=config.training.epochs,
        validation_fraction=config.data.validation_fraction,
        amp=config.training.amp,
        checkpoint_every_steps=config.engine.checkpoint_every_steps,
        readers=config.engine.readers_per_actor,
    )


def _identity(config: TrainEncoderConfig, sizes: EncoderConfig, rollouts: Rollouts) -> TrainingIdentity:
    start_from = config.training.start_from
    settings: dict[str, Any] = {
        "run": {"seed": config.run.seed},
        "data": {
            "window_frames": config.data.window_frames,
            "validation_fraction": config.data.validation_fraction,
        },
        "encoder": {**asdict(sizes), "hidden_dims": list(sizes.hidden_dims)},
        "losses": {**config.losses.model_dump(), **config.loss_weights},
        "optimizer": config.optimizer.model_dump(),
        "training": {
            "batch_size": config.training.batch_size,
            "amp": config.training.amp,
            "start_from": weights_digest(start_from) if start_from is not None else None,
        },
    }
    return TrainingIdentity(
        settings=settings,
        rollouts=len(rollouts.keys),
        rollouts_digest=rollouts_digest(rollouts),
        epochs=config.training.epochs,
        created_at=now_utc(),
        versions=versions(),
    )
