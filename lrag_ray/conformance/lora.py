"""Golden LoRA: merged weights, and what the generator computes with and without it."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lrag_ray.conformance.case import Bound, GoldenCase, Sheet
from lrag_ray.conformance.files import CaseRecord, Folder, Vectors
from lrag_ray.conformance.recording import generator_files, wan_config
from lrag_ray.context.base import Base, BaseSettings
from lrag_ray.context.policy import Layout, PolicyInputs
from lrag_ray.context.runtime import ContextRuntime
from lrag_ray.errors import WeightsError
from lrag_ray.wan.checkpoint import load_transformer
from lrag_ray.wan.lora import Lora, lora_targets, read_lora
from lrag_ray.wan.rope import Rope
from lrag_ray.wan.schedule import FlowMatchSchedule
from lrag_ray.wan.transformer import CausalWanTransformer

MERGED = Bound(absolute=1e-5)
OUTPUTS = Bound(absolute=1e-5)


class _Files(NamedTuple):
    """The files of one case, distinguished by their content."""

    base: Vectors
    merged: Vectors | None
    outputs: Vectors | None
    loras: list[Path]


def cases(folder: Folder) -> list[GoldenCase]:
    """A case per JSON with a rank and a model."""
    records = [record for record in folder.records if record.holds("rank", "model")]
    return [
        GoldenCase(record.path.stem, partial(_check, record, _files(folder, record, alone=len(records) == 1)))
        for record in records
    ]


def _files(folder: Folder, record: CaseRecord, *, alone: bool) -> _Files | None:
    """Files of a case: those that share its stem, or all where it is the only case."""

    def belongs(path: Path) -> bool:
        return alone or path.stem.startswith(record.path.stem)

    base = [file for file in generator_files(folder) if belongs(file.path)]
    if not base:
        return None
    others = [file for file in folder.vectors if belongs(file.path) and file not in base]
    merged = [file for file in others if file.shapes and all(name.startswith("blocks.") for name in file.shapes)]
    outputs = [file for file in others if file.has("x", "prompt_embeds", "timestep")]
    loras = [path for path in folder.torch_files if belongs(path) and _is_lora(path)]
    return _Files(base[0], next(iter(merged), None), next(iter(outputs), None), loras)


def _is_lora(path: Path) -> bool:
    try:
        return bool(read_lora(Lora(path)))
    except WeightsError:
        return False


def _check(record: CaseRecord, files: _Files | None, sheet: Sheet) -> None:
    if files is None or not files.loras:
        sheet.add("files", "fail", "a case needs the base weights and a LoRA file beside its JSON")
        return
    golden = record.content
    config = wan_config(golden["model"])
    base = load_transformer(files.base.path, config, dtype=torch.float32)
    if "target_modules" in golden:
        sheet.same("target layers", sorted(lora_targets(base)), sorted(golden["target_modules"]))
    models = {"base": base}
    for path in files.loras:
        # Without either the strength is that of the file, else the update counts once.
        alpha = golden.get("alpha", golden["scaling"] * golden["rank"] if "scaling" in golden else None)
        lora = Lora(path, rank=int(golden["rank"]), alpha=None if alpha is None else float(alpha))
        merged = load_transformer(files.base.path, config, dtype=torch.float32, lora=lora)
        models[path.stem] = merged
        if files.merged is not None:
            _check_weights(path.stem, base, merged, files.merged, sheet)
    if files.outputs is not None:
        kwargs = golden.get("model_kwargs", {})
        for name, model in models.items():
            _check_outputs(name, model, files.outputs, kwargs, sheet)


def _check_weights(
    label: str, base: CausalWanTransformer, merged: CausalWanTransformer, golden: Vectors, sheet: Sheet
) -> None:
    """The changed matrices are the golden ones, all others are untouched."""
    ours, before = merged.state_dict(), base.state_dict()
    sheet.close_all(f"{label} merged", {name: (ours[name], golden[name], MERGED) for name in golden.shapes})
    sheet.close_all(
        f"{label} unchanged", {name: (ours[name], before[name], Bound()) for name in ours if name not in golden}
    )


def _check_outputs(
    label: str, model: CausalWanTransformer, golden: Vectors, kwargs: Mapping[str, Any], sheet: Sheet
) -> None:
    """Two calls, the second on the cache that the first one left; applied and merged LoRA must both be met."""
    kinds = ["base"] if label == "base" else ["lora", "merged"]
    ours = _two_calls(model, golden, kwargs)
    pairs = {
        f"{kind}.{name}": (value, golden[f"{kind}.{name}"], OUTPUTS)
        for kind in kinds
        for name, value in ours.items()
        if f"{kind}.{name}" in golden
    }
    sheet.close_all(f"{label} outputs", pairs)


@torch.no_grad()
def _two_calls(model: CausalWanTransformer, golden: Vectors, kwargs: Mapping[str, Any]) -> dict[str, Tensor]:
    """Flow and x0 of the first frames, then of half their values as the next frames."""
    x, t = golden["x"], golden["timestep"]
    config, device = model.config, torch.device("cpu")
    grid = config.token_grid(x.shape[-2], x.shape[-1])
    layout = Layout(config.num_layers, config.num_heads, config.head_dim, grid, x.shape[1], torch.float32, device)
    rope = Rope(config.head_dim, grid, device)
    settings = BaseSettings(window=kwargs.get("local_attn_size", -1), sink=kwargs.get("sink_size", 0))
    policies = [Base(settings, PolicyInputs(layout, rope)) for _ in x]
    context = ContextRuntime(layout, rope, list(policies))
    text = model.embed_text(golden["prompt_embeds"])
    schedule = FlowMatchSchedule(kwargs.get("timestep_shift", 5.0))
    outputs: dict[str, Tensor] = {}
    for call, latents in enumerate((x, 0.5 * x)):
        context.begin_block(call)
        context.begin_pass(0, clean=True)
        flow = model(latents, t, text, context)
        context.end_pass()
        x0 = schedule.x0_from_flow(flow.flatten(0, 1), latents.flatten(0, 1), t.flatten()).view_as(flow)
        outputs |= {f"pass{call}.flow": flow, f"pass{call}.x0": x0}
    return outputs
