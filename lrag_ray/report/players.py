"""The videos of the page: rows of players side by side, with addresses relative to the page."""

from __future__ import annotations

import math
import posixpath
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from urllib.parse import quote

import pyarrow.compute as pc

from lrag_ray.context.trace import ALL_LAYERS, TraceRow
from lrag_ray.report.collect import ReportData, ShownRollout
from lrag_ray.report.trace_svg import TraceFigure, trace_figure
from lrag_ray.scoring.measure import Measure
from lrag_ray.store.address import Storage
from lrag_ray.store.parts import BrokenPartError, read_trace_table
from lrag_ray.store.records import HOW_TO_REPAIR, RolloutId

MAPS = 12
"""Prompts per backbone whose attention maps are drawn: they are what makes a page large and slow to write."""


@dataclass(frozen=True)
class Score:
    """One value of one video."""

    measure: Measure
    value: float


@dataclass(frozen=True)
class Player:
    """One rollout's videos in a prompt's row."""

    method: str
    sources: Mapping[str, str]
    """Relative address by latent frames."""
    seconds: Mapping[str, float]
    """Where playing stops, by latent frames: a file may be longer than its duration."""
    missing: str
    """Why nothing can be played here, or ''."""
    figure: TraceFigure | None
    damage: str = ""
    """Why there is no figure although there is a trace, or ''."""
    scores: Mapping[str, Sequence[Score]] = field(default_factory=dict)
    """Values of each of its videos that has any, by latent frames."""
    frame_s: float = 0.0
    """Seconds of a latent frame."""
    remarks: Sequence[str] = ()
    """What judges wrote of it."""


@dataclass(frozen=True)
class Row:
    """The videos of one prompt, sample and backbone side by side."""

    anchor: str
    prompt: str
    original: str
    """The prompt before it was refined, or ''."""
    prompt_id: str
    number: int
    """Of the prompt, from 1."""
    columns: Mapping[str, str]
    """The other columns of the prompt table."""
    sample: int
    backbone: str
    players: Sequence[Player]
    """One per method that is compared."""


Link = Callable[[Storage, str], str | None]
"""URL of a video (its storage, its path there) for a page, or None where the page cannot reach it."""


def relative_address(page_folder: Storage, storage: Storage, path: str) -> str | None:
    """URL of `path` in `storage` from a page in `page_folder`; None where the two have no common root."""
    target, start = storage.full(path), page_folder.root
    if page_folder.is_local != storage.is_local:
        return None
    if not storage.is_local:
        same_service = type(page_folder.fs) is type(storage.fs)
        if not same_service or target.split("/")[0] != start.split("/")[0]:
            return None
    return quote(posixpath.relpath(target, start))


def rows(data: ReportData, link: Link) -> Iterator[Row]:
    """Rows in prompt-major order; traces are read row by row, so that only one row's are in memory."""
    with_maps = _with_maps(data)
    scores = _scores(data)
    for prompt_id, sample, backbone in dict.fromkeys((r.prompt_id, r.sample, r.backbone) for r in data.rollouts):
        named = {
            method: RolloutId(backbone=backbone, method=method, prompt_id=prompt_id, sample=sample)
            for method in data.methods[backbone]
        }
        shown = {method: data.rollouts.get(rollout) for method, rollout in named.items()}
        prompt, maps = data.identity.prompts[prompt_id], (backbone, prompt_id) in with_maps
        yield Row(
            anchor=f"{backbone}-{prompt_id}-{sample}",
            prompt=prompt.text,
            original=prompt.original,
            prompt_id=prompt_id,
            number=prompt.index + 1,
            columns=data.prompt_columns[prompt_id],
            sample=sample,
            backbone=backbone,
            players=[
                replace(
                    _player(method, rollout, link, maps, scores.get((backbone, method, prompt_id, sample), {})),
                    remarks=_remarks(data, named[method].path, rollout),
                )
                for method, rollout in shown.items()
            ],
        )


def _remarks(data: ReportData, path: str, shown: ShownRollout | None) -> list[str]:
    """Of every duration, with its length where there are several."""
    found = []
    for video in shown.videos if shown is not None else ():
        for each in data.judged:
            remarks = each.scores.remarks.get((path, video.latent_frames), ())
            found += [f"{video.duration_s:g} s, {remark}" for remark in remarks]
    return found


def _with_maps(data: ReportData) -> set[tuple[str, str]]:
    """The first `MAPS` prompts of each backbone that have videos."""
    found = dict.fromkeys((rollout.backbone, rollout.prompt_id) for rollout in data.rollouts)
    return {pair for backbone in data.methods for pair in [each for each in found if each[0] == backbone][:MAPS]}


def _scores(data: ReportData) -> dict[tuple[str, str, str, int], dict[str, list[Score]]]:
    """By backbone, method, prompt and sample, then by latent frames."""
    found: dict[tuple[str, str, str, int], dict[str, list[Score]]] = {}
    for video in data.scores.videos:
        values = [
            Score(measure, value)
            for measure in data.suite.measures
            if math.isfinite(value := video.values.get(measure.name, math.nan))
        ]
        if values:
            key = video.backbone, video.method, video.prompt_id, video.sample
            found.setdefault(key, {})[str(video.latent_frames)] = values
    return found


def _player(
    method: str, shown: ShownRollout | None, link: Link, maps: bool, scores: Mapping[str, Sequence[Score]]
) -> Player:
    if shown is None:
        return Player(method, {}, {}, "no video yet", None)
    storage = shown.run_dir.storage
    figure, damage = None, ""
    try:
        if maps and (trace := rollout_trace(shown)):
            figure = trace_figure(trace)
    except BrokenPartError as error:
        damage = f"no attention map: {error}. {HOW_TO_REPAIR}"
    addresses = {str(video.latent_frames): link(storage, video.video.path) for video in shown.videos}
    sources = {frames: address for frames, address in addresses.items() if address is not None}
    return Player(
        method=method,
        sources=sources,
        seconds={str(video.latent_frames): video.frames / video.fps for video in shown.videos},
        missing="" if sources else f"at {storage.uri}/{shown.videos[-1].video.path}, out of this page's reach",
        figure=figure,
        damage=damage,
        scores=scores,
        frame_s=shown.videos[-1].duration_s / shown.videos[-1].latent_frames,
    )


def rollout_trace(shown: ShownRollout) -> list[TraceRow]:
    """Trace up to the longest committed duration, layers and heads added up; BrokenPartError where a part is damaged.

    A method that chooses per layer has millions of rows, and the map shows the mean over layers and heads: shares of a
    frame's tokens stay what they are where all tokens are added up alike.
    """
    rows = read_trace_table(shown.run_dir.storage, shown.videos[-1].commit.trace_parts)
    in_all_layers = pc.equal(rows["layer"], ALL_LAYERS)
    layers = pc.count_distinct(rows["layer"].filter(pc.invert(in_all_layers))).as_py()
    heads = pc.list_value_length(rows["heads"])
    most = 1 + max(pc.max(pc.list_flatten(rows["heads"])).as_py() or 0, 0)
    times = pc.multiply(pc.if_else(in_all_layers, max(1, layers), 1), pc.fill_null(heads, most))
    rows = rows.set_column(rows.schema.get_field_index("tokens"), "tokens", pc.multiply(rows["tokens"], times))
    grouped = rows.group_by(["block", "kind", "frame"], use_threads=False)
    summed = grouped.aggregate([("temporal_index", "min"), ("tokens", "sum"), ("similarity", "max")])
    return [
        TraceRow(
            block=row["block"],
            layer=ALL_LAYERS,
            kind=row["kind"],
            frame=row["frame"],
            temporal_index=row["temporal_index_min"],
            tokens=row["tokens_sum"],
            similarity=row["similarity_max"],
        )
        for row in summed.to_pylist()
    ]
