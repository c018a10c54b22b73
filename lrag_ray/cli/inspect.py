"""``lrag-ray inspect``: which frames a rollout attended to, and what embeddings of its frames are worth."""

from __future__ import annotations

import math
from itertools import groupby
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from lrag_ray.cli.options import AsJson
from lrag_ray.cli.output import console, print_json, say, tells_errors, write
from lrag_ray.cli.tables import table
from lrag_ray.printable import counted

_WIDTH_WITHOUT_TERMINAL = 140
_ROLLOUT = "rollout"


class _RolloutByDefault(TyperGroup):
    """``inspect ROLLOUT`` is ``inspect rollout ROLLOUT``."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Put the name in where no other command is named."""
        if args and args[0] not in self.commands and args[0] not in ctx.help_option_names:
            args = [_ROLLOUT, *args]
        return super().parse_args(ctx, args)


inspect = typer.Typer(
    cls=_RolloutByDefault,
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Look into stored results: what a rollout attended to (ROLLOUT, or rollout ROLLOUT), and embeddings.\n\n"
    "\b\nExamples:\n  lrag-ray inspect runs/demo/rollouts/tiny/rag/00000-1f2e3d4c-0\n"
    "  lrag-ray inspect embeddings runs/demo --descriptor avg_pool",
)


def register(app: typer.Typer) -> None:
    """Add the commands to the program."""
    app.add_typer(inspect, name="inspect")


@inspect.command(_ROLLOUT)
@tells_errors
def inspect_rollout_command(
    rollout: Annotated[
        str,
        typer.Argument(metavar="ROLLOUT", help="RUN/rollouts/<backbone>/<method>/<prompt_id>-<sample>."),
    ],
    png: Annotated[Path | None, typer.Option("--png", metavar="FILE", help="Also draw a PNG.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the trace rows as one JSON object.")] = False,
) -> None:
    """Draw which frames a rollout attended to: query blocks to the right, attended frames upwards.

    Retrieved frames are coloured by their similarity to the query frame, compressed ones by the share of their tokens
    that is attended.

    \b
    Examples:
      lrag-ray inspect runs/demo/rollouts/tiny/rag/00000-1f2e3d4c-0
      lrag-ray inspect rollout runs/demo/rollouts/tiny/rag/00000-1f2e3d4c-0 --png map.png
    """
    from rich.text import Text

    from lrag_ray.report.inspect import inspect_rollout
    from lrag_ray.report.trace_map import KIND_COLOURS, KIND_GLYPHS, VALUE_GLYPH, draw_png, draw_text, trace_map

    found = inspect_rollout(rollout)
    title = (
        f"{found.commit.rollout.backbone}, {found.commit.rollout.method}, "
        f"{counted(found.commit.latent_frames, 'latent frame')}"
    )
    if png is not None:
        draw_png(found.rows, png, title)
    if as_json:
        print_json({"rollout": found.commit.rollout, "rows": found.rows})
        return
    out = console()
    out.print(f"{title}\n{found.prompt}")
    height = max(8, out.height - 6) if out.is_terminal else 36
    width = out.width if out.is_terminal else _WIDTH_WITHOUT_TERMINAL
    for line in draw_text(found.rows, height=height, width=width // 2):
        out.print(Text.assemble(*((glyph * 2, colour) for glyph, colour in line)))
    legend = [
        piece for kind, glyph in KIND_GLYPHS.items() for piece in ((f"{glyph} ", KIND_COLOURS[kind]), f"{kind}  ")
    ]
    out.print(Text.assemble(*legend, f"{VALUE_GLYPH} {trace_map(found.rows).value_name}"))
    if png is not None:
        out.print(f"picture: {png}")


@inspect.command()
@tells_errors
def embeddings(
    run: Annotated[str, typer.Argument(metavar="RUN", help="Address of a run or imported dataset with latents.")],
    descriptors: Annotated[
        list[str] | None,
        typer.Option(
            "--descriptor",
            metavar="NAME",
            help="avg_pool, random (an untrained encoder), the checkpoint of an encoder, or dino (features of decoded "
            "frames); may be repeated [default: avg_pool and random].",
        ),
    ] = None,
    prompts: Annotated[
        list[str] | None, typer.Option("--prompt", metavar="TEXT", help="Only rollouts whose prompt contains this.")
    ] = None,
    most: Annotated[int, typer.Option("--rollouts", min=1, help="Rollouts to look at.")] = 2,
    to: Annotated[
        str | None,
        typer.Option("--to", metavar="FOLDER", help="Where page and data go [default: RUN/summary/embeddings]."),
    ] = None,
    window: Annotated[int, typer.Option("--window", help="Window of the retrieval that is played back.")] = 12,
    sink: Annotated[int, typer.Option("--sink", help="Its sink.")] = 1,
    top_k: Annotated[int, typer.Option("--top-k", help="Its retrieved frames.")] = 6,
    recent: Annotated[int, typer.Option("--recent-exclude", help="Its newest frames that are not eligible.")] = 5,
    block: Annotated[int, typer.Option("--frames-per-block", min=1, help="Its frames per block.")] = 3,
    weights: Annotated[
        str | None,
        typer.Option("--weights", metavar="DIR", help="dino: folder of VBench-Long's networks, or random."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Compare descriptors on stored rollouts: similarity over time, and which frames they would retrieve.

    \b
    Example:
      lrag-ray inspect embeddings runs/latents --descriptor avg_pool --descriptor runs/encoder/checkpoints/best.pt
    """
    from lrag_ray.context.rag import Rag, RagSettings
    from lrag_ray.errors import UsageError
    from lrag_ray.pipelines.embeddings import inspect_embeddings

    try:
        settings = RagSettings(window, sink, top_k, recent)
        Rag.check(settings, block)
    except ValueError as error:
        raise UsageError(f"{error}") from None
    found = inspect_embeddings(
        run, descriptors or ["avg_pool", "random"], prompts=prompts or [], most=most, to=to, settings=settings,
        frames_per_block=block, networks=weights,
    )  # fmt: skip
    for each in found.left_out:
        write(f"left out: {each}", stderr=True)
    if as_json:

        def finite(value: float) -> float | None:
            return value if math.isfinite(value) else None

        rows = [
            {"rollout": one.rollout, "descriptor": one.descriptor, "by_distance": one.by_distance.tolist(),
             "bend": finite(one.bend), "retrieval": {k: finite(v) for k, v in one.retrieval._asdict().items()}}
            for one in found.measures
        ]  # fmt: skip
        left_out = [str(each) for each in found.left_out]
        print_json({"folder": found.folder, "files": list(found.files), "measures": rows, "left_out": left_out})
        return
    for rollout, measures in groupby(found.measures, lambda one: one.rollout):
        say(console(), rollout)
        shown = table("", "descriptor", "neighbours", "bend", "back", "reach", "spread", "changed")
        shown.title = None
        for one in measures:
            neighbours = one.by_distance[1] if len(one.by_distance) > 1 else float("nan")
            numbers = (neighbours, one.bend, *one.retrieval[1:])
            shown.add_row(one.descriptor, *(f"{n:.3g}" if math.isfinite(n) else "–" for n in numbers))
        console().print(shown)
        console().print()
    say(console(), f"page: {found.folder}/{found.files[0]}; data beside it: {', '.join(found.files[1:])}")
