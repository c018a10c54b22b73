"""Ray job entry point of scoring: progress as lines in the job's log, or as JSON events.

Run as ``python -m jobs.score RUN|VIDEOS [--set scoring.suite=vbench_long …] [--manifest FILE] [--to ADDRESS]`` in the
job's working directory. The exit code is that of ``lrag-ray score``.
"""

from __future__ import annotations

import argparse
import sys

from lrag_ray.interrupts import ends_with_130


def main() -> None:
    """Score what is named on the command line."""
    with ends_with_130():
        _score()


def _score() -> None:
    parser = argparse.ArgumentParser(prog="python -m jobs.score")
    parser.add_argument("target")
    parser.add_argument("--set", action="append", default=[], metavar="A.B=VALUE", dest="overrides")
    parser.add_argument("--manifest")
    parser.add_argument("--to")
    parser.add_argument("--progress", choices=("log", "json"), default="log")
    given = parser.parse_args()

    from jobs.entry import listener, reporting_errors
    from lrag_ray.api import score

    with reporting_errors():
        outcome = score(
            given.target,
            overrides=given.overrides,
            manifest=given.manifest,
            to=given.to,
            listener=listener(given.progress),
        )
        sys.exit(outcome.exit_code)


if __name__ == "__main__":
    main()
