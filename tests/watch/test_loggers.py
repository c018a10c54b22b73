"""The loggers with their real libraries: what they wrote is read back."""

from __future__ import annotations

import json
import struct
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from lrag_ray.config.watch import MlflowSection, TensorBoardSection, WandbSection
from lrag_ray.errors import RunEnvironmentError
from lrag_ray.events import ReportWritten
from lrag_ray.store.address import Storage
from lrag_ray.watch import logger
from lrag_ray.watch.logger import LoggedRun, RunLogger, drift_curves
from lrag_ray.watch.mlflow import MlflowLogger
from lrag_ray.watch.tensorboard import TensorBoardLogger
from lrag_ray.watch.wandb import WandbLogger
from tests.watch.make import ended, start_of

_WANDB_HEADER_BYTES = 7
_FULL, _LAST = 1, 4

DRIFT = """backbone,method,duration_s,measure,clip,start_s,in_clip
tiny,rag,4.5,flicker,0,0.0,0.1
tiny,rag,4.5,flicker,1,2.0,0.2
tiny,base,4.5,flicker,0,0.0,0.3
"""


def log_a_start(destination: RunLogger, folder: Path) -> None:
    """All that a start gives to a logger, with a report in `folder`."""
    folder.mkdir()
    (folder / "report.html").write_text("<html>the page</html>", encoding="utf-8")
    (folder / "drift.csv").write_text(DRIFT, encoding="utf-8")
    listener = LoggedRun(destination, Storage(str(folder)))
    for event in [*start_of(), ReportWritten(str(folder), ("report.html", "drift.csv")), ended()]:
        listener(event)


def test_tensorboard_files_hold_scalars_curves_and_report(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log_a_start(
        TensorBoardLogger(TensorBoardSection(folder=str(tmp_path / "tb")), "s3://bucket/table2"), tmp_path / "s"
    )
    (folder,) = (tmp_path / "tb").iterdir()
    assert folder.name.startswith("table2-")
    read = EventAccumulator(str(folder))
    read.Reload()
    assert read.Scalars("scores/tiny/rag/4.5s/flicker")[0].value == 0.25
    assert read.Scalars("scores/tiny/rag/4.5s/average_rank")[0].value == 1.5
    assert read.Scalars("progress/blocks")[-1].value == 12
    assert read.Scalars("progress/stored_bytes")[-1].value == 5000
    points = [(event.step, event.value) for event in read.Scalars("drift/tiny/rag/4.5s/flicker")]
    assert points == [(0, pytest.approx(0.1)), (2, pytest.approx(0.2))]
    assert (folder / "report" / "report.html").read_text() == "<html>the page</html>"


def test_mlflow_holds_scalars_curves_and_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow.tracking import MlflowClient

    # MLflow's own switch: it prefers a database to plain files.
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    section = MlflowSection(tracking_uri=str(tmp_path / "mlruns"), experiment="videos")
    log_a_start(MlflowLogger(section, "runs/table2"), tmp_path / "s")
    client = MlflowClient(tracking_uri=str(tmp_path / "mlruns"))
    experiment = client.get_experiment_by_name("videos")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    assert (run.info.run_name, run.info.status) == ("table2", "FAILED")
    assert run.data.metrics["scores/tiny/rag/4.5s/flicker"] == 0.25
    assert run.data.metrics["progress/rollouts_done"] == 1
    curve = client.get_metric_history(run.info.run_id, "drift/tiny/rag/4.5s/flicker")
    assert [(point.step, point.value) for point in curve] == [(0, 0.1), (2, 0.2)]
    files = [file.path for file in client.list_artifacts(run.info.run_id, "report")]
    assert files == ["report/drift.csv", "report/report.html"]
    # A second start is a run of its own in the same experiment.
    MlflowLogger(section, "runs/table2").close(ended(state="done", exit_code=0))
    assert len(client.search_runs([experiment.experiment_id])) == 2


def test_wandb_offline_holds_scalars_curves_and_report(tmp_path: Path) -> None:
    section = WandbSection(project="videos", mode="offline", folder=str(tmp_path / "files"))
    log_a_start(WandbLogger(section, "runs/table2"), tmp_path / "s")
    (folder,) = (tmp_path / "files" / "wandb").glob("offline-run-*")
    # W&B's own process writes the file, and may be at it for a moment longer.
    deadline = time.monotonic() + 60
    while "state" not in (found := read_wandb(folder))[1] and time.monotonic() < deadline:
        time.sleep(0.2)
    rows, summary, artifacts = found
    assert any(row.get("scores/tiny/rag/4.5s/flicker") == 0.25 for row in rows)
    curve = [
        (row["video_s"], row["drift/tiny/rag/4.5s/flicker"]) for row in rows if "drift/tiny/rag/4.5s/flicker" in row
    ]
    assert curve == [(0.0, 0.1), (2.0, 0.2)]
    assert any(row.get("progress/blocks") == 12 for row in rows)
    assert summary["state"] == "incomplete"
    assert artifacts == [("report", ["drift.csv", "report.html"])]


def read_wandb(folder: Path) -> tuple[list[dict[str, float]], dict[str, object], list[tuple[str, Sequence[str]]]]:
    """History rows, summary and artifacts of an offline run, from the log that `wandb sync` would send."""
    from wandb.proto import wandb_internal_pb2

    (log,) = folder.glob("*.wandb")
    rows: list[dict[str, float]] = []
    summary: dict[str, object] = {}
    artifacts: list[tuple[str, Sequence[str]]] = []
    for data in leveldb_records(log.read_bytes()[_WANDB_HEADER_BYTES:]):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        if record.HasField("history"):
            items = record.history.item
            rows.append({item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items})
        elif record.HasField("summary"):
            summary |= {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.summary.update}
        elif record.HasField("request") and record.request.HasField("log_artifact"):
            logged = record.request.log_artifact.artifact
            artifacts.append((logged.name, sorted(entry.path for entry in logged.manifest.contents)))
        elif record.HasField("artifact"):
            artifacts.append((record.artifact.name, sorted(entry.path for entry in record.artifact.manifest.contents)))
    return rows, summary, artifacts


def leveldb_records(log: bytes) -> Iterator[bytes]:
    """Records of a LevelDB log: blocks of 32 KiB less the header of the file, pieces of crc, length, kind and data."""
    at, record = 0, b""
    while at + 7 <= len(log):
        left = 32768 - (at + _WANDB_HEADER_BYTES) % 32768
        if left < 7:
            at += left
            continue
        length, kind = struct.unpack_from("<HB", log, at + 4)
        record += log[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (_FULL, _LAST):
            yield record
            record = b""


def test_curves_of_a_report_are_grouped_by_cell_and_dimension() -> None:
    assert dict(drift_curves(DRIFT)) == {
        "tiny/rag/4.5s/flicker": [(0.0, 0.1), (2.0, 0.2)],
        "tiny/base/4.5s/flicker": [(0.0, 0.3)],
    }


def test_a_library_that_is_missing_is_named_with_its_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> None:
        raise ModuleNotFoundError(f"No module named {name!r}")

    monkeypatch.setattr(logger, "import_module", absent)
    for make in (
        lambda: TensorBoardLogger(TensorBoardSection(folder=str(tmp_path)), "runs/x"),
        lambda: WandbLogger(WandbSection(project="p"), "runs/x"),
        lambda: MlflowLogger(MlflowSection(), "runs/x"),
    ):
        with pytest.raises(RunEnvironmentError, match=r"pip install 'lrag-ray\[(tensorboard|wandb|mlflow)\]'"):
            make()


def test_a_folder_that_cannot_be_written_is_refused_at_the_start(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(RunEnvironmentError, match=r"watch\.tensorboard\.folder: .*/file/below cannot be written"):
        TensorBoardLogger(TensorBoardSection(folder=str(tmp_path / "file" / "below")), "runs/x")
    with pytest.raises(RunEnvironmentError, match=r"watch\.mlflow: the tracking server cannot be used"):
        # Without MLFLOW_ALLOW_FILE_STORE.
        MlflowLogger(MlflowSection(tracking_uri=str(tmp_path / "mlruns")), "runs/x")
