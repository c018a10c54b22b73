"""Which scores a run was meant to have: the scoring section of its ``config.json``, taken as data.

A run directory may come from a stranger, so only what describes scores is taken from it, and only for suites that come
with the package. A plug-in that it names is reported by name and never imported.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from lrag_ray.scoring.registry import NONE, registered
from lrag_ray.store.address import Storage
from lrag_ray.store.run_dir import CONFIG_FILE
from lrag_ray.store.seal import DamagedError, parsed_json

_DESCRIBES_SCORES = ("suite", "mode", "dimensions", "controls")


class IntendedScores(NamedTuple):
    """What ``config.json`` says about scores."""

    section: dict[str, Any]
    """Values of the scoring section that describe scores; empty where they are not known, so that defaults apply."""
    plug_in: str | None = None
    """The suite that it names, where that does not come with the package."""
    damaged: bool = False
    """It is not what was written, so nothing of it is taken."""


def intended_scores(storage: Storage) -> IntendedScores:
    """Read them. What cannot be read or understood counts as not known."""
    try:
        stored = parsed_json(storage.read_bytes(CONFIG_FILE))
        section = stored["scoring"]
        suite = section["suite"]
    except DamagedError:
        return IntendedScores({}, damaged=True)
    except (FileNotFoundError, ValueError, RecursionError, KeyError, TypeError):
        return IntendedScores({})
    if not isinstance(section, dict) or not isinstance(suite, str):
        return IntendedScores({})
    if suite not in (NONE, *registered()):
        return IntendedScores({}, suite)
    return IntendedScores({key: section[key] for key in _DESCRIBES_SCORES if key in section})
