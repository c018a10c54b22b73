"""Versions of the programs that results may depend on."""

from __future__ import annotations

import platform
from functools import cache
from importlib.metadata import version

import lrag_ray


@cache
def versions() -> dict[str, str]:
    """Versions that results may depend on; for people who compare runs."""
    names = ("torch", "diffusers", "transformers", "av", "ray")
    own = {"python": platform.python_version(), "lrag-ray": lrag_ray.__version__}
    return own | {name: version(name) for name in names}
