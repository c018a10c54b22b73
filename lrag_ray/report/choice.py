"""Which scores a report shows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lrag_ray.config.schema import ScoringSection
from lrag_ray.errors import UsageError
from lrag_ray.scoring.registry import registered, suite_class
from lrag_ray.scoring.suite import Suite
from lrag_ray.store.rollouts import RolloutRun


def choose_suite(
    run_dirs: Sequence[RolloutRun],
    asked_for: str | Suite[Any] | None,
    mode: str | None,
    *,
    suites: Sequence[Suite[Any]] = (),
    must_have: bool = False,
) -> tuple[Suite[Any], list[str]]:
    """What to show, and what else there is to show.

    What is not asked for is chosen: what all runs have goes before what only some have, then `suites` that do not come
    with the package, then the order of the registry and of each suite's modes.

    Raises:
        UsageError: a suite that does not exist, a mode that it does not have, or, with `must_have`, scores that no run
            has while there are others.
    """
    known = [variant for name in registered() for variant in suite_class(name).variants()]
    folders = {suite.folder for suite in known}
    given = {suite.folder: suite for suite in suites}
    known = [*(suite for suite in suites if suite.folder not in folders), *(given.get(s.folder, s) for s in known)]
    if isinstance(asked_for, Suite):
        open_to = [asked_for]
    elif asked_for is not None:
        open_to = _variants(asked_for)
    else:
        open_to = known
    if mode is not None:
        modes = list(dict.fromkeys(suite.mode for suite in open_to if suite.mode))
        open_to = [suite for suite in open_to if suite.mode == mode]
        if not open_to:
            has = f"has the modes {', '.join(modes)}" if modes else "has no modes"
            raise UsageError(f"--mode {mode}: the {asked_for or 'registered'} suite {has}")
    known += [suite for suite in open_to if suite.folder not in {other.folder for other in known}]
    listings = [run_dir.storage.list_files("scores") for run_dir in run_dirs]
    present = {
        suite.folder: sum(any(path.startswith(f"{suite.folder}/") for path in listing) for listing in listings)
        for suite in known
    }
    best = max(open_to, key=lambda suite: present[suite.folder])
    if asked_for is None and mode is None and not present[best.folder] and not suites:
        best = suite_class(ScoringSection().suite).variants()[0]
    others = [suite.label for suite in known if present[suite.folder] and suite.folder != best.folder]
    if must_have and others and not present[best.folder]:
        where = ", ".join(run_dir.uri for run_dir in run_dirs)
        name = asked_for if isinstance(asked_for, str) else best.name
        modes_ = f" --mode {best.mode}" if best.mode else ""
        raise UsageError(
            f"there are no scores of {best.label} in {where}, but of {'; '.join(others)}: name those with --suite and "
            f"--mode, or make the missing ones with `lrag-ray score RUN --suite {name}{modes_}`"
        )
    return best, others


def _variants(name: str) -> list[Suite[Any]]:
    try:
        return list(suite_class(name).variants())
    except ValueError as error:
        raise UsageError(f"--suite: {error}") from None
