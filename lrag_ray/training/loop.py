"""The training loop of the retrieval encoder: epochs of steps, validation, checkpoints, exact resume.

All workers run it together and take the same steps: gradients and losses are summed over them before anything is
decided, so a NaN, a damaged window or a request to stop ends the step on every worker alike. Equal settings, data and
number of workers give equal weights, bit for bit, however often the training was interrupted; another number of workers
gives the same windows in the same order, with other rounding.

    trainer = Trainer(settings, sampler, reader, sink)
    end = trainer.run()
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor
from torch.amp.grad_scaler import GradScaler

from lrag_ray.errors import LragError, UsageError, WeightsError
from lrag_ray.retrieval.encoder import EncoderConfig, LatentAutoencoder
from lrag_ray.retrieval.losses import LossConfig
from lrag_ray.retrieval.training import (
    NonFiniteStepError,
    OptimizerConfig,
    make_optimizer,
    shared_losses,
    train_step,
)
from lrag_ray.training.checkpoint import OWN_KEY, Position, load_state, on_host, trainer_config
from lrag_ray.training.peers import Alone, Peers
from lrag_ray.training.read_ahead import Batch, WindowReader, read_ahead
from lrag_ray.training.windows import Window, WindowSampler, share_of
from lrag_ray.wan.keyed import keyed_generator

_MOST_NAMED = 8


@dataclass(frozen=True)
class TrainingSettings:
    """What determines the weights, besides the data."""

    sizes: EncoderConfig
    losses: LossConfig = field(default_factory=LossConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    seed: int = 42
    epochs: int = 400
    validation_fraction: float = 0.1
    amp: bool = True
    """float16 with a gradient scaler on a GPU; a CPU always computes in float32."""
    checkpoint_every_steps: int = 500
    """Besides one at the end of every epoch."""
    readers: int = 4
    """Threads that read windows ahead."""


class LossRow(NamedTuple):
    """Losses of one step, or of one validation."""

    split: Literal["train", "validation"]
    epoch: int
    step: int
    """Optimiser steps done when it was measured; a training row is of the step before it changed the weights."""
    recon: float
    delta: float
    smooth: float
    total: float
    grad_norm: float | None
    """Before clipping; None for validation."""
    windows: int
    """Over all workers."""
    workers: int
    seconds: float
    """Wall time of the step or of the validation, with the wait for its windows and for the checkpoint before it."""


class Progress(NamedTuple):
    """Where a training is, for people."""

    epoch: int
    """The epoch under way, from 1."""
    epochs: int
    step: int
    steps: int
    workers: int
    doing: Literal["loading", "training", "validating"]
    train: Sequence[float]
    """Means of recon, delta and smooth over the epoch so far; empty before the first step."""
    validation: Sequence[float]
    """The same of the last validation of this start; empty before it."""
    best: float | None
    """Lowest validation total."""
    best_epoch: int | None
    """Its epoch, from 1."""
    windows_per_s: float | None
    """Over the last second or more."""


Leave = Literal["", "checkpoint", "stop"]


class Sink(Protocol):
    """Where results go, and where wishes come from. Only worker 0 writes."""

    def restore(self) -> tuple[dict[str, Any], str] | None:
        """The checkpoint to continue from and its name, or None to begin."""

    def save(self, checkpoint: dict[str, Any], rows: Sequence[LossRow]) -> None:
        """Store the newest checkpoint and the rows since the one before."""

    def save_best(self, checkpoint: dict[str, Any]) -> None:
        """Store the best checkpoint so far."""

    def advance(self, progress: Progress) -> None:
        """Show where the training is; called often."""

    def leave(self) -> Leave:
        """Whether this worker should store a checkpoint soon (its node drains) or stop; called at every step."""

    def close(self) -> None:
        """Wait until everything is stored; raises what prevented it."""


@dataclass(frozen=True)
class TrainingEnd:
    """How a training ended."""

    state: Literal["done", "stopped", "failed"]
    """done: all epochs. stopped: on request, after a checkpoint. failed: see `reason`."""
    epoch: int
    """Finished epochs."""
    step: int
    best: float | None
    """Lowest validation total."""
    best_epoch: int | None
    """Its epoch, from 1."""
    reason: str = ""


class TrainingFailedError(LragError):
    """The training cannot go on, on any worker; another try would meet the same."""


T = TypeVar("T")


def together(peers: Peers, action: Callable[[], T], agree: Callable[[T], object] = lambda _: None) -> T:
    """Do something that may fail on one worker alone, so that no other waits for it for ever.

    Raises TrainingFailedError on all workers if WeightsError, UsageError or TrainingFailedError was raised on any;
    RuntimeError if `agree` of the results differs between workers. Other errors are raised as they are.
    """
    problem, result = "", None
    try:
        result = action()
    except (WeightsError, UsageError, TrainingFailedError) as error:
        problem = str(error) or type(error).__name__
    found = peers.gather(problem or f"\0{agree(result)}")  # type: ignore[arg-type]
    if failures := list(dict.fromkeys(text for text in found if not text.startswith("\0"))):
        raise TrainingFailedError("; ".join(failures))
    if len(set(found)) > 1:
        raise RuntimeError(f"workers began from different states: {sorted({text[1:] for text in found})}")
    return result  # type: ignore[return-value]


class Trainer:
    """One worker's side of a training."""

    def __init__(
        self,
        settings: TrainingSettings,
        sampler: WindowSampler,
        reader: WindowReader,
        sink: Sink,
        *,
        peers: Peers | None = None,
        device: torch.device | None = None,
    ) -> None:
        self._settings = settings
        self._sampler = sampler
        self._reader = reader
        self._sink = sink
        self._peers: Peers = peers or Alone()
        self._device = device or torch.device("cpu")
        self._cuda = self._device.type == "cuda"
        self._at = Position()
        self._rows: list[LossRow] = []
        self._validation: Sequence[float] = ()
        self._pace = _Pace()
        self.model = make_model(settings.sizes, settings.seed).to(self._device)
        self._optimizer = make_optimizer(self.model, settings.optimizer)
        self._scaler = GradScaler(self._device.type, enabled=settings.amp and self._cuda)

    def run(self) -> TrainingEnd:
        """Train to the last epoch, or until asked to stop.

        What no other try can help (NaN, damaged data, a checkpoint that does not fit) is the `reason` of the end.
        Raises what another try may help: storage errors, and errors of the process group.
        """
        try:
            together(self._peers, self._restore, lambda _: self._at.step)
            state = self._epochs()
        except TrainingFailedError as error:
            self._sink.close()
            return self._end("failed", str(error))
        self._sink.close()
        return self._end(state)

    def _epochs(self) -> Literal["done", "stopped"]:
        while self._at.epoch < self._settings.epochs:
            if not self._train_epoch():
                return "stopped"
            self._finish_epoch()
        return "done"

    def _train_epoch(self) -> bool:
        """The rest of the epoch; whether it was finished."""
        self.model.train()
        mine = (self._share(self._sampler.batch(self._at.epoch, i)) for i in self._positions())
        with read_ahead(self._reader, mine, threads=self._settings.readers, pin=self._cuda) as batches:
            began = time.monotonic()
            for batch in batches:
                leave = self._step(batch, began)
                began = time.monotonic()
                due = self._at.step % self._settings.checkpoint_every_steps == 0
                if leave or due:
                    self._store()
                if leave == "stop":
                    return False
        return True

    def _positions(self) -> Iterator[int]:
        yield from range(self._at.batch, self._sampler.batches_per_epoch)

    def _step(self, batch: Batch, began: float) -> Leave:
        """One step; returns what any worker wishes. `began` is the time since when it waited for its batch."""
        everyone = len(self._sampler.batch(self._at.epoch, self._at.batch))
        latents = self._on_device(batch)
        if batch.problems:
            # Every worker sees the NaN in the sum and stops before the weights change.
            latents = latents.new_full((1, *latents.shape[1:]), torch.nan)
        wish = torch.tensor([0.0, 0.0], device=self._device)
        leave = self._sink.leave()
        if leave:
            wish[int(leave == "stop")] = 1.0

        def combine(tensors: list[Tensor]) -> None:
            self._peers.sum([*tensors, wish])

        try:
            report = train_step(
                self.model, self._optimizer, latents, self._settings.losses, self._settings.optimizer.grad_clip,
                share=(len(batch.windows) or len(batch.problems)) / everyone, scaler=self._scaler, combine=combine,
            )  # fmt: skip
        except NonFiniteStepError as error:
            raise self._failed(error, batch) from None
        at = self._at
        recon, delta, smooth, grad_norm, *wishes = torch.cat(
            [torch.stack([*report.losses, report.grad_norm]), wish]
        ).tolist()
        self._rows.append(
            LossRow(
                "train", at.epoch + 1, at.step, recon, delta, smooth, recon + delta + smooth,
                grad_norm, everyone, self._peers.size, time.monotonic() - began,
            )
        )  # fmt: skip
        at.sums = [total + value * everyone for total, value in zip(at.sums, (recon, delta, smooth), strict=True)]
        at.windows += everyone
        at.batch += 1
        at.step += 1
        self._pace.add(everyone)
        self._advance("training")
        return "stop" if wishes[1] else "checkpoint" if wishes[0] else ""

    def _failed(self, error: NonFiniteStepError, batch: Batch) -> TrainingFailedError:
        """Name the windows that are to blame; all workers come here at the same step."""
        mine = list(batch.problems)
        if not mine:
            with torch.no_grad():
                for window, latents in zip(batch.windows, self._on_device(batch), strict=True):
                    terms = shared_losses(
                        self.model, latents[None], self._settings.losses, share=1.0, amp=self._scaler.is_enabled()
                    )
                    if not bool(torch.isfinite(terms).all()):
                        mine.append(f"{self._reader.name(window)} gives the losses {terms.tolist()}")
        blamed = [line for text in self._peers.gather("\n".join(mine)) for line in text.split("\n") if line]
        shown = blamed[:_MOST_NAMED]
        more = [f"and {len(blamed) - len(shown)} more"] if len(blamed) > len(shown) else []
        where = f"step {self._at.step} (epoch {self._at.epoch + 1}, batch {self._at.batch + 1})"
        if not blamed:
            windows = ", ".join(map(self._reader.name, batch.windows[:_MOST_NAMED]))
            return TrainingFailedError(f"{where}: {error}, of the batch {windows}. {_CHECKPOINT_KEPT}{_LOSS_FIX}")
        fix = _DATA_FIX if batch.problems or any("gives the losses" not in line for line in blamed) else _LOSS_FIX
        return TrainingFailedError(f"{where}: {'; '.join([*shown, *more])}. {_CHECKPOINT_KEPT}{fix}")

    @torch.no_grad()
    def _finish_epoch(self) -> None:
        """Validate, keep the best, store, and go on to the next epoch."""
        began = time.monotonic()
        self._advance("validating")
        at = self._at
        batches = self._sampler.validation_batches()
        measured = [total / at.windows for total in at.sums]
        if batches:
            measured = self._validate(batches)
            self._validation = measured
            windows = sum(map(len, batches))
            self._rows.append(
                LossRow(
                    "validation", at.epoch + 1, at.step, measured[0], measured[1], measured[2], sum(measured),
                    None, windows, self._peers.size,
                    time.monotonic() - began,
                )
            )  # fmt: skip
        total = sum(measured)
        at.epoch, at.batch, at.sums, at.windows = at.epoch + 1, 0, [0.0, 0.0, 0.0], 0
        if at.best is None or total < at.best:
            at.best, at.best_epoch = total, at.epoch
            if self._peers.rank == 0:
                self._sink.save_best({**self._checkpoint(), "val_loss": total})
        self._store()

    def _validate(self, batches: Sequence[Sequence[Window]]) -> list[float]:
        """Means of the three terms over all windows of `batches`."""
        self.model.eval()
        sums = torch.zeros(3, dtype=torch.float32, device=self._device)
        count = sum(map(len, batches))
        problems: list[str] = []
        with read_ahead(
            self._reader, map(self._share, batches), threads=self._settings.readers, pin=self._cuda
        ) as mine:
            for batch in mine:
                problems += batch.problems
                sums += shared_losses(
                    self.model, self._on_device(batch), self._settings.losses,
                    share=len(batch.windows) / count, amp=self._scaler.is_enabled(),
                )  # fmt: skip
        self._peers.sum([sums])
        found = [line for text in self._peers.gather("\n".join(problems)) for line in text.split("\n") if line]
        if found or not bool(torch.isfinite(sums).all()):
            where = f"validation after epoch {self._at.epoch + 1}"
            what = "; ".join(found[:_MOST_NAMED]) or f"losses {sums.tolist()}"
            raise TrainingFailedError(f"{where}: {what}. {_CHECKPOINT_KEPT}{_DATA_FIX if found else _LOSS_FIX}")
        return [float(value) for value in sums]

    def _restore(self) -> None:
        self._advance("loading")
        found = self._sink.restore()
        if found is not None:
            content, source = found
            self._at = load_state(content, source, self.model, self._optimizer, self._scaler)
            batches = self._sampler.batches_per_epoch
            if self._at.batch > batches:
                raise TrainingFailedError(
                    f"{source} is at batch {self._at.batch} of an epoch of {batches}; it is damaged"
                )

    def _store(self) -> None:
        if self._peers.rank == 0:
            self._sink.save(self._checkpoint(), self._rows)
        self._rows = []

    def _checkpoint(self) -> dict[str, Any]:
        settings = self._settings
        return {
            "epoch": self._at.epoch - 1,
            "model": on_host(self.model.state_dict()),
            "optimizer": on_host(self._optimizer.state_dict()),
            "scaler": on_host(self._scaler.state_dict()),
            "config": trainer_config(
                settings.sizes, settings.losses, settings.optimizer,
                seed=settings.seed, epochs=settings.epochs, batch_size=self._sampler.batch_size,
                window_frames=self._sampler.length, validation_fraction=settings.validation_fraction, amp=settings.amp,
            ),
            OWN_KEY: asdict(self._at),
        }  # fmt: skip

    def _advance(self, doing: Literal["loading", "training", "validating"]) -> None:
        at, settings = self._at, self._settings
        self._sink.advance(
            Progress(
                epoch=min(at.epoch + 1, settings.epochs),
                epochs=settings.epochs,
                step=at.step,
                steps=self._sampler.batches_per_epoch * settings.epochs,
                workers=self._peers.size,
                doing=doing,
                train=[total / at.windows for total in at.sums] if at.windows else (),
                validation=self._validation,
                best=at.best,
                best_epoch=at.best_epoch,
                windows_per_s=self._pace.per_s,
            )
        )

    def _end(self, state: Literal["done", "stopped", "failed"], reason: str = "") -> TrainingEnd:
        return TrainingEnd(state, self._at.epoch, self._at.step, self._at.best, self._at.best_epoch, reason)

    def _share(self, batch: Sequence[Window]) -> Sequence[Window]:
        return share_of(batch, self._peers.rank, self._peers.size)

    def _on_device(self, batch: Batch) -> Tensor:
        return batch.latents.to(self._device, non_blocking=True).float()


_CHECKPOINT_KEPT = "The weights are those of the last checkpoint. "
_DATA_FIX = (
    "Fix: `lrag-ray dataset verify` finds damaged rollouts; make them again, or leave them out of a new training"
)
_LOSS_FIX = "Fix: a smaller optimizer.lr, or training.amp: false, in a new training (another run.uri)"


def make_model(sizes: EncoderConfig, seed: int) -> LatentAutoencoder:
    """An untrained encoder, float32 on the CPU; equal seeds give equal weights, whatever was drawn before."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(keyed_generator("encoder weights", seed).initial_seed())
        return LatentAutoencoder(sizes)


class _Pace:
    """Windows per second over the last second or more."""

    def __init__(self) -> None:
        self.per_s: float | None = None
        self._since = time.monotonic()
        self._count = 0

    def add(self, windows: int) -> None:
        self._count += windows
        now = time.monotonic()
        if now - self._since >= 1:
            self.per_s = self._count / (now - self._since)
            self._since, self._count = now, 0
