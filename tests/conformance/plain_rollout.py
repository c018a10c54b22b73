"""A second, plain implementation of the rollout, written from golden/rollout/README.md alone.

It keeps every frame, recomputes every index in every pass and treats batch elements one by one: slow, and with nothing
in common with the real one but the transformer's layers. It makes golden vectors of any size in the published format.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor

from lrag_ray.wan.config import WanConfig
from lrag_ray.wan.keyed import keyed_generator
from lrag_ray.wan.random_weights import fill_random
from lrag_ray.wan.transformer import CausalWanTransformer

MODEL: dict[str, Any] = {
    "dim": 32,
    "ffn_dim": 40,
    "freq_dim": 16,
    "text_dim": 8,
    "text_len": 5,
    "num_heads": 2,
    "num_layers": 2,
}


class Key(NamedTuple):
    """A frame that attention sees, and the temporal index of its keys."""

    frame: int
    temporal_index: int


class PlainContext:
    """Attention in float64 over frames that are looked up one by one."""

    fuses = False

    def __init__(self, grid: tuple[int, int]) -> None:
        self.grid = grid
        self.clean: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
        """Unrotated K and V of finished frames, by layer and frame."""
        self.current: list[int] = []
        self.keys: list[Key] = []
        self.query_indices: list[int] = []
        self.store = False

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """One layer of one pass; everything is [1, n·f, H, head_dim]."""
        per_frame = [x[0].split(self.grid[0] * self.grid[1]) for x in (q, k, v)]
        own = {frame: (per_frame[1][i], per_frame[2][i]) for i, frame in enumerate(self.current)}
        rows = [own.get(key.frame) or self.clean[layer, key.frame] for key in self.keys]
        queries = torch.cat([self.turn(x, i) for x, i in zip(per_frame[0], self.query_indices, strict=True)])
        keys = torch.cat([self.turn(k, key.temporal_index) for (k, _), key in zip(rows, self.keys, strict=True)])
        values = torch.cat([v for _, v in rows]).double()
        if self.store:
            self.clean |= {(layer, frame): kv for frame, kv in own.items()}
        weights = torch.einsum("qhd,khd->hqk", queries, keys).div(math.sqrt(q.shape[-1])).softmax(-1)
        return torch.einsum("hqk,khd->qhd", weights, values)[None].to(q.dtype)

    def turn(self, x: Tensor, index: int) -> Tensor:
        """Rotate the tokens [f, H, head_dim] of a frame as complex numbers."""
        pairs = x.shape[-1] // 2
        widths = (pairs - 2 * (pairs // 3), pairs // 3, pairs // 3)
        rows, columns = self.grid
        places = torch.tensor([(index, row, column) for row in range(rows) for column in range(columns)]).double()
        angles = [
            places[:, axis, None] * 10000.0 ** (-torch.arange(width).double() / width)
            for axis, width in enumerate(widths)
        ]
        phase = torch.cat(angles, dim=1)[:, None]
        z = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)).contiguous())
        return torch.view_as_real(z * torch.polar(torch.ones_like(phase), phase)).flatten(-2)


class Choice(NamedTuple):
    """What was retrieved for the block that starts at a frame."""

    query_frame: int
    frames: list[int]
    similarities: list[float]


class Rolled(NamedTuple):
    """A finished rollout of one batch element."""

    latents: Tensor
    descriptors: Tensor
    choices: list[Choice]
    timesteps: list[float]


@torch.no_grad()
def plain_rollout(
    model: CausalWanTransformer,
    case: dict[str, Any],
    noise: Tensor,
    renoise: Tensor,
    prompt: Tensor,
    describe: Callable[[Tensor], Tensor],
) -> Rolled:
    """Roll out noise [F, C, H, W] with renoise [blocks, steps - 1, n, C, H, W] and prompt [text_len, text_dim]."""
    settings, n = case["model_kwargs"], case["num_frame_per_block"]
    window = settings["local_attn_size"] if settings["local_attn_size"] != -1 else len(noise)
    sink, relative = settings["sink_size"], settings.get("use_latentmem", False)
    memory = settings["memory_size"] if relative else 0
    shift, u = settings["timestep_shift"], 1 - torch.arange(1000).double() / 1000
    table = shift * u / (1 + (shift - 1) * u)
    steps = [float(step) for step in case["denoising_step_list"]]
    if case.get("warp", True):
        steps = [1000 * float(table[1000 - int(step)]) for step in steps]

    def sigma(t: float) -> float:
        return float(table[(1000 * table - t).abs().argmin()])

    context = PlainContext((noise.shape[2] // 2, noise.shape[3] // 2))
    text = model.embed_text(prompt[None])
    latents: list[Tensor] = []
    descriptors: list[Tensor] = []
    choices: list[Choice] = []
    for start in range(0, len(noise), n):
        end = start + n
        chosen: list[int] = []
        eligible = start - window - settings.get("recent_exclude", 0)
        if memory and eligible > 0:
            query = descriptors[start - 1]
            scores = [float(torch.cosine_similarity(query, descriptors[sink + p], dim=0)) for p in range(eligible)]
            chosen = sorted(range(eligible), key=lambda p: -scores[p])[:memory]
            choices.append(Choice(start, [sink + p for p in chosen], [scores[p] for p in chosen]))
        used = min(end, window)
        slots = [slot if slot < sink else end - used + slot for slot in range(used)]
        local = range(max(sink, used - (window - sink - memory)), used)
        context.keys = [Key(slots[j], j if relative else slots[j]) for j in range(min(sink, used))]
        context.keys += [Key(sink + p, 0) for p in chosen]
        context.keys += [Key(slots[j], j if relative else slots[j]) for j in local]
        context.query_indices = list(range(used - n, used)) if relative else list(range(start, end))
        context.current, context.store = list(range(start, end)), False
        x = x0 = noise[start:end]
        for i, t in enumerate(steps):
            if i:
                x = ((1 - sigma(t)) * x0 + sigma(t) * renoise[start // n, i - 1]).float()
            flow = model(x[None], torch.full((1, n), t), text, context)[0]
            x0 = (x.double() - sigma(t) * flow.double()).float()
        latents.append(x0)
        descriptors += list(describe(x0))
        context.store = True
        model(x0[None], torch.full((1, n), float(case.get("context_noise", 0))), text, context)
    return Rolled(torch.cat(latents), torch.stack(descriptors), choices, steps)


def average(latents: Tensor) -> Tensor:
    """The ``avg_pool`` descriptor."""
    return latents.mean(dim=(-2, -1))


def make_case(folder: Path, name: str, case: dict[str, Any], hw: tuple[int, int] = (10, 12), batch: int = 1) -> Path:
    """Write a case in the format of golden/rollout; returns the path of its JSON."""
    model = CausalWanTransformer(WanConfig(**MODEL)).eval()
    fill_random(model, seed=5)
    frames, n, steps = case["frames"], case["num_frame_per_block"], len(case["denoising_step_list"])

    def draw(what: str, *shape: int) -> Tensor:
        return torch.randn(shape, generator=keyed_generator(name, what))

    noise = draw("noise", batch, frames, 16, *hw)
    renoise = draw("renoise", frames // n, steps - 1, batch, n, 16, *hw)
    prompts = draw("prompts", batch, 5, 8)
    rolled = [plain_rollout(model, case, noise[b], renoise[:, :, b], prompts[b], average) for b in range(batch)]
    log = [
        {
            "query_frame": choices[0].query_frame,
            "selected_global_frames": [choice.frames for choice in choices],
            "selected_similarities": [choice.similarities for choice in choices],
        }
        for choices in zip(*(one.choices for one in rolled), strict=True)
    ]
    folder.mkdir(exist_ok=True)
    tensors = {
        "noise": noise,
        "renoise": renoise.flatten(2, 3),
        "prompt_embeds": prompts,
        "output": torch.stack([one.latents for one in rolled]),
        "descriptors": torch.stack([one.descriptors for one in rolled]),
    }
    save_file(tensors, folder / f"{name}.safetensors")
    save_file(model.state_dict(), folder / "weights.safetensors")
    content = {
        "case": {**case, "batch": batch, "hw": hw, "model_weights": "weights.safetensors"},
        "model": MODEL,
        "timesteps": rolled[0].timesteps,
        "memory_indices_log": log,
    }
    path = folder / f"{name}.json"
    path.write_text(json.dumps(content))
    return path
