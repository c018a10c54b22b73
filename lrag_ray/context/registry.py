"""Context methods by name."""

from __future__ import annotations

import difflib
from typing import Any, get_args

from lrag_ray.context.base import Base
from lrag_ray.context.deep_forcing import DeepForcing
from lrag_ray.context.dummy_forcing import DummyForcing
from lrag_ray.context.ema_sink import EmaSink
from lrag_ray.context.forcing_kv import ForcingKv
from lrag_ray.context.infinity_rope import InfinityRope
from lrag_ray.context.memflow import MemFlow
from lrag_ray.context.memrope import MemRope
from lrag_ray.context.policy import ContextPolicy, Family
from lrag_ray.context.rag import Rag
from lrag_ray.context.rolling_forcing import RollingForcing
from lrag_ray.context.rolling_sink import RollingSink
from lrag_ray.plugins import import_plugin

_REGISTERED: dict[str, type[ContextPolicy[Any]]] = {
    "base": Base,
    "rolling_sink": RollingSink,
    "ema_sink": EmaSink,
    "infinity_rope": InfinityRope,
    "deep_forcing": DeepForcing,
    "memrope": MemRope,
    "memflow": MemFlow,
    "rag": Rag,
    "dummy_forcing": DummyForcing,
    "forcing_kv": ForcingKv,
    "rolling_forcing": RollingForcing,
}


def registered() -> list[str]:
    """Names of the methods that come with the package."""
    return list(_REGISTERED)


def family(name: str) -> Family:
    """Family of the method of this name; ``other`` for one that does not come with the package.

    Nothing is imported for it: the name may come out of a stranger's run.
    """
    return _REGISTERED[name].origin.family if name in _REGISTERED else "other"


def by_family(method: str) -> int:
    """Sort key of a registered name or any other: families in their order."""
    return get_args(Family).index(family(method))


def policy_class(name: str) -> type[ContextPolicy[Any]]:
    """The policy behind a registered name or ``package.module:Policy``.

    Raises ValueError that names what is wrong: an unknown name (with the nearest one), a module that cannot be
    imported, or an object that is not a ContextPolicy.
    """
    if name in _REGISTERED:
        return _REGISTERED[name]
    if ":" not in name:
        nearest = difflib.get_close_matches(name, _REGISTERED, n=1)
        hint = f"; did you mean '{nearest[0]}'?" if nearest else ""
        raise ValueError(f"unknown method '{name}'{hint} Known: {', '.join(_REGISTERED)}, or package.module:Policy")
    found = import_plugin("method", name, "Policy")
    if not (isinstance(found, type) and issubclass(found, ContextPolicy)):
        raise ValueError(f"method '{name}' is not a lrag_ray.context.policy.ContextPolicy")
    return found
