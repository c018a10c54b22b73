"""Strips: frames at chosen seconds in columns, methods in rows; for the page and for paper.

Each strip is one small WebP image of one video, named by the video's digest, made once and used again by every later
report. Videos are read one at a time and frame by frame, through storage.
"""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lrag_ray.report.collect import ReportData, ShownRollout
from lrag_ray.scoring.suite import FrameRow, Suite
from lrag_ray.store.address import Storage
from lrag_ray.store.local_copy import local_copy
from lrag_ray.store.scratch import scratch_folder
from lrag_ray.store.videos import CommittedVideo
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


@dataclass(frozen=True)
class Strip:
    """One row of a sheet."""

    method: str
    label: str
    """Of the row, where a method has several."""
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
    return [
        _sheet(data, folder, present, backbone, chosen)
        for backbone in data.identity.backbones
        for chosen in _chosen(data, backbone)[:prompts]
    ]


def unused_strips(files: Iterable[str], sheets: Sequence[StripSheet]) -> set[str]:
    """Strips among the `files` of a report's folder that none of `sheets` shows: those of an earlier report."""
    shown = {row.path for sheet in sheets for row in sheet.rows}
    return {path for path in files if _NAME.fullmatch(path) and path not in shown}


def _chosen(data: ReportData, backbone: str) -> list[Mapping[str, tuple[ShownRollout, CommittedVideo]]]:
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
                _strips(data.suite, folder, present, method, *chosen[method])
                if method in chosen
                else [Strip(method, "", None, "no video yet")]
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
    suite: Suite[Any], folder: Storage, present: set[str], method: str, shown: ShownRollout, video: CommittedVideo
) -> list[Strip]:
    rows = _rows(suite, video)
    # Frames of a suite's own rows touch, in full size.
    width, gap = (None, 0) if rows[0].label else (_WIDTH, _GAP)
    strips = []
    for row in rows:
        # Hashed once more: a stranger's record may hold anything in place of a digest.
        made_from = f"{video.video.sha256} {list(row.indices)} {width} {gap} {_QUALITY}"
        path = f"{FOLDER}/{hashlib.sha256(made_from.encode()).hexdigest()[:32]}.webp"
        if path not in present:
            try:
                folder.write(path, _image(shown.run_dir.storage, video, row.indices, width, gap))
            except VideoError as error:
                # The place on this machine means nothing to who reads the page.
                reason = str(error).replace(f"{shown.run_dir.storage.root}/", "")
                return [Strip(method, row.label, None, reason)]
        strips.append(Strip(method, row.label, path, ""))
    return strips


def _image(storage: Storage, video: CommittedVideo, indices: Sequence[int], width: int | None, gap: int) -> bytes:
    """The frames side by side as WebP."""
    from PIL import Image as PilImage

    with scratch_folder() as scratch:
        local = local_copy(storage, video.video.path, video.video.sha256, scratch)
        try:
            pictures = [_thumbnail(frame, width) for frame in frames_at(local, indices)]
        except VideoError as error:
            raise VideoError(str(error).replace(str(local), video.video.path)) from None
    # A video of fewer frames than columns repeats some.
    distinct = sorted(set(indices))
    columns, (each, height) = len(indices), pictures[0].size
    strip = PilImage.new("RGBA", (columns * each + (columns - 1) * gap, height))
    for column, index in enumerate(indices):
        strip.paste(pictures[distinct.index(index)], (column * (each + gap), 0))
    content = io.BytesIO()
    strip.save(content, "WEBP", quality=_QUALITY)
    return content.getvalue()


def _thumbnail(frame: Frames, width: int | None) -> Image:
    """A frame `width` pixels wide, or as it is."""
    from PIL import Image as PilImage

    picture = PilImage.fromarray(frame)
    if width is None:
        return picture
    height = max(1, round(frame.shape[0] * width / frame.shape[1]))
    return picture.resize((width, height), PilImage.Resampling.LANCZOS)
