"""How far an encoder training is, from storage alone."""

from __future__ import annotations

from lrag_ray.store.failures import read_failures
from lrag_ray.store.lease import at_work
from lrag_ray.store.records import FailureRecord, Record
from lrag_ray.store.training_run import TrainingRun


class TrainingStatus(Record):
    """The whole training."""

    uri: str
    epoch: int
    """Finished epochs."""
    epochs: int
    step: int
    best: float | None
    """Lowest validation total."""
    best_epoch: int | None
    stored_at: str | None
    """Time of the last checkpoint."""
    failures: list[FailureRecord]
    """Why it cannot go on; the next start tries again."""
    held_by: str | None
    """The driver that works on it."""
    lost: str | None
    """The last driver, where it probably died."""

    @property
    def done(self) -> bool:
        """Whether all epochs are done."""
        return self.epoch >= self.epochs

    @property
    def settled(self) -> bool:
        """Whether nothing will change until someone starts it again."""
        return self.held_by is None and (bool(self.failures) or self.done)

    @property
    def exit_code(self) -> int:
        """1 where it cannot go on, else 0."""
        return int(bool(self.failures))


def training_status(run: TrainingRun) -> TrainingStatus:
    """Status of the training at an address; StorageError where there is none."""
    identity = run.require()
    state = run.state()
    failures, _ = read_failures(run.storage)
    workers = at_work(run.storage)
    return TrainingStatus(
        uri=run.uri,
        epoch=state.epoch if state else 0,
        epochs=identity.epochs,
        step=state.step if state else 0,
        best=state.best if state else None,
        best_epoch=state.best_epoch if state else None,
        stored_at=state.stored_at if state else None,
        failures=[failure for failure in failures if failure.quarantined],
        held_by=workers.held_by,
        lost=workers.lost,
    )
