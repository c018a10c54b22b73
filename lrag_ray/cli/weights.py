"""``lrag-ray weights``: list, pull, verify and convert what a configuration needs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lrag_ray.cli.output import console, print_json, printable, quantity, tells_errors
from lrag_ray.errors import LragError, RunEnvironmentError

if TYPE_CHECKING:
    from lrag_ray.engine.weights.needs import Need

Config = Annotated[str, typer.Argument(metavar="CONFIG", help="YAML file that describes the run.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="A.B=VALUE", help="Replace a value of the file (YAML); may be repeated."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout; errors as JSON on stderr.")]

weights = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="The weights of a run: what it needs, where that is published, getting, checking and converting it.\n\n"
    "\b\nExample:\n  lrag-ray weights list configs/table2.yaml",
)


def register(app: typer.Typer) -> None:
    """Add the commands to the program."""
    app.add_typer(weights, name="weights")


@weights.command("list")
@tells_errors
def list_needs(config: Config, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Show every file that a configuration needs, whether it is there, and where it is published.

    \b
    Example:
      lrag-ray weights list configs/table2.yaml
    """
    from lrag_ray.engine.weights.local import sizes_at
    from lrag_ray.engine.weights.published import UNKNOWN

    rows: list[dict[str, Any]] = []
    for need in _needs(config, overrides):
        published = need.published
        rows.append(
            {
                "kind": need.kind,
                "address": need.address,
                "keys": list(need.keys),
                "present_bytes": sum(sizes_at(need.address).values()) or None,
                "source": published.source if published else None,
                "published_bytes": published.size_bytes if published else None,
                "licence": published.licence if published else UNKNOWN,
            }
        )
    if as_json:
        print_json({"needs": rows})
        return
    for row in rows:
        size = quantity(row["published_bytes"], "B") if row["published_bytes"] else "size unknown"
        source = f"{row['source']} ({size}, licence {row['licence']})" if row["source"] else "not published so named"
        here = quantity(row["present_bytes"], "B") if row["present_bytes"] else "missing"
        console().print(
            f"{row['kind']:<18} {here:<10} {printable(row['address'])}\n{'':<29} from {source}", soft_wrap=True
        )
    if not rows:
        console().print("nothing: every backbone of this configuration has random weights")


@weights.command()
@tells_errors
def pull(
    config: Config,
    overrides: Overrides = None,
    again: Annotated[bool, typer.Option("--again", help="Replace what is there already.")] = False,
    as_json: AsJson = False,
) -> None:
    """Fetch what is missing to the configured paths or bucket addresses; goes on where it was cut off.

    Digests are recorded beside each file. HF_ENDPOINT names a mirror, HF_TOKEN a token.

    \b
    Examples:
      lrag-ray weights pull configs/table2.yaml
      lrag-ray weights pull configs/table2.yaml --set backbones.longlive.vae.path=s3://bucket/Wan2.1_VAE.pth
    """
    from lrag_ray.engine.weights.pull import pull as pull_need

    rows: list[dict[str, Any]] = []
    for need in _needs(config, overrides):
        row: dict[str, Any] = {"kind": need.kind, "address": need.address, "error": None}
        try:
            result = pull_need(need, again=again, tell=lambda line: console(stderr=True).print(line, soft_wrap=True))
            row |= {"pulled": result.pulled, "size_bytes": result.size_bytes}
            state = f"{'pulled' if result.pulled else 'there'}, {quantity(result.size_bytes, 'B')}"
        except LragError as error:
            row["error"] = state = str(error)
        rows.append(row)
        if not as_json:
            _say(f"{need.kind:<18} {need.address}: {state}")
    _finish({"pulled": rows}, as_json, failed=any(row["error"] for row in rows))


@weights.command()
@tells_errors
def verify(
    config: Config,
    overrides: Overrides = None,
    digests: Annotated[bool, typer.Option(help="Read every byte and compare digests.")] = True,
    as_json: AsJson = False,
) -> None:
    """Check what is there: sizes, digests recorded when it was pulled, and names and shapes on the meta device.

    \b
    Examples:
      lrag-ray weights verify configs/table2.yaml
      lrag-ray weights verify configs/table2.yaml --no-digests
    """
    from lrag_ray.engine.weights.verify import verify as verify_need

    verdicts = []
    for need in _needs(config, overrides):
        verdict = verify_need(need, digests=digests)
        verdicts.append(verdict)
        if not as_json:
            _say(f"{'ok' if verdict.ok else 'fail':<5} {need.kind:<18} {need.address}: {verdict.detail}")
    rows = [{"kind": v.need.kind, "address": v.need.address, "ok": v.ok, "detail": v.detail} for v in verdicts]
    _finish({"verified": rows}, as_json, failed=not all(verdict.ok for verdict in verdicts))


@weights.command()
@tells_errors
def convert(
    config: Config,
    to: Annotated[str, typer.Option("--to", metavar="FOLDER", help="Folder for the converted files.")],
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Write generators (EMA chosen, LoRA merged), text encoder and VAE as safetensors, which actors map into memory.

    Prints the values to set in the configuration. The files are others, so a run that was begun keeps the old ones.

    \b
    Example:
      lrag-ray weights convert configs/table2.yaml --to weights/converted
    """
    from lrag_ray.engine.weights.convert import convert as convert_need

    found = [convert_need(need, Path(to)) for need in _needs(config, overrides)]
    done = [conversion for conversion in found if conversion is not None]
    if as_json:
        print_json({"converted": [conversion._asdict() | {"target": str(conversion.target)} for conversion in done]})
        return
    for conversion in done:
        _say(f"{conversion.source} -> {conversion.target} ({quantity(conversion.size_bytes, 'B')})")
        for key, value in conversion.settings.items():
            shown = value if isinstance(value, str) else json.dumps(value)
            _say(f"    --set {key}={shown}")


def _needs(config: str, overrides: list[str] | None) -> list[Need]:
    from lrag_ray.config.load import load_config
    from lrag_ray.engine.weights.needs import needs_of

    return needs_of(load_config(config, overrides or []))


def _say(line: str) -> None:
    console().print(printable(line), soft_wrap=True)


def _finish(result: dict[str, Any], as_json: bool, *, failed: bool) -> None:
    if as_json:
        print_json(result)
    if failed:
        raise typer.Exit(RunEnvironmentError.exit_code)
