"""Method sections: from `MethodConfig` to a ContextPolicy with its own, checked settings."""

from __future__ import annotations

import dataclasses
from functools import cache
from typing import Any, NamedTuple

from pydantic import BaseModel, ConfigDict, create_model

from lrag_ray.config.schema import MethodConfig
from lrag_ray.context.policy import ContextPolicy
from lrag_ray.context.registry import policy_class
from lrag_ray.context.weights import WeightFile


class NamedWeights(NamedTuple):
    """A weights file of a method, and where it is."""

    file: WeightFile
    address: str


class Method(NamedTuple):
    """A context method with settings."""

    policy: type[ContextPolicy[Any]]
    settings: Any
    """Instance of `policy.Settings`."""

    @property
    def weights(self) -> list[NamedWeights]:
        """The weights files that the settings name, used or not."""
        files = self.policy.weight_files(self.settings)
        found = [(file, file.address(self.settings)) for file in files]
        return [NamedWeights(file, address) for file, address in found if address is not None]


def resolve_method(method: MethodConfig) -> Method:
    """Policy and settings of a loaded configuration's method (`load_config` has checked them)."""
    policy = policy_class(method.method)
    model = settings_model(policy).model_validate({"settings": method.settings})
    return Method(policy, getattr(model, "settings"))  # noqa: B009 - a field made at run time


@cache
def settings_model(policy: type[ContextPolicy[Any]]) -> type[BaseModel]:
    """A model with the one field `settings`, typed and checked as the policy's dataclass; unknown keys are refused."""
    config = ConfigDict(extra="forbid", allow_inf_nan=False, hide_input_in_errors=True)
    model: type[BaseModel] = create_model("MethodSettings", __config__=config, settings=(policy.Settings, ...))
    return model


def settings_keys(policy: type[ContextPolicy[Any]]) -> list[str]:
    """Keys that a section of this method may have besides `method`."""
    return [field.name for field in dataclasses.fields(policy.Settings)]
