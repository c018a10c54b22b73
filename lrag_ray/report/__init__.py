"""Tables and pages about a run: ``summary/ranks.csv``, ``scores.parquet`` and ``report.html``."""

from lrag_ray.report.build import Report, build_report

__all__ = ["Report", "build_report"]
