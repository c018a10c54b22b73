"""``lrag-ray methods | presets | schema``: what a configuration may name."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import typer

from lrag_ray.cli.options import AsJson
from lrag_ray.cli.output import console, print_json, tells_errors

if TYPE_CHECKING:
    from lrag_ray.context.policy import ContextPolicy


def register(app: typer.Typer) -> None:
    """Add the commands to the program."""
    app.command("methods")(methods)
    app.command("presets")(presets)
    app.command("schema")(schema)


@tells_errors
def methods(as_json: AsJson = False) -> None:
    """List the context methods: settings and defaults, what they cost, what they refuse and where they come from.

    \b
    Example:
      lrag-ray methods
    """
    from lrag_ray.cli.output import quantity
    from lrag_ray.cli.tables import table
    from lrag_ray.context.registry import policy_class, registered
    from lrag_ray.rollout.loops import nests

    found: dict[str, dict[str, Any]] = {}
    for name in registered():
        policy = policy_class(name)
        found[name] = {
            "summary": _summary(policy),
            "settings": {field.name: field.default for field in dataclasses.fields(policy.Settings)},
            "horizon_free": nests(policy),
            "max_frames": policy.max_frames,
            "as_released": dict(policy.as_released),
            "released": dict(policy.released),
            **policy.origin._asdict(),
            **_costs(policy),
            "restrictions": list(_restrictions(policy)),
        }
    if as_json:
        print_json(found)
        return
    out = console()
    shown = table("Methods", "method", "settings and defaults", "what it does", text_columns=3)
    for name, method in found.items():
        shown.add_row(name, _settings(method["settings"]), method["summary"])
    out.print(shown)
    out.print()
    costs = table(
        "Costs and origins at the defaults, full size, 120 s",
        "method", "family", "attends to", "device memory", "host memory", "restrictions", "released code", "licence",
        text_columns=8,
    )  # fmt: skip
    for name, method in found.items():
        costs.add_row(
            name,
            method["family"],
            f"{method['attended_frames']} frames",
            quantity(method["device_bytes"], "B"),
            quantity(method["history_bytes"], "B"),
            "; ".join(method["restrictions"]) or "none",
            method["code"],
            method["licence"],
        )
    out.print(costs)
    out.print(
        "\nDevice memory is the cache with what a method holds beside it, host memory the history of one rollout."
    )
    released = {name: method["released"] for name, method in found.items() if method["released"]}
    out.print("`preset: released` in a method's section puts the settings of its own release in place of the defaults:")
    for name, settings in released.items():
        out.print(f"  {name}: {_settings(settings)}")
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


def _costs(policy: type[ContextPolicy[Any]]) -> dict[str, int]:
    """Frames and bytes of one rollout of 120 s on a generator of full size, at the default settings."""
    from lrag_ray.wan.config import WanConfig

    settings, n, frames = policy.Settings(), 3, 480
    attended = policy.attended_frames(settings, n, frames - n)
    kv_bytes = WanConfig().kv_bytes_per_frame(60, 104, 2)
    return {
        "attended_frames": attended,
        "device_bytes": attended * kv_bytes + policy.device_bytes(settings, n, frames, kv_bytes),
        "history_bytes": policy.history_frames(settings, n, frames) * kv_bytes,
    }


def _restrictions(policy: type[ContextPolicy[Any]]) -> Iterator[str]:
    from lrag_ray.rollout.loops import nests

    yield from policy.restrictions
    if policy.max_frames is not None:
        yield f"at most {policy.max_frames} latent frames"
    if not nests(policy):
        yield "every duration is a rollout of its own"
    for file in policy.weight_files(policy.Settings()):
        if file.used:
            yield f"needs weights ({file.key})"


def _settings(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}: {_yaml(value)}" for key, value in values.items())


def _yaml(value: object) -> str:
    words = {True: "true", False: "false", None: "null"}
    return words[value] if value is None or isinstance(value, bool) else str(value)
