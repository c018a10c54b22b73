"""``lrag-ray inspect``: which frames a rollout attended to."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lrag_ray.cli.output import console, print_json, tells_errors

_WIDTH_WITHOUT_TERMINAL = 140


def register(app: typer.Typer) -> None:
    """Add the command to the program."""
    app.command("inspect")(inspect)


@tells_errors
def inspect(
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
    Example:
      lrag-ray inspect runs/demo/rollouts/tiny/rag/00000-1f2e3d4c-0 --png map.png
    """
    from rich.text import Text

    from lrag_ray.report.inspect import inspect_rollout
    from lrag_ray.report.trace_map import KIND_COLOURS, KIND_GLYPHS, VALUE_GLYPH, draw_png, draw_text, trace_map

    found = inspect_rollout(rollout)
    title = (
        f"{found.commit.rollout.backbone}, {found.commit.rollout.method}, {found.commit.latent_frames} latent frames"
    )
    if png is not None:
        draw_png(found.rows, png, title)
    if as_json:
        print_json({"rollout": found.commit.rollout, "rows": [row._asdict() for row in found.rows]})
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
