"""Tables and pages about runs: ranks, differences, drift, LaTeX and ``report.html`` in the run's ``summary``."""

from lrag_ray.report.build import Report, build_report, report

__all__ = ["Report", "build_report", "report"]
