"""Ray job entry point of scoring: the same call as ``lrag-ray score``, with plain progress lines in the job's log.

Run as ``python -m jobs.score RUN [--suite vbench_long …]`` where the job's working directory is.
"""

from __future__ import annotations

import sys

from lrag_ray.cli.app import app


def main() -> None:
    """Score what is named on the command line; the exit code is that of ``lrag-ray score``."""
    app(["score", *sys.argv[1:]], prog_name="python -m jobs.score")


if __name__ == "__main__":
    main()
