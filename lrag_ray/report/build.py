"""From run directories to their summary."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from rich.table import Table

from lrag_ray.report.collect import ReportData, collect
from lrag_ray.report.data_files import (
    differences_csv,
    drift_csv,
    drift_parquet,
    ends_csv,
    ranks_csv,
    scores_parquet,
    videos_csv,
)
from lrag_ray.report.ends import ends_tables
from lrag_ray.report.judged import judged_csv
from lrag_ray.report.latex import latex_table
from lrag_ray.report.methods import make_contexts
from lrag_ray.report.page import render_page
from lrag_ray.report.players import Link, relative_address
from lrag_ray.report.strips import make_strips, unused_strips
from lrag_ray.report.tables import terminal_tables, warnings
from lrag_ray.scoring.ranks import RankBlock
from lrag_ray.scoring.suite import Suite
from lrag_ray.store.address import Storage
from lrag_ray.store.records import FileIndex, FileRecord
from lrag_ray.store.rollouts import RolloutRun
from lrag_ray.store.run_dir import SUMMARY, SUMMARY_INDEX

PAGE = "report.html"


@dataclass(frozen=True)
class Report:
    """What was written, and the ranks."""

    data: ReportData
    folder: str | None
    """Where it is; None where nothing was written."""
    files: Sequence[str]
    """What was written there, the page first; strips are in a folder of their own beside them."""

    @property
    def blocks(self) -> Sequence[RankBlock]:
        """Rank tables, one per backbone and duration."""
        return self.data.blocks

    @property
    def warnings(self) -> list[str]:
        """What must be known before any number is read."""
        return warnings(self.data)

    def terminal_tables(self) -> list[Table]:
        """The rank tables and differences for a Rich console."""
        return list(terminal_tables(self.data))


def build_report(run_dir: RolloutRun, *, suites: Sequence[Suite[Any]] = (), strips: int | None = None) -> Report:
    """Write the summary of a run from what its storage holds; the same storage gives the same files.

    `suites`: see `collect`.

    Raises:
        StorageError: there is no run, or it cannot be written.
    """
    return write_report(collect([run_dir], suites=suites), strips=strips)


def report(
    run_dirs: Sequence[RolloutRun],
    *,
    to: str | None = None,
    suite: str | Suite[Any] | None = None,
    mode: str | None = None,
    strips: int | None = None,
    must_have: bool = False,
    labels: Sequence[str | None] | None = None,
) -> Report:
    """Write the report of one run or of several as one, into the folder or address `to`.

    `strips` are the prompts per backbone that get strips; None leaves the number to the suite.

    Without `to`, one run's report goes to its own summary, and nothing is written for several. `must_have` and
    `labels`: see `collect`; with `must_have` a page with scores is never replaced by one without.

    Raises:
        StorageError: an address holds no run or cannot be written.
        UsageError: runs that cannot stand in one table, a mode of a suite without modes, or scores that are not there.
    """
    data = collect(run_dirs, suite, mode, must_have=must_have, labels=labels)
    return Report(data, None, []) if to is None and len(run_dirs) > 1 else write_report(data, to=to, strips=strips)


def write_changed(folder: Storage, contents: Mapping[str, bytes]) -> None:
    """Write files, without touching those that hold the same bytes already."""
    there = folder.read_many(list(contents))
    for name, content in contents.items():
        if there.get(name) != content:
            folder.write(name, content)


def _write_index(storage: Storage) -> None:
    """Name what the summary of a run consists of, with checksums."""
    paths = sorted(path for path in storage.list_files(SUMMARY) if path != SUMMARY_INDEX)
    digests = ((path, *storage.digest(path)) for path in paths)
    files = [FileRecord(path=path, size_bytes=size, sha256=sha256) for path, size, sha256 in digests]
    write_changed(storage, {SUMMARY_INDEX: FileIndex(files=files).sealed()})


def write_report(
    data: ReportData, *, to: str | None = None, strips: int | None = None, link: Link | None = None
) -> Report:
    """Write everything that `data` shows; see `report`. Without `link` videos are linked to relative to the page."""
    folder = Storage(to) if to is not None else data.sources[0].run_dir.storage.below(SUMMARY)
    sheets = make_strips(data, folder, data.suite.strips if strips is None else strips)
    contexts = make_contexts(data, folder) if sheets else []
    contents = {
        PAGE: render_page(data, sheets, contexts, link or partial(relative_address, folder)).encode(),
        "ranks.csv": ranks_csv(data).encode(),
        "differences.csv": differences_csv(data).encode(),
        "table.tex": latex_table(data).encode(),
        "videos.csv": videos_csv(data).encode(),
        "scores.parquet": scores_parquet(data),
    }
    if data.judged:
        seconds = {
            (block.backbone, block.latent_frames): data.duration_s(block.backbone, block.latent_frames)
            for each in data.judged
            for block in each.blocks
        }
        contents["judge.csv"] = judged_csv(data.judged, seconds).encode()
    if tables := ends_tables(data):
        contents["ends.csv"] = ends_csv(data, tables).encode()
    if data.drift:
        contents |= {"drift.csv": drift_csv(data).encode(), "drift.parquet": drift_parquet(data)}
    write_changed(folder, contents)
    shown = {row.path for sheet in sheets for row in sheet.rows} | {
        row.path for sheet in contexts for row in sheet.rows
    }
    # An earlier report may have shown a suite with drift, or strips of other videos: they do not belong to this page.
    files = folder.list_files()
    optional = {"drift.csv", "drift.parquet", "ends.csv", "judge.csv"}
    for name in optional & files.keys() - contents.keys() | unused_strips(files, shown):
        folder.remove(name)
    if to is None:
        _write_index(data.sources[0].run_dir.storage)
    return Report(data, folder.uri, list(contents))
