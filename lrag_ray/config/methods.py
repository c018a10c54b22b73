"""Method sections: from `MethodConfig` to a ContextPolicy with its own, checked settings."""

from __future__ import annotations

import dataclasses
from functools import cache
from typing import Any, NamedTuple

from pydantic import BaseModel, ConfigDict, create_model

from lrag_ray.config.schema import MethodConfig
from lrag_ray.context.frames import check_local_room
from lrag_ray.context.policy import ContextPolicy
from lrag_ray.context.registry import policy_class


class Method(NamedTuple):
    """A context method with settings."""

    policy: type[ContextPolicy]
    settings: Any
    """Instance of `policy.Settings`."""


def resolve_method(method: MethodConfig) -> Method:
    """Policy and settings of a loaded configuration's method (`load_config` has checked them)."""
    policy = policy_class(method.method)
    model = settings_model(policy).model_validate({"settings": method.settings})
    return Method(policy, getattr(model, "settings"))  # noqa: B009 - a field made at run time


@cache
def settings_model(policy: type[ContextPolicy]) -> type[BaseModel]:
    """A model with the one field `settings`, typed and checked as the policy's dataclass; unknown keys are refused."""
    config = ConfigDict(extra="forbid", allow_inf_nan=False, hide_input_in_errors=True)
    model: type[BaseModel] = create_model("MethodSettings", __config__=config, settings=(policy.Settings, ...))
    return model


def settings_keys(policy: type[ContextPolicy]) -> list[str]:
    """Keys that a section of this method may have besides `method`."""
    return [field.name for field in dataclasses.fields(policy.Settings)]


def check_whole_block(method: Method, frames_per_block: int) -> None:
    """Raise ValueError where a block would not attend to all of itself: retrieval allows it, no run can mean it."""
    if (past_local_frames(method, frames_per_block) or 0) < 0:
        settings = method.settings
        check_local_room(settings.window, settings.sink, frames_per_block, settings.top_k)


def past_local_frames(method: Method, frames_per_block: int) -> int | None:
    """Local frames before the current block once the window is full; None where the window has no such split."""
    settings = method.settings
    window, sink, top_k = (getattr(settings, name, None) for name in ("window", "sink", "top_k"))
    if not (isinstance(window, int) and isinstance(sink, int) and isinstance(top_k, int)) or window == -1:
        return None
    return window - sink - top_k - frames_per_block
