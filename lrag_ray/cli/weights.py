"""``lrag-ray weights``: list, pull, verify and convert what a configuration needs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from lrag_ray.errors import LragError, RunEnvironmentError

Config = Annotated[Path, typer.Argument(help="Run configuration (YAML).", show_default=False)]
Overrides = Annotated[
    list[str], typer.Option("--set", metavar="KEY=VALUE", help="Override a value of the configuration.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]

weights = typer.Typer(no_args_is_help=True, help="What a configuration needs: list, pull, verify, convert.")


def register(app: typer.Typer) -> None:
    """Add the commands to the program."""
    app.add_typer(weights, name="weights")


@weights.command("list", epilog="Example: lrag-ray weights list configs/table2.yaml")
def list_needs(config: Config, overrides: Overrides = [], as_json: AsJson = False) -> None:  # noqa: B006
    """Show every file that a configuration needs, whether it is there, and where it is published."""
    from lrag_ray.engine.weights.local import sizes_at
    from lrag_ray.engine.weights.published import UNKNOWN

    rows = []
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
        typer.echo(json.dumps({"needs": rows}))
        return
    for row in rows:
        here = _gigabytes(row["present_bytes"]) if row["present_bytes"] else "missing"
        source = f"{row['source']} ({_gigabytes(row['published_bytes'])}, licence {row['licence']})"
        typer.echo(f"{row['kind']:<18} {here:<10} {row['address']}")
        typer.echo(f"{'':<29} {source if row['source'] else 'not published under this name'}")
    if not rows:
        typer.echo("nothing: every backbone of this configuration has random weights")


@weights.command(epilog="Example: lrag-ray weights pull configs/table2.yaml")
def pull(
    config: Config,
    overrides: Overrides = [],  # noqa: B006
    again: Annotated[bool, typer.Option("--again", help="Replace what is there already.")] = False,
    as_json: AsJson = False,
) -> None:
    """Fetch what is missing to the configured paths or bucket addresses; goes on where it was cut off.

    Digests are recorded beside each file. HF_ENDPOINT names a mirror, HF_TOKEN a token.
    """
    from lrag_ray.engine.weights.pull import pull as pull_need

    rows: list[dict[str, Any]] = []
    for need in _needs(config, overrides):
        row: dict[str, Any] = {"kind": need.kind, "address": need.address, "error": None}
        try:
            result = pull_need(need, again=again, tell=lambda line: typer.echo(line, err=True))
            row |= {"pulled": result.pulled, "size_bytes": result.size_bytes}
        except LragError as error:
            row["error"] = str(error)
        rows.append(row)
        if not as_json:
            state = row["error"] or f"{'pulled' if row['pulled'] else 'there'}, {_gigabytes(row['size_bytes'])}"
            typer.echo(f"{need.kind:<18} {need.address}: {state}")
    _finish({"pulled": rows}, as_json, failed=any(row["error"] for row in rows))


@weights.command(epilog="Example: lrag-ray weights verify configs/table2.yaml")
def verify(
    config: Config,
    overrides: Overrides = [],  # noqa: B006
    digests: Annotated[bool, typer.Option(help="Read every byte and compare digests.")] = True,
    as_json: AsJson = False,
) -> None:
    """Check what is there: sizes, digests recorded when it was pulled, and names and shapes on the meta device."""
    from lrag_ray.engine.weights.verify import verify as verify_need

    verdicts = []
    for need in _needs(config, overrides):
        verdict = verify_need(need, digests=digests)
        verdicts.append(verdict)
        if not as_json:
            typer.echo(f"{'ok' if verdict.ok else 'FAIL':<5} {need.kind:<18} {need.address}: {verdict.detail}")
    rows = [{"kind": v.need.kind, "address": v.need.address, "ok": v.ok, "detail": v.detail} for v in verdicts]
    _finish({"verified": rows}, as_json, failed=not all(verdict.ok for verdict in verdicts))


@weights.command(epilog="Example: lrag-ray weights convert configs/table2.yaml --to weights/converted")
def convert(
    config: Config,
    to: Annotated[Path, typer.Option("--to", help="Folder for the converted files.", show_default=False)],
    overrides: Overrides = [],  # noqa: B006
    as_json: AsJson = False,
) -> None:
    """Write generators (EMA chosen, LoRA merged), text encoder and VAE as safetensors, which actors map into memory.

    Prints the values to set in the configuration. The files are others, so a run that was begun keeps the old ones.
    """
    from lrag_ray.engine.weights.convert import convert as convert_need

    found = [convert_need(need, to) for need in _needs(config, overrides)]
    done = [conversion for conversion in found if conversion is not None]
    if as_json:
        rows = [
            {"source": c.source, "target": str(c.target), "size_bytes": c.size_bytes, "set": c.settings} for c in done
        ]
        typer.echo(json.dumps({"converted": rows}))
        return
    for conversion in done:
        typer.echo(f"{conversion.source} -> {conversion.target} ({_gigabytes(conversion.size_bytes)})")
        for key, value in conversion.settings.items():
            typer.echo(f"    --set {key}={json.dumps(value) if not isinstance(value, str) else value}")


def _needs(config: Path, overrides: list[str]) -> list[Any]:
    from lrag_ray.config.load import load_config
    from lrag_ray.engine.weights.needs import needs_of

    return needs_of(load_config(config, overrides))


def _gigabytes(size: Any) -> str:
    if size is None:
        return "size unknown"
    return f"{size / 1e9:.2f} GB" if size >= 1e7 else f"{size / 1e3:.1f} kB"


def _finish(result: dict[str, Any], as_json: bool, *, failed: bool) -> None:
    if as_json:
        typer.echo(json.dumps(result))
    if failed:
        raise typer.Exit(RunEnvironmentError.exit_code)
