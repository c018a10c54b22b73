"""``lrag-ray dataset``: describe, check, export and import latent datasets."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

import typer

from lrag_ray.cli.options import AsJson
from lrag_ray.cli.output import console, count, print_json, print_lines, quantity, say, tells_errors, write
from lrag_ray.cli.tables import table
from lrag_ray.printable import counted

if TYPE_CHECKING:
    from rich.console import Console

    from lrag_ray.events import Event
    from lrag_ray.pipelines.dataset import DatasetInfo
    from lrag_ray.pipelines.latents import LatentsOutcome

dataset = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Latent datasets: describe, check, export, import. Several addresses are joined as one dataset.\n\n"
    "\b\nExamples:\n  lrag-ray dataset info runs/latents\n  lrag-ray dataset export runs/latents --to latents",
)

Datasets = Annotated[
    list[str], typer.Argument(metavar="RUN…", help="Addresses of runs or imported datasets; several are joined.")
]


def register(app: typer.Typer) -> None:
    """Add the commands to the program."""
    app.add_typer(dataset, name="dataset")


@dataset.command()
@tells_errors
def info(runs: Datasets, as_json: AsJson = False) -> None:
    """Show what a dataset holds: rollouts, frames, shape, size, digest, and where the latents come from.

    \b
    Example:
      lrag-ray dataset info runs/latents s3://bucket/more
    """
    from lrag_ray.pipelines.dataset import dataset_info

    found = dataset_info(runs)
    if as_json:
        print_json(found)
    else:
        _print_info(console(), found)


@dataset.command()
@tells_errors
def verify(runs: Datasets, as_json: AsJson = False) -> None:
    """Read every latent and compare it with its checksum, digest and shape; NaN and infinity are reported too.

    Exit code 1 if anything is damaged.

    \b
    Example:
      lrag-ray dataset verify runs/latents
    """
    from lrag_ray.pipelines.dataset import verify_dataset

    found = verify_dataset(runs)
    if as_json:
        print_json(found)
    else:
        out = console()
        print_lines(out, "Damaged", (f"{each.rollout}: {each.problem}" for each in found.damaged))
        whole = "all whole" if not found.damaged else f"{count(len(found.damaged))} damaged"
        out.print(f"Read {counted(found.rollouts, 'rollout')}, {counted(found.frames, 'latent frame')}: {whole}.")
    raise typer.Exit(found.exit_code)


@dataset.command()
@tells_errors
def export(
    runs: Datasets,
    to: Annotated[str, typer.Option("--to", metavar="DIR", help="Folder or bucket to write into.")],
    form: Annotated[
        Literal["pt", "webdataset"],
        typer.Option("--format", help="pt: latent_000000.pt, as the released code reads; webdataset: tar shards."),
    ] = "pt",
    dtype: Annotated[
        Literal["stored", "bfloat16"], typer.Option("--dtype", help="Precision; stored keeps every bit.")
    ] = "stored",
    shard_mb: Annotated[int, typer.Option("--shard-mb", metavar="MB", min=1, help="Size of a shard, about.")] = 1000,
    as_json: AsJson = False,
) -> None:
    """Write a dataset as files that other programs read.

    Files are numbered in the order of the prompts. The same command again continues. Latents that are not what was
    stored are named and not exported, with exit code 1.

    \b
    Examples:
      lrag-ray dataset export runs/latents --to datasets
      lrag-ray dataset export runs/latents --to s3://bucket/shards --format webdataset
    """
    from lrag_ray.pipelines.dataset import export_dataset

    made = export_dataset(runs, to, form=form, dtype=dtype, shard_bytes=shard_mb * 1_000_000)
    if as_json:
        print_json(made)
    else:
        out = console()
        print_lines(out, "Damaged, not exported", (f"{each.rollout}: {each.problem}" for each in made.damaged))
        there = f" ({count(made.files_there)} were there)" if made.files_there else ""
        wrote = f"{counted(made.files_made, 'file')}{there}"
        out.print(f"Wrote {wrote} of {counted(made.rollouts, 'rollout')}, {made.dtype}.")
        say(out, f"files: {made.uri}")
    raise typer.Exit(made.exit_code)


@dataset.command("import")
@tells_errors
def import_(
    source: Annotated[str, typer.Argument(metavar="DIR", help="Folder or bucket of .pt files or tar shards.")],
    to: Annotated[str, typer.Option("--to", metavar="RUN", help="Address of the dataset.")],
    window: Annotated[
        int, typer.Option("--window", min=1, help="Latents with fewer frames are left out and named.")
    ] = 8,
    licence: Annotated[str, typer.Option("--licence", help="Licence of the latents, for the card.")] = "unknown",
    as_json: AsJson = False,
) -> None:
    """Make a dataset from latents that another program stored: .pt files of [T, C, H, W], or tar shards.

    Files that are truncated, of another shape or too short are named and left out, with exit code 1. The same command
    again adds what is new.

    \b
    Example:
      lrag-ray dataset import datasets --to runs/imported
    """
    from lrag_ray.pipelines.dataset_import import import_dataset

    made = import_dataset(source, to, window=window, licence=licence, listener=_tell)
    if as_json:
        print_json(made)
    else:
        out = console()
        print_lines(out, "Left out", (f"{name} {reason}" for name, reason in made.left_out.items()))
        there = f" ({count(made.there)} were there)" if made.there else ""
        out.print(
            f"Imported {counted(made.imported, 'latent')}{there}; the dataset holds {counted(made.frames, 'frame')}."
        )
        say(out, f"dataset: {made.uri}")
    raise typer.Exit(made.exit_code)


def print_corpus(out: Console, outcome: LatentsOutcome) -> None:
    """What a start of `job: latents` made."""
    from lrag_ray.cli.tables import print_made

    print_made(out, outcome)
    out.print(
        f"The dataset holds {counted(outcome.dataset_rollouts, 'rollout')}, "
        f"{counted(outcome.dataset_frames, 'latent frame')}"
        + (f", digest {outcome.dataset_digest}." if outcome.dataset_digest else ".")
    )
    say(out, f"dataset: {outcome.uri} (lrag-ray dataset info, verify, export)")


def _print_info(out: Console, found: DatasetInfo) -> None:
    shown = table(" + ".join(found.uris), "", "", text_columns=2)
    shown.show_header = False
    same = found.shortest == found.longest
    lengths = count(found.longest) if same else f"{count(found.shortest)} to {count(found.longest)}"
    facts = {
        "rollouts": f"{count(found.rollouts)}, of "
        f"{counted(found.prompts, 'prompt') if found.prompts else 'unknown prompts'}",
        "latent frames": f"{count(found.frames)}, {lengths} per rollout",
        "one frame": f"[{', '.join(map(str, found.shape))}] {found.dtype}",
        "size": quantity(found.size_bytes, "B"),
        "windows of 8": count(found.windows),
        **{f"made by {name}": f"{counted(number, 'rollout')}" for name, number in found.by_method.items()},
    }
    if found.duplicates:
        facts["held twice"] = f"{counted(found.duplicates, 'rollout')}, each counted once"
    for name, value in facts.items():
        shown.add_row(name, value)
    out.print(shown)
    say(out, f"digest {found.digest}")
    print_lines(out, "Left out", found.left_out)
    for uri, card in zip(found.uris, found.cards, strict=True):
        if card is None:
            continue
        out.print(f"\n{uri}: {card.origin}, licence {card.licence}")
        for each in card.weights:
            out.print(f"  {each.kind} {each.name} from {each.source}, licence {each.licence}")


def _tell(event: Event) -> None:
    if text := getattr(event, "text", ""):
        write(text, stderr=True)
