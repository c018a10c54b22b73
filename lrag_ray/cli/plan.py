"""``lrag-ray plan``: what a run comes to, and whether these GPUs, this time and this money suffice for it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from lrag_ray.cli.options import AsJson, Config, Overrides
from lrag_ray.cli.output import console, count, duration, print_json, quantity, say, tells_errors
from lrag_ray.cli.tables import table
from lrag_ray.cli.training import GPUS_SHOWN, print_training_plan
from lrag_ray.errors import UsageError
from lrag_ray.printable import counted, listed

if TYPE_CHECKING:
    from lrag_ray.pipelines.plan import GpuHours, Hours, Plan

_LEAST_GPU_HOURS = 0.1
"""Plans below this are not worth a line about GPUs."""
_LEAST_SHOWN_HOURS = 0.01
"""Bounds below this are not told apart."""
_CELLS_SHOWN = 6
"""More cells are counted and not listed."""


def register(app: typer.Typer) -> None:
    """Add the command to the program."""
    app.command()(plan)


@tells_errors
def plan(
    config: Config,
    overrides: Overrides = None,
    gpus: Annotated[
        int | None, typer.Option("--gpus", metavar="N", min=1, help="GPUs of the run: tells its wall-clock time.")
    ] = None,
    gpu: Annotated[
        str | None, typer.Option("--gpu", metavar="KIND", help="Their kind, such as H100 [default: all usual ones].")
    ] = None,
    price: Annotated[
        float | None, typer.Option("--price", metavar="P", min=0, help="Price of an hour of one GPU, in your currency.")
    ] = None,
    node_memory_gb: Annotated[
        float | None, typer.Option("--node-memory-gb", min=1, help="Check histories against nodes of this much memory.")
    ] = None,
    gpu_memory_gb: Annotated[
        float | None,
        typer.Option("--gpu-memory-gb", min=1, help="With --node-memory-gb: and such GPUs."),
    ] = None,
    rollouts_per_node: Annotated[
        int | None,
        typer.Option(
            "--rollouts-per-node", min=1, help="With --node-memory-gb: actors on a node [default: engine.actors]."
        ),
    ] = None,
    speeds_of: Annotated[
        str | None,
        typer.Option(
            "--from", metavar="RUN", help="Take speeds from the timings of this run [default: of run.uri, if local]."
        ),
    ] = None,
    cells: Annotated[bool, typer.Option("--cells", help="List every cell.")] = False,
    as_json: AsJson = False,
) -> None:
    """Tell what a job comes to, without running anything: rollouts or steps, hours, price, memory, bytes stored.

    Works without weights, and with prompts.count also without the prompt file. Hours come from measured timings; where
    nothing was measured, they are bounds. With --node-memory-gb it says where histories fit on such nodes, and refuses
    those that do not, with storage types and tiers that do. For a training it reads the index of the data.

    \b
    Examples:
      lrag-ray plan configs/table2.yaml --set durations_s=[30,60]
      lrag-ray plan configs/table2.yaml --gpus 6 --gpu H100 --price 2.5
      lrag-ray plan configs/table2.yaml --node-memory-gb 256 --gpu-memory-gb 80 --rollouts-per-node 6
      lrag-ray plan configs/table2.yaml --gpus 6 --from runs/one_prompt
      lrag-ray plan configs/encoder.yaml --gpu A100
    """
    from lrag_ray.config.load import load_job
    from lrag_ray.config.prompts import plan_prompts
    from lrag_ray.config.training import TrainEncoderConfig
    from lrag_ray.pipelines.history_choice import Machine
    from lrag_ray.pipelines.plan import make_plan
    from lrag_ray.pipelines.plan_training import plan_training
    from lrag_ray.pipelines.speeds import device_named, speeds_for
    from lrag_ray.wan.devices import DEVICES

    if gpu is not None and device_named(gpu) is None:
        known = ", ".join(device.name for device in DEVICES)
        raise UsageError(f"--gpu {gpu}: not a kind that plan knows. Fix: one of {known}")
    loaded = load_job(config, overrides or [])
    if isinstance(loaded, TrainEncoderConfig):
        rollouts_only = {
            "--node-memory-gb": node_memory_gb, "--gpu-memory-gb": gpu_memory_gb,
            "--rollouts-per-node": rollouts_per_node, "--cells": cells or None,
        }  # fmt: skip
        if given := [name for name, value in rollouts_only.items() if value is not None]:
            raise UsageError(f"{', '.join(given)}: these are about rollouts, and {config} trains. Fix: leave them out")
        if gpu is not None and speeds_of is not None:
            raise UsageError(f"--gpu {gpu}: the timings of a training do not tell its GPU. Fix: leave --gpu out")
        planned = plan_training(loaded, speeds_of)
        if as_json:
            print_json(planned)
        else:
            print_training_plan(console(), planned, gpus, device_named(gpu) if gpu else None, price)
        return
    machine = None
    if node_memory_gb is not None:
        share = min(1.0, loaded.engine.gpus_per_actor or 1.0)
        rollouts = rollouts_per_node or loaded.engine.least_actors
        machine = Machine(round(node_memory_gb * 1e9), round((gpu_memory_gb or 0) * share * 1e9), rollouts)
    elif gpu_memory_gb is not None or rollouts_per_node is not None:
        raise UsageError("--gpu-memory-gb and --rollouts-per-node need --node-memory-gb")
    made = make_plan(loaded, plan_prompts(loaded.prompts), speeds_for(loaded, speeds_of), machine)
    if as_json:
        print_json(made)
    else:
        print_plan(console(), made, gpus=gpus, gpu=gpu, price=price, cells=cells)


def print_plan(
    out: Console,
    plan: Plan,
    *,
    gpus: int | None = None,
    gpu: str | None = None,
    price: float | None = None,
    cells: bool = False,
) -> None:
    """Rollouts and work per method with their totals, hours and price, memory in one sentence, notes."""
    samples = f" x {plan.samples} samples" if plan.samples > 1 else ""
    asked = {"--gpus": gpus, "--gpu": gpu, "--price": price}
    given = [name for name, value in asked.items() if value is not None]
    on_cpus = bool(plan.speeds) and all(speed.device.startswith("cpu") for speed in plan.speeds)
    if given and on_cpus:
        raise UsageError(
            f"{', '.join(given)}: the timings of {plan.speeds[0].source} are of CPUs. Fix: leave it out, or give "
            "--from a run that was made on GPUs"
        )
    on_gpus = plan.on_gpus or bool(given)
    out.print(f"{plan.uri}: {counted(plan.prompts, 'prompt')}{samples}\n")
    backbones = table("Backbones", "name", "label", "parameters", "tokens/frame", "KV per latent frame", text_columns=2)
    for backbone in plan.backbones:
        backbones.add_row(
            backbone.name,
            backbone.label,
            quantity(backbone.parameters, ""),
            count(backbone.tokens_per_frame),
            quantity(backbone.kv_bytes_per_frame, "B"),
        )
    kinds = _kinds(plan, gpu) if on_gpus or plan.speeds else {}
    long = bool(kinds) and max(hours.total.most for hours in kinds.values()) >= _LEAST_GPU_HOURS
    list_cells = cells or len(plan.cells) <= _CELLS_SHOWN
    for each in [backbones, *([_cells(plan)] if list_cells else []), *_methods(plan, on_gpus=on_gpus)]:
        out.print(each)
        out.print()
    out.print(_work(plan, kinds if long else {}, "actor" if on_cpus else "GPU"))
    out.print()
    if not list_cells:
        durations = ", ".join(f"{seconds:g}" for seconds in dict.fromkeys(cell.duration_s for cell in plan.cells))
        methods = len({cell.method for cell in plan.cells})
        videos = [cell.videos for cell in plan.cells]
        made = f"{counted(videos[0], 'video')} each" if len(set(videos)) == 1 else f"{count(sum(videos))} videos in all"
        say(
            out,
            f"Cells: {counted(len(plan.backbones), 'backbone')} x {counted(methods, 'method')} x durations of "
            f"{durations} s = {len(plan.cells)}, {made} (--cells lists them).",
        )
    totals = plan.totals
    say(
        out,
        f"Stored: about {quantity(totals.latent_bytes, 'B')} of latents and {quantity(totals.video_bytes, 'B')} of "
        f"video ({counted(totals.video_frames, 'video frame')}).",
    )
    wall_clock = _wall_clock(kinds, plan, gpus, price)
    for line in (*_source(plan, kinds, long=long), *wall_clock, _memory(plan, kinds, on_gpus=on_gpus)):
        say(out, line)
    for note in plan.notes:
        say(out, f"Note: {note}")


def _cells(plan: Plan) -> Table:
    cells = table("Cells", "backbone", "method", "duration", "latent frames", "video frames", "videos", text_columns=2)
    for cell in plan.cells:
        cells.add_row(
            cell.backbone,
            cell.method,
            f"{cell.duration_s:g} s",
            count(cell.latent_frames),
            count(cell.video_frames),
            count(cell.videos),
        )
    return cells


def _methods(plan: Plan, *, on_gpus: bool) -> list[Table]:
    """Three tables: eleven columns fit on no common terminal. Columns in which every value would be 0 are left out."""
    both = ("backbone", "method")
    rollouts = table("Rollouts", *both, "rollouts", "latent frames", "passes", "stored", text_columns=2)
    work = table("Work of these rollouts", *both, "last block", "decoding it", "all passes", text_columns=2)
    kept = any(each.keeps_history for each in plan.methods)
    tiers = {
        "in host memory": [each.history_bytes for each in plan.methods],
        "on disk": [each.history_disk_bytes for each in plan.methods],
    }
    tiers = {name: values for name, values in tiers.items() if any(values)}
    columns = [*both, *(["history"] if kept else []), *tiers, "actor (GPU)" if on_gpus else "actor"]
    memory = table("Memory at the end of a rollout", *columns, text_columns=3 if kept else 2)
    for row, each in enumerate(plan.methods):
        names = (each.backbone, each.method)
        stored = quantity(each.latent_bytes + each.video_bytes, "B")
        rollouts.add_row(*names, count(each.rollouts), count(each.latent_frames), count(each.passes), stored)
        flops = (each.block_flops, each.block_decode_flops, each.transformer_flops)
        work.add_row(*names, *(quantity(value, "FLOP") for value in flops))
        held = [quantity(values[row], "B") if each.keeps_history else "–" for values in tiers.values()]
        history = [each.history if each.keeps_history else "none"] if kept else []
        memory.add_row(*names, *history, *held, quantity(each.gpu_bytes, "B"))
    totals = plan.totals
    stored = quantity(totals.latent_bytes + totals.video_bytes, "B")
    numbers = (count(totals.rollouts), count(totals.latent_frames), count(totals.passes))
    sums = ((rollouts, (*numbers, stored)), (work, ("", "", quantity(totals.transformer_flops, "FLOP"))))
    for made, values in sums:
        made.add_section()
        made.add_row("total", "", *values, style="bold")
    return [rollouts, work, memory]


def _work(plan: Plan, kinds: dict[str, GpuHours], worker: str) -> Table:
    """Operations by kind of work, and hours of one worker (GPU or actor) of these kinds.

    A kind is a row: beside one another they fit on no common terminal.
    """
    totals = plan.totals
    scored = ["VBench-Long, if run"] if totals.scoring_flops else []
    title = f"Work in all, and hours of one {worker}" if kinds else "Work in all"
    made = table(title, "", "generation", "decoding", "both", *scored)
    flops = [totals.transformer_flops, totals.decode_flops, totals.transformer_flops + totals.decode_flops]
    flops += [totals.scoring_flops] if scored else []
    made.add_row("operations", *(quantity(each, "FLOP") for each in flops))
    for name, hours in kinds.items():
        spans = [hours.generation, hours.decoding, hours.total, *([hours.scoring] if scored else [])]
        made.add_row(f"hours, {name}", *map(_span, spans))
    return made


def _kinds(plan: Plan, gpu: str | None) -> dict[str, GpuHours]:
    """Devices to speak of: the measured ones, or the one that was asked for, or the usual ones."""
    from lrag_ray.pipelines.speeds import device_named

    name = device_named(gpu) if gpu is not None else None
    if name is not None and name not in plan.gpu_hours:
        raise UsageError(
            f"--gpu {gpu}: the timings are of {', '.join(plan.gpu_hours)}. Fix: leave --gpu out, or give --from a run "
            f"that was made on {name}"
        )
    names = [name] if name is not None else list(plan.gpu_hours) if plan.speeds else GPUS_SHOWN
    return {name: plan.gpu_hours[name] for name in names}


def _span(hours: Hours | None) -> str:
    if hours is None:
        return "–"
    if hours.fewest < hours.most < _LEAST_SHOWN_HOURS:
        return f"under {_LEAST_SHOWN_HOURS:g}"
    low, high = (f"{value:,.0f}" if value >= 100 else f"{value:.2g}" for value in hours)
    return low if low == high else f"{low} to {high}"


def _source(plan: Plan, kinds: dict[str, GpuHours], *, long: bool) -> list[str]:
    """What the hours are from, or why there are none."""
    if not kinds:
        return [
            "Hours are not known: no run on such CPUs was measured. Run one prompt and give it with --from RUN, or ask "
            "for a GPU with --gpu KIND."
        ]
    if not plan.speeds:
        if not long:
            return [f"One GPU takes less than {_LEAST_GPU_HOURS:g} hours for all of it."]
        from lrag_ray.pipelines.speeds import GENERATION_SHARE, SCORING_SHARE

        generation, scoring = (
            f"{100 * low:.0f} to {100 * high:.0f} %" for low, high in (GENERATION_SHARE, SCORING_SHARE)
        )
        scores = f", {scoring} for scores" if plan.totals.scoring_flops else ""
        return [
            f"Hours are bounds, since nothing was measured: {generation} of the peak for generation and decoding"
            f"{scores} (docs/performance.md). Run one prompt and give it with --from RUN for hours of your "
            "own GPUs."
        ]
    found = [
        f"{quantity(speed.generation_flops_per_s, 'FLOP/s')} generating"
        + (f" and {quantity(speed.decoding_flops_per_s, 'FLOP/s')} decoding" if speed.decoding_flops_per_s else "")
        + f" on {speed.device} ({counted(speed.rollouts, 'rollout')} of {speed.source})"
        for speed in plan.speeds
    ]
    return [f"Hours are from measured timings: {'; '.join(found)}."]


def _wall_clock(kinds: dict[str, GpuHours], plan: Plan, gpus: int | None, price: float | None) -> list[str]:
    if gpus is None and price is None:
        return []
    lines = []
    for name, hours in kinds.items():
        total = hours.total
        parts = [f"{name}:"]
        if gpus is not None:
            wall = [max(whole / gpus, longest) * 3600 for whole, longest in zip(total, hours.longest, strict=True)]
            low, high = map(duration, wall)
            parts.append(f"{low if low == high else f'{low} to {high}'} on {counted(gpus, 'GPU')}")
            if total.most / gpus < hours.longest.most:
                parts.append("(the longest rollout alone takes that)")
        if price is not None:
            # What is paid for is time that GPUs are held, not time that they work.
            paid = [value / 3600 * gpus for value in wall] if gpus is not None else list(total)
            low, high = (f"{value * price:,.2f}" for value in paid)
            parts.append(f"for {low if low == high else f'{low} to {high}'} at {price:g} an hour")
        lines.append(f"{' '.join(parts)}{', without scores' if plan.totals.scoring_flops else ''}.")
    return lines


def _memory(plan: Plan, kinds: dict[str, GpuHours], *, on_gpus: bool) -> str:
    """What an actor needs of its GPU, which have it, and how large histories become, in one sentence."""
    from lrag_ray.pipelines.doctor import CUDA_CONTEXT_BYTES
    from lrag_ray.wan.devices import DEVICES

    largest = max(plan.methods, key=lambda each: each.gpu_bytes)
    longest = max(plan.methods, key=lambda each: each.history_bytes)
    needs = largest.gpu_bytes + CUDA_CONTEXT_BYTES
    memory = {device.name: device.memory_gb for device in DEVICES if device.name in kinds}
    fitting = [name for name, gb in memory.items() if gb >= needs / 1e9]
    small = [name for name in memory if name not in fitting]
    if on_gpus:
        said = f"Memory: an actor needs {quantity(needs, 'B')} of its GPU ({largest.backbone}/{largest.method})"
        if memory:
            said += f", which {listed(fitting) or 'none'} {'have' if len(fitting) > 1 else 'has'}"
            said += f" ({listed(small)} {'do' if len(small) > 1 else 'does'} not)" if small and fitting else ""
    else:
        said = (
            f"Memory: an actor needs {quantity(largest.gpu_bytes, 'B')} beside Python and its libraries "
            f"({largest.backbone}/{largest.method})"
        )
    if not longest.history_bytes:
        return f"{said}, and no history in host memory." if on_gpus else f"{said}."
    grows = quantity(longest.history_bytes, "B")
    return (
        f"{said}; a history grows to {grows} of host memory per rollout ({longest.backbone}/{longest.method}), which "
        "--node-memory-gb checks against a node."
    )
