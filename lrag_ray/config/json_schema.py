"""JSON Schema of configuration files, for editors: completion, and unknown keys marked while one types.

It describes the file as a person writes it: presets fill in what a backbone leaves out, a method has the keys of its
`Settings`, and a list where such a key takes one value is a sweep. `load_config` checks more than it can say.
"""

from __future__ import annotations

import inspect
from typing import Any

from pydantic import TypeAdapter

from lrag_ray.config.jobs import JOB_SCHEMAS
from lrag_ray.config.presets import PRESETS
from lrag_ray.context.policy import ContextPolicy
from lrag_ray.context.registry import policy_class, registered

TITLE = "lrag-ray configuration"


def json_schema() -> dict[str, Any]:
    """The schema of all jobs (draft 2020-12)."""
    definitions: dict[str, Any] = {}
    cases = []
    for job, model in JOB_SCHEMAS.items():
        made = model.model_json_schema()
        definitions |= made.pop("$defs", {})
        definitions[job] = made
        cases.append({"if": _is_job(job), "then": {"$ref": f"#/$defs/{job}"}})
    if "BackboneConfig" in definitions:
        _complete_backbones(definitions["BackboneConfig"])
    methods = _method_definitions()
    definitions |= {f"method-{name}": section for name, section in methods.items()}
    definitions["method"] = _any_method()
    for job in JOB_SCHEMAS:
        if (section := definitions[job]["properties"].get("methods")) is not None:
            names = section.pop("patternProperties")
            section |= _methods(next(iter(names)))
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": TITLE,
        "type": "object",
        "properties": {"job": {"enum": [*JOB_SCHEMAS], "default": "evaluate"}},
        "allOf": cases,
        "$defs": definitions,
    }


def _is_job(job: str) -> dict[str, Any]:
    named = {"properties": {"job": {"const": job}}}
    return named if job == "evaluate" else {**named, "required": ["job"]}


def _complete_backbones(section: dict[str, Any]) -> None:
    """A preset brings what is required otherwise."""
    section.pop("required", None)
    section["properties"]["preset"] |= {"anyOf": [{"enum": [*PRESETS]}, {"type": "null"}]}


def _method_definitions() -> dict[str, dict[str, Any]]:
    """Sections of the registered methods by name."""
    found = {}
    for name in registered():
        policy = policy_class(name)
        section = TypeAdapter(policy.Settings).json_schema()
        settings = {key: {"anyOf": [value, _sweep(value)]} for key, value in section["properties"].items()}
        found[name] = {
            "type": ["object", "null"],
            "description": inspect.getdoc(inspect.getmodule(policy)) or "",
            "properties": {"method": {"const": name}, "preset": {"enum": _presets(policy)}, **settings},
            "additionalProperties": False,
        }
    return found


def _presets(policy: type[ContextPolicy[Any]]) -> list[str | None]:
    return ["released", None] if policy.released else [None]


def _sweep(value: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": {key: inner for key, inner in value.items() if key != "default"}, "minItems": 1}


def _methods(name_pattern: str) -> dict[str, Any]:
    """A section that names a method has its keys; so has one that is called like it and names none."""
    free = {"$ref": "#/$defs/method"}
    own = {
        name: {"if": {"type": "object", "required": ["method"]}, "then": free, "else": _method(name)}
        for name in registered()
    }
    return {"propertyNames": {"pattern": name_pattern}, "properties": own, "additionalProperties": free}


def _any_method() -> dict[str, Any]:
    """A section that names a method, registered or not."""
    named = [
        {"if": {"properties": {"method": {"const": name}}, "required": ["method"]}, "then": _method(name)}
        for name in registered()
    ]
    return {"type": "object", "required": ["method"], "properties": {"method": {"type": "string"}}, "allOf": named}


def _method(name: str) -> dict[str, Any]:
    return {"$ref": f"#/$defs/method-{name}"}
