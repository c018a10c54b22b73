"""Ray job entry point of a configuration, whatever its job: progress as lines in the job's log, or as JSON events.

Run as ``python -m jobs.evaluate CONFIG [--set a.b=value …] [--progress log|json]`` in the job's working directory. The
exit code is that of the job. `lrag-ray submit` starts it this way, with the version of its client, which must be ours.
"""

from __future__ import annotations

import argparse
import platform
import socket
import sys
from pathlib import Path

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
    parser.add_argument("--client-version", metavar="VERSION/NUMERICS")
    given = parser.parse_args()

    import lrag_ray
    from jobs.entry import check_client, listener, report_outcome, reporting_errors
    from lrag_ray.config.load import load_job
    from lrag_ray.events import Notice
    from lrag_ray.pipelines.jobs import start

    with reporting_errors():
        check_client(given.client_version)
        receive = listener(given.progress)
        code = f"lrag-ray {lrag_ray.__version__} from {Path(lrag_ray.__file__).parent}"
        receive(Notice(f"{code} with Python {platform.python_version()} on {socket.gethostname()}"))
        outcome = start(load_job(given.config, given.overrides), listener=receive)
        report_outcome(outcome, given.progress)
        sys.exit(outcome.exit_code)


if __name__ == "__main__":
    main()
