"""Scoring suites by name. A suite is imported when it is asked for, so that importing this costs nothing."""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING, Any

from lrag_ray.plugins import import_plugin

if TYPE_CHECKING:
    from lrag_ray.config.schema import ScoringSection
    from lrag_ray.scoring.suite import Suite

_REGISTERED = {
    "vbench_long": "lrag_ray.scoring.vbench_long.suite:VbenchLong",
    "preview": "lrag_ray.scoring.preview.suite:Preview",
    "world": "lrag_ray.scoring.world.suite:World",
    "judge": "lrag_ray.scoring.judge.suite:Judge",
}
"""In the order in which a report prefers their scores."""

NONE = "none"
"""Value of `scoring.suite` that turns scoring off."""


def registered() -> list[str]:
    """Names of the suites that come with the package."""
    return list(_REGISTERED)


def check_name(name: str) -> str:
    """`name` if it is registered, none, or looks like ``package.module:Suite``; otherwise ValueError."""
    known = sorted([*_REGISTERED, NONE])
    if name in known or ":" in name:
        return name
    nearest = difflib.get_close_matches(name, known, n=1)
    hint = f"; did you mean '{nearest[0]}'?" if nearest else ""
    expected = ", ".join(f"'{each}'" for each in known)
    raise ValueError(f"expected {expected} or package.module:Suite, got text {name!r}{hint}")


def suite_class(name: str) -> type[Suite[Any]]:
    """The suite behind a registered name or ``package.module:Suite``.

    Names come from the user's configuration or command line only, never from a run directory: a module is executed
    when it is imported. Raises ValueError that names what is wrong.
    """
    from lrag_ray.scoring.suite import Suite

    check_name(name)
    found = import_plugin("suite", _REGISTERED.get(name, name), "Suite")
    if not (isinstance(found, type) and issubclass(found, Suite)):
        raise ValueError(f"suite '{name}' is not a lrag_ray.scoring.suite.Suite")
    if name not in _REGISTERED and found.name in [*_REGISTERED, NONE]:
        raise ValueError(f"suite '{name}': its name '{found.name}' belongs to another suite, choose a different one")
    return found


def suite_of(scoring: ScoringSection) -> Suite[Any] | None:
    """The suite that a loaded configuration asks for, made from its settings; None where scoring is off."""
    return None if scoring.suite == NONE else suite_class(scoring.suite).of(scoring)
