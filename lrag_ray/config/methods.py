"""Method sections: from `MethodConfig` to a ContextPolicy with its own, checked settings."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

from lrag_ray.config.plugin_settings import parse_settings
from lrag_ray.config.schema import MethodConfig
from lrag_ray.context.policy import ContextPolicy
from lrag_ray.context.registry import policy_class, registered
from lrag_ray.context.weights import WeightFile
from lrag_ray.errors import ConfigError
from lrag_ray.retrieval.bank_types import BankType


class NamedWeights(NamedTuple):
    """A weights file of a method, and where it is."""

    file: WeightFile
    address: str


class Method(NamedTuple):
    """A context method with settings."""

    policy: type[ContextPolicy[Any]]
    settings: Any
    """Instance of `policy.Settings`."""
    history: BankType = "exact"
    """How its history is stored."""

    @property
    def weights(self) -> list[NamedWeights]:
        """The weights files that the settings name, used or not."""
        files = self.policy.weight_files(self.settings)
        found = [(file, file.address(self.settings)) for file in files]
        return [NamedWeights(file, address) for file, address in found if address is not None]


def resolve_method(method: MethodConfig) -> Method:
    """Policy and settings of a loaded configuration's method (`load_config` has checked them)."""
    policy = policy_class(method.method)
    return Method(policy, parse_settings(policy.Settings, method.settings), method.history)


def registered_method(name: str, values: Mapping[str, Any]) -> Method | None:
    """Policy and settings as a run stores them, where digests stand in place of weights.

    None for a plug-in, which is not imported, and for settings that do not fit: the run may be a stranger's.
    """
    if name not in registered():
        return None
    policy = policy_class(name)
    try:
        own = {key: value for key, value in values.items() if not isinstance(value, Mapping)}
        return Method(policy, parse_settings(policy.Settings, own))
    except (ConfigError, ValueError):
        return None


def settings_keys(policy: type[ContextPolicy[Any]]) -> list[str]:
    """Keys that a section of this method may have besides `method`."""
    return [field.name for field in dataclasses.fields(policy.Settings)]
