"""``python -m lrag_ray`` and the console script ``lrag-ray``."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command, or say which extra it needs."""
    try:
        from lrag_ray.cli.app import main as run
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] == "lrag_ray":
            raise
        print(
            f"error: the command lrag-ray needs the package {error.name}, which `pip install lrag-ray` alone does not "
            "bring. Install the extra: pip install 'lrag-ray[run]'",
            file=sys.stderr,
        )
        raise SystemExit(3) from None
    except KeyboardInterrupt:
        # Before the program is there to answer it.
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from None
    run()


if __name__ == "__main__":
    main()
