"""``lrag-ray weights``: list, pull, verify and convert what a configuration needs."""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from lrag_ray.cli.options import AsJson, Config, Overrides
from lrag_ray.cli.output import console, duration, print_json, quantity, say, tells_errors
from lrag_ray.errors import LragError, RunEnvironmentError, UsageError
from lrag_ray.printable import counted

if TYPE_CHECKING:
    from lrag_ray.scoring.suite import Suite
    from lrag_ray.weights.needs import Need

OptionalConfig = Annotated[
    str | None, typer.Argument(metavar="CONFIG", help="YAML file that describes the run; or give --suite.")
]
SuiteOption = Annotated[
    str | None,
    typer.Option("--suite", help="Also the networks of this scoring suite; without CONFIG those alone."),
]
FolderOption = Annotated[
    str | None,
    typer.Option(
        "--folder",
        metavar="DIR",
        help="Folder of the suite's networks [default: scoring.weights of CONFIG, else VBench's own cache].",
    ),
]

_KIND = 26
"""Columns for the kind of a file."""
_INDENT = " " * 6

weights = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="The weights of a run: what it needs, where that is published, getting, checking and converting it.\n\n"
    "\b\nExamples:\n  lrag-ray weights list configs/table2.yaml\n  lrag-ray weights list --suite vbench_long",
)


def register(app: typer.Typer) -> None:
    """Add the commands to the program."""
    app.add_typer(weights, name="weights")


@weights.command("list")
@tells_errors
def list_needs(
    config: OptionalConfig = None,
    suite: SuiteOption = None,
    folder: FolderOption = None,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Show every file that a configuration or a scoring suite needs, whether it is there, and where it is published.

    \b
    Examples:
      lrag-ray weights list configs/table2.yaml
      lrag-ray weights list --suite vbench_long --folder weights/vbench
    """
    from lrag_ray.weights.local import sizes_at
    from lrag_ray.weights.networks import size_of
    from lrag_ray.weights.published import UNKNOWN

    rows: list[dict[str, Any]] = []
    needs, suite_networks = _selected(config, overrides, suite, folder)
    for need in needs:
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
    for file in suite_networks.weight_files() if suite_networks is not None else ():
        rows.append(
            {
                "kind": file.name,
                "address": str(file.path),
                "keys": ["scoring.weights"],
                "present_bytes": size_of(file.path) if file.path.exists() else None,
                "source": f"{file.url}#{file.member}" if file.member else file.url,
                "published_bytes": file.size_bytes,
                "licence": file.licence,
            }
        )
    if as_json:
        print_json({"needs": rows})
        return
    for row in rows:
        size = quantity(row["published_bytes"], "B") if row["published_bytes"] else "size unknown"
        here = quantity(row["present_bytes"], "B") if row["present_bytes"] else "missing"
        _say(f"{here:<10} {row['kind']:<{_KIND}} {row['address']}", "green" if row["present_bytes"] else "red")
        if row["source"]:
            _say(f"{_INDENT}from {row['source']}")
            _say(f"{_INDENT}{size}, licence {row['licence']}")
        else:
            _say(f"{_INDENT}your own: no published file has this name")
    missing = [row for row in rows if not row["present_bytes"]]
    if rows:
        present = [row for row in rows if row["present_bytes"]]
        there = f"{len(present)} here{_bytes(present, 'present_bytes')}"
        _say(f"{counted(len(rows), 'file')}: {there}, {len(missing)} missing{_bytes(missing, 'published_bytes')}.")
    if any(row["source"] for row in missing):
        _say(f"Fix: lrag-ray weights pull {_arguments(config, suite, folder)}")
    if not rows:
        console().print("nothing: this configuration begins with random weights")


@weights.command()
@tells_errors
def pull(
    config: OptionalConfig = None,
    suite: SuiteOption = None,
    folder: FolderOption = None,
    overrides: Overrides = None,
    again: Annotated[bool, typer.Option("--again", help="Replace what is there already.")] = False,
    as_json: AsJson = False,
) -> None:
    """Fetch what is missing to the configured paths or bucket addresses; continues where it was cut off.

    Digests are recorded beside each file. HF_ENDPOINT names a mirror of the Hub, HF_TOKEN a token.

    \b
    Examples:
      lrag-ray weights pull configs/table2.yaml
      lrag-ray weights pull configs/table2.yaml --set backbones.longlive.vae.path=s3://bucket/Wan2.1_VAE.pth
      lrag-ray weights pull --suite vbench_long --folder weights/vbench
    """
    from lrag_ray.weights.networks import pull_source, sources
    from lrag_ray.weights.pull import pull as pull_need

    rows: list[dict[str, Any]] = []
    began = time.monotonic()

    def tell(line: str) -> None:
        console(stderr=True).print(line, soft_wrap=True)

    def add(kind: str, address: str, pulled: bool, size_bytes: int, error: str | None = None) -> None:
        rows.append({"kind": kind, "address": address, "error": error})
        if error is None:
            rows[-1] |= {"pulled": pulled, "size_bytes": size_bytes}
        if not as_json:
            state = f"{'pulled' if pulled else 'there'}, {quantity(size_bytes, 'B')}"
            _say(f"{kind:<{_KIND}} {address}: {error or state}")

    needs, suite_networks = _selected(config, overrides, suite, folder)
    for need in needs:
        try:
            result = pull_need(need, again=again, tell=tell)
            add(need.kind, need.address, result.pulled, result.size_bytes)
        except LragError as error:
            add(need.kind, need.address, False, 0, str(error))
    if suite_networks is not None:
        for source in sources(suite_networks.weight_files()):
            try:
                for network in pull_source(source, again=again, tell=tell):
                    add(network.name, str(network.path), network.pulled, network.size_bytes)
            except LragError as error:
                add(" ".join(source.names), source.url, False, 0, str(error))
    if not as_json:
        fetched = [row for row in rows if row.get("pulled")]
        size, seconds = sum(row["size_bytes"] for row in fetched), time.monotonic() - began
        failed = sum(row["error"] is not None for row in rows)
        speed = f" in {duration(seconds)}, {quantity(size / seconds, 'B/s')}" if size and seconds > 0 else ""
        _say(f"{counted(len(rows), 'file')}: {len(fetched)} pulled ({quantity(size, 'B')}{speed}), {failed} failed.")
    _finish({"pulled": rows}, as_json, failed=any(row["error"] for row in rows))


@weights.command()
@tells_errors
def verify(
    config: OptionalConfig = None,
    suite: SuiteOption = None,
    folder: FolderOption = None,
    overrides: Overrides = None,
    digests: Annotated[bool, typer.Option(help="Read every byte and compare digests.")] = True,
    as_json: AsJson = False,
) -> None:
    """Check what is there: sizes, digests recorded when it was pulled, and that it fits or, for a suite, loads.

    \b
    Examples:
      lrag-ray weights verify configs/table2.yaml
      lrag-ray weights verify configs/table2.yaml --no-digests
      lrag-ray weights verify --suite vbench_long --folder weights/vbench
    """
    from lrag_ray.weights.networks import verify_networks
    from lrag_ray.weights.verify import verify as verify_need

    rows: list[dict[str, Any]] = []
    began = time.monotonic()

    def add(kind: str, address: str, ok: bool, detail: str) -> None:
        detail = detail.replace("CONFIG", shlex.quote(config)) if config is not None else detail
        rows.append({"kind": kind, "address": address, "ok": ok, "detail": detail})
        if not as_json:
            _say(f"{'ok' if ok else 'fail':<5} {kind:<{_KIND}} {address}: {detail}", "green" if ok else "red")

    needs, suite_networks = _selected(config, overrides, suite, folder)
    for need in needs:
        verdict = verify_need(need, digests=digests)
        add(need.kind, need.address, verdict.ok, verdict.detail)
    if suite_networks is not None:
        for network in verify_networks(suite_networks, digests=digests):
            add(network.name, str(network.path), network.ok, network.detail)
    if not as_json:
        wrong = sum(not row["ok"] for row in rows)
        _say(
            f"{counted(len(rows), 'file')} in {duration(time.monotonic() - began)}: {len(rows) - wrong} ok, "
            f"{wrong} failed."
        )
    _finish({"verified": rows}, as_json, failed=not all(row["ok"] for row in rows))


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
    from lrag_ray.weights.convert import convert as convert_need

    found = [convert_need(need, Path(to)) for need in _selected(config, overrides, None, None).needs]
    done = [conversion for conversion in found if conversion is not None]
    if as_json:
        print_json({"converted": [conversion._asdict() | {"target": str(conversion.target)} for conversion in done]})
        return
    for conversion in done:
        _say(f"{conversion.source} -> {conversion.target} ({quantity(conversion.size_bytes, 'B')})")
        for key, value in conversion.settings.items():
            shown = value if isinstance(value, str) else json.dumps(value)
            _say(f"    --set {shlex.quote(f'{key}={shown}')}")


class _Selection(NamedTuple):
    """What a command is about."""

    needs: list[Need]
    suite: Suite[Any] | None
    """The scoring suite whose networks are meant; None where they are not asked for."""


def _selected(config: str | None, overrides: list[str] | None, suite: str | None, folder: str | None) -> _Selection:
    from lrag_ray.config.load import load_job
    from lrag_ray.config.schema import RunConfig, ScoringSection
    from lrag_ray.scoring.registry import NONE, suite_class
    from lrag_ray.weights.local import is_remote
    from lrag_ray.weights.needs import needs_of

    if config is None and suite is None:
        raise UsageError("neither CONFIG nor --suite is given. Fix: name a configuration, or --suite vbench_long")
    loaded = load_job(config, overrides or []) if config is not None else None
    needs = needs_of(loaded) if loaded is not None else []
    scoring = loaded.scoring if isinstance(loaded, RunConfig) else ScoringSection(suite=NONE)
    name = suite or scoring.suite
    if name == NONE:
        return _Selection(needs, None)
    if folder is not None:
        scoring = scoring.model_copy(update={"weights": folder})
    if scoring.weights is not None and is_remote(scoring.weights):
        raise UsageError(
            f"{scoring.weights} is not a folder of this machine. Fix: give --folder a path that all nodes see"
        )
    try:
        return _Selection(needs, suite_class(name).of(scoring))
    except ValueError as error:
        raise UsageError(f"--suite: {error}") from None


def _say(line: str, style: str = "") -> None:
    say(console(), line, len(_INDENT), style=style)


def _bytes(rows: Sequence[Mapping[str, Any]], key: str) -> str:
    """Their sum in brackets, with how many have none."""
    known = sum(row[key] or 0 for row in rows)
    unknown = sum(not row[key] for row in rows)
    parts = [quantity(known, "B")] if known else []
    parts += [f"{unknown} of unknown size"] if unknown else []
    return f" ({' and '.join(parts)})" if parts else ""


def _arguments(config: str | None, suite: str | None, folder: str | None) -> str:
    """What this command was given, for the next one."""
    options = [("--suite", suite), ("--folder", folder)]
    given = [part for name, value in options if value for part in (name, value)]
    return shlex.join([*([config] if config else []), *given])


def _finish(result: dict[str, Any], as_json: bool, *, failed: bool) -> None:
    if as_json:
        print_json(result)
    if failed:
        raise typer.Exit(RunEnvironmentError.exit_code)
