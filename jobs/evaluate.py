"""Ray job entry point of a configuration: progress as lines in the job's log, or as JSON events.

Run as ``python -m jobs.evaluate CONFIG [--set a.b=value …] [--progress log|json]`` in the job's working directory. The
exit code is that of the job.
"""

from __future__ import annotations

import argparse
import sys

from lrag_ray.interrupts import ends_with_130


def main() -> None:
    """Run the configuration named on the command line."""
    with ends_with_130():
        _run()


def _run() -> None:
    parser = argparse.ArgumentParser(prog="python -m jobs.evaluate")
    parser.add_argument("config")
    parser.add_argument("--set", action="append", default=[], metavar="A.B=VALUE", dest="overrides")
    parser.add_argument("--progress", choices=("log", "json"), default="log")
    given = parser.parse_args()

    from jobs.entry import listener, reporting_errors
    from lrag_ray.config.load import load_config
    from lrag_ray.pipelines.jobs import start

    with reporting_errors():
        outcome = start(load_config(given.config, given.overrides), listener=listener(given.progress))
        sys.exit(outcome.exit_code)


if __name__ == "__main__":
    main()
