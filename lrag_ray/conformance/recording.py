"""Runs our rollout on recorded noise and keeps what golden vectors can be compared with."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lrag_ray.conformance.files import Folder, Vectors
from lrag_ray.context.policy import ContextPolicy, bank_of
from lrag_ray.context.registry import policy_class
from lrag_ray.context.trace import ALL_LAYERS, TraceRow
from lrag_ray.context.weights import on_device
from lrag_ray.retrieval.bank_types import BankType
from lrag_ray.retrieval.encoder import known_fields
from lrag_ray.rollout.loops import loop_of
from lrag_ray.rollout.noise import RecordedNoise
from lrag_ray.wan.checkpoint import load_transformer
from lrag_ray.wan.config import SamplerConfig, WanConfig
from lrag_ray.wan.transformer import CausalWanTransformer

CPU = torch.device("cpu")


class Attended(NamedTuple):
    """What attention received in one layer of one pass, each [B, rows, H, head_dim]."""

    q: Tensor
    k: Tensor
    v: Tensor


@dataclass
class Recording:
    """A finished rollout with its insides. Passes are numbered per block, the clean-context pass last."""

    timesteps: list[list[float]]
    """Timestep of every pass, by block."""
    policies: list[ContextPolicy[Any]]
    """Policy of every batch element, as the rollout left it."""
    latents: Tensor = field(default_factory=lambda: torch.empty(0))
    """Clean latents [B, F, C, H, W]."""
    flow: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    """Network output [B, n, C, H, W] by (block, pass)."""
    x0: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    """Clean prediction [B, n, C, H, W] by (block, pass)."""
    attended: dict[tuple[int, int, int], Attended] = field(default_factory=dict)
    """Rows of all heads by (block, pass, layer), where they were asked for."""
    attended_by_head: dict[tuple[int, int, int, int], Attended] = field(default_factory=dict)
    """Rows of one head by (block, pass, layer, head), where groups of heads attend to different ones."""
    query_indices: list[list[list[int]]] = field(default_factory=list)
    """Temporal index of each of a block's frames, by block and batch element."""
    trace: list[list[list[TraceRow]]] = field(default_factory=list)
    """Trace rows by block and batch element."""
    state: list[list[dict[str, Tensor]]] = field(default_factory=list)
    """`BlockResult.state` by block and batch element."""

    def rows(self, block: int, element: int, layer: int, head: int = 0) -> list[TraceRow]:
        """What one batch element attends to in a block and layer, with one of its heads."""
        return [
            row
            for row in self.trace[block][element]
            if row.layer in (ALL_LAYERS, layer) and (row.heads is None or head in row.heads)
        ]

    def of_head(self, block: int, step: int, layer: int, head: int) -> Attended:
        """Rows [B, rows, 1, head_dim] that attention received in one head."""
        if (block, step, layer, head) in self.attended_by_head:
            return self.attended_by_head[block, step, layer, head]
        return Attended(*(x[:, :, head : head + 1] for x in self.attended[block, step, layer]))


class _Recorder:
    """The probe that fills a recording."""

    def __init__(self, wanted: Callable[[int, int, int], bool]) -> None:
        self.wanted = wanted
        self.flow: dict[tuple[int, int], Tensor] = {}
        self.x0: dict[tuple[int, int], Tensor] = {}
        self.attended: dict[tuple[int, int, int], Attended] = {}
        self.by_head: dict[tuple[int, int, int, int], Attended] = {}

    def on_pass(self, block: int, step: int, flow: Tensor, x0: Tensor) -> None:
        self.flow[block, step] = flow.cpu()
        self.x0[block, step] = x0.cpu()

    def on_attention(
        self, block: int, step: int, layer: int, q: Tensor, k: Tensor, v: Tensor, heads: tuple[int, ...] | None
    ) -> None:
        if not self.wanted(block, step, layer):
            return
        # Keys and values are views of a buffer that the next pass overwrites.
        rows = Attended(*(x.cpu() if x.is_cuda else x.clone() for x in (q, k, v)))
        if heads is None:
            self.attended[block, step, layer] = rows
            return
        for i, head in enumerate(heads):
            self.by_head[block, step, layer, head] = Attended(*(x[:, :, i : i + 1] for x in rows))


def record(
    transformer: CausalWanTransformer,
    sampler: SamplerConfig,
    method: str,
    settings: Mapping[str, Any],
    prompt_embeds: Tensor,
    noise: Tensor,
    renoise: Tensor,
    *,
    wanted: Callable[[int, int, int], bool] = lambda block, step, layer: False,
    bank: BankType = "exact",
    look: Callable[[int, Sequence[ContextPolicy[Any]]], None] = lambda block, policies: None,
) -> Recording:
    """Roll out all frames of `noise` [B, F, C, H, W] with `renoise` [blocks, steps - 1 or more, B·n, C, H, W].

    The transformer's device computes; all that is recorded is on the CPU.

    `settings` name the method's own weights by local paths. `wanted(block, pass, layer)` says where to keep attention
    rows, `bank` how history is stored. `look(block, policies)` is called before every block and, with the number of
    blocks, at the end. Raises ValueError for impossible settings.
    """
    policy = policy_class(method)
    own: Any = policy.Settings(**settings)
    named = [(file, file.address(own)) for file in policy.weight_files(own) if file.used]
    batch, frames = noise.shape[:2]
    n, device = sampler.frames_per_block, transformer.patch_embedding.weight.device
    recorder = _Recorder(wanted)
    rollout = loop_of(policy)(
        transformer,
        sampler,
        policy,
        own,
        prompt_embeds,
        RecordedNoise(noise, renoise.unflatten(2, (batch, n)), n),
        (noise.shape[2], noise.shape[3], noise.shape[4]),
        weights={file.key: on_device(file.read(Path(path)), device) for file, path in named if path is not None},
        make_bank=bank_of(bank),
        probe=recorder,
        total_blocks=frames // n,
    )
    recording = Recording([rollout.timesteps(block) for block in range(frames // n)], rollout.context.policies)
    latents = []
    look(0, recording.policies)
    for result in rollout.blocks(frames // n):
        look(result.block + 1, recording.policies)
        latents.append(result.latents.cpu())
        recording.query_indices.append([policy.query_indices() for policy in recording.policies])
        recording.trace.append(result.trace)
        recording.state.append(result.state)
    recording.latents = torch.cat(latents, dim=1)
    recording.flow, recording.x0 = recorder.flow, recorder.x0
    recording.attended, recording.attended_by_head = recorder.attended, recorder.by_head
    return recording


def with_local_weights(method: str, settings: Mapping[str, Any], folder: Folder) -> dict[str, Any]:
    """`settings` with the method's own weights looked for in `folder`: of a recorded path only the name counts."""
    policy = policy_class(method)
    files = policy.weight_files(policy.Settings(**settings))
    named = {file.key: settings[file.key] for file in files if settings.get(file.key)}
    return {**settings, **{key: str(folder.path / str(path).rsplit("/", 1)[-1]) for key, path in named.items()}}


def wan_config(model: Mapping[str, Any]) -> WanConfig:
    """Sizes from the ``model`` object of a golden JSON. Raises ValueError for a variant that is not built here."""
    for name, built in (("model_type", "t2v"), ("qk_norm", True), ("cross_attn_norm", True)):
        if model.get(name, built) != built:
            raise ValueError(f"model {name} {model[name]!r}: the transformer is built for {built!r}")
    return WanConfig(**known_fields(WanConfig, {**model, "patch_size": tuple(model.get("patch_size", (1, 2, 2)))}))


def golden_transformer(path: Path, config: WanConfig, device: torch.device = CPU) -> CausalWanTransformer:
    """The generator of golden vectors, float32."""
    return load_transformer(path, config, dtype=torch.float32, device=device)


def generator_files(folder: Folder) -> list[Vectors]:
    """Safetensors files in a folder that hold the weights of a generator."""
    return [file for file in folder.vectors if file.has("patch_embedding.weight", "head.head.weight")]
