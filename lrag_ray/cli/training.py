"""Encoder trainings on the terminal: live losses, outcome, plan, status."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from lrag_ray.cli.output import count, duration, quantity, say
from lrag_ray.errors import INTERRUPTED, UsageError
from lrag_ray.printable import counted

if TYPE_CHECKING:
    from lrag_ray.events import TrainingAdvanced
    from lrag_ray.pipelines.plan_training import TrainingPlan
    from lrag_ray.pipelines.train_encoder import TrainingOutcome
    from lrag_ray.store.training_status import TrainingStatus


_LEAST_HOURS = 0.1
"""Fewer hours are shown as less than this."""
GPUS_SHOWN = ("H200", "H100", "A100", "RTX 4090")
"""Kinds that a plan speaks of where none is asked for."""


def training_headline(event: TrainingAdvanced) -> str:
    """One line: how far, the losses, how fast."""
    if event.doing == "loading":
        # Where a training goes on is known when its checkpoint is loaded.
        return f"loading on {counted(event.workers, 'worker')}"
    parts = [f"epoch {count(event.epoch)}/{count(event.epochs)}", f"step {count(event.step)}/{count(event.steps)}"]
    if event.doing != "training":
        parts.append(event.doing)
    if event.train:
        parts.append(f"train {sum(event.train):.4g}")
    if event.validation:
        parts.append(f"validation {sum(event.validation):.4g}")
    if event.best is not None:
        parts.append(f"best {event.best:.4g} in epoch {event.best_epoch}")
    if event.windows_per_s:
        parts.append(f"{event.windows_per_s:.3g} windows/s on {counted(event.workers, 'worker')}")
    return ", ".join(parts)


def losses_table(event: TrainingAdvanced) -> Table:
    """Losses of both splits."""
    made = Table(box=None, pad_edge=False, header_style="dim")
    for name in ("", "total", "recon", "delta", "smooth"):
        made.add_column(name, justify="right" if name else "left")
    for split, values in (("train, this epoch", event.train), ("validation", event.validation)):
        if values:
            made.add_row(split, *(f"{value:.5g}" for value in (sum(values), *values)))
    return made


def print_training(console: Console, outcome: TrainingOutcome) -> None:
    """How far the training is, and where everything is."""
    best = "" if outcome.best is None else f"; lowest total {outcome.best:.6g} in epoch {outcome.best_epoch}"
    console.print(
        f"{count(outcome.epochs_done)} of {counted(outcome.epochs, 'epoch')} are done "
        f"({counted(outcome.steps, 'step')}){best}."
        f" This start took {duration(outcome.seconds)}."
    )
    for reason in outcome.missing.values():
        say(console, f"It cannot go on: {reason}")
    places = {"state": f"lrag-ray status {shlex.quote(outcome.uri)}"}
    if outcome.exit_code != INTERRUPTED:
        places = {"page": f"{outcome.uri}/summary/report.html", **places}
    if outcome.best is not None:
        places = {"encoder": f"{outcome.uri}/checkpoints/best.pt", **places}
    for what, place in places.items():
        console.print(f"{what + ':':20}{place}", soft_wrap=True)


def print_training_plan(
    console: Console, plan: TrainingPlan, gpus: int | None = None, gpu: str | None = None, price: float | None = None
) -> None:
    """Data, steps, hours, memory."""
    half = " (about half with float16 on a GPU)" if plan.gpu_hours else ""
    rows = {
        "data": f"{', '.join(plan.data)}: {counted(plan.rollouts, 'rollout')}, {counted(plan.frames, 'latent frame')}; "
        f"{count(plan.training_rollouts)} for training, {count(plan.validation_rollouts)} for validation",
        "model": f"{quantity(plan.parameters, '')} parameters",
        "steps": f"{count(plan.steps_per_epoch)} per epoch with one window of each of "
        f"{counted(plan.training_rollouts, 'rollout')}, {count(plan.steps)} in {counted(plan.epochs, 'epoch')}",
        "work": f"{quantity(plan.flops, 'FLOP')} in all",
        "read": f"{quantity(plan.read_bytes, 'B')} in all, {quantity(plan.window_bytes, 'B')} per window",
        "memory per worker": f"{quantity(plan.worker_bytes, 'B')}: {quantity(plan.model_bytes, 'B')} of weights, "
        f"gradients and optimiser, {quantity(plan.activation_bytes, 'B')} of activations in float32{half}, "
        f"{quantity(plan.batch_bytes, 'B')} of windows read ahead",
        "stored": f"{quantity(plan.stored_bytes, 'B')}: two checkpoints of {quantity(plan.checkpoint_bytes, 'B')}, and "
        "the losses",
    }
    hours = _training_hours(plan, gpus, gpu, price)
    console.print(f"{plan.uri}: training of the retrieval encoder\n")
    for name, text in rows.items():
        say(console, f"{name + ':':20}{text}", 20)
    for index, line in enumerate(hours):
        say(console, f"{'' if index else 'hours:':20}{line}", 20)
    for note in plan.notes:
        say(console, f"Note: {note}")


def _training_hours(plan: TrainingPlan, gpus: int | None, gpu: str | None, price: float | None) -> list[str]:
    """Hours of one worker where a speed was measured, else bounds for one GPU of the usual kinds, or of `gpu`."""
    from lrag_ray.pipelines.plan_training import TRAINING_SHARE

    lines: list[str] = []

    def add(name: str, fewest: float, most: float) -> None:
        def span(low: float, high: float) -> str:
            if high < _LEAST_HOURS:
                return f"less than {_LEAST_HOURS:g}"
            shown = [f"{value:,.0f}" if value >= 100 else f"{value:.2g}" for value in (low, high)]
            return shown[0] if shown[0] == shown[1] else " to ".join(shown)

        line = f"{name}: {span(fewest, most)} hours"
        if most < _LEAST_HOURS:
            lines.append(line)
            return
        if gpus is not None:
            line += f", {span(fewest / gpus, most / gpus)} on {count(gpus)} of them"
        if price is not None:
            line += f", for {fewest * price:,.2f}" + ("" if fewest == most else f" to {most * price:,.2f}")
        lines.append(line)

    if plan.speed is not None and plan.worker_hours is not None and gpu is None:
        add("one worker", plan.worker_hours, plan.worker_hours)
        speed = plan.speed
        lines.append(
            f"measured: {speed.train_windows_per_s:.3g} windows/s per worker in {counted(speed.steps, 'step')} of "
            f"{speed.source}"
        )
        return lines
    later = "after the first steps, plan takes the measured speed of run.uri, or of --from RUN"
    if not plan.gpu_hours:
        asked = {"--gpu": gpu, "--gpus": gpus, "--price": price}
        if given := [f"{name} {value}" for name, value in asked.items() if value is not None]:
            fix = "set it to 1 (--set engine.gpus_per_actor=1), or leave these out"
            raise UsageError(f"{', '.join(given)}: engine.gpus_per_actor is 0. Fix: {fix}")
        return [f"unknown, since nothing was measured on CPUs: {later}"]
    for name in (gpu,) if gpu is not None else GPUS_SHOWN:
        add(f"one {name}", *plan.gpu_hours[name])
    low, high = (f"{100 * share:g}" for share in TRAINING_SHARE)
    lines.append(f"bounds: {low} to {high} % of the peak; reading may take longer (`lrag-ray bench dataset`); {later}")
    return lines


def print_training_status(console: Console, status: TrainingStatus) -> None:
    """How far a training is, and who works on it."""
    best = "" if status.best is None else f", lowest total {status.best:.6g} in epoch {status.best_epoch}"
    say(
        console,
        f"{status.uri}: {count(status.epoch)} of {counted(status.epochs, 'epoch')}, "
        f"{counted(status.step, 'step')}{best}.",
    )
    if status.stored_at:
        say(console, f"Last checkpoint: {status.stored_at}.")
    if status.held_by is not None:
        say(console, f"At work: {status.held_by}.")
    else:
        lost = f" The last driver did not end properly: {status.lost}." if status.lost else ""
        say(console, f"Nobody is at work.{lost}{'' if status.done else ' The same `lrag-ray run` continues.'}")
    for failure in status.failures:
        say(console, f"Failed: {failure.reason} ({failure.path})")
