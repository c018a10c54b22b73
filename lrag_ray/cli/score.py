"""``lrag-ray score``: scores of a run's videos, or of any others."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from lrag_ray.cli.options import AsJson, Overrides
from lrag_ray.cli.output import console, count, duration, first_of, print_json, tells_errors
from lrag_ray.printable import counted

if TYPE_CHECKING:
    from lrag_ray.pipelines.score import RunScores
    from lrag_ray.pipelines.score_videos import GroupResult, VideoScores
    from lrag_ray.scoring.measure import Measure
    from lrag_ray.scoring.suite import Suite
    from lrag_ray.store.rollouts import RolloutRun

_MOST_VIDEOS_SHOWN = 40
_LEAST_NAME = 12
_MEANS = {"Mean over clips (official)": "mean_over_clips", "Mean of the videos' means": "mean_of_video_means"}
"""Both global means, by field."""


def register(app: typer.Typer) -> None:
    """Add the command to the program."""
    # A glob that the shell expanded is answered with advice.
    app.command(context_settings={"allow_extra_args": True})(score)


@tells_errors
def score(
    context: typer.Context,
    target: Annotated[
        str, typer.Argument(metavar="RUN|VIDEOS", help="Address of a run; or a folder, file, glob or bucket of videos.")
    ],
    suite: Annotated[
        str | None, typer.Option("--suite", help="preview or world (runs only), vbench_long or module:Suite.")
    ] = None,
    mode: Annotated[
        str | None, typer.Option("--mode", help="direct, or compat: clips re-encoded as the official code does.")
    ] = None,
    weights: Annotated[
        str | None, typer.Option("--weights", metavar="DIR", help="Folder of the networks' files.")
    ] = None,
    dimensions: Annotated[str | None, typer.Option("--dimensions", metavar="A,B", help="Only these.")] = None,
    manifest: Annotated[
        str | None,
        typer.Option("--manifest", metavar="FILE", help="CSV or JSONL: path and what is known of each video."),
    ] = None,
    to: Annotated[
        str | None,
        typer.Option("--to", metavar="ADDRESS", help="Where the rows of videos go; scores-<suite> if absent."),
    ] = None,
    config: Annotated[
        str | None,
        typer.Option("--config", metavar="CONFIG", help="Of a run: use this file instead of its last configuration."),
    ] = None,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Score videos: those of a run, or any others, with VBench-Long, the preview suite or a suite of your own.

    A run is scored as its configuration says; options change that for this command. The rows are in the run, and its
    report is written again. Other videos are scored with vbench_long: all files of a folder that look like videos,
    whatever they are called. A manifest says what belongs together, so that methods can be ranked: its columns are
    path (relative to the folder), method, backbone, prompt, sample and duration_s, all but the first optional. The
    same command again continues. Exit code 1 if a video could not be scored.

    \b
    Examples:
      lrag-ray score runs/table2 --suite vbench_long --mode compat --set scoring.gpus_per_worker=1
      lrag-ray score videos/ --weights weights/vbench --manifest videos/manifest.csv
      lrag-ray score 'videos/**/*.mp4' --dimensions motion_smoothness,imaging_quality --to scores/mine
    """
    from lrag_ray.cli.progress import shown_progress
    from lrag_ray.config.load import load_config
    from lrag_ray.config.overrides import quoted
    from lrag_ray.config.videos import videos_config
    from lrag_ray.pipelines.score import is_run, score_run
    from lrag_ray.pipelines.score_videos import score_videos
    from lrag_ray.pipelines.stored_config import stored_config
    from lrag_ray.scoring.registry import suite_class
    from lrag_ray.store.rollouts import RolloutRun

    if context.args:
        raise typer.BadParameter(
            f"one address is wanted, {1 + len(context.args)} are given. A glob must be in quotes: '*.mp4'; files that "
            "no glob describes, in a manifest"
        )
    given = {
        "suite": suite,
        "mode": mode,
        "weights": weights,
        "dimensions": [name.strip() for name in dimensions.split(",")] if dimensions is not None else None,
    }
    chosen = [f"scoring.{key}={quoted(value)}" for key, value in given.items() if value is not None]
    chosen += overrides or []
    if not is_run(target):
        if config is not None:
            raise typer.BadParameter(f"--config belongs to a run, and {target} is none")
        videos = videos_config(chosen)
        with shown_progress() as listener:
            scores = score_videos(target, videos, manifest=manifest, to=to, listener=listener)
        if as_json:
            print_json(scores)
        else:
            print_video_scores(console(), scores, suite_class(videos.scoring.suite).of(videos.scoring))
        raise typer.Exit(scores.exit_code)
    if manifest is not None or to is not None:
        raise typer.BadParameter(f"--manifest and --to are for other videos, and {target} is a run")
    if config is None:
        loaded = stored_config(target, chosen)
    else:
        loaded = load_config(config, [*chosen, f"run.uri={quoted(target)}"])
    with shown_progress() as listener:
        outcome = score_run(loaded, listener=listener)
    if as_json:
        print_json(outcome)
    else:
        run = RolloutRun(loaded.run.uri, loaded.storage)
        print_run_scores(console(), run, outcome, suite_class(loaded.scoring.suite).of(loaded.scoring))
    raise typer.Exit(outcome.exit_code)


def print_run_scores(shown: Console, run: RolloutRun, outcome: RunScores, suite: Suite[Any]) -> None:
    """Rank tables, what this start did, what failed, and where everything is."""
    from lrag_ray.report.collect import collect
    from lrag_ray.report.tables import terminal_tables

    if outcome.report_folder:
        for ranks in terminal_tables(collect([run], suite)):
            shown.print(ranks)
            shown.print()
    shown.print(f"This start scored {counted(outcome.videos_scored, 'video')} in {duration(outcome.seconds)}.")
    _print_failed(shown, outcome.failed)
    for name in outcome.report_files:
        shown.print(f"{outcome.report_folder}/{name}", soft_wrap=True)


def print_video_scores(shown: Console, outcome: VideoScores, suite: Suite[Any]) -> None:
    """Per video where no manifest names several methods; both global means of every backbone and duration; what failed.

    Methods stand in columns and dimensions below one another, as in the rank tables of a run: a terminal of 80 columns
    holds them.
    """
    from lrag_ray.cli.tables import table
    from lrag_ray.report.tables import number

    measures = suite.measures
    title = suite.title + (", from 0 to 100" if all(measure.unit == "percent" for measure in measures) else "")
    if outcome.untrained:
        title += ", RANDOM WEIGHTS: the numbers mean nothing"

    def value(scores: Mapping[str, float], measure: Measure) -> str:
        return number(scores[measure.name], measure) if measure.name in scores else "-"

    if len(outcome.groups) == 1 and len(outcome.videos) <= _MOST_VIDEOS_SHOWN:
        # The first word identifies a dimension; the next table has their names in the same order.
        heads = [measure.title.partition(" ")[0] for measure in measures]
        made = table(f"{title}: mean over the clips of each video", "video", "clips", *heads)
        made.columns[0].min_width = _LEAST_NAME
        for video in outcome.videos:
            values = [value(video.scores, measure) for measure in measures]
            made.add_row(video.path, count(video.clips), *values)
        shown.print(made)
        shown.print()
    blocks: dict[str, list[GroupResult]] = {}
    for group in outcome.groups:
        blocks.setdefault(group.name, []).append(group)
    for label, groups in blocks.items():
        means = table(f"{title}: {label}", "", *(group.method or "score" for group in groups))
        for kind, which in _MEANS.items():
            means.add_row(kind)
            for measure in measures:
                cells = [value(getattr(group, which), measure) for group in groups]
                means.add_row(f"  {measure.title}", *cells)
        if any(group.average_rank is not None for group in groups):
            ranks = ["-" if group.average_rank is None else f"{group.average_rank:.2f}" for group in groups]
            prompts = max(group.prompts_ranked for group in groups)
            means.add_row(f"Average rank, over {counted(prompts, 'prompt')}", *ranks)
        means.add_row("Videos", *(count(group.videos) for group in groups))
        means.add_row("Clips", *(count(group.clips) for group in groups))
        shown.print(means)
        shown.print()
    for note in outcome.left_out:
        shown.print(note, soft_wrap=True)
    shown.print(f"This start scored {counted(outcome.videos_scored, 'video')} in {duration(outcome.seconds)}.")
    _print_failed(shown, outcome.failed)
    notes: dict[str, set[str]] = {}
    for video in outcome.videos:
        notes.setdefault(video.note, set()).add(video.path)
    for note, paths in notes.items():
        if note:
            shown.print(f"Note on {', '.join(sorted(paths))}: {note}", soft_wrap=True)
    shown.print(f"{outcome.to}/{outcome.csv}", soft_wrap=True)


def _print_failed(shown: Console, failed: Mapping[str, str]) -> None:
    if failed:
        shown.print(f"Without a score, or without all of them ({len(failed)}):")
        for line in first_of(f"{video}: {reason}" for video, reason in failed.items()):
            shown.print(f"  {line}", soft_wrap=True)
