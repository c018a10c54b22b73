"""The ``lrag-ray`` command. Each command parses, makes one call of the Python API, and prints.

Heavy packages are imported inside the commands, so that ``--help`` is quick.
"""

from __future__ import annotations

import time
from typing import Annotated, Literal

import typer

from lrag_ray import __version__
from lrag_ray.cli import (
    bench,
    catalogue,
    dataset,
    decode,
    doctor,
    gc,
    import_config,
    init,
    inspect,
    judge,
    plan,
    prompts,
    refine,
    report,
    runs,
    score,
    submit,
    view,
    weights,
)
from lrag_ray.cli.options import AsJson, Config, Overrides, Progress, Run
from lrag_ray.cli.output import console, print_json, tells_errors, write
from lrag_ray.errors import RunEnvironmentError
from lrag_ray.printable import plain
from lrag_ray.retrieval.bank_types import BankType

_LOOK_EVERY_S = 5.0

app = typer.Typer(
    name="lrag-ray",
    help="Generate and evaluate long retrieval-augmented videos in bulk on Ray.\n\n"
    "Exit codes: 0 all done; 1 finished, but something failed; 2 wrong use or configuration; 3 the environment "
    "(cluster, storage, weights); 130 interrupted.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        write(f"lrag-ray {__version__}")
        raise typer.Exit


@app.callback()
def lrag_ray(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Options of the program itself."""


@app.command()
@tells_errors
def run(
    config: Config,
    overrides: Overrides = None,
    repair: Annotated[
        bool, typer.Option("--repair", help="Read everything back first, and make again exactly what is damaged.")
    ] = False,
    progress: Progress = "auto",
    as_json: AsJson = False,
) -> None:
    """Run a job here, on a running Ray cluster or a local one: an evaluation, a latent corpus, an encoder training.

    The same command again continues: what is committed is not done again, what is partial continues, what failed is
    tried again. Prompts, samples, methods, backbones and durations may be added in between.

    \b
    Examples:
      lrag-ray run configs/demo.yaml
      lrag-ray run configs/encoder.yaml
      lrag-ray run configs/demo.yaml --set run.uri=runs/mine --set prompts.path=prompts.txt --set prompts.limit=8
      lrag-ray run configs/demo.yaml --repair
    """
    from lrag_ray.cli.dataset import print_corpus
    from lrag_ray.cli.progress import shown_progress
    from lrag_ray.cli.tables import print_outcome
    from lrag_ray.cli.training import print_training
    from lrag_ray.config.load import load_job
    from lrag_ray.pipelines.jobs import start
    from lrag_ray.pipelines.latents import LatentsOutcome
    from lrag_ray.pipelines.train_encoder import TrainingOutcome
    from lrag_ray.store.rollouts import RolloutRun

    loaded = load_job(config, overrides or [])
    with shown_progress(progress) as listener:
        outcome = start(loaded, listener=listener, repair=repair)
    if as_json:
        print_json(outcome)
    elif isinstance(outcome, TrainingOutcome):
        print_training(console(), outcome)
    elif isinstance(outcome, LatentsOutcome):
        print_corpus(console(), outcome)
    else:
        print_outcome(console(), RolloutRun(loaded.run.uri, loaded.storage), outcome)
    raise typer.Exit(outcome.exit_code)


plan.register(app)


@app.command()
@tells_errors
def status(
    run_uri: Run,
    watch: Annotated[
        bool, typer.Option("--watch", help="Look again every few seconds until nothing is left to do.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Show how far a run is, from its storage alone: results per cell, scores, failures, and who works on it.

    With --watch it ends when all is done, or when the rest is quarantined and nobody works on the run any more. Exit
    code 1 if anything was quarantined.

    \b
    Examples:
      lrag-ray status runs/demo
      lrag-ray status s3://bucket/table2 --watch
    """
    from lrag_ray.cli.tables import print_status
    from lrag_ray.cli.training import print_training_status
    from lrag_ray.store.rollouts import RolloutRun
    from lrag_ray.store.status import RunStatus, run_status
    from lrag_ray.store.training_run import TrainingRun, holds_training
    from lrag_ray.store.training_status import TrainingStatus, training_status

    run_dir = RolloutRun(run_uri)
    training = holds_training(run_dir.storage)
    while True:
        began_s = time.monotonic()
        found: RunStatus | TrainingStatus
        found = training_status(TrainingRun(run_uri)) if training else run_status(run_dir)
        if as_json:
            print_json({**found.model_dump(mode="json"), "done": found.done})
        else:
            if watch:
                # Not before the new look is there: a large run on a bucket takes a while to read.
                console().clear()
            if isinstance(found, TrainingStatus):
                print_training_status(console(), found)
            else:
                print_status(console(), found)
        if not watch or found.settled or (found.done and found.held_by is None):
            raise typer.Exit(found.exit_code)
        # At most half of the time is spent on reading: every commit is read at every look.
        time.sleep(max(_LOOK_EVERY_S, time.monotonic() - began_s))


@app.command()
@tells_errors
def verify(
    folder: Annotated[str | None, typer.Argument(metavar="DIR", help="Folder of golden vectors.")] = None,
    run_uri: Annotated[
        str | None, typer.Option("--run", metavar="RUN", help="Check a run against itself: base and infinity_rope.")
    ] = None,
    stored: Annotated[
        bool, typer.Option("--bytes", help="With --run: read back every stored file against its checksum.")
    ] = False,
    sample: Annotated[
        int | None, typer.Option("--sample", metavar="N", min=1, help="With --bytes: only N rollouts or other files.")
    ] = None,
    bank: Annotated[
        BankType | None,
        typer.Option(
            "--bank", help="Store the history of golden rollouts so, and judge latents and choices: a quality gate."
        ),
    ] = None,
    device: Annotated[
        Literal["cpu", "cuda"] | None, typer.Option("--device", help="Compute golden rollouts there, and those alone.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Compare our numbers with golden vectors: one row per case and tensor, exit code 1 if any is off.

    Recognises by content: rollouts, methods, schedules, retrieval encoders, checkpoints, LoRA, VAE, text encoder, and
    VBench-Long where its own folder is named (that takes half an hour on a CPU). With --run, checks on a run's own
    latents that base and infinity_rope are equal until the window fills and differ after. With --run and --bytes,
    every stored file is read back instead, of an encoder training too: one row per damaged file, with what makes it
    again.

    \b
    Examples:
      lrag-ray verify golden/rollout
      lrag-ray verify golden/rollout --bank int4
      lrag-ray verify golden --device cuda
      lrag-ray verify --run runs/table2
      lrag-ray verify --run s3://bucket/table2 --bytes --sample 500
    """
    import torch

    from lrag_ray.cli.tables import print_results
    from lrag_ray.conformance.run_check import check_run
    from lrag_ray.conformance.verify import failed, iter_results

    if (folder is None) == (run_uri is None):
        raise typer.BadParameter("give either a folder of golden vectors or --run RUN")
    if (stored and run_uri is None) or (sample is not None and not stored):
        raise typer.BadParameter("--bytes needs --run RUN, and --sample needs --bytes")
    if stored:
        raise typer.Exit(_verify_bytes(run_uri or "", sample, as_json=as_json))
    if bank is not None and folder is None:
        raise typer.BadParameter("--bank needs a folder of golden vectors")
    if device is not None and folder is None:
        raise typer.BadParameter("--device needs a folder of golden vectors")
    if device == "cuda" and not torch.cuda.is_available():
        raise RunEnvironmentError("--device cuda: torch sees no CUDA device. Fix: leave --device out")
    place = None if device is None else torch.device(device)
    results = check_run(run_uri) if run_uri is not None else iter_results(folder or "", bank, place)
    found = []
    if as_json:
        found = list(results)
        print_json({"passed": not failed(found), "results": found})
    else:
        found = print_results(console(), results)
    raise typer.Exit(1 if failed(found) else 0)


def _verify_bytes(run_uri: str, sample: int | None, *, as_json: bool) -> int:
    """`verify --bytes`; the exit code."""
    from lrag_ray.cli.tables import print_damage
    from lrag_ray.store.integrity import Coverage, find_damage
    from lrag_ray.store.rollouts import RolloutRun
    from lrag_ray.store.training_integrity import find_training_damage
    from lrag_ray.store.training_run import TrainingRun, holds_training

    coverage, run = Coverage(), RolloutRun(run_uri)
    if holds_training(run.storage):
        found = find_training_damage(TrainingRun(run_uri), coverage)
    else:
        found = find_damage(run, coverage, sample=sample)
    if as_json:
        damage = [each._asdict() for each in found]
        print_json({"whole": not damage, "damaged": damage, **plain(coverage)})
    else:
        damage = print_damage(console(), found, coverage)
    return 1 if damage else 0


submit.register(app)
decode.register(app)
score.register(app)
report.register(app)
inspect.register(app)
prompts.register(app)
refine.register(app)
judge.register(app)
runs.register(app)
view.register(app)
init.register(app)
doctor.register(app)
gc.register(app)
weights.register(app)
dataset.register(app)
import_config.register(app)
bench.register(app)
catalogue.register(app)

if __name__ == "__main__":
    from lrag_ray.__main__ import main

    main()
