"""Settings that a plug-in (a method, a suite) declares as a dataclass, checked like any other section."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError, create_model

from lrag_ray.errors import ConfigError

T = TypeVar("T")


@cache
def settings_model(settings: Any) -> type[BaseModel]:
    """A model with the one field `settings`, typed and checked as the dataclass; unknown keys are refused."""
    config = ConfigDict(extra="forbid", allow_inf_nan=False, hide_input_in_errors=True)
    model: type[BaseModel] = create_model("PluginSettings", __config__=config, settings=(settings, ...))
    return model


def parse_settings(settings: type[T], values: Mapping[str, Any]) -> T:
    """An instance of the dataclass. ConfigError for values that do not fit (`load_config` names their place)."""
    try:
        key: Any = settings  # mypy takes no type[T] for Hashable
        model = settings_model(key).model_validate({"settings": dict(values)})
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise ConfigError(f"{'.'.join(map(str, first['loc']))} of {settings.__qualname__}: {first['msg']}") from error
    found: T = getattr(model, "settings")  # noqa: B009 - a field made at run time
    return found
