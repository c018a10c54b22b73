"""Whether the stored bytes of an encoder training are those that were written.

Records, losses, rollouts and checkpoints carry a checksum of their own (`lrag_ray.store.seal`,
`lrag_ray.wan.torch_seal`). The page and its data have none: ``lrag-ray report`` makes them from the losses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from lrag_ray.errors import LragError
from lrag_ray.store.failures import FOLDER as FAILURES
from lrag_ray.store.integrity import Coverage, Damage, Kind
from lrag_ray.store.lease import FOLDER as LEASE
from lrag_ray.store.lease import Beat, LeaseRecord
from lrag_ray.store.parquet import damage_of
from lrag_ray.store.records import FailureRecord, Record, why_not
from lrag_ray.store.run_dir import CONFIG_FILE, RUN_FILE
from lrag_ray.store.seal import parsed_json
from lrag_ray.store.training_run import (
    BEST,
    LAST,
    METRICS,
    REPAIRS,
    ROLLOUTS_FILE,
    STATE_FILE,
    TrainingIdentity,
    TrainingRun,
    TrainingState,
)

_RECORDS: dict[str, tuple[Kind, type[Record]]] = {
    RUN_FILE: ("run", TrainingIdentity),
    STATE_FILE: ("state", TrainingState),
}
_UNDER_WAY = "the next start of `lrag-ray run` writes another"


def find_training_damage(run: TrainingRun, coverage: Coverage) -> Iterator[Damage]:
    """Read a training back and yield what is damaged; `coverage` is filled in. StorageError where the store fails."""
    files = run.storage.list_files()
    for path in sorted(files):
        found = _check_of(run, path, files)
        if found is None:
            coverage.unnamed.append(path)
            continue
        kind, check = found
        coverage.files += 1
        coverage.size_bytes += files[path]
        try:
            check()
        except FileNotFoundError:
            continue
        except (LragError, ValueError, RecursionError) as error:
            repair = REPAIRS.get(path) or REPAIRS.get(path.split("/")[0]) or _UNDER_WAY
            what = why_not(error) if isinstance(error, ValueError) else str(error).split(". ")[0]
            yield Damage(path, kind, what, repair)


def _check_of(run: TrainingRun, path: str, files: dict[str, int]) -> tuple[Kind, Callable[[], object]] | None:
    def record(model: type[Record]) -> object:
        return model.opened(run.storage.read_bytes(path))

    def table() -> None:
        if (what := damage_of(run.storage.read_bytes(path), path, files)) is not None:
            raise ValueError(what)

    top = path.split("/")[0]
    if path in _RECORDS:
        kind, model = _RECORDS[path]
        return kind, lambda: record(model)
    if path == CONFIG_FILE:
        return "configuration", lambda: parsed_json(run.storage.read_bytes(path))
    if path in (LAST, BEST):
        return "checkpoint", lambda: run.checkpoint(path)
    if path == ROLLOUTS_FILE or (top == METRICS and path.endswith(".parquet")):
        return "rollouts" if path == ROLLOUTS_FILE else "losses", table
    if top == LEASE and path.endswith((".json", ".beat")):
        return "lease", lambda: record(LeaseRecord if path.endswith(".json") else Beat)
    if top == FAILURES and path.endswith(".json"):
        return "failure record", lambda: record(FailureRecord)
    return None
