"""``lrag-ray methods | presets | schema``: what a configuration may name."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

import typer

from lrag_ray.cli.options import AsJson
from lrag_ray.cli.output import console, print_json, tells_errors


def register(app: typer.Typer) -> None:
    """Add the commands to the program."""
    app.command("methods")(methods)
    app.command("presets")(presets)
    app.command("schema")(schema)


@tells_errors
def methods(as_json: AsJson = False) -> None:
    """List the context methods with their settings and defaults.

    \b
    Example:
      lrag-ray methods
    """
    from lrag_ray.cli.tables import table
    from lrag_ray.context.registry import policy_class, registered

    found: dict[str, dict[str, Any]] = {}
    for name in registered():
        policy = policy_class(name)
        found[name] = {
            "summary": _summary(policy),
            "settings": {field.name: field.default for field in dataclasses.fields(policy.Settings)},
            "horizon_free": policy.horizon_free,
            "max_frames": policy.max_frames,
            "as_released": dict(policy.as_released),
        }
    if as_json:
        print_json(found)
        return
    out = console()
    shown = table("Methods", "method", "settings and defaults", "what it does", text_columns=3)
    for name, method in found.items():
        settings = ", ".join(f"{key}: {_yaml(value)}" for key, value in method["settings"].items())
        shown.add_row(name, settings, method["summary"])
    out.print(shown)
    out.print("\nA method of your own is named package.module:Policy; see lrag_ray/context/README.md.")


@tells_errors
def presets(as_json: AsJson = False) -> None:
    """List the backbone presets and the files that they expect.

    \b
    Example:
      lrag-ray presets
    """
    from lrag_ray.cli.tables import table
    from lrag_ray.config.presets import PRESETS

    if as_json:
        print_json(PRESETS)
        return
    shown = table("Presets", "preset", "label", "latent frame", "weights", text_columns=4)
    for name, values in PRESETS.items():
        weights = values["weights"]
        lora = f", LoRA {weights['lora']['path']}" if "lora" in weights else ""
        latent = values["latent"]
        size = f"{latent['channels']}x{latent['height']}x{latent['width']}"
        shown.add_row(name, values["label"], size, f"{weights.get('path', 'random')}{lora}")
    out = console()
    out.print(shown)
    out.print("\n`lrag-ray weights list CONFIG` names every file of a run, and where it is published.")


@tells_errors
def schema() -> None:
    """Print the JSON Schema of configuration files, for editors.

    The files in configs/ name theirs in their first line; an editor with a YAML language server then completes keys.

    \b
    Example:
      lrag-ray schema > lrag-ray.schema.json
    """
    from lrag_ray.config.json_schema import json_schema

    print_json(json_schema())


def _summary(policy: type[object]) -> str:
    """First sentence of the module that states the method, without its name."""
    text = " ".join((inspect.getdoc(inspect.getmodule(policy)) or "").split("\n\n")[0].split())
    return text.partition(": ")[2] or text


def _yaml(value: object) -> str:
    words = {True: "true", False: "false", None: "null"}
    return words[value] if value is None or isinstance(value, bool) else str(value)
