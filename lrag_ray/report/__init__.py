"""Tables and pages about runs: ranks, differences, drift, LaTeX and ``report.html`` in the run's ``summary``."""

from lrag_ray.report.build import Report, build_report, report
from lrag_ray.report.collect import ReportData, collect

__all__ = ["Report", "ReportData", "build_report", "collect", "report"]
