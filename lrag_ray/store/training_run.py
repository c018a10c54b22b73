"""The run directory of an encoder training.

::

    RUN/
      run.json                     what the training is (`TrainingIdentity`)
      config.json, lease/, failures/   as in every run
      data/rollouts.parquet        the rollouts it trains on, fixed when it began
      checkpoints/last.pt          where it stands
      checkpoints/best.pt          lowest validation total so far
      state.json                   where that is, in a few numbers
      metrics/steps-<first>-<last>.parquet   losses between two checkpoints
      summary/                     page, plots, losses.parquet

A checkpoint is replaced atomically, after the losses up to it. A worker that the cluster lost but that still writes can
only put an older checkpoint of the same training there, from which the same steps lead to the same weights.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from pydantic import Field

from lrag_ray.errors import StorageError, WeightsError
from lrag_ray.printable import counted
from lrag_ray.store.address import Storage
from lrag_ray.store.identity import FORMAT_VERSION, canonical_digest, compare
from lrag_ray.store.parquet import read_parquet, write_parquet
from lrag_ray.store.records import Count, JsonValue, Record, UtcTime, now_utc, why_not
from lrag_ray.store.run_dir import CONFIG_FILE, RUN_FILE, IdentifiedRun
from lrag_ray.store.scratch import scratch_folder
from lrag_ray.training.checkpoint import OWN_KEY, checkpoint_bytes
from lrag_ray.training.loop import LossRow
from lrag_ray.training.windows import Rollouts
from lrag_ray.wan.state_dict import read_checkpoint

LAST = "checkpoints/last.pt"
BEST = "checkpoints/best.pt"
ROLLOUTS_FILE = "data/rollouts.parquet"
METRICS = "metrics"
STATE_FILE = "state.json"
_ANEW = "begin a new training (another run.uri)"
REPAIRS = {
    RUN_FILE: _ANEW,
    CONFIG_FILE: "`lrag-ray run CONFIG` writes it again",
    ROLLOUTS_FILE: _ANEW,
    LAST: f"remove {LAST} and {STATE_FILE}, and `lrag-ray run CONFIG` trains again from the start",
    BEST: f"remove {LAST} and {STATE_FILE}, and `lrag-ray run CONFIG` trains again from the start",
    STATE_FILE: f"remove it; `lrag-ray run CONFIG` continues from {LAST} and writes it again",
    METRICS: "remove it; the plots then lack these steps, the training does not",
}
"""What to do about a damaged file of a training, by its path or folder."""
_PART = re.compile(rf"^{METRICS}/steps-(\d{{12}})-(\d{{12}})\.parquet$")

LOSS_SCHEMA = pa.schema(
    [
        ("split", pa.string()),
        ("epoch", pa.int32()),
        ("step", pa.int64()),
        ("recon", pa.float64()),
        ("delta", pa.float64()),
        ("smooth", pa.float64()),
        ("total", pa.float64()),
        ("grad_norm", pa.float64()),
        ("windows", pa.int32()),
        ("workers", pa.int32()),
        ("seconds", pa.float64()),
    ]
)
"""Columns of the losses: the fields of `LossRow`."""
_ROLLOUTS_SCHEMA = pa.schema([("key", pa.string()), ("frames", pa.int64()), ("validation", pa.bool_())])


class TrainingIdentity(Record):
    """Content of ``run.json`` of a training. `epochs` may grow; nothing else ever changes."""

    job: Literal["train_encoder"] = "train_encoder"
    format_version: int = FORMAT_VERSION
    settings: dict[str, JsonValue]
    """What determines the weights besides the data, as in the configuration; the file to start from by its digest."""
    rollouts: Count
    """Of both splits."""
    rollouts_digest: str
    """SHA-256 over keys and frames of the rollouts, in order of their keys."""
    epochs: int = Field(ge=1, lt=2**31)
    created_at: UtcTime
    versions: dict[str, str] = Field(default_factory=dict)

    @property
    def digest(self) -> str:
        """Of all that may not change."""
        return canonical_digest({"settings": self.settings, "rollouts": self.rollouts_digest})


class TrainingState(Record):
    """Content of ``state.json``: where the last checkpoint stands, for who does not want to read it."""

    epoch: Count
    """Finished epochs."""
    step: Count
    best: float | None
    """Lowest validation total."""
    best_epoch: int | None
    """Its epoch, from 1."""
    stored_at: UtcTime


class TrainingRun(IdentifiedRun[TrainingIdentity]):
    """One training at one address."""

    identity = TrainingIdentity
    absent = "there is no training at this address"
    unreadable = "an encoder training"
    advice = (
        "Another job, or another version of lrag-ray, wrote it, or it is damaged. Fix: set run.uri to a new address"
    )
    changed = "a training"

    def differences(self, stored: TrainingIdentity, wanted: TrainingIdentity) -> list[str]:
        """All changes but that of the epochs."""
        changes = [*compare("", stored.settings, wanted.settings)]
        if stored.rollouts_digest != wanted.rollouts_digest:
            changes.append(f"data: {counted(stored.rollouts, 'rollout')} in the training, other ones in the dataset")
        return [change.removeprefix(".") for change in changes]

    def grown(self, stored: TrainingIdentity, wanted: TrainingIdentity) -> TrainingIdentity:
        """To other epochs."""
        return stored.model_copy(update={"epochs": wanted.epochs})

    def rollouts(self) -> Rollouts | None:
        """The rollouts that were fixed when the training began; None before. StorageError for a damaged file."""
        try:
            data = self.storage.read_bytes(ROLLOUTS_FILE)
        except FileNotFoundError:
            return None
        try:
            table = read_parquet(data, _ROLLOUTS_SCHEMA)
        except pa.ArrowInvalid as error:
            raise StorageError(f"{self.uri}/{ROLLOUTS_FILE} is damaged ({error}). Fix: {_ANEW}") from error
        return Rollouts(
            table["key"].to_pylist(),
            table["frames"].to_numpy().astype(np.int64),
            table["validation"].to_numpy(zero_copy_only=False).astype(bool),
        )

    def fix_rollouts(self, rollouts: Rollouts) -> None:
        """Store the rollouts of a training that begins."""
        columns = [list(rollouts.keys), rollouts.frames, rollouts.validation]
        table = pa.table(columns, schema=_ROLLOUTS_SCHEMA)
        self.storage.write(ROLLOUTS_FILE, write_parquet(table, ROLLOUTS_FILE))

    def checkpoint(self, path: str = LAST) -> dict[str, Any] | None:
        """A stored checkpoint, tensors on the CPU; None where there is none.

        Raises WeightsError for a damaged one.
        """
        try:
            return self._checkpoint(path)
        except WeightsError as error:
            raise WeightsError(f"{error}. Nothing else holds what is in it: {REPAIRS[path]}") from error

    def _checkpoint(self, path: str) -> dict[str, Any] | None:
        if self.storage.is_local:
            full = Path(self.storage.full(path))
            return read_checkpoint(full) if full.is_file() else None
        with scratch_folder() as folder:
            copy = folder / "checkpoint.pt"
            try:
                self.storage.get_file(path, copy)
            except FileNotFoundError:
                return None
            return read_checkpoint(copy)

    def save(self, checkpoint: Mapping[str, Any], rows: Sequence[LossRow]) -> None:
        """Store losses, then the checkpoint that they lead to."""
        if rows:
            part = f"{METRICS}/steps-{rows[0].step:012d}-{rows[-1].step:012d}.parquet"
            columns = [list(column) for column in zip(*rows, strict=True)]
            self.storage.write(part, write_parquet(pa.table(columns, schema=LOSS_SCHEMA), part))
        self.storage.write(LAST, checkpoint_bytes(checkpoint))
        at = checkpoint[OWN_KEY]
        state = TrainingState(
            stored_at=now_utc(), **{name: at[name] for name in ("epoch", "step", "best", "best_epoch")}
        )
        self.storage.write(STATE_FILE, state.sealed())

    def state(self) -> TrainingState | None:
        """Where the last checkpoint stands; None before the first. StorageError for a damaged record."""
        try:
            return TrainingState.opened(self.storage.read_bytes(STATE_FILE))
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise StorageError(
                f"{self.uri}/{STATE_FILE} is damaged ({why_not(error)}). Fix: {REPAIRS[STATE_FILE]}"
            ) from error

    def save_best(self, checkpoint: Mapping[str, Any]) -> None:
        """Store the best checkpoint."""
        self.storage.write(BEST, checkpoint_bytes(checkpoint))

    def losses(self) -> pa.Table:
        """All losses in order of their steps; StorageError for a damaged file."""
        tables = []
        for path, _, _ in self._parts():
            try:
                tables.append(read_parquet(self.storage.read_bytes(path), LOSS_SCHEMA))
            except (pa.ArrowInvalid, FileNotFoundError) as error:
                raise StorageError(f"{self.uri}/{path} is damaged ({error}). Fix: {REPAIRS[METRICS]}") from error
        if not tables:
            return LOSS_SCHEMA.empty_table()
        # A part that was cut elsewhere before a crash may repeat steps; the values are the same.
        joined = pa.concat_tables(tables)
        steps = zip(joined["split"].to_pylist(), joined["step"].to_pylist(), strict=True)
        last = {step: row for row, step in enumerate(steps)}
        return joined.take(sorted(last.values()))

    def _parts(self) -> Iterator[tuple[str, int, int]]:
        """Paths, first and last steps, in order."""
        for path in sorted(self.storage.list_files(METRICS)):
            if match := _PART.match(path):
                yield path, int(match[1]), int(match[2])


def holds_training(storage: Storage) -> bool:
    """Whether the run at an address is an encoder training."""
    try:
        data = storage.read_bytes(RUN_FILE)
    except FileNotFoundError:
        return False
    try:
        TrainingIdentity.opened(data)
    except ValueError:
        return False
    return True


def rollouts_digest(rollouts: Rollouts) -> str:
    """SHA-256 over keys and frames."""
    return canonical_digest([list(rollouts.keys), rollouts.frames.tolist()])
