"""Ray job entry point of an evaluation: the same call as ``lrag-ray run``, with plain progress lines in the job's log.

Run as ``python -m jobs.evaluate CONFIG [--set a.b=value …]`` where the job's working directory is.
"""

from __future__ import annotations

import sys

from lrag_ray.cli.app import app


def main() -> None:
    """Run the configuration named on the command line; the exit code is that of ``lrag-ray run``."""
    app(["run", *sys.argv[1:]], prog_name="python -m jobs.evaluate")


if __name__ == "__main__":
    main()
