"""What a configuration comes to, before anything runs: cells, rollouts, arithmetic, bytes.

Arithmetic, except that the tokenizer is read to find prompts that are cut off.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import NamedTuple

from lrag_ray.chat.store import Spent
from lrag_ray.config.histories import HistoryPlaces, history_places, stored_frame_bytes
from lrag_ray.config.horizons import LATENT_FRAMES_PER_SECOND, latent_frames
from lrag_ray.config.methods import Method, resolve_method
from lrag_ray.config.presets import CHECKPOINT_LOOPS, CHECKPOINT_NOTES, LOOP_NOTES
from lrag_ray.config.prompts import WHERE_TO_GET, Prompt, duplicate_warnings, listed, sample_notes
from lrag_ray.config.refine import RefineSection, described
from lrag_ray.config.schema import BackboneConfig, RunConfig
from lrag_ray.pipelines.history_choice import HistoryNeed, Machine, check_machine
from lrag_ray.pipelines.speeds import (
    GENERATION_SHARE,
    SCORING_SHARE,
    VAE_SIZES,
    Speed,
    device_named,
    flops_per_block,
)
from lrag_ray.pipelines.text_cuts import cut_notes
from lrag_ray.printable import counted
from lrag_ray.retrieval.bank_types import BankType
from lrag_ray.rollout.loops import loop_of, nests
from lrag_ray.scoring.flops import vbench_flops
from lrag_ray.scoring.registry import suite_of
from lrag_ray.stages.refinement import read_template
from lrag_ray.wan.devices import DEVICES, Device, gpu_hours
from lrag_ray.wan.flops import decode_flops, rollout_memory, setup_flops
from lrag_ray.wan.vae import video_frames
from lrag_ray.world.scenes import HELD_OUT, setting_of

VIDEO_BITS_PER_PIXEL = 0.2
"""Rough size of H.264 at the default quality; sharp or noisy videos take several times as much."""

_BYTES = {"bfloat16": 2, "float32": 4}


@dataclass(frozen=True)
class Cell:
    """Backbone x method x duration: one row of the result tables."""

    backbone: str
    method: str
    duration_s: float
    latent_frames: int
    video_frames: int
    videos: int
    """Rollouts that get one."""


@dataclass(frozen=True)
class BackbonePlan:
    """A generator in numbers."""

    name: str
    label: str
    parameters: int
    """Of the transformer."""
    tokens_per_frame: int
    kv_bytes_per_frame: int
    """K and V of a latent frame over all layers."""


@dataclass(frozen=True)
class MethodPlan:
    """All rollouts of one method on one backbone."""

    backbone: str
    method: str
    horizons: tuple[int, ...]
    """Latent frames at which results are committed."""
    nested: bool
    """One rollout to the longest horizon serves the shorter ones; otherwise each horizon is a rollout of its own."""
    rollouts: int
    latent_frames: int
    passes: int
    """Transformer passes; one makes `engine.prompts_per_pass` rollouts go on."""
    block_flops: int
    """Operations of the last block of the longest rollout, or of the last full window where several blocks are denoised
    together: the most expensive one."""
    block_decode_flops: int
    """Operations to decode a block; 0 where videos are off."""
    transformer_flops: int
    """Operations of all passes, in rows that repeat a rollout too; a multiply-add counts as two."""
    decode_flops: int
    """Operations to decode the latents; 0 where videos are off."""
    longest_flops: int
    """Operations of the passes of the longest rollout, with those beside it, which one worker makes."""
    longest_decode_flops: int
    """The same for decoding them."""
    scoring_flops: int
    """Operations of VBench-Long on all videos; 0 where videos are off, and for a corpus, which is not scored."""
    video_frames: int
    """Frames of all stored videos."""
    latent_bytes: int
    """Stored latents, with what else a rollout is resumed from."""
    video_bytes: int
    """Stored videos, roughly."""
    history: BankType
    """How the history is stored."""
    history_bytes: int
    """Host memory of one rollout's history at its end."""
    history_disk_bytes: int
    """Local disk of the same; what is in GPU memory is part of `gpu_bytes`."""
    gpu_bytes: int
    """GPU memory of one rollout actor, without the CUDA context; on CPUs the same in host memory. With all rows of a
    pass (`engine.prompts_per_pass`), unlike the histories above."""
    keeps_history: bool
    """Whether there is a history at the end of the longest rollout."""


@dataclass(frozen=True)
class Totals:
    """Sums over the whole plan."""

    cells: int
    rollouts: int
    latent_frames: int
    passes: int
    transformer_flops: int
    decode_flops: int
    scoring_flops: int
    video_frames: int
    latent_bytes: int
    video_bytes: int


class Hours(NamedTuple):
    """Bounds; equal where the speed was measured."""

    fewest: float
    most: float


@dataclass(frozen=True)
class GpuHours:
    """Hours of one GPU."""

    generation: Hours
    decoding: Hours
    scoring: Hours | None
    """Of VBench-Long, if it is run: bounds, since commits have no timings of it; None for a device of unknown peak."""
    longest: Hours
    """Of the longest rollout, its decoding included: no number of GPUs makes the run shorter."""

    @property
    def total(self) -> Hours:
        """Generation and decoding."""
        return Hours(self.generation.fewest + self.decoding.fewest, self.generation.most + self.decoding.most)


@dataclass(frozen=True)
class Plan:
    """What would run from nothing; what storage already holds is not subtracted."""

    uri: str
    prompts: int
    samples: int
    on_gpus: bool
    """Whether actors use GPUs (`engine.gpus_per_actor`)."""
    backbones: tuple[BackbonePlan, ...]
    methods: tuple[MethodPlan, ...]
    cells: tuple[Cell, ...]
    totals: Totals
    gpu_hours: dict[str, GpuHours]
    """By kind of GPU; of the measured devices alone where speeds are known."""
    speeds: tuple[Speed, ...]
    """What the hours are from; empty where they are bounds from `GENERATION_SHARE` of the peak."""
    notes: tuple[str, ...]
    """What a person should know: roundings, duplicates, settings with side effects."""


def make_plan(
    config: RunConfig, prompts: Sequence[Prompt], speeds: Sequence[Speed] = (), machine: Machine | None = None
) -> Plan:
    """Plan of a loaded configuration for these prompts; `speeds` as measured turn operations into hours.

    With `machine`, what the notes say of histories is about such a node; ConfigError for those that do not fit on it.
    """
    videos = len(prompts) * config.prompts.samples
    methods: list[MethodPlan] = []
    cells: list[Cell] = []
    pairs = len(config.backbones) * len(config.methods)
    decoded = config.decoded(videos * pairs)
    for backbone_name, backbone in config.backbones.items():
        n = backbone.sampler.frames_per_block
        frames_of = {duration_s: latent_frames(duration_s, n) for duration_s in config.durations_s}
        for method_name, section in config.methods.items():
            method = resolve_method(section)
            horizons = tuple(sorted(set(frames_of.values())))
            # The decoded rollouts are the first ones, prompt by prompt.
            own = len(range(len(methods), decoded, pairs))
            methods.append(_method_plan(config, backbone_name, method_name, method, horizons, videos, own))
            cells += [
                Cell(
                    backbone_name,
                    method_name,
                    duration_s,
                    frames,
                    video_frames(frames, config.video.cold_chunk),
                    own,
                )
                for duration_s, frames in frames_of.items()
            ]
    totals = Totals(
        cells=len(cells),
        rollouts=sum(each.rollouts for each in methods),
        latent_frames=sum(each.latent_frames for each in methods),
        passes=sum(each.passes for each in methods),
        transformer_flops=sum(each.transformer_flops for each in methods),
        decode_flops=sum(each.decode_flops for each in methods),
        scoring_flops=sum(each.scoring_flops for each in methods),
        video_frames=sum(each.video_frames for each in methods),
        latent_bytes=sum(each.latent_bytes for each in methods),
        video_bytes=sum(each.video_bytes for each in methods),
    )
    return Plan(
        uri=config.run.uri,
        prompts=len(prompts),
        samples=config.prompts.samples,
        on_gpus=config.engine.gpus_per_actor > 0,
        backbones=tuple(_backbone_plan(name, backbone) for name, backbone in config.backbones.items()),
        methods=tuple(methods),
        cells=tuple(cells),
        totals=totals,
        gpu_hours=_gpu_hours(totals, methods, speeds),
        speeds=tuple(speeds),
        notes=tuple(dict.fromkeys([*_notes(config, prompts), *_history_notes(config, methods, machine)])),
    )


def _gpu_hours(totals: Totals, methods: Sequence[MethodPlan], speeds: Sequence[Speed]) -> dict[str, GpuHours]:
    longest = max(methods, key=lambda each: each.longest_flops + each.longest_decode_flops)

    def hours(generation: Bounds, decoding: Bounds, scoring: Bounds | None) -> GpuHours:
        decoding_longest = decoding(longest.longest_decode_flops)
        generating_longest = generation(longest.longest_flops)
        return GpuHours(
            generation=generation(totals.transformer_flops),
            decoding=decoding(totals.decode_flops),
            scoring=scoring(totals.scoring_flops) if scoring else None,
            longest=Hours(*(a + b for a, b in zip(generating_longest, decoding_longest, strict=True))),
        )

    def of_peak(device: Device, shares: tuple[float, float]) -> Bounds:
        return lambda flops: Hours(*(gpu_hours(flops, device, share) for share in reversed(shares)))

    def at(flops_per_s: float) -> Bounds:
        return lambda flops: Hours(*[flops / flops_per_s / 3600] * 2)

    known = {device.name: device for device in DEVICES}
    if not speeds:
        return {
            name: hours(
                of_peak(device, GENERATION_SHARE), of_peak(device, GENERATION_SHARE), of_peak(device, SCORING_SHARE)
            )
            for name, device in known.items()
        }
    found: dict[str, GpuHours] = {}
    for speed in speeds:
        name = device_named(speed.device)
        scoring = of_peak(known[name], SCORING_SHARE) if name else None
        # Where nothing was decoded, decoding is taken to be as fast as generation.
        decoding = speed.decoding_flops_per_s or speed.generation_flops_per_s
        found.setdefault(name or speed.device, hours(at(speed.generation_flops_per_s), at(decoding), scoring))
    return found


Bounds = Callable[[float], Hours]
"""From operations to hours of one GPU."""


def history_bytes(config: RunConfig, backbone: BackboneConfig, method: Method, total_frames: int) -> int:
    """Host memory of the history of one rollout of `total_frames` latent frames at its end."""
    return _places(config, backbone, method, total_frames).host


def _places(config: RunConfig, backbone: BackboneConfig, method: Method, total_frames: int) -> HistoryPlaces:
    engine = config.engine
    return history_places(backbone, method, total_frames, engine.bank, on_gpu=engine.gpus_per_actor > 0)


def _kv_bytes_per_frame(backbone: BackboneConfig) -> int:
    latent = backbone.latent
    return backbone.transformer.kv_bytes_per_frame(latent.height, latent.width, _BYTES[backbone.dtype])


def _backbone_plan(name: str, backbone: BackboneConfig) -> BackbonePlan:
    sizes, latent = backbone.transformer, backbone.latent
    return BackbonePlan(
        name=name,
        label=backbone.label,
        parameters=sizes.parameter_count(),
        tokens_per_frame=sizes.tokens_per_frame(latent.height, latent.width),
        kv_bytes_per_frame=_kv_bytes_per_frame(backbone),
    )


def _method_plan(
    config: RunConfig,
    backbone_name: str,
    method_name: str,
    method: Method,
    horizons: tuple[int, ...],
    videos: int,
    decoded: int,
) -> MethodPlan:
    backbone = config.backbones[backbone_name]
    sizes, sampler, latent = backbone.transformer, backbone.sampler, backbone.latent
    policy, settings = method.policy, method.settings
    places = _places(config, backbone, method, horizons[-1])
    stored_frame = stored_frame_bytes(backbone, method.history)
    n, longest = sampler.frames_per_block, horizons[-1]
    value_bytes = _BYTES[backbone.dtype]
    of_kind = VAE_SIZES[backbone.vae.kind]
    vae = of_kind if decoded else None
    nested = nests(policy) and not config.independent_durations
    runs = (longest,) if nested else horizons

    loop = loop_of(policy)
    per_pass = min(longest, loop.frames_per_pass(sampler))
    per_block = partial(flops_per_block, sizes, sampler, latent.height, latent.width, method)
    once = setup_flops(sizes, sampler)
    generated = videos * sum(runs)
    stored = generated + videos * sum(loop.carried_frames(sampler, frames // n) for frames in runs)
    frame_decode_flops = decode_flops(vae, latent.height, latent.width) if vae else 0
    lengths = [video_frames(frames, config.video.cold_chunk) for frames in horizons] if vae else []
    # Nested durations share their clips.
    scored = [lengths] if nested else [[length] for length in lengths]
    shown = decoded * sum(lengths)
    height, width = (of_kind.spatial_compression * side for side in (latent.height, latent.width))
    rows = config.engine.prompts_per_pass
    turns = -(-videos // rows)
    memory = rollout_memory(
        sizes,
        latent.height,
        latent.width,
        frames_per_pass=per_pass,
        window_frames=policy.attended_frames(settings, n, longest - n),
        method_bytes=policy.device_bytes(settings, n, longest, stored_frame) + places.device,
        batch=rows,
        bytes_per_value=value_bytes,
        vae=vae,
    )
    return MethodPlan(
        backbone=backbone_name,
        method=method_name,
        horizons=horizons,
        nested=nested,
        rollouts=videos * len(runs),
        latent_frames=generated,
        passes=turns * sum(loop.passes(sampler, frames // n) for frames in runs),
        block_flops=per_block(longest)[-per_pass // n],
        transformer_flops=turns * rows * sum(once + sum(per_block(frames)) for frames in runs),
        block_decode_flops=n * frame_decode_flops,
        decode_flops=decoded * sum(runs) * frame_decode_flops,
        longest_flops=rows * (once + sum(per_block(longest))),
        longest_decode_flops=rows * longest * frame_decode_flops,
        scoring_flops=(decoded if config.job == "evaluate" else 0)
        * sum(vbench_flops(group, config.video.fps, height, width) for group in scored),
        video_frames=shown,
        latent_bytes=stored * latent.channels * latent.height * latent.width * value_bytes,
        video_bytes=round(shown * height * width * VIDEO_BITS_PER_PIXEL / 8),
        history=method.history,
        history_bytes=places.host,
        history_disk_bytes=places.disk,
        gpu_bytes=memory.total,
        keeps_history=places.total > 0,
    )


def _notes(config: RunConfig, prompts: Sequence[Prompt]) -> Iterator[str]:
    if prompts and not prompts[0].text:
        named = f"{config.prompts.path} is not there yet" if config.prompts.path else "no prompts.path is given"
        count = config.prompts.count or len(prompts)
        drawn = f", which gives {counted(len(prompts), 'prompt')}" if len(prompts) != count else ""
        yield f"{named}: planned for prompts.count {count}{drawn}. `run` needs the file: {WHERE_TO_GET}"
    yield from sample_notes(config.prompts)
    yield from duplicate_warnings(prompts)
    if config.prompts.refine is not None and not any(prompt.original for prompt in prompts):
        yield from _refine_notes(config.prompts.refine, prompts)
    else:
        yield from cut_notes(list(config.backbones.values()), prompts)
    if (suite := suite_of(config.scoring)) is not None and config.video.enabled:
        yield from suite.plan_notes(
            len(config.backbones), len(config.methods), config.durations_s, len(prompts) * config.prompts.samples
        )
    for name, backbone in config.backbones.items():
        file = (backbone.weights.path or "").rpartition("/")[2]
        if note := CHECKPOINT_NOTES.get(file):
            yield f"backbones.{name}: {note}"
        if backbone.weights.builtin:
            yield from _foreign_prompts(name, prompts)
        yield from _loop_notes(name, file, config)
        yield from _duration_notes(config.durations_s, backbone.sampler.frames_per_block)
    if len(config.durations_s) > 1 and not config.independent_durations:
        yield (
            "durations are nested: shorter videos are the beginnings of the longest, so results of different durations "
            "are not independent samples (independent_durations: true makes them so, at the cost of more rollouts)"
        )
    videos, rows = len(prompts) * config.prompts.samples, config.engine.prompts_per_pass
    if lone := videos % rows:
        yield (
            f"engine.prompts_per_pass {rows}: of the {counted(videos, 'rollout')} of each method the last {lone} fill "
            "no pass, so it takes as long as a full one"
        )
    for name, section in config.methods.items():
        method = resolve_method(section)
        for backbone in config.backbones.values():
            for note in method.policy.notes(method.settings, backbone.sampler.frames_per_block):
                yield f"methods.{name}: {note}"


def _foreign_prompts(backbone: str, prompts: Sequence[Prompt]) -> Iterator[str]:
    """Prompts that say nothing to a generator of the tiny world."""
    if foreign := [prompt.line for prompt in prompts if prompt.text and setting_of(prompt.text) is None]:
        yield (
            f"backbones.{backbone} knows the tiny world alone, and {counted(len(foreign), 'prompt')} (lines "
            f"{listed(foreign)}) are not of it: their videos mean nothing. Write them like '{HELD_OUT[0].prompt}'"
        )


def _history_notes(config: RunConfig, methods: Sequence[MethodPlan], machine: Machine | None) -> Iterator[str]:
    needs = []
    for each in methods:
        backbone, method = config.backbones[each.backbone], resolve_method(config.methods[each.method])
        places = _places(config, backbone, method, each.horizons[-1])
        if places.total:
            where, key = f"{each.backbone}/{each.method}", f"methods.{each.method}.history"
            rows = config.engine.prompts_per_pass
            actor_bytes = each.gpu_bytes - rows * places.device
            needs.append(HistoryNeed(where, key, backbone, method, each.horizons[-1], actor_bytes, rows))
    if machine is not None:
        yield from check_machine(needs, config, machine)


def _loop_notes(backbone: str, file: str, config: RunConfig) -> Iterator[str]:
    """Methods whose rollout loop is not the one that a checkpoint is trained for."""
    trained_for = CHECKPOINT_LOOPS.get(file, "blocks")
    others = [name for name, section in config.methods.items() if resolve_method(section).policy.loop != trained_for]
    if file and others:
        yield f"backbones.{backbone}: {LOOP_NOTES[trained_for].format(checkpoint=file, methods=', '.join(others))}"


def _refine_notes(section: RefineSection, prompts: Sequence[Prompt]) -> Iterator[str]:
    """What refining comes to, for a plan. Tokens are guessed from characters."""
    texts = list(dict.fromkeys(prompt.text for prompt in prompts))
    instruction = len(read_template(section))
    tokens_in = sum((instruction + len(text)) // 4 for text in texts)
    tokens_out = len(texts) * min(section.max_tokens, 200)
    spent = Spent(len(texts), tokens_in, tokens_out, 0)
    yield f"prompts are refined by {described(section)} first: about {spent.described(section)}, without retries"
    if section.max_calls is not None and section.max_calls < len(texts):
        yield f"prompts.refine.max_calls {section.max_calls} is less than the {counted(len(texts), 'prompt')}"


def _duration_notes(durations_s: Sequence[float], frames_per_block: int) -> Iterator[str]:
    for duration_s in durations_s:
        frames = latent_frames(duration_s, frames_per_block)
        if frames != duration_s * LATENT_FRAMES_PER_SECOND:
            yield (
                f"{duration_s:g} s is not a number of whole blocks of {frames_per_block} latent frames: made "
                f"{frames} latent frames ({frames / LATENT_FRAMES_PER_SECOND:g} s, {video_frames(frames)} video frames)"
            )
    for frames, group in groupby(durations_s, lambda duration_s: latent_frames(duration_s, frames_per_block)):
        same = [f"{duration_s:g} s" for duration_s in group]
        if len(same) > 1:
            yield f"{' and '.join(same)} are the same {frames} latent frames, so they share their results"
