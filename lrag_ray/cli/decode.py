"""``lrag-ray decode``: videos from the stored latents of a run."""

from __future__ import annotations

from typing import Annotated

import typer

from lrag_ray.cli.options import AsJson, Overrides, Run
from lrag_ray.cli.output import console, print_json, tells_errors


def register(app: typer.Typer) -> None:
    """Add the command to the program."""
    app.command()(decode)


@tells_errors
def decode(
    run_uri: Run,
    config: Annotated[
        str | None,
        typer.Option("--config", metavar="CONFIG", help="The configuration that the run was made with: names the VAE."),
    ] = None,
    overrides: Overrides = None,
    other_vae: Annotated[
        bool, typer.Option("--other-vae", help="Allow another VAE than the one the run was started with.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Decode what a run has committed, without generating anything.

    Gives a run without videos (video.enabled: false) its videos, or makes others: another quality, another frame rate,
    another precision of the VAE. They are stored in RUN/decoded; scoring and report use them where the run has no
    videos. The same command again continues. A run directory is data: the path of the VAE comes from the configuration
    that the run was made with (--config), or from --set.

    \b
    Examples:
      lrag-ray decode runs/table2 --config configs/table2.yaml
      lrag-ray decode runs/demo --set video.crf=28 --set engine.actors=4
      lrag-ray decode s3://bucket/table2 --set backbones.longlive.vae.path=/models/Wan2.1_VAE.pth
    """
    from lrag_ray.cli.progress import shown_progress
    from lrag_ray.cli.tables import print_decoded
    from lrag_ray.config.load import load_config
    from lrag_ray.config.overrides import quoted
    from lrag_ray.pipelines.decode import decode as decode_run
    from lrag_ray.pipelines.stored_config import stored_config

    overrides = overrides or []
    if config is None:
        loaded = stored_config(run_uri, overrides, decodes=True)
    else:
        loaded = load_config(config, [*overrides, f"run.uri={quoted(run_uri)}"])
    with shown_progress() as progress:
        outcome = decode_run(loaded, other_vae=other_vae, listener=progress)
    if as_json:
        print_json(outcome)
    else:
        print_decoded(console(), outcome)
    raise typer.Exit(outcome.exit_code)
