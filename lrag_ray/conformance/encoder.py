"""Golden vectors of the retrieval encoder: forward, losses, gradients, training steps, checkpoints."""

from __future__ import annotations

import re
import zlib
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lrag_ray.conformance.case import Bound, GoldenCase, Sheet
from lrag_ray.conformance.files import CaseRecord, Folder, Vectors, case_stem, pair
from lrag_ray.errors import WeightsError
from lrag_ray.retrieval.encoder import EncoderConfig, LatentAutoencoder, known_fields, load_encoder
from lrag_ray.retrieval.losses import EncoderLosses, LossConfig, encoder_losses
from lrag_ray.retrieval.training import OptimizerConfig, make_optimizer, train_step
from lrag_ray.wan.state_dict import read_checkpoint

FORWARD = Bound(absolute=1e-5)
RELATIVE = 1e-4
"""Of losses, gradients and trained weights."""

RECONSTRUCTION = Bound(1e-4)
"""The decoder's group norms divide by small deviations: on a CPU with other vector units float32 sums move values of up
to 8 by 4e-5."""

KNOWN_WEIGHT_RECIPE = (
    "for each parameter name: numpy RandomState(zlib.crc32(name)).standard_normal(shape); ndim>1: *0.02; "
    "1-d '.weight': 1+0.02*z; 1-d '.bias': 0.02*z; cast to float32"
)


def cases(folder: Folder) -> list[GoldenCase]:
    """Cases with tensors, cases made by a recipe, the table of config fields, and trained checkpoints."""
    found = []
    for record in folder.records:
        if record.holds("ae_config", "weight_recipe"):
            found.append(GoldenCase(record.path.stem, partial(_check_recipe, record.content)))
        elif record.holds("defaults") and "hidden_dims" in record.content["defaults"]:
            found.append(GoldenCase(record.path.stem, partial(_check_defaults, record.content["defaults"])))
    records = [r for r in folder.records if r.holds("ae_config") and not r.holds("weight_recipe")]
    vectors = [file for file in folder.vectors if "batch" in file and file.named("weights.encoder.")]
    for case in pair(records, vectors):
        found.append(GoldenCase(case.stem, partial(_check_tensors, case.record, case.vectors)))
    if found:
        checkpoints = [path for path in folder.torch_files if _is_encoder_checkpoint(path)]
        found += [GoldenCase(path.stem, partial(_check_checkpoint, path, vectors)) for path in checkpoints]
    return found


def _is_encoder_checkpoint(path: Path) -> bool:
    try:
        return {"config", "model"} <= read_checkpoint(path).keys()
    except WeightsError:
        return False


def _check_defaults(defaults: Mapping[str, Any], sheet: Sheet) -> None:
    ours = {**vars(EncoderConfig()), **vars(LossConfig()), **vars(OptimizerConfig())}
    ours["hidden_dims"] = list(ours["hidden_dims"])
    for name in sorted(ours.keys() & defaults.keys()):
        sheet.same(f"default {name}", ours[name], defaults[name])


def _check_tensors(record: CaseRecord | None, vectors: Vectors | None, sheet: Sheet) -> None:
    if record is None or vectors is None:
        sheet.add("files", "fail", "a case needs a JSON with ae_config and a safetensors file with weights and batch")
        return
    golden = record.content
    model = LatentAutoencoder(EncoderConfig.from_checkpoint(golden["ae_config"]))
    model.load_state_dict(vectors.group("weights."))
    batch = vectors["batch"]
    frames = batch.flatten(0, 1)
    with torch.no_grad():
        embedding, reconstruction = model(frames)
        outputs = {
            "encode_raw": embedding,
            "encode_normalized": model.encode(frames),
            "reconstruction": reconstruction,
        }
    for name, ours in outputs.items():
        if name in vectors:
            sheet.close(name, ours, vectors[name], RECONSTRUCTION if name == "reconstruction" else FORWARD)
    _check_counts(golden, model, sheet)
    loss_config = LossConfig(**known_fields(LossConfig, golden["ae_config"]))
    losses = encoder_losses(model, batch, loss_config)
    losses.total.backward()
    if "losses" in golden:
        _check_losses("losses", losses, golden["losses"], sheet)
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    _check_gradients(gradients, golden, vectors, sheet)
    if "training" in golden:
        _check_training(model, batch, loss_config, golden, vectors, sheet)


def _check_counts(golden: Mapping[str, Any], model: LatentAutoencoder, sheet: Sheet) -> None:
    counts = {
        "parameter_count": _parameters(model),
        "encoder_parameter_count": _parameters(model.encoder),
        "decoder_parameter_count": _parameters(model.decoder),
        "feat_shape": list(model.config.feature_shape),
    }
    for name, ours in counts.items():
        if name in golden:
            sheet.same(name, ours, golden[name])


def _parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _check_losses(label: str, ours: EncoderLosses, golden: Mapping[str, float], sheet: Sheet) -> None:
    # The hinge of a few pairs may be far below the total that is optimised; rounding scales with the latter.
    bound = Bound(absolute=1e-5 * abs(golden.get("total", 0.0)), relative=RELATIVE)
    sheet.close_all(
        label, {name: (getattr(ours, name).detach(), torch.tensor(value), bound) for name, value in golden.items()}
    )


def _check_gradients(ours: Mapping[str, Tensor], golden: Mapping[str, Any], vectors: Vectors, sheet: Sheet) -> None:
    """Values and norms. A bias right before a group norm has no gradient but rounding, hence the floor."""
    floor = 1e-7 * float(golden.get("total_grad_norm", 0.0))
    pairs = {}
    for name in vectors.named("grad."):
        value = vectors[f"grad.{name}"]
        pairs[name] = (ours[name], value, Bound(absolute=RELATIVE * float(value.abs().max()) + floor))
    sheet.close_all("gradients", pairs)
    if "total_grad_norm" in golden:
        norm = torch.stack([gradient.norm() for gradient in ours.values()]).norm()
        sheet.close("total_grad_norm", norm, torch.tensor(golden["total_grad_norm"]), Bound(relative=RELATIVE))
    if "grad_norms" in golden:
        bound = Bound(absolute=10 * floor, relative=RELATIVE)
        norms = {name: (ours[name].norm(), torch.tensor(value), bound) for name, value in golden["grad_norms"].items()}
        sheet.close_all("gradient norms", norms)


def _check_training(
    model: LatentAutoencoder,
    batch: Tensor,
    loss_config: LossConfig,
    golden: Mapping[str, Any],
    vectors: Vectors,
    sheet: Sheet,
) -> None:
    training = golden["training"]
    settings = OptimizerConfig(**known_fields(OptimizerConfig, {**golden["ae_config"], **training}))
    optimizer = make_optimizer(model, settings)
    for step in training["steps"]:
        before = train_step(model, optimizer, batch, loss_config, settings.grad_clip).losses
        _check_losses(f"step {step['step']} losses before", before, step["before"], sheet)
        with torch.no_grad():
            after = encoder_losses(model, batch, loss_config)
        _check_losses(f"step {step['step']} losses after", after, step["after"], sheet)
    # Adam divides a gradient by its own size: one that is nothing but rounding moves its parameter by up to the
    # learning rate in every step, in a direction that no two implementations share.
    noise = 1e-6 * float(golden.get("total_grad_norm", 0.0))
    drift = Bound(absolute=2 * settings.lr * len(training["steps"]))
    parameters = dict(model.named_parameters())
    pairs, undetermined = {}, {}
    for name in vectors.named("trained."):
        ours, value = parameters[name].detach(), vectors[f"trained.{name}"]
        bound = Bound(absolute=RELATIVE * float(value.abs().max()))
        # Single values too: one of a kernel's may lack a gradient where the others have one.
        lost = vectors[f"grad.{name}"].abs() < noise if f"grad.{name}" in vectors else torch.zeros_like(value).bool()
        pairs[name] = (ours[~lost], value[~lost], bound)
        if bool(lost.any()):
            undetermined[name] = (ours[lost], value[lost], drift)
    sheet.close_all("trained weights", pairs)
    sheet.close_all("trained weights without gradient", undetermined)


def _check_checkpoint(path: Path, vectors: list[Vectors], sheet: Sheet) -> None:
    """A checkpoint of the public saver loads strictly and holds the trained weights of the case it belongs to."""
    loaded = dict(load_encoder(path).named_parameters())
    shapes = {name: tuple(parameter.shape) for name, parameter in loaded.items()}
    fitting = [
        file for file in vectors if {name: file.shapes[f"trained.{name}"] for name in file.named("trained.")} == shapes
    ]
    fitting.sort(key=lambda file: not path.stem.startswith(case_stem(file.path)))
    if not fitting:
        sheet.add("weights", "pass")
        return
    trained = fitting[0].group("trained.")
    sheet.close_all("weights", {name: (value.detach(), trained[name], Bound()) for name, value in loaded.items()})


def _check_recipe(golden: Mapping[str, Any], sheet: Sheet) -> None:
    """A case too large to store: weights and input follow a recipe, a few outputs are given."""
    draw = re.search(r"RandomState\((\d+)\)\.standard_normal\(\(([\d, ]+)\)\)", golden.get("input_recipe", ""))
    if golden["weight_recipe"] != KNOWN_WEIGHT_RECIPE or draw is None:
        sheet.add("recipe", "skip", "the recipe for weights or input is not one that is known here")
        return
    with torch.device("meta"):
        model = LatentAutoencoder(EncoderConfig.from_checkpoint(golden["ae_config"]))
    shapes = {name: list(parameter.shape) for name, parameter in model.named_parameters()}
    sheet.same("parameter_shapes", dict(sorted(shapes.items())), dict(sorted(golden["parameter_shapes"].items())))
    _check_counts(golden, model, sheet)
    weights = {name: _recipe_weight(name, parameter) for name, parameter in model.named_parameters()}
    model.load_state_dict(weights, assign=True)
    shape = [int(size) for size in draw.group(2).split(",") if size.strip()]
    frames = torch.from_numpy(np.random.RandomState(int(draw.group(1))).standard_normal(shape).astype(np.float32))
    with torch.no_grad():
        raw, reconstruction = model(frames)
        unit = model.encode(frames)
    at = golden["embed_indices"]
    ours = {
        "encode_raw": raw[:, at],
        "encode_normalized": unit[:, at],
        "encode_raw_norm": raw.norm(dim=-1),
        "encode_raw_sum": raw.sum(-1),
        "cosine_0_1": unit[0] @ unit[1],
        "reconstruction_mean": reconstruction.mean(),
        "reconstruction_std": reconstruction.std(),
        "recon_loss": (reconstruction - frames).square().mean(),
    }
    for name, value in ours.items():
        if name in golden:
            sheet.close(name, value, torch.tensor(golden[name]), Bound(absolute=1e-5, relative=1e-5))
    sheet.same("reconstruction_shape", list(reconstruction.shape), golden["reconstruction_shape"])
    samples = golden["reconstruction_samples"]
    values = torch.stack([reconstruction[tuple(sample["index"])] for sample in samples])
    sheet.close("reconstruction_samples", values, torch.tensor([sample["value"] for sample in samples]), FORWARD)


def _recipe_weight(name: str, parameter: Tensor) -> Tensor:
    z = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(tuple(parameter.shape))
    offset = 1.0 if z.ndim == 1 and name.endswith(".weight") else 0.0
    return torch.from_numpy((offset + 0.02 * z).astype(np.float32))
