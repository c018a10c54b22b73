"""From a run directory to its summary."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.table import Table

from lrag_ray.report.collect import ReportData, collect
from lrag_ray.report.page import render_page
from lrag_ray.report.tables import ranks_csv, scores_parquet, terminal_tables
from lrag_ray.scoring.preview import PREVIEW
from lrag_ray.scoring.ranks import RankBlock
from lrag_ray.store.run_dir import RunDirectory

SUMMARY = "summary"
"""Folder of the report, relative to the run."""


@dataclass(frozen=True)
class Report:
    """What was written, and the ranks."""

    data: ReportData
    ranks_path: str
    """Rank table as CSV; paths are relative to the run."""
    scores_path: str
    """Values of every video as parquet."""
    page_path: str
    """The page; opens in a browser from the run's folder or bucket."""

    @property
    def blocks(self) -> Sequence[RankBlock]:
        """Rank tables, one per backbone and duration."""
        return self.data.blocks

    def terminal_tables(self) -> list[Table]:
        """The rank tables for a Rich console."""
        return list(terminal_tables(self.data))


def build_report(run_dir: RunDirectory) -> Report:
    """Write the summary of a run from what its storage holds; the same storage gives the same files.

    Raises:
        StorageError: there is no run, or it cannot be written.
    """
    data = collect(run_dir, PREVIEW)
    report = Report(
        data=data,
        ranks_path=f"{SUMMARY}/ranks.csv",
        scores_path=f"{SUMMARY}/scores.parquet",
        page_path=f"{SUMMARY}/report.html",
    )
    run_dir.storage.write(report.ranks_path, ranks_csv(data).encode())
    run_dir.storage.write(report.scores_path, scores_parquet(data))
    run_dir.storage.write(report.page_path, render_page(data).encode())
    return report
