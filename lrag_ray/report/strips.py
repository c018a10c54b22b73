"""Strips: frames at chosen seconds in columns, methods in rows; for the page and for paper.

Each strip is one small WebP image of one video, named by the video's digest, made once and used again by every later
report. Each video is read in one pass, through storage, those of a few prompts side by side.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lrag_ray.report.collect import ReportData, ShownRollout
from lrag_ray.report.tables import number
from lrag_ray.scoring.suite import FrameMark, FrameRow, Suite
from lrag_ray.store.address import Storage
from lrag_ray.store.local_copy import local_copy
from lrag_ray.store.scratch import scratch_folder
from lrag_ray.store.videos import CommittedVideo
from lrag_ray.thread_pool import thread_pool
from lrag_ray.video.decode import Frames
from lrag_ray.video.mp4 import VideoError, frames_at

if TYPE_CHECKING:
    from PIL.Image import Image

FOLDER = "strips"
COLUMNS = 7
_NAME = re.compile(rf"{FOLDER}/[0-9a-f]{{32}}\.webp")
"""What strips are called, so that nothing else in a folder is taken for one."""
_WIDTH = 288
"""Pixels of one frame in a strip."""
_GAP = 6
"""Pixels between frames, which the page shines through."""
_QUALITY = 82
_BAND = 34
"""Height of the marks below a strip, in pixels."""
_SIGNS: dict[bool | None, tuple[Sequence[Sequence[tuple[float, float]]], tuple[int, int, int, int]]] = {
    True: ([[(-0.3, 0.02), (-0.08, 0.25), (0.3, -0.28)]], (32, 150, 90, 255)),
    False: ([[(-0.22, -0.22), (0.22, 0.22)], [(-0.22, 0.22), (0.22, -0.22)]], (200, 75, 50, 255)),
    None: ([[(-0.18, 0.0), (0.18, 0.0)]], (140, 145, 150, 255)),
}
"""Lines of a tick, a cross and a dash, as shares of the band's height from its middle, and colours that can be seen on
light and on dark pages."""


@dataclass(frozen=True)
class Strip:
    """One row of a sheet."""

    method: str
    label: str
    """Of the row, where a method has several."""
    value: str
    """Score of the video that belongs to the row, with its measure; or ''."""
    path: str | None
    """Of the image, relative to the report's folder; None where there is none."""
    reason: str
    """Why there is none."""


@dataclass(frozen=True)
class StripSheet:
    """The strips of one prompt, sample and backbone."""

    backbone: str
    number: int
    """Of the prompt, from 1."""
    prompt: str
    sample: int
    seconds: Sequence[str]
    """Labels of the columns."""
    rows: Sequence[Strip]
    """One or more per method that is compared."""


def make_strips(data: ReportData, folder: Storage, prompts: int) -> list[StripSheet]:
    """Sheets of the first `prompts` prompts of each backbone, at its longest duration; prompts with more videos first.

    Images that `folder` has already are not made again. A video that cannot be read has its reason in its row.
    """
    if prompts < 1:
        return []
    present = set(folder.list_files(FOLDER))
    chosen = [
        (backbone, videos) for backbone in data.identity.backbones for videos in chosen_videos(data, backbone)[:prompts]
    ]
    with thread_pool(min(8, os.cpu_count() or 1), "strips") as pool:
        return list(pool.map(lambda each: _sheet(data, folder, present, *each), chosen))


def unused_strips(files: Iterable[str], shown: Collection[str | None]) -> set[str]:
    """Strips among the `files` of a report's folder that are not `shown`: those of an earlier report."""
    return {path for path in files if _NAME.fullmatch(path) and path not in shown}


def chosen_videos(data: ReportData, backbone: str) -> list[Mapping[str, tuple[ShownRollout, CommittedVideo]]]:
    """Videos of the longest duration by method, one mapping per prompt, those with most methods first."""
    longest = max(
        (shown.videos[-1].latent_frames for id_, shown in data.rollouts.items() if id_.backbone == backbone), default=0
    )
    by_unit: dict[tuple[str, int], dict[str, tuple[ShownRollout, CommittedVideo]]] = {}
    for rollout, shown in data.rollouts.items():
        video = next((video for video in shown.videos if video.latent_frames == longest), None)
        if rollout.backbone == backbone and video is not None:
            by_unit.setdefault((rollout.prompt_id, rollout.sample), {})[rollout.method] = (shown, video)
    one_per_prompt: dict[str, dict[str, tuple[ShownRollout, CommittedVideo]]] = {}
    for (prompt_id, _), methods in sorted(by_unit.items(), key=lambda item: item[0][1]):
        one_per_prompt.setdefault(prompt_id, methods)
    order = list(data.identity.prompts)
    ids = sorted(one_per_prompt, key=lambda prompt_id: (-len(one_per_prompt[prompt_id]), order.index(prompt_id)))
    return [one_per_prompt[prompt_id] for prompt_id in ids]


def _sheet(
    data: ReportData,
    folder: Storage,
    present: set[str],
    backbone: str,
    chosen: Mapping[str, tuple[ShownRollout, CommittedVideo]],
) -> StripSheet:
    _, video = next(iter(chosen.values()))
    prompt = data.identity.prompts[video.rollout.prompt_id]
    return StripSheet(
        backbone=backbone,
        number=prompt.index + 1,
        prompt=prompt.text,
        sample=video.rollout.sample,
        seconds=[f"{index / video.fps:.3g} s" for index in _rows(data.suite, video)[0].indices],
        rows=[
            strip
            for method in data.methods[backbone]
            for strip in (
                _strips(data, folder, present, backbone, method, *chosen[method])
                if method in chosen
                else [Strip(method, "", "", None, "no video yet")]
            )
        ],
    )


def _rows(suite: Suite[Any], video: CommittedVideo) -> Sequence[FrameRow]:
    """What the suite wants to be seen; else one row of frames in equal steps of the duration as the configuration names
    it, the last one in place of its end."""
    step_s = video.duration_s / (COLUMNS - 1)
    usual = [min(round(i * step_s * video.fps), video.frames - 1) for i in range(COLUMNS)]
    return suite.frame_rows(video.frames) or [FrameRow("", usual)]


def _strips(
    data: ReportData,
    folder: Storage,
    present: set[str],
    backbone: str,
    method: str,
    shown: ShownRollout,
    video: CommittedVideo,
) -> list[Strip]:
    suite, storage = data.suite, shown.run_dir.storage
    prompt = data.identity.prompts[video.rollout.prompt_id].text
    rows = _rows(suite, video)
    try:
        if not rows[0].label:
            return [Strip(method, "", "", make_strip(folder, present, storage, video, rows[0].indices), "")]
        # Frames of a suite's own rows touch, in full size.
        made_from = f"{video.video.sha256} {suite.folder} {prompt}"
        paths = [_path(f"{made_from} {row.label} {list(row.indices)}") for row in rows]
        if not present.issuperset(paths):
            marked = suite.marked_frames(video.frames)
            frames = _read(storage, video, {*marked, *(index for row in rows for index in row.indices)})
            marks = suite.frame_marks([frames[index] for index in marked], prompt)
            for row, path in zip(rows, paths, strict=True):
                folder.write(path, _image(frames, row.indices, None, 0, marks.get(row.label, ())))
        values = _values(data, backbone, method, video)
        return [
            Strip(method, row.label, values.get(row.measure, ""), path, "")
            for row, path in zip(rows, paths, strict=True)
        ]
    except VideoError as error:
        # The place on this machine means nothing to who reads the page.
        return [Strip(method, rows[0].label, "", None, str(error).replace(f"{storage.root}/", ""))]


def _values(data: ReportData, backbone: str, method: str, video: CommittedVideo) -> dict[str, str]:
    """Scores of the video by measure name, as a row says them; `backbone` and `method` as the report calls them."""
    of_video = (backbone, method, video.latent_frames, video.rollout.prompt_id, video.rollout.sample)
    for found in data.scores.videos:
        if (found.backbone, found.method, found.latent_frames, found.prompt_id, found.sample) == of_video:
            shown = [each for each in (*data.suite.measures, *data.suite.unranked) if each.name in found.values]
            return {each.name: f"{each.title} {number(found.values[each.name], each)}" for each in shown}
    return {}


def make_strip(
    folder: Storage, present: Collection[str], storage: Storage, video: CommittedVideo, indices: Sequence[int]
) -> str:
    """Path below `folder` of small frames of a video side by side, made unless it is `present`. Raises VideoError."""
    path = _path(f"{video.video.sha256} {list(indices)}")
    if path not in present:
        folder.write(path, _image(_read(storage, video, set(indices)), indices, _WIDTH, _GAP))
    return path


def _path(made_from: str) -> str:
    # Hashed: a stranger's record may hold anything in place of a digest.
    return f"{FOLDER}/{hashlib.sha256(f'{made_from} {_QUALITY} {_BAND}'.encode()).hexdigest()[:32]}.webp"


def _read(storage: Storage, video: CommittedVideo, indices: set[int]) -> dict[int, Frames]:
    """Frames of the video by index, read in one pass; a VideoError names its place in the run."""
    with scratch_folder() as scratch:
        local = local_copy(storage, video.video.path, video.video.sha256, scratch)
        try:
            return dict(zip(sorted(indices), frames_at(local, indices), strict=True))
        except VideoError as error:
            raise VideoError(str(error).replace(str(local), video.video.path)) from None


def _image(
    frames: Mapping[int, Frames],
    indices: Sequence[int],
    width: int | None,
    gap: int,
    marks: Sequence[FrameMark] = (),
) -> bytes:
    """The frames side by side as WebP, with `marks` below them in cells of equal width."""
    from PIL import Image as PilImage

    # A video of fewer frames than columns repeats some.
    pictures = {index: _thumbnail(frames[index], width) for index in set(indices)}
    columns, (each, height) = len(indices), pictures[indices[0]].size
    whole = columns * each + (columns - 1) * gap
    strip = PilImage.new("RGBA", (whole, height + (_BAND if marks else 0)))
    for column, index in enumerate(indices):
        strip.paste(pictures[index], (column * (each + gap), 0))
    if marks:
        strip.paste(_band(marks, whole), (0, height))
    content = io.BytesIO()
    strip.save(content, "WEBP", quality=_QUALITY)
    return content.getvalue()


def _band(marks: Sequence[FrameMark], width: int) -> Image:
    """What is read, with ticks, crosses and dashes, as a picture `width` by `_BAND` pixels."""
    from PIL import Image as PilImage
    from PIL import ImageDraw

    scale = 4  # Drawn large and made smaller, for smooth edges.
    band = PilImage.new("RGBA", (width * scale, _BAND * scale))
    draw = ImageDraw.Draw(band)
    for cell, mark in enumerate(marks):
        x, y = (cell + 0.5) * width / len(marks) * scale, _BAND / 2 * scale
        if mark.seen is not None:
            icon = _thumbnail(mark.seen, round(0.8 * _BAND * scale * mark.seen.shape[1] / mark.seen.shape[0]))
            alone = mark.right is None
            band.paste(icon, (round(x - (icon.width / 2 if alone else icon.width)), round(y - icon.height / 2)), icon)
            if alone:
                continue
            x += 0.4 * _BAND * scale
        lines, colour = _SIGNS[mark.right]
        for line in lines:
            at = [(x + dx * _BAND * scale, y + dy * _BAND * scale) for dx, dy in line]
            draw.line(at, fill=colour, width=round(_BAND * scale / 7), joint="curve")
    return band.resize((width, _BAND), PilImage.Resampling.LANCZOS)


def _thumbnail(frame: Frames, width: int | None) -> Image:
    """A frame `width` pixels wide, or as it is."""
    from PIL import Image as PilImage

    picture = PilImage.fromarray(frame)
    if width is None:
        return picture
    height = max(1, round(frame.shape[0] * width / frame.shape[1]))
    return picture.resize((width, height), PilImage.Resampling.LANCZOS)
