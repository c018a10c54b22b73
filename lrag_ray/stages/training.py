"""What a worker of an encoder training does: open the data and the run, and go through the loop with its peers.

The same in every process, and in a notebook with one worker::

    work = TrainingWork(...)
    end = work(LocalTrainingHost(), Alone())
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from lrag_ray.config.schema import StorageSection
from lrag_ray.errors import StorageError
from lrag_ray.printable import counted
from lrag_ray.store.datasets import LatentDataset
from lrag_ray.store.training_run import TrainingRun, rollouts_digest
from lrag_ray.training.loop import (
    Leave,
    LossRow,
    Progress,
    Trainer,
    TrainingEnd,
    TrainingFailedError,
    TrainingSettings,
    together,
)
from lrag_ray.training.peers import Peers
from lrag_ray.training.read_ahead import UnusableWindowError, WindowReader
from lrag_ray.training.windows import Rollouts, Window, WindowSampler
from lrag_ray.wan.state_dict import read_checkpoint
from lrag_ray.weights.local import local_copy


class TrainingHost(Protocol):
    """What a worker may ask of the place where it runs."""

    @property
    def device(self) -> torch.device:
        """Where the model computes."""

    def leave(self) -> Leave:
        """What the worker should do soon. Costs next to nothing."""

    def report(self, progress: Progress) -> None:
        """Show where the training is. Costs next to nothing."""

    def warn(self, text: str) -> None:
        """Report something that a person should look into."""


class LocalTrainingHost:
    """A host outside the engine: the CPU of this process."""

    device = torch.device("cpu")

    def leave(self) -> Leave:
        """Never."""
        return ""

    def report(self, progress: Progress) -> None:
        """To nobody."""

    def warn(self, text: str) -> None:
        """To nobody."""


@dataclass(frozen=True)
class TrainingWork:
    """One training, as a picklable object."""

    run: str
    """Address of the run."""
    data: Sequence[str]
    """Addresses of the datasets."""
    storage: StorageSection
    settings: TrainingSettings
    batch_size: int
    window_frames: int
    threads: int
    """Of torch; fixed, because sums change with their number."""
    start_from: str | None = None

    def __call__(self, host: TrainingHost, peers: Peers) -> TrainingEnd:
        """Train to the end, or until the host says to stop. See `Trainer.run` for what is raised."""
        torch.set_num_threads(self.threads)
        # Equal steps on equal devices: a resumed training must give the bits of an undisturbed one.
        torch.backends.cudnn.benchmark = False
        torch.backends.cudnn.deterministic = True
        try:
            run, sampler, reader = together(peers, self._opened, lambda opened: rollouts_digest(opened[1].rollouts))
        except TrainingFailedError as error:
            return TrainingEnd("failed", 0, 0, None, None, str(error))
        sink = RunSink(run, host, self.start_from)
        return Trainer(self.settings, sampler, reader, sink, peers=peers, device=host.device).run()

    def _opened(self) -> tuple[TrainingRun, WindowSampler, WindowReader]:
        run = TrainingRun(self.run, self.storage)
        rollouts = run.rollouts()
        if rollouts is None:
            raise StorageError(f"{run.uri} does not say on which rollouts it trains; start it with `lrag-ray run`")
        dataset = LatentDataset.open(*self.data, storage=self.storage)
        return (
            run,
            WindowSampler(rollouts, self.window_frames, self.batch_size, self.settings.seed),
            window_reader(dataset, rollouts, self.window_frames),
        )


def window_reader(dataset: LatentDataset, rollouts: Rollouts, length: int) -> WindowReader:
    """Windows of the `rollouts` of a training from a dataset that may hold more.

    Raises TrainingFailedError for rollouts that the dataset lacks.
    """
    places = {key: index for index, key in enumerate(dataset.keys)}
    if missing := [key for key in rollouts.keys if key not in places]:
        raise TrainingFailedError(
            f"{len(missing)} of {counted(len(rollouts.keys), 'rollout')} of this training are not in the "
            f"dataset any more: "
            f"{', '.join(key[:12] for key in missing[:8])}. Fix: `lrag-ray dataset verify` lists damaged ones, and the "
            "command that made them makes them again; name all datasets it began with (data.uris); or begin a new "
            "training (another run.uri)"
        )
    at = [places[key] for key in rollouts.keys]

    def name(window: Window) -> str:
        entry = dataset.rollouts[at[window.rollout]]
        return f"{entry.run}/{entry.rollout} (frames {window.start} to {window.start + length - 1})"

    def read_into(window: Window, out: Tensor) -> None:
        try:
            dataset.read_into(at[window.rollout], window.start, out)
        except StorageError as error:
            if error.__cause__ is not None:
                # Transient storage errors outlasted the retries: another start of the workers may succeed.
                raise
            raise UnusableWindowError(f"{name(window)} cannot be read: {error}") from error
        except IndexError as error:
            raise UnusableWindowError(f"{name(window)} is not there any more: {error}") from error

    return WindowReader(read_into, (length, *dataset.shape), dataset.dtype, name)


class RunSink:
    """Stores checkpoints and losses in the run, in a thread of its own, so that training goes on meanwhile.

    A checkpoint that cannot be stored does not end the training: it is reported, and the next one holds its losses too.
    """

    def __init__(self, run: TrainingRun, host: TrainingHost, start_from: str | None) -> None:
        self._run = run
        self._host = host
        self._start_from = start_from
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoints")
        self._flight: Future[None] | None = None
        self._unsaved: list[LossRow] = []
        """Losses of checkpoints that could not be stored."""
        self._failed: StorageError | None = None
        """Why the newest checkpoint, or the best one, is not stored."""
        self._best: dict[str, Any] | None = None
        """The best checkpoint, while it is not stored."""

    def restore(self) -> tuple[dict[str, Any], str] | None:
        """The run's own last checkpoint, else the one to start from."""
        if (own := self._run.checkpoint()) is not None:
            return own, f"{self._run.uri}/checkpoints/last.pt"
        if self._start_from is not None:
            return read_checkpoint(local_copy(self._start_from)), f"checkpoint {self._start_from} (training.start_from)"
        return None

    def save(self, checkpoint: dict[str, Any], rows: Sequence[LossRow]) -> None:
        """Store as soon as the checkpoint before is stored."""
        self._land()
        self._unsaved += rows
        self._flight = self._writer.submit(self._store, checkpoint)

    def save_best(self, checkpoint: dict[str, Any]) -> None:
        """Store together with the next checkpoint, which always follows."""
        self._land()
        self._best = checkpoint

    def advance(self, progress: Progress) -> None:
        """Hand on to the host."""
        self._host.report(progress)

    def leave(self) -> Leave:
        """As the host says."""
        return self._host.leave()

    def close(self) -> None:
        """Wait for the last checkpoint; StorageError if it is not stored."""
        self._land()
        self._writer.shutdown()
        if self._failed is not None:
            raise self._failed

    def _land(self) -> None:
        if self._flight is not None:
            flight, self._flight = self._flight, None
            flight.result()

    def _store(self, checkpoint: dict[str, Any]) -> None:
        try:
            if self._best is not None:
                self._run.save_best(self._best)
                self._best = None
            self._run.save(checkpoint, self._unsaved)
        except StorageError as error:
            self._failed = error
            self._host.warn(f"a checkpoint could not be stored, the training goes on: {error}")
        else:
            self._failed = None
            self._unsaved = []
