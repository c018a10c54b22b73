"""``python -m lrag_ray`` and the console script ``lrag-ray``."""

from __future__ import annotations

import sys

from lrag_ray.interrupts import ends_with_130


def main() -> None:
    """Run the command, or say which extra it needs."""
    with ends_with_130():
        try:
            from lrag_ray.cli.app import app
        except ModuleNotFoundError as error:
            if error.name is None or error.name.partition(".")[0] == "lrag_ray":
                raise
            print(
                f"error: the command lrag-ray needs the package {error.name}, which `pip install lrag-ray` alone does "
                "not bring. Install the extra: pip install 'lrag-ray[run]'",
                file=sys.stderr,
            )
            raise SystemExit(3) from None
        app()


if __name__ == "__main__":
    main()
