"""Golden vectors of the parts of VBench-Long: clip split, recipe of the weights, mapping tables, network outputs.

Outputs are compared for the first frame (or pair) of each video's first clip: the scores cover the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import ParamSpec

import torch
from torch import Tensor

from lrag_ray.conformance.case import Bound, GoldenCase, Sheet
from lrag_ray.conformance.files import CaseRecord, Folder, Vectors
from lrag_ray.conformance.vbench_frames import (
    clips_of,
    first_frames,
    golden_clips,
    missing_files,
    networks,
    recipe,
    recognises,
    source_of,
    videos_of,
)
from lrag_ray.scoring.vbench_long import (
    aesthetic_quality,
    background_consistency,
    motion_smoothness,
    subject_consistency,
)
from lrag_ray.scoring.vbench_long.clips import Frame, clip_length, spans
from lrag_ray.scoring.vbench_long.dynamic_degree import sampling_interval
from lrag_ray.scoring.vbench_long.frames import decode, probe
from lrag_ray.scoring.vbench_long.networks import Networks
from lrag_ray.scoring.vbench_long.official import NETWORKS, NetworkName
from lrag_ray.scoring.vbench_long.preprocess import ClipFrames, pad_to_multiple
from lrag_ray.scoring.vbench_long.raft import STRIDE
from lrag_ray.scoring.vbench_long.slow_fast import CLIP_TO_CLIP_WEIGHT, IN_CLIP_WEIGHT, MAPPING, map_score

P = ParamSpec("P")

FEATURE = Bound(absolute=1e-4, relative=1e-4)
"""Features are of the order of one."""
FLOW = Bound(absolute=1e-3)
"""Pixels."""
LEVEL = Bound(absolute=1.0)
"""Predicted frames are truncated to whole grey levels."""
EXACT = Bound(absolute=1e-12)

_IN_CLIP: Mapping[str, Callable[[ClipFrames, Networks], Tensor]] = {
    "dino_vitb16": subject_consistency.features,
    "clip_b32": background_consistency.features,
    "clip_l14": aesthetic_quality.features,
}
_SLOW: Mapping[str, tuple[str, Callable[[Tensor, Networks], Tensor]]] = {
    "dinov2_vitb14": ("subject", subject_consistency.slow_features),
    "dreamsim": ("background", background_consistency.slow_features),
}


def cases(folder: Folder) -> list[GoldenCase]:
    """One case per part and file."""
    found = [
        GoldenCase(f"{record.path.stem} split", partial(_check_split, record))
        for record in folder.records
        if recognises(record)
    ]
    for file in folder.vectors:
        record = folder.record(file.path.with_name(file.path.stem.replace("features", "golden", 1) + ".json"))
        if record is not None and recognises(record):
            check = partial(_check_outputs, file, record)
            found.append(GoldenCase(file.path.stem, check))
    found += [
        GoldenCase(record.path.stem, partial(_check_tables, record))
        for record in folder.records
        if record.holds("slow_fast", "mapping_table")
    ]
    # Last, when most of the networks are there.
    found += [
        GoldenCase(record.path.stem, partial(_check_weights, record)) for record in folder.records if _is_recipe(record)
    ]
    return found


def _check_split(record: CaseRecord, sheet: Sheet) -> None:
    for video in videos_of(record):
        path = source_of(record, video)
        if not path.is_file():
            sheet.add(video, "skip", f"{path.name} is not among the videos")
            continue
        fps, shapes = probe(path).fps, [frame.shape for frame in decode(path)]
        height, width, _ = shapes[0]
        split = spans(len(shapes), clip_length(fps))
        ours = [(span.frame_count, int(fps), [width, height]) for span in split]
        about = [record.content["clips"][clip] for clip in clips_of(record, video)]
        sheet.same(f"{video} clips", ours, [(clip["frames"], clip["fps"], clip["size"]) for clip in about])


def _check_outputs(file: Vectors, record: CaseRecord, sheet: Sheet) -> None:
    if missing := missing_files(record):
        sheet.add("frames", "skip", missing)
        return
    pairs: dict[str, dict[str, tuple[Tensor, Tensor, Bound]]] = {}
    for video in videos_of(record):
        clip = next(golden_clips(record, video))
        for network, features in _IN_CLIP.items():
            if (key := f"{network}/{clip.name}") in file:
                ours = _run(features, _frames(clip.frames[:1], clip.fps), networks())
                pairs.setdefault(network, {})[key] = (ours, file[key][:1], FEATURE)
        if (key := f"raft_flow_pair0/{clip.name}") in file:
            pairs.setdefault("raft_flow", {})[key] = (_run(_flow, clip.frames, clip.fps), file[key], FLOW)
        if (key := f"amt_img/{clip.name}") in file:
            ours = _run(_middle, clip.frames, clip.fps)
            pairs.setdefault("amt", {})[key] = (ours, file[key], LEVEL)
        for network, (kind, slow) in _SLOW.items():
            key = f"{network}/{video}"
            frames = first_frames(record, video, kind) if key in file else None
            if frames:
                ours = _run(slow, _frames(frames[:1], clip.fps).uint8, networks())
                pairs.setdefault(network, {})[key] = (ours, file[key][:1], FEATURE)
    for network, compared in pairs.items():
        sheet.close_all(network, compared)


def _frames(frames: list[Frame], fps: int) -> ClipFrames:
    return ClipFrames(frames, fps, networks().device)


def _run(compute: Callable[P, Tensor], *args: P.args, **kwargs: P.kwargs) -> Tensor:
    with networks().numerics():
        return compute(*args, **kwargs).float().cpu().clone()


def _flow(frames: list[Frame], fps: int) -> Tensor:
    """Of the first pair of sampled frames."""
    step = sampling_interval(fps)
    padded, _ = pad_to_multiple(_frames([frames[0], frames[step]], fps).uint8.float(), STRIDE)
    return next(networks().raft.flows(padded, 1))


def _middle(frames: list[Frame], fps: int) -> Tensor:
    """The first frame and the predicted second, [2, H, W, 3]."""
    given = _frames(frames[:3], fps)
    predicted = motion_smoothness.middle_frames(given, networks())
    return torch.cat([given.uint8[:1], predicted]).permute(0, 2, 3, 1)


def _check_tables(record: CaseRecord, sheet: Sheet) -> None:
    for name, table in record.content["mapping_table"].items():
        sheet.same(f"{name} table", list(MAPPING.get(name, ())), table["y_mapped"])
        ours = torch.tensor([map_score(name, x) for x in table["x_clip2clip"]], dtype=torch.float64)
        sheet.close(f"{name} at its steps", ours, torch.tensor(table["y_mapped"], dtype=torch.float64), EXACT)
        weights = record.content["slow_fast"][name]
        sheet.same(
            f"{name} weights", (IN_CLIP_WEIGHT, CLIP_TO_CLIP_WEIGHT), (weights["w_inclip"], weights["w_clip2clip"])
        )


def _is_recipe(record: CaseRecord) -> bool:
    content = record.content
    return isinstance(content, dict) and bool(content) and content.keys() <= set(NETWORKS)


def _check_weights(record: CaseRecord, sheet: Sheet) -> None:
    for network, tensors in record.content.items():
        name: NetworkName = network
        if name not in recipe().checksums:
            networks().build(name)
        ours = recipe().checksums[name]
        sheet.same(f"{name} tensors", ours, {key: tensors[key]["crc32"] for key in tensors if key in ours})
        floating = {key for key in tensors if not key.endswith("num_batches_tracked")}
        sheet.same(f"{name} names", sorted(ours), sorted(floating))
