"""Golden pieces of the transformer: time embedding, RoPE, RMS norm and one call on an empty cache."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lrag_ray.conformance.case import Bound, GoldenCase, Sheet
from lrag_ray.conformance.files import Folder, Vectors
from lrag_ray.conformance.recording import generator_files, golden_transformer
from lrag_ray.context.base import Base, BaseSettings
from lrag_ray.context.policy import Layout, PolicyInputs
from lrag_ray.context.runtime import ContextRuntime
from lrag_ray.wan.config import WanConfig
from lrag_ray.wan.rope import Rope, rotate
from lrag_ray.wan.schedule import FlowMatchSchedule
from lrag_ray.wan.transformer import CausalWanTransformer, RMSNorm, sinusoidal_embedding

UNIT = Bound(absolute=5e-6)
FORWARD = Bound(absolute=5e-5)
GRID = (2, 3)
"""Token rows and columns of the RoPE vectors (golden/rollout/README.md)."""


def cases(folder: Folder) -> list[GoldenCase]:
    """A case per safetensors file with such pieces."""
    prefixes = ("rope.hd", "time.embedding", "rmsnorm.", "forward.")
    return [
        GoldenCase(file.path.stem, partial(_check, folder, file))
        for file in folder.vectors
        if any(file.named(prefix) for prefix in prefixes)
    ]


def _check(folder: Folder, vectors: Vectors, sheet: Sheet) -> None:
    for dim in vectors.named("time.embedding"):
        golden = vectors[f"time.embedding{dim}"]
        sheet.close(f"time.embedding{dim}", sinusoidal_embedding(int(dim), vectors["time.t"]).float(), golden, UNIT)
    for name in sorted(vectors.named("rope.hd")):
        head_dim, _, case = name.partition(".")
        if case != "x":
            sheet.close(
                f"rope.hd{name}", _rotated(vectors[f"rope.hd{head_dim}.x"], case), vectors[f"rope.hd{name}"], UNIT
            )
    if vectors.has("rmsnorm.x", "rmsnorm.weight", "rmsnorm.out"):
        norm = RMSNorm(len(vectors["rmsnorm.weight"]), eps=1e-6)
        norm.weight.data = vectors["rmsnorm.weight"]
        sheet.close("rmsnorm.out", norm(vectors["rmsnorm.x"]).detach(), vectors["rmsnorm.out"], UNIT)
    for model in sorted({name.partition(".")[0] for name in vectors.named("forward.")}):
        _check_forward(folder, model, vectors.group(f"forward.{model}."), sheet)


def _rotated(x: Tensor, case: str) -> Tensor:
    """x [1, tokens, H, head_dim] turned as ``indices_0_5_11`` or ``start_frame_7`` says."""
    rows, columns = GRID
    frames = x.shape[1] // (rows * columns)
    kind, _, numbers = re.sub(r"^(indices|start_frame)_", r"\1 ", case).partition(" ")
    indices = [int(number) for number in numbers.split("_")]
    if kind == "start_frame":
        indices = list(range(indices[0], indices[0] + frames))
    return rotate(x, Rope(x.shape[-1], GRID, x.device).frames(indices))


def _check_forward(folder: Folder, label: str, golden: Mapping[str, Tensor], sheet: Sheet) -> None:
    """One call for the first block; the weights are the file beside it whose sizes fit."""
    dim = golden["patch_embedding"].shape[-1]
    fitting = [file for file in generator_files(folder) if file.shapes["patch_embedding.weight"][0] == dim]
    if not fitting:
        sheet.add(f"forward.{label}", "fail", f"no generator weights of width {dim} are beside the vectors")
        return
    transformer = golden_transformer(fitting[0].path, _config(fitting[0], golden))
    ours = _forward(transformer, golden, _shift(folder, dim))
    sheet.close_all(
        f"forward.{label}", {name: (value, golden[name], FORWARD) for name, value in ours.items() if name in golden}
    )


def _shift(folder: Folder, dim: int) -> float:
    """Timestep shift of a rollout case with the same generator in the same folder, else the published 5."""
    shifts = (
        float(record.content["case"]["model_kwargs"]["timestep_shift"])
        for record in folder.records
        if record.holds("case", "model") and record.content["model"].get("dim") == dim
    )
    return next(shifts, 5.0)


def _config(file: Vectors, golden: Mapping[str, Tensor]) -> WanConfig:
    """Sizes as the shapes of weights and vectors tell them."""
    shapes = file.shapes
    return WanConfig(
        dim=shapes["patch_embedding.weight"][0],
        ffn_dim=shapes["blocks.0.ffn.0.weight"][0],
        freq_dim=shapes["time_embedding.0.weight"][1],
        text_dim=shapes["text_embedding.0.weight"][1],
        text_len=golden["prompt_embeds"].shape[1],
        num_heads=golden["cache_layer0.k"].shape[2],
        num_layers=1 + max(int(name.split(".")[0]) for name in file.named("blocks.")),
    )


class _Keep:
    """Probe that keeps what layer 0 attends to."""

    def __init__(self) -> None:
        self.rows: dict[str, Tensor] = {}

    def on_pass(self, block: int, step: int, flow: Tensor, x0: Tensor) -> None:
        """Not called: there is no rollout."""

    def on_attention(
        self, block: int, step: int, layer: int, q: Tensor, k: Tensor, v: Tensor, heads: tuple[int, ...] | None
    ) -> None:
        if layer == 0:
            self.rows |= {"cache_layer0.k": k.clone(), "cache_layer0.v": v.clone()}


@torch.no_grad()
def _forward(transformer: CausalWanTransformer, golden: Mapping[str, Tensor], shift: float) -> dict[str, Tensor]:
    """Activations by their golden names."""
    x, t = golden["x"], golden["t"]
    config = transformer.config
    grid = config.token_grid(x.shape[-2], x.shape[-1])
    layout = Layout(
        config.num_layers, config.num_heads, config.head_dim, grid, x.shape[1], torch.float32, torch.device("cpu")
    )
    rope = Rope(config.head_dim, grid, layout.device)
    probe = _Keep()
    policy = Base(BaseSettings(window=-1, sink=0), PolicyInputs(layout, rope))
    context = ContextRuntime(layout, rope, [policy] * len(x), probe)
    kept: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def hook(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
            # Clones: the layers overwrite their input.
            kept[name] = output.clone()

        return hook

    def keep_input(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        kept["patch_embedding"] = inputs[0].clone()

    transformer.text_embedding.register_forward_hook(keep("text_embedding"))
    transformer.time_projection.register_forward_hook(keep("time_projection"))
    transformer.blocks[0].register_forward_pre_hook(keep_input)
    for layer, block in enumerate(transformer.blocks):
        block.register_forward_hook(keep(f"after_block{layer}"))
    context.begin_block(0)
    context.begin_pass(0, clean=False)
    flow = transformer(x, t, transformer.embed_text(golden["prompt_embeds"]), context)
    x0 = FlowMatchSchedule(shift).x0_from_flow(flow.flatten(0, 1), x.flatten(0, 1), t.flatten()).view_as(flow)
    return kept | probe.rows | {"flow": flow, "x0": x0}
