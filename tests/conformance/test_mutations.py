"""A check that cannot fail is worthless: every change of a golden file must show, in the row that it belongs to."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, cast

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lrag_ray.conformance import checkpoints
from lrag_ray.conformance.verify import failed, verify_path
from lrag_ray.wan.checkpoint import generator_weights
from lrag_ray.wan.config import WanConfig
from lrag_ray.wan.transformer import CausalWanTransformer

Change = Callable[[Path], None]


def tensor(file: str, name: str, change: Callable[[Tensor], None]) -> Change:
    """Edit one tensor of a safetensors file in place."""

    def apply(folder: Path) -> None:
        content = load_file(folder / file)
        change(content[name])
        save_file(content, folder / file)

    return apply


def nudge(by: float, at: int = 7) -> Callable[[Tensor], None]:
    """Add to one value."""

    def change(x: Tensor) -> None:
        x.view(-1)[min(at, x.numel() - 1)] += by

    return change


def all_equal(value: int) -> Callable[[Tensor], None]:
    """Set all values."""

    def change(x: Tensor) -> None:
        x.fill_(value)

    return change


def entry(file: str, value: Any, *path: str | int) -> Change:
    """Set one entry of a JSON file."""

    def apply(folder: Path) -> None:
        content = json.loads((folder / file).read_text())
        place: Any = content
        above, last = path[:-1], cast(Any, path[-1])
        for key in above:
            place = place[key]
        if isinstance(place, list) or last in place:
            assert place[last] != value, "the mutation changes nothing"
        place[last] = value
        (folder / file).write_text(json.dumps(content))

    return apply


class Mutation(NamedTuple):
    """Changes, and the rows that must fail because of them."""

    sources: str
    """Space-separated patterns of the golden files that are copied."""
    changes: dict[str, Change]
    """Changes by the beginning of the row that must fail; ``*`` is the row of an exception."""


SHIFT = "scheduler/shift5.*"
AE = "encoder/tiny_ae.*"
RAG = "rollout/e_rag_block1.* rollout/weights_dim48.*"
RAG_AE = "rollout/c_rag_ae.* rollout/weights_dim48.* rollout/ae_tiny.*"
NATIVE = "rollout/a_native.* rollout/weights_dim48.*"
UNITS = "rollout/units.* rollout/weights_dim*"
BASE = "methods/self_forcing/sf_window12_sink0.* methods/tiny/*"
INFINITY = "methods/infinity_rope/inf_window6_sink1.* methods/tiny/*"
DEEP = "methods/deep_forcing/df_native_w21_s10_n16_r4.* methods/tiny/*"
MEMFLOW = "methods2/memflow/mf_w9_s1_b3_r1.* methods2/tiny/*"
DUMMY = "methods2/per_head/dummy_forcing/dummy_sf_ar1_c1_d6.* methods2/per_head/tiny/*"
FORCING_KV = "methods2/per_head/forcing_kv/fkv_sf_ar1.* methods2/per_head/tiny/*"
ROLLING = "methods2/rolling_forcing/roll_48.* methods2/tiny/*"
FRAMEWISE = "methods2/framewise/fw_2step_first4_w12_s1.* methods2/framewise/tiny/*"
CHECKPOINTS = "checkpoints/*"
LORA = "lora/*"
VAE = "vae/tiny_vae.*"
TEXT = "text_encoder/*"


def shift_tensor(name: str, change: Callable[[Tensor], None]) -> Change:
    return tensor("scheduler/shift5.safetensors", name, change)


def ae_tensor(name: str, by: float) -> Change:
    return tensor("encoder/tiny_ae.safetensors", name, nudge(by))


def unit(name: str, by: float) -> Change:
    return tensor("rollout/units.safetensors", name, nudge(by))


def in_rag(value: Any, *path: str | int) -> Change:
    return entry("rollout/e_rag_block1.json", value, *path)


def rag_tensor(name: str, by: float = 1e-3) -> Change:
    return tensor("rollout/e_rag_block1.safetensors", name, nudge(by))


def in_meta(stem: str, value: Any, *path: str | int) -> Change:
    return entry(f"methods/{stem}.meta.json", value, *path)


def method_tensor(stem: str, name: str, by: float = 1e-2) -> Change:
    return tensor(f"methods/{stem}.safetensors", name, nudge(by))


FRAMEWISE_STEM = "methods2/framewise/fw_2step_first4_w12_s1"


def memflow(name: str, by: float) -> Change:
    return tensor("methods2/memflow/mf_w9_s1_b3_r1.safetensors", name, nudge(by))


DUMMY_STEM = "methods2/per_head/dummy_forcing/dummy_sf_ar1_c1_d6"
ROLLING_STEM = "methods2/rolling_forcing/roll_48"
FORCING_KV_STEM = "methods2/per_head/forcing_kv/fkv_sf_ar1"


def framewise(name: str) -> Change:
    return tensor(f"{FRAMEWISE_STEM}.safetensors", name, nudge(1e-2))


BASE_STEM = "self_forcing/sf_window12_sink0"
INFINITY_STEM = "infinity_rope/inf_window6_sink1"
DEEP_STEM = "deep_forcing/df_native_w21_s10_n16_r4"
LATE = "debug.late.step1.layer0"


def corrupt_checkpoint(folder: Path) -> None:
    """Add a tensor to a file that the record calls complete."""
    content = torch.load(folder / "checkpoints/ckpt_generator.pt", weights_only=True)
    content["generator"]["model.blocks.0.ffn.1.weight"] = torch.zeros(1)
    torch.save(content, folder / "checkpoints/ckpt_generator.pt")


MUTATIONS = {
    "scheduler tensors": Mutation(
        SHIFT,
        {
            "sigmas": shift_tensor("sigmas", nudge(1e-7, 997)),
            "x0_from_flow_bf16": shift_tensor("x0_from_flow_bf16", nudge(2**-7)),
            "timestep_index": shift_tensor("timestep_index", nudge(1)),
            "training_weight_at_t": shift_tensor("training_weight_at_t", nudge(1e-4)),
            "warped [1000, 500]": entry("scheduler/shift5.json", [1000.0, 833.4], "warped", "[1000, 500]"),
        },
    ),
    "memflow": Mutation(
        MEMFLOW,
        {
            "attended k": memflow("attended.block11.pass4.layer2.k", 1e-2),
            "attended v": memflow("attended.block11.pass4.layer0.v", 1e-2),
            "bank scores": memflow("memflow.block9.layer1.scores", 1e-2),
            "kept bank frames": memflow("memflow.block9.layer1.kept_slots", 1),
        },
    ),
    "dummy forcing": Mutation(
        DUMMY,
        {
            "attended k": tensor(f"{DUMMY_STEM}.safetensors", "attended.block11.pass4.layer2.head3.k", nudge(1e-2)),
            "attended v": tensor(f"{DUMMY_STEM}.safetensors", "attended.block11.pass4.layer0.head1.v", nudge(1e-2)),
            "head scores": tensor(f"{DUMMY_STEM}.safetensors", "dummy.scores", nudge(1e-2)),
            "classes of heads": tensor(f"{DUMMY_STEM}.safetensors", "dummy.assignment", nudge(1)),
            "context trace heads": entry(f"{DUMMY_STEM}.context_trace.json", [0], -1, "heads"),
            "origin tokens": tensor(
                f"{DUMMY_STEM}.context_tokens.safetensors", "ctx.block11.pass0.layer1.head2.origin_token", nudge(1)
            ),
        },
    ),
    "dummy forcing samples": Mutation(
        DUMMY, {"head scores": tensor(f"{DUMMY_STEM}.safetensors", "dummy.sampled_rows", all_equal(5))}
    ),
    "forcing kv": Mutation(
        FORCING_KV,
        {
            "patch scores": tensor(f"{FORCING_KV_STEM}.safetensors", "fkv.block8.patch_scores", nudge(1e-2)),
            "kept patches": tensor(f"{FORCING_KV_STEM}.safetensors", "fkv.block8.selected", nudge(1, at=5)),
            "context trace": entry(f"{FORCING_KV_STEM}.context_trace.json", [0, 1], -1, "heads"),
            "temporal indices": tensor(
                f"{FORCING_KV_STEM}.context_tokens.safetensors",
                "ctx.block11.pass4.layer2.head0.temporal_index",
                nudge(1),
            ),
        },
    ),
    "forcing kv heads": Mutation(
        FORCING_KV, {"latents": entry(f"{FORCING_KV_STEM}.meta.json", [0], "settings", "static_heads", 1)}
    ),
    "rolling forcing": Mutation(
        ROLLING,
        {
            "x0_pred": tensor(f"{ROLLING_STEM}.safetensors", "x0_pred", nudge(1e-2)),
            "attended k": tensor(f"{ROLLING_STEM}.safetensors", "attended.window14.joint.layer1.k", nudge(1e-2)),
            "attended v": tensor(f"{ROLLING_STEM}.safetensors", "attended.window14.clean.layer2.v", nudge(1e-2)),
            "first_frame of calls": entry(f"{ROLLING_STEM}.context_trace.json", 30, 20, "first_frame"),
            "groups of calls": entry(f"{ROLLING_STEM}.context_trace.json", [], 20, "groups"),
            "timesteps of calls": entry(f"{ROLLING_STEM}.context_trace.json", 900.0, 21, "timesteps", 2),
            "temporal indices": tensor(
                f"{ROLLING_STEM}.context_tokens.safetensors", "ctx.window14.joint.layer0.temporal_index", nudge(1)
            ),
        },
    ),
    "frame-wise": Mutation(
        FRAMEWISE,
        {
            "x0_pred_first_block": framewise("x0_pred_first_block"),
            "x0_pred_other_blocks": framewise("x0_pred_other_blocks"),
            "attended k": framewise("attended.block35.pass2.layer0.k"),
        },
    ),
    "frame-wise steps": Mutation(
        FRAMEWISE,
        {"latents": entry(f"{FRAMEWISE_STEM}.meta.json", 900.0, "timesteps_first_block", 1)},
    ),
    "scheduler shift": Mutation(SHIFT, {"timesteps": entry("scheduler/shift5.json", 5.01, "shift")}),
    "scheduler variant": Mutation(SHIFT, {"sigma_min": entry("scheduler/shift5.json", 0.003, "sigma_min")}),
    "encoder numbers": Mutation(
        AE,
        {
            "encode_raw": ae_tensor("encode_raw", 1e-4),
            "gradients": ae_tensor("grad.encoder.fc.weight", 1e-2),
            "trained weights": ae_tensor("trained.encoder.fc.weight", 1e-3),
            "losses": entry("encoder/tiny_ae.json", 0.0020, "losses", "delta"),
            "parameter_count": entry("encoder/tiny_ae.json", 14665, "parameter_count"),
        },
    ),
    "encoder weights": Mutation(AE, {"encode_normalized": ae_tensor("weights.encoder.fc.bias", 1e-3)}),
    "encoder margin": Mutation(AE, {"losses": entry("encoder/tiny_ae.json", 0.8, "ae_config", "delta_margin")}),
    "encoder window": Mutation(AE, {"losses": entry("encoder/tiny_ae.json", 2, "ae_config", "delta_window")}),
    "encoder rate": Mutation(AE, {"step 0 losses after": entry("encoder/tiny_ae.json", 4e-4, "training", "lr")}),
    "encoder decay": Mutation(AE, {"trained weights": entry("encoder/tiny_ae.json", 0.5, "training", "weight_decay")}),
    "encoder default": Mutation(
        "encoder/ae_config_fields.json",
        {"default latent_dim": entry("encoder/ae_config_fields.json", 512, "defaults", "latent_dim")},
    ),
    "rollout numbers": Mutation(
        RAG,
        {
            "output": rag_tensor("output"),
            "descriptors": rag_tensor("descriptors"),
            "debug flow": rag_tensor("debug.block5.context.flow"),
            "debug x0": rag_tensor("debug.block5.step2.x0"),
            "late query_roped": rag_tensor(f"{LATE}.query_roped"),
            "late key_roped": rag_tensor(f"{LATE}.key_roped"),
            "late value": rag_tensor(f"{LATE}.value"),
            "retrieved similarities": in_rag(0.95, "memory_indices_log", 2, "selected_similarities", 0, 2),
        },
    ),
    "rollout choices": Mutation(
        RAG,
        {
            "retrieved frames": in_rag([[3, 1, 2]], "memory_indices_log", 2, "selected_global_frames"),
            "history size": in_rag(6, "memory_indices_log", 2, "num_evicted"),
            "attention map": in_rag(1, "attention_map", 9, "keys_all_passes", 0, 1, 2),
            "query indices": in_rag([6], "attention_map", 17, "query_rope"),
        },
    ),
    "rollout lost log": Mutation(RAG, {"retrieved frames": in_rag([], "memory_indices_log")}),
    "rollout noise": Mutation(RAG, {"output": rag_tensor("noise", 0.1)}),
    "rollout renoise": Mutation(RAG, {"output": rag_tensor("renoise", 0.1)}),
    "rollout prompt": Mutation(RAG, {"output": rag_tensor("prompt_embeds", 0.1)}),
    "rollout K": Mutation(RAG, {"output": in_rag(2, "case", "model_kwargs", "memory_size")}),
    "rollout R": Mutation(RAG, {"output": in_rag(1, "case", "model_kwargs", "recent_exclude")}),
    "rollout sink": Mutation(RAG, {"output": in_rag(2, "case", "model_kwargs", "sink_size")}),
    "rollout window": Mutation(RAG, {"output": in_rag(7, "case", "model_kwargs", "local_attn_size")}),
    "rollout impossible": Mutation(RAG, {"*": in_rag(1, "case", "model_kwargs", "local_attn_size")}),
    "rollout model": Mutation(RAG, {"output": in_rag(False, "case", "model_kwargs", "use_latentmem")}),
    "rollout context noise": Mutation(RAG, {"output": in_rag(100, "case", "context_noise")}),
    "rollout unwarped": Mutation(RAG, {"timesteps": in_rag(False, "case", "warp")}),
    "rollout shift": Mutation(RAG, {"timesteps": in_rag(5.5, "case", "model_kwargs", "timestep_shift")}),
    "rollout steps": Mutation(RAG, {"timesteps": in_rag([1000, 750, 500, 249], "case", "denoising_step_list")}),
    "rollout descriptor": Mutation(
        RAG_AE,
        {"descriptors": entry("rollout/c_rag_ae.json", "avg_pool", "case", "model_kwargs", "compression_method")},
    ),
    "rollout encoder": Mutation(
        RAG_AE, {"*": entry("rollout/c_rag_ae.json", "absent.pt", "case", "model_kwargs", "ae_ckpt")}
    ),
    "rollout native": Mutation(
        NATIVE, {"output": entry("rollout/a_native.json", True, "case", "model_kwargs", "use_latentmem")}
    ),
    "units": Mutation(
        UNITS,
        {
            "rope.hd24.start_frame_7": unit("rope.hd24.start_frame_7", 1e-4),
            "time.embedding48": unit("time.embedding48", 1e-4),
            "rmsnorm": unit("rmsnorm.out", 1e-4),
            "forward.dim64": unit("forward.dim64.after_block1", 1e-3),
            "forward.dim48": tensor("rollout/weights_dim48.safetensors", "blocks.2.ffn.0.weight", nudge(1.0)),
        },
    ),
    "methods numbers": Mutation(
        BASE,
        {
            "latents": method_tensor(BASE_STEM, "latents"),
            "x0_pred": method_tensor(BASE_STEM, "x0_pred"),
            "kv_cache k": method_tensor(BASE_STEM, "kv_cache.2.k"),
            "kv_cache v": method_tensor(BASE_STEM, "kv_cache.1.v"),
        },
    ),
    "methods timesteps of the case": Mutation(BASE, {"latents": in_meta(BASE_STEM, 900.0, "timesteps", 1)}),
    "methods sink": Mutation(BASE, {"latents": in_meta(BASE_STEM, 1, "settings", "sink")}),
    "methods method": Mutation(BASE, {"kv_cache k": in_meta(BASE_STEM, "infinity_rope", "settings", "method")}),
    "methods unknown setting": Mutation(BASE, {"*": in_meta(BASE_STEM, 3, "settings", "windows")}),
    "methods sampler": Mutation(
        BASE, {"timesteps of the inputs": entry("methods/tiny/config.json", 8.0, "sampler", "timestep_shift")}
    ),
    "methods rows": Mutation(
        INFINITY,
        {
            "context trace": entry(f"methods/{INFINITY_STEM}.context_trace.json", 5, 9, "groups", 1, 1),
            "query indices": entry(f"methods/{INFINITY_STEM}.context_trace.json", [3, 4, 6], 9, "query_index"),
            "kv_cache k": method_tensor(INFINITY_STEM, "kv_cache.0.k"),
            "temporal indices": tensor(
                f"methods/{INFINITY_STEM}.context_tokens.safetensors",
                "ctx.block11.pass0.layer1.temporal_index",
                nudge(1),
            ),
        },
    ),
    "deep forcing rows": Mutation(
        DEEP,
        {
            "selected tokens": method_tensor(DEEP_STEM, "pc.block9.layer1.selected_aug_index", 1),
            "origin tokens": tensor(
                f"methods/{DEEP_STEM}.context_tokens.safetensors",
                "ctx.block11.pass4.layer2.origin_token",
                nudge(1, 250),
            ),
        },
    ),
    "deep forcing recent": Mutation(DEEP, {"selected tokens": in_meta(DEEP_STEM, 5, "settings", "recent")}),
    "checkpoints": Mutation(
        CHECKPOINTS,
        {
            "use_ema=true (": tensor("checkpoints/expected_weights.safetensors", "ema.head.head.bias", nudge(1e-6)),
            "use_ema=false": corrupt_checkpoint,
        },
    ),
    "lora numbers": Mutation(
        LORA,
        {
            "lora_rank4_lora_raw merged": tensor(
                "lora/lora_rank4_merged_changed_weights.safetensors", "blocks.1.ffn.0.weight", nudge(1e-4)
            ),
            "base outputs": tensor("lora/lora_rank4_outputs.safetensors", "base.pass1.flow", nudge(1e-3)),
        },
    ),
    "lora alpha": Mutation(LORA, {"lora_rank4_lora_wrapped outputs": entry("lora/lora_rank4.json", 5, "alpha")}),
    "lora window": Mutation(
        LORA, {"lora_rank4_lora_raw outputs": entry("lora/lora_rank4.json", 4, "model_kwargs", "local_attn_size")}
    ),
    "lora rank": Mutation(LORA, {"*": entry("lora/lora_rank4.json", 3, "rank")}),
    "vae": Mutation(
        VAE,
        {
            "decode_raw": tensor("vae/tiny_vae.safetensors", "decode_raw", nudge(1e-3, 5000)),
            "encode_btchw": tensor("vae/tiny_vae.safetensors", "encode_btchw", nudge(1e-3)),
            "decode_chunk3": tensor("vae/tiny_vae.safetensors", "decode_chunk3_btchw", nudge(1e-3, 5000)),
        },
    ),
    "text padding": Mutation(
        TEXT,
        {
            "output_padding_zeroed": tensor(
                "text_encoder/tiny_umt5.safetensors", "output_padding_zeroed", nudge(1e-3, 700)
            )
        },
    ),
}


def copy(golden: Path, sources: str, target: Path) -> Path:
    """Copy golden files, keeping their folders."""
    for pattern in sources.split():
        for file in golden.glob(pattern):
            place = target / file.relative_to(golden)
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, place)
    if not target.is_dir():
        pytest.skip(f"no golden vectors like {sources} in {golden}")
    return target


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_changed_golden_file_fails(golden: Path, tmp_path: Path, name: str) -> None:
    mutation = MUTATIONS[name]
    folder = copy(golden, mutation.sources, tmp_path / "golden")
    for change in mutation.changes.values():
        change(folder)
    results = verify_path(folder)
    assert failed(results)
    wrong = [row.tensor for row in results if row.status == "fail"]
    missed = [row for row in mutation.changes if not any(tensor.startswith(row) for tensor in wrong)]
    assert missed == []


def test_a_lenient_loader_fails(golden: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = copy(golden, CHECKPOINTS, tmp_path / "golden")

    def lenient(path: Path, config: WanConfig, *, use_ema: bool, dtype: torch.dtype) -> CausalWanTransformer:
        """Load as the public code does: gaps stay random, strangers are ignored."""
        transformer = CausalWanTransformer(config).to(dtype)
        weights = {k: v for k, v in generator_weights(path, use_ema=use_ema).items() if v.shape != (63,)}
        transformer.load_state_dict(weights, strict=False)
        return transformer

    monkeypatch.setattr(checkpoints, "load_transformer", lenient)
    fooled = {row.case for row in verify_path(folder) if row.status == "fail"}
    corrupt = {"missing_key", "ema_missing_key", "unexpected_key", "wrong_shape"}
    assert fooled == {f"ckpt_corrupt_{how}" for how in corrupt}


def renamed(folder: Path, golden: Path) -> None:
    """The same vectors under names that tell nothing."""
    copy(golden, RAG + " " + SHIFT, folder)
    (folder / "scheduler").rename(folder / "rollouts")
    for file in (folder / "rollouts").iterdir():
        file.rename(file.with_name("tables" if file.suffix == ".json" else "numbers").with_suffix(file.suffix))
    (folder / "rollout").rename(folder / "42")
    for file in (folder / "42").glob("e_rag_block1.*"):
        file.rename(file.with_name(f"shift5{file.suffix}"))


def test_names_do_not_matter(golden: Path, tmp_path: Path) -> None:
    renamed(tmp_path / "x", golden)
    results = verify_path(tmp_path / "x")
    assert {(row.folder, row.status) for row in results} == {("42", "pass"), ("rollouts", "pass")}
    assert {"output", "sigmas"} <= {row.tensor for row in results}


@pytest.mark.parametrize("sources", [SHIFT, AE, RAG, UNITS, BASE, LORA, TEXT])
def test_unchanged_copies_pass(golden: Path, tmp_path: Path, sources: str) -> None:
    results = verify_path(copy(golden, sources, tmp_path / "elsewhere"))
    assert results
    assert not failed(results)
