"""``lrag-ray decode``: videos from the stored latents of a run."""

from __future__ import annotations

from typing import Annotated

import typer

from lrag_ray.cli.options import AsJson, Config, Overrides
from lrag_ray.cli.output import console, print_json, tells_errors


def register(app: typer.Typer) -> None:
    """Add the command to the program."""
    app.command()(decode)


@tells_errors
def decode(
    config: Config,
    overrides: Overrides = None,
    other_vae: Annotated[
        bool, typer.Option("--other-vae", help="Allow another VAE than the one the run was started with.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Decode what the run at run.uri has committed, without generating anything.

    Gives a run without videos (video.enabled: false) its videos, or makes others: another quality, another frame rate,
    another precision of the VAE. They lie under RUN/decoded; scoring and report take them where the run has none of
    its own. The same command again continues. CONFIG is the run's own file: it says where the VAE lies.

    \b
    Examples:
      lrag-ray decode configs/table2.yaml
      lrag-ray decode configs/table2.yaml --set video.crf=28 --set engine.actors=4
    """
    from lrag_ray.cli.progress import shown_progress
    from lrag_ray.cli.tables import print_decoded
    from lrag_ray.config.load import load_config
    from lrag_ray.engine.decode import decode as decode_run

    loaded = load_config(config, overrides or [])
    with shown_progress() as progress:
        outcome = decode_run(loaded, other_vae=other_vae, progress=progress)
    if as_json:
        print_json(outcome)
    else:
        print_decoded(console(), outcome)
    raise typer.Exit(outcome.exit_code)
