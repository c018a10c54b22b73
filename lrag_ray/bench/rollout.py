"""Speed and memory of a rollout by part, methods against each other, and what a storage type of the history changes.

Run as ``lrag-ray bench rollout``. Weights are random unless a configuration names them. Blocks of compared methods take
turns on one device, so that both see the same clock and temperature.
"""

from __future__ import annotations

import resource
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lrag_ray.config.histories import history_frames
from lrag_ray.config.methods import Method
from lrag_ray.config.presets import PRESETS
from lrag_ray.config.schema import BackboneConfig
from lrag_ray.conformance.stored_history import changed_frames, retrieved
from lrag_ray.context.policy import bank_of
from lrag_ray.context.weights import Loaded
from lrag_ray.errors import UsageError
from lrag_ray.retrieval.bank_types import BankType
from lrag_ray.retrieval.encoder import EncoderConfig
from lrag_ray.retrieval.history import TieredBank, Tiers
from lrag_ray.rollout.clock import PassClock
from lrag_ray.rollout.loop import RolloutLoop
from lrag_ray.rollout.loops import loop_of
from lrag_ray.rollout.noise import KeyedNoise
from lrag_ray.stages.backbone import load_generator, load_method_weights, load_vae
from lrag_ray.stages.rollout.background import BackgroundThread
from lrag_ray.stages.rollout.joint import JointRollout
from lrag_ray.stages.rollout.worker import BLOCKS_BEHIND
from lrag_ray.training.loop import make_model
from lrag_ray.video.decode import StreamingDecoder
from lrag_ray.wan.devices import DEVICES
from lrag_ray.wan.kernels import Kernels, Products
from lrag_ray.wan.keyed import keyed_generator
from lrag_ray.wan.transformer import CausalWanTransformer
from lrag_ray.wan.vae import WanVae

VIDEO_FRAMES_PER_LATENT = 4
HOOKS = {
    "begin_block": "admit",
    "on_latents": "encode",
    "end_block": "search",
    "begin_expose": "gather",
    "expose": "gather",
}
"""Hooks of a context method that are timed, by the part that they are."""
PARTS = ("denoise", "context", "decode", *dict.fromkeys(HOOKS.values()))


@dataclass(frozen=True)
class Measured:
    """Medians of the timed blocks of one method."""

    method: str
    prompts_per_pass: int
    """Rollouts that were made together; all numbers are of them together."""
    products: Products
    """Matrix products of the layers."""
    history: BankType
    ms_per_block: float
    """Denoising and clean-context passes, with all that the method does."""
    spread: float
    """(slowest - fastest) / median."""
    parts_ms: Mapping[str, float]
    """Mean per block. denoise and context (the clean-context pass) hold the method's own parts: admit, encode, search,
    gather; on a GPU by its own clock."""
    fps: float
    """Video frames per second without decoding."""
    fps_decoded: float | None
    """The same with decoding after each block; None where there is no decoder."""
    fps_overlapped: float | None
    """The same with decoding beside the next block, as a worker does it."""
    mfu: float | None
    """Share of the GPU's bfloat16 peak; None on a CPU or an unknown GPU."""
    launches: int
    """Operations of torch in a block that are not views."""
    to_host_bytes: float
    """Over the bus per block."""
    to_device_bytes: float
    history_frames: int
    """In the bank at the end."""
    history_bytes: int


@dataclass(frozen=True)
class Comparison:
    """A method beside the first one."""

    method: str
    prompts_per_pass: int
    products: Products
    ratio: float
    """Median of its time per block of one rollout over the first one's, turn by turn; above 1 it is slower."""
    low: float
    """Smallest of these ratios."""
    high: float
    """Largest of them."""


@dataclass(frozen=True)
class Difference:
    """A rollout whose history is stored as `history`, or whose products are `products`, beside one with an exact
    history and the backbone's own products."""

    history: BankType
    products: Products
    frames: int
    latent_max: float
    """Largest difference of a latent."""
    latent_rms: float
    """Root mean square of all differences."""
    latent_rms_end: float
    """The same over the last block."""
    changed: float
    """Share of the retrieved frames that are others."""
    frame_bytes: int


@dataclass(frozen=True)
class RolloutBench:
    """All that was measured."""

    device: str
    dtype: str
    latent: Sequence[int]
    """[C, H, W]."""
    parameters: int
    depth_frames: int
    """Latent frames before the timed blocks."""
    blocks: int
    methods: Sequence[Measured]
    compared: Sequence[Comparison]
    differences: Sequence[Difference]
    peak_device_bytes: int | None
    peak_host_bytes: int

    def as_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


def random_backbone(preset: str) -> BackboneConfig:
    """A preset's sizes with random weights. KeyError for an unknown preset."""
    vae = {"kind": "tiny"}
    return BackboneConfig.model_validate({**PRESETS[preset], "weights": {"random_seed": 0}, "vae": vae})


def bench_rollout(
    backbone: BackboneConfig,
    methods: Mapping[str, Method],
    device: torch.device,
    *,
    blocks: int = 6,
    depth_frames: int = 48,
    banks: Sequence[BankType] = (),
    bank_blocks: int = 40,
    tiers: Tiers = Tiers(),  # noqa: B008 - frozen
    kernels: Kernels = Kernels(),  # noqa: B008 - frozen
    decode: bool = True,
    prompts_per_pass: int = 1,
    products: Products = "exact",
) -> RolloutBench:
    """Measure `blocks` blocks of each method behind `depth_frames` latent frames, which are replayed from random ones;
    above 1 `prompts_per_pass`, of that number of rollouts together as well, and with other `products` with them too.

    The first method is what the others are compared with, and rolled out over `bank_blocks` blocks with every storage
    type of `banks` and with `products`. UsageError where it then keeps no history that could be stored.
    """
    name, method = next(iter(methods.items()))
    rolled_out = bank_blocks * backbone.sampler.frames_per_block
    if banks and not history_frames(backbone, method, rolled_out):
        raise UsageError(
            f"--bank {banks[0]}: {name} keeps no history over {rolled_out} latent frames, so none is stored. "
            "Fix: leave --bank out, name a method with a history (rag), or raise --bank-blocks"
        )
    kinds: list[Products] = list(dict.fromkeys([backbone.products, products]))
    models = {kind: load_generator(backbone.model_copy(update={"products": kind}), device, kernels) for kind in kinds}
    vae = load_vae(backbone, device) if decode else None
    n = backbone.sampler.frames_per_block
    # The windows that are timed hold as many blocks as in the middle of a long rollout.
    total = depth_frames // n + (1 + (vae is not None)) * blocks + 1 + len(backbone.sampler.denoising_steps)
    sizes = sorted({1, prompts_per_pass})
    runs = [
        _Run(backbone, models[kind], kind, name, method, device, total, tiers, rows)
        for name, method in methods.items()
        for rows in sizes
        for kind in kinds
    ]
    for run in runs:
        run.replay(depth_frames // n)
    for turn in range(blocks + 1):
        for run in runs:
            run.block(vae, counted=turn > 0)
    measured = [run.measured() for run in runs]
    if vae is not None:
        overlapped = [run.overlapped_fps(vae, blocks) for run in runs]
        measured = [replace(one, fps_overlapped=fps) for one, fps in zip(measured, overlapped, strict=True)]
    first, *others = runs
    compared = []
    for other in others:
        ratios = [b / a / other.rows for a, b in zip(first.seconds, other.seconds, strict=True)]
        compared.append(
            Comparison(other.name, other.rows, other.products, statistics.median(ratios), min(ratios), max(ratios))
        )
    del runs, first, others
    cases: list[tuple[BankType, Products]] = [(bank, kinds[0]) for bank in banks]
    cases += [("exact", kind) for kind in kinds[1:]]
    differences = list(_differences(backbone, models, method, device, cases, bank_blocks))
    on_gpu = device.type == "cuda"
    return RolloutBench(
        device=torch.cuda.get_device_name(device) if on_gpu else "cpu",
        dtype=backbone.dtype,
        latent=_latent(backbone),
        parameters=backbone.transformer.parameter_count(),
        depth_frames=depth_frames // n * n,
        blocks=blocks,
        methods=measured,
        compared=compared,
        differences=differences,
        peak_device_bytes=torch.cuda.max_memory_allocated(device) if on_gpu else None,
        peak_host_bytes=1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
    )


class _Run:
    """One method's rollout, or `rows` of them together, block by block."""

    def __init__(
        self,
        backbone: BackboneConfig,
        model: CausalWanTransformer,
        products: Products,
        name: str,
        method: Method,
        device: torch.device,
        total_blocks: int,
        tiers: Tiers,
        rows: int,
    ) -> None:
        self.name, self.rows, self.products = name, rows, products
        self.seconds: list[float] = []
        self.rollout = _rollout(backbone, model, method, device, total_blocks, tiers, rows)
        self._total_blocks = total_blocks
        self._backbone, self._method, self._device = backbone, method, device
        self._clock = PassClock(device, *PARTS)
        self._decode_s: list[float] = []
        self._counter = _Launches()
        for policy in self.rollout.context.policies:
            for hook, part in HOOKS.items():
                _time(policy, hook, part, self._clock)
        self._banks = [bank for bank in self.rollout._banks if isinstance(bank, TieredBank)]

    def replay(self, blocks: int) -> None:
        """Fill the caches with random latents; where replay needs more than latents, with generated ones."""
        sampler = self._backbone.sampler
        n, loop = sampler.frames_per_block, loop_of(self._method.policy)
        generated = blocks if loop.carried_frames(sampler, self._total_blocks) else 0
        for _ in self.rollout.blocks(generated):
            pass
        for block in range(generated, blocks):
            latents = torch.randn(self.rows, n, *_latent(self._backbone), generator=keyed_generator("bench", block))
            self.rollout.replay(latents)
        self._begin()

    def block(self, vae: WanVae | None, *, counted: bool) -> None:
        """Make a block, and decode it by itself. What is not counted warms up, and its launches are counted."""
        self._wait()
        began = time.perf_counter()
        if counted:
            (result,) = self.rollout.blocks(1)
        else:
            with self._counter:
                (result,) = self.rollout.blocks(1)
        self._wait()
        taken = time.perf_counter() - began
        decode_s = 0.0
        if vae is not None:
            began = time.perf_counter()
            for latents in result.latents:
                vae.decode(latents)
            self._wait()
            decode_s = time.perf_counter() - began
        if counted:
            self.seconds.append(taken)
            self._decode_s.append(decode_s)
        else:
            self._begin()

    def overlapped_fps(self, vae: WanVae, blocks: int) -> float:
        """Video frames per second of more blocks, each decoded to the host while the next one is generated."""
        decoders = [StreamingDecoder(vae) for _ in range(self.rows)]
        rollouts = JointRollout(self.rollout, range(self.rows), self.rows)
        self._wait()
        began = time.perf_counter()
        with BackgroundThread(self.rows * BLOCKS_BEHIND) as background:
            for together in rollouts.blocks(blocks, behind=self._device.type == "cuda"):
                for decoder, block in zip(decoders, together, strict=True):
                    background.do(decoder.push, block.latents)
            background.finish()
        frames = self.rows * blocks * self._backbone.sampler.frames_per_block * VIDEO_FRAMES_PER_LATENT
        return frames / (time.perf_counter() - began)

    def measured(self) -> Measured:
        """Of the blocks that were counted."""
        count, backbone = len(self.seconds), self._backbone
        n, latent = backbone.sampler.frames_per_block, backbone.latent
        frames = self.rows * n * VIDEO_FRAMES_PER_LATENT
        median = statistics.median(self.seconds)
        totals = {**self._clock.totals_s(), **self.rollout.timings_s}
        parts = {part: 1e3 * (totals[part] - self._before[part]) / count for part in PARTS if part != "decode"}
        decode_s = statistics.mean(self._decode_s)
        policy, sizes = self._method.policy, backbone.transformer
        attended = partial(policy.attended_frames, self._method.settings)
        flops = loop_of(policy).block_flops(
            sizes, backbone.sampler, latent.height, latent.width, attended, self._total_blocks
        )[self.rollout.block - 1]
        gpu = torch.cuda.get_device_name(self._device) if self._device.type == "cuda" else ""
        peak = next((device.bf16_tflops for device in DEVICES if device.name in gpu), None)
        to_host, to_device = (b - a for a, b in zip(self._crossed, self._bus(), strict=True))
        return Measured(
            method=self.name,
            prompts_per_pass=self.rows,
            products=self.products,
            history=self._method.history,
            ms_per_block=1e3 * median,
            spread=(max(self.seconds) - min(self.seconds)) / median,
            parts_ms={**parts, "decode": 1e3 * decode_s},
            fps=frames / median,
            fps_decoded=frames / (median + decode_s) if decode_s else None,
            fps_overlapped=None,
            mfu=self.rows * flops / median / 1e12 / peak if peak else None,
            launches=self._counter.count,
            to_host_bytes=to_host / count,
            to_device_bytes=to_device / count,
            history_frames=sum(bank.nbytes() // bank.usage().frame_bytes for bank in self._banks),
            history_bytes=sum(bank.nbytes() for bank in self._banks),
        )

    def _begin(self) -> None:
        """What was done until here does not count."""
        self._wait()
        self._before = {**self._clock.totals_s(), **self.rollout.timings_s}
        self._crossed = self._bus()

    def _bus(self) -> tuple[int, int]:
        usages = [bank.usage() for bank in self._banks]
        return sum(usage.to_host_bytes for usage in usages), sum(usage.to_device_bytes for usage in usages)

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


class _Launches(TorchDispatchMode):
    """Counts operations that are not views."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        returned = func._schema.returns
        is_view = any(each.alias_info and not each.alias_info.is_write for each in returned)
        self.count += not is_view
        return func(*args, **(kwargs or {}))


def _time(policy: Any, hook: str, part: str, clock: PassClock) -> None:
    """Let `clock` see what a hook of this policy takes."""
    inner: Callable[..., Any] = getattr(policy, hook)

    def timed(*arguments: Any) -> Any:
        began = clock.mark()
        found = inner(*arguments)
        clock.add(part, began, clock.mark())
        return found

    setattr(policy, hook, timed)


def _rollout(
    backbone: BackboneConfig,
    model: CausalWanTransformer,
    method: Method,
    device: torch.device,
    total_blocks: int,
    tiers: Tiers = Tiers(),  # noqa: B008 - frozen
    rows: int = 1,
) -> RolloutLoop:
    sizes, shape = backbone.transformer, _latent(backbone)
    text = torch.randn(rows, sizes.text_len, sizes.text_dim, generator=keyed_generator("bench", "text"))
    return loop_of(method.policy)(
        model,
        backbone.sampler,
        method.policy,
        method.settings,
        text,
        KeyedNoise(0, ["bench"] * rows, range(rows), (backbone.sampler.frames_per_block, *shape)),
        shape,
        weights=_weights(method, shape, device),
        make_bank=bank_of(method.history, tiers),
        total_blocks=total_blocks,
    )


def _weights(method: Method, latent: tuple[int, int, int], device: torch.device) -> dict[str, Loaded]:
    """A method's weights, and an untrained retrieval encoder where it needs one that no file is named for."""
    found = load_method_weights(method, device)
    for file in method.policy.weight_files(method.settings):
        if file.used and file.key not in found:
            found[file.key] = make_model(EncoderConfig(*latent), seed=0).eval().requires_grad_(False).to(device)
    return found


def _differences(
    backbone: BackboneConfig,
    models: Mapping[Products, CausalWanTransformer],
    method: Method,
    device: torch.device,
    others: Sequence[tuple[BankType, Products]],
    blocks: int,
) -> Iterator[Difference]:
    """Whole rollouts with other histories and products, beside one with an exact history by the first of `models`."""
    if not others:
        return
    exact, chosen, _ = _whole(backbone, next(iter(models.values())), method._replace(history="exact"), device, blocks)
    for history, products in others:
        stored = method._replace(history=history)
        latents, ours, frame_bytes = _whole(backbone, models[products], stored, device, blocks)
        difference = (latents - exact).double()
        changed, total = changed_frames(ours, chosen)
        yield Difference(
            history=history,
            products=products,
            frames=len(latents),
            latent_max=float(difference.abs().max()),
            latent_rms=float(difference.pow(2).mean().sqrt()),
            latent_rms_end=float(difference[-backbone.sampler.frames_per_block :].pow(2).mean().sqrt()),
            changed=changed / total if total else 0.0,
            frame_bytes=frame_bytes,
        )


def _whole(
    backbone: BackboneConfig, model: CausalWanTransformer, method: Method, device: torch.device, blocks: int
) -> tuple[Tensor, list[list[int]], int]:
    """Latents [F, C, H, W] and retrieved frames by block of a rollout, and the bytes of a stored frame."""
    rollout = _rollout(backbone, model, method, device, blocks)
    results = list(rollout.blocks(blocks))
    latents = torch.cat([result.latents[0].float().cpu() for result in results])
    sizes = [bank.usage().frame_bytes for bank in rollout._banks if isinstance(bank, TieredBank)]
    return latents, [retrieved(result.trace[0]) for result in results], sizes[0] if sizes else 0


def _latent(backbone: BackboneConfig) -> tuple[int, int, int]:
    return backbone.latent.channels, backbone.latent.height, backbone.latent.width
