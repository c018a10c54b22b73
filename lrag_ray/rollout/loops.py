"""Rollout loops by name."""

from __future__ import annotations

from typing import Any

from lrag_ray.context.policy import ContextPolicy
from lrag_ray.errors import UsageError
from lrag_ray.plugins import import_plugin
from lrag_ray.rollout.loop import RolloutLoop
from lrag_ray.rollout.rolling import RollingWindows
from lrag_ray.rollout.rollout import Rollout

_REGISTERED: dict[str, type[RolloutLoop]] = {loop.name: loop for loop in (Rollout, RollingWindows)}


def loop_of(policy: type[ContextPolicy[Any]]) -> type[RolloutLoop]:
    """The loop that a method is made for: a registered name or ``package.module:Loop``.

    Raises UsageError where the method names one that does not exist.
    """
    if policy.loop in _REGISTERED:
        return _REGISTERED[policy.loop]
    if ":" not in policy.loop:
        known = ", ".join(_REGISTERED)
        raise UsageError(f"{policy.__name__}.loop '{policy.loop}' is unknown. Known: {known}, or package.module:Loop")
    try:
        found = import_plugin("loop", policy.loop, "Loop")
    except ValueError as error:
        raise UsageError(f"{policy.__name__}.{error}") from error
    if not (isinstance(found, type) and issubclass(found, RolloutLoop)):
        raise UsageError(f"{policy.__name__}.loop '{policy.loop}' is not a lrag_ray.rollout.loop.RolloutLoop")
    return found


def nests(policy: type[ContextPolicy[Any]]) -> bool:
    """Whether shorter durations are prefixes of longer ones: the method and its loop must both be horizon-free."""
    return policy.horizon_free and loop_of(policy).horizon_free
