from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from lrag_ray.config.load import config_keys, load_config, load_job
from lrag_ray.config.methods import resolve_method
from lrag_ray.config.presets import PRESETS
from lrag_ray.context.memrope import MemRopeSettings
from lrag_ray.context.rag import RagSettings
from lrag_ray.errors import ConfigError
from tests.config.make import SMALL, write

REPOSITORY = Path(__file__).resolve().parents[2]

KEYS = """
job preset run run.uri run.seed prompts prompts.path prompts.column prompts.limit prompts.count prompts.samples
prompts.refine prompts.refine.attempts prompts.refine.backend prompts.refine.base_url prompts.refine.concurrency
prompts.refine.key_env prompts.refine.language prompts.refine.max_calls prompts.refine.max_tokens
prompts.refine.max_total_tokens prompts.refine.max_wait_s prompts.refine.model prompts.refine.on_failure
prompts.refine.price_per_million_input prompts.refine.price_per_million_output prompts.refine.requests_per_minute
prompts.refine.retries prompts.refine.seed prompts.refine.temperature prompts.refine.template prompts.refine.timeout_s
durations_s independent_durations
backbones backbones.* backbones.*.preset backbones.*.label backbones.*.transformer backbones.*.transformer.dim
backbones.*.transformer.ffn_dim backbones.*.transformer.freq_dim backbones.*.transformer.text_dim
backbones.*.transformer.text_len backbones.*.transformer.in_dim backbones.*.transformer.out_dim
backbones.*.transformer.num_heads backbones.*.transformer.num_layers backbones.*.transformer.patch_size
backbones.*.transformer.eps backbones.*.sampler backbones.*.sampler.denoising_steps backbones.*.sampler.warp
backbones.*.sampler.shift backbones.*.sampler.context_timestep backbones.*.sampler.frames_per_block
backbones.*.sampler.first_block_denoising_steps
backbones.*.weights backbones.*.weights.path backbones.*.weights.use_ema backbones.*.weights.lora
backbones.*.weights.lora.path backbones.*.weights.lora.rank backbones.*.weights.lora.alpha
backbones.*.weights.random_seed backbones.*.weights.builtin
backbones.*.latent backbones.*.latent.channels backbones.*.latent.height
backbones.*.latent.width backbones.*.dtype backbones.*.products backbones.*.text_encoder backbones.*.text_encoder.kind
backbones.*.text_encoder.path backbones.*.text_encoder.tokenizer backbones.*.vae backbones.*.vae.kind
backbones.*.vae.path backbones.*.vae.dtype backbones.*.vae.channels_last backbones.*.vae.fused_norm
backbones.*.fail_on_prompt
methods methods.* methods.*.method methods.*.preset methods.*.adaptive methods.*.alpha methods.*.alpha_long
methods.*.alpha_short methods.*.bank methods.*.first_overflow methods.*.record_interval
methods.*.ar_start methods.*.local_blocks methods.*.num_dummy methods.*.static_frames methods.*.dynamic_frames
methods.*.anchor
methods.*.patch_frames methods.*.patches_per_frame methods.*.retention methods.*.compress methods.*.static_heads
methods.*.admission methods.*.budget methods.*.choose methods.*.compression
methods.*.descriptor methods.*.descriptor_dtype methods.*.encoder methods.*.first_sink_offset methods.*.max_reuse
methods.*.recent methods.*.recent_exclude methods.*.sink methods.*.top_k methods.*.window
engine engine.address engine.actors engine.actors.min engine.actors.max engine.cpus_per_actor engine.gpus_per_actor
engine.threads_per_actor engine.attention engine.fused_rows engine.fused_layers
engine.prompts_per_pass
engine.max_attempts engine.bank engine.bank.device_gb engine.bank.host_gb engine.bank.disk methods.*.history
engine.checkpoint_every_blocks engine.stall_timeout_s engine.lease_ttl_s resume resume.on
storage storage.endpoint_url storage.region storage.profile storage.attempts storage.retry_for_s
storage.connect_timeout_s storage.read_timeout_s
video video.enabled video.crf video.fps video.cold_chunk
scoring scoring.suite scoring.settings scoring.settings.*
scoring.mode scoring.dimensions scoring.weights scoring.precision scoring.early_stop
scoring.batch_frames scoring.batch_pairs scoring.controls scoring.workers scoring.cpus_per_worker
scoring.gpus_per_worker scoring.during_generation
watch watch.metrics watch.metrics_linger_s watch.tensorboard watch.tensorboard.folder watch.wandb watch.wandb.project
watch.wandb.entity watch.wandb.name watch.wandb.mode watch.wandb.folder watch.mlflow watch.mlflow.tracking_uri
watch.mlflow.experiment watch.mlflow.name watch.on_end watch.on_end.webhook watch.on_end.webhook_from
watch.on_end.token_from watch.on_end.command watch.on_end.timeout_s watch.on_end.attempts
"""


def problems(folder: Path, text: str, *overrides: str) -> list[str]:
    """The lines of the error, without the folder."""
    path = write(folder, text)
    with pytest.raises(ConfigError) as caught:
        load_config(path, list(overrides))
    lines = str(caught.value).replace(f"{folder}/", "").split("\n  ")
    return lines[1:] if len(lines) > 1 else lines


def changed(old: str, new: str) -> str:
    assert old in SMALL
    return SMALL.replace(old, new)


def test_the_public_keys_are_these() -> None:
    """Adding a key is a change of the public surface: say so here. Removing one breaks users' files."""
    assert sorted(config_keys()) == sorted(KEYS.split())


def test_as_released_is_a_default_everywhere_and_what_is_given_wins(tmp_path: Path) -> None:
    released = load_config(write(tmp_path), ["preset=as_released"])
    assert released.video.cold_chunk == 60
    assert released.backbones["tiny"].vae.dtype == "bfloat16"
    assert resolve_method(released.methods["rag"]).settings.descriptor_dtype == "bfloat16"
    assert released.methods["base"].settings == {}
    given = ["video.cold_chunk=null", "methods.rag.descriptor_dtype=float32", "backbones.tiny.vae={dtype: float32}"]
    config = load_config(write(tmp_path), ["preset=as_released", *given])
    assert config.video.cold_chunk is None
    assert config.backbones["tiny"].vae.dtype == "float32"
    assert resolve_method(config.methods["rag"]).settings.descriptor_dtype == "float32"
    plain = load_config(write(tmp_path))
    assert (plain.video.cold_chunk, plain.backbones["tiny"].vae.dtype) == (None, "float32")


def test_methods_are_checked_against_the_sizes_of_the_generator(tmp_path: Path) -> None:
    """Given settings that count heads, layers or tokens of another generator, the place and the fix are named."""
    (line,) = problems(tmp_path, SMALL, "methods.d={method: dummy_forcing, num_dummy: 7}")
    assert "methods.d: num_dummy 7 exceeds the 6 heads of 3 layers: lower it" in line
    (line,) = problems(tmp_path, SMALL, "methods.f={method: forcing_kv, static_heads: [[0], [1]]}")
    assert "methods.f: static_heads has 2 layers, the generator 3" in line
    given = "methods.f={method: forcing_kv, static_heads: [[0], [], [0, 1]]}"
    settings = resolve_method(load_config(write(tmp_path), [given]).methods["f"]).settings
    assert settings.static_heads == ((0,), (), (0, 1)), "a list of lists is no sweep"


def test_a_method_takes_the_settings_of_its_own_release(tmp_path: Path) -> None:
    """Given preset: released, they are the defaults of that method alone, and what is given wins."""
    own = ["methods.memrope={preset: released}", "methods.mine={method: memrope, preset: released, sink: 2}"]
    config = load_config(write(tmp_path), own)
    assert resolve_method(config.methods["memrope"]).settings == MemRopeSettings(12, 3, first_overflow="released")
    assert resolve_method(config.methods["mine"]).settings == MemRopeSettings(12, 2, first_overflow="released")
    budget = load_config(write(tmp_path), ["preset=as_released", "methods.memrope={}", "methods.rolling_sink={}"])
    assert resolve_method(budget.methods["memrope"]).settings == MemRopeSettings(first_overflow="released")
    assert resolve_method(budget.methods["rolling_sink"]).settings.window == 12, "the budget is the paper's"
    assert problems(tmp_path, SMALL, "methods.rag.preset=released") == [
        "--set methods.rag.preset=released: methods.rag.preset: method 'rag' has no released settings here"
    ]


def test_steps_of_the_first_block_are_checked_like_the_others(tmp_path: Path) -> None:
    config = load_config(write(tmp_path), ["backbones.tiny.sampler.first_block_denoising_steps=[1000, 500]"])
    assert config.backbones["tiny"].sampler.first_block_denoising_steps == (1000, 500)
    (line,) = problems(tmp_path, SMALL, "backbones.tiny.sampler.first_block_denoising_steps=[2000]")
    assert "first_block_denoising_steps [2000] must be in 0..1000" in line


def test_a_small_file_is_completed_by_its_preset(tmp_path: Path) -> None:
    config = load_config(write(tmp_path))
    tiny = config.backbones["tiny"]
    assert tiny.label == "tiny, untrained"
    assert tiny.weights.random_seed == 0
    assert tiny.transformer.dim == PRESETS["tiny"]["transformer"]["dim"]
    assert tiny.sampler.denoising_steps == (1000, 750, 500, 250)
    assert [method.method for method in config.methods.values()] == ["base", "rag"]
    assert resolve_method(config.methods["rag"]).settings == RagSettings(descriptor="avg_pool")


def test_overrides_come_after_the_file_and_before_the_preset(tmp_path: Path) -> None:
    config = load_config(
        write(tmp_path),
        ["backbones.tiny.transformer.num_layers=4", "methods.rag.top_k=2", "methods.more={method: base, window: 6}"],
    )
    assert config.backbones["tiny"].transformer.num_layers == 4
    assert config.backbones["tiny"].transformer.dim == PRESETS["tiny"]["transformer"]["dim"]
    assert resolve_method(config.methods["rag"]).settings.top_k == 2
    assert resolve_method(config.methods["more"]).settings.window == 6


def test_a_preset_can_be_chosen_by_an_override(tmp_path: Path) -> None:
    config = load_config(write(tmp_path), ["backbones.tiny.preset=self_forcing"])
    assert config.backbones["tiny"].transformer.dim == 1536
    assert config.backbones["tiny"].weights.use_ema


@pytest.mark.parametrize("name", sorted(path.name for path in (REPOSITORY / "configs").glob("*.yaml")))
def test_every_shipped_configuration_loads(name: str) -> None:
    load_job(REPOSITORY / "configs" / name)


def test_paths_stay_as_they_are_written(tmp_path: Path) -> None:
    config = load_config(write(tmp_path), ["prompts.path=../other/p.txt", "run.uri=s3://bucket/run"])
    assert (config.prompts.path, config.run.uri) == ("../other/p.txt", "s3://bucket/run")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("durations_s: ", "duration_s: ", "run.yaml:4: duration_s: unknown key; did you mean 'durations_s'?"),
        (
            "uri: runs/small}",
            "uri: runs/small, sead: 1}",
            "run.yaml:2: run.sead: unknown key; did you mean 'seed'?",
        ),
        (
            "{preset: tiny}",
            "{preset: tiny, transformer: {num_layer: 2}}",
            "run.yaml:6: backbones.tiny.transformer.num_layer: unknown key; did you mean 'num_layers'?",
        ),
        (
            "{preset: tiny}",
            "{preset: tiny, sampler: {steps: 2}}",
            "run.yaml:6: backbones.tiny.sampler.steps: unknown key; valid: denoising_steps, warp, shift, "
            "context_timestep, frames_per_block, first_block_denoising_steps",
        ),
        (
            "{descriptor: avg_pool}",
            "{descriptor: avg_pool, topk: 3}",
            "run.yaml:9: methods.rag.topk: unknown key; did you mean 'top_k'?",
        ),
        (
            "base: {}",
            "base: {top_k: 3}",
            "run.yaml:8: methods.base.top_k: unknown key; valid: window, sink",
        ),
        (
            "engine: {actors: 2}",
            "limit: 8",
            "run.yaml:10: limit: unknown key here; did you mean 'prompts.limit'?",
        ),
        (
            "engine: {actors: 2}",
            "engine: {actors: two}",
            "run.yaml:10: engine.actors: expected a whole number, per_gpu or {min: a, max: b}, got text 'two'",
        ),
        (
            "engine: {actors: 2}",
            "engine: {actors: '2'}",
            "run.yaml:10: engine.actors: expected a whole number, per_gpu or {min: a, max: b}, got text '2'",
        ),
        (
            "engine: {actors: 2}",
            "engine: {actors: true}",
            "run.yaml:10: engine.actors: expected a whole number, per_gpu or {min: a, max: b}, got true",
        ),
        ("engine: {actors: 2}", "engine: {actors: 0}", "run.yaml:10: engine.actors: must be at least 1, got 0"),
        (
            "engine: {actors: 2}",
            "engine: {prompts_per_pass: 17}",
            "run.yaml:10: engine.prompts_per_pass: must be at most 16, got 17",
        ),
        (
            "engine: {actors: 2}",
            "engine: {cpus_per_actor: .inf}",
            "run.yaml:10: engine.cpus_per_actor: expected a finite number, got Infinity",
        ),
        (
            "engine: {actors: 2}",
            "engine: {actors: {min: 3, max: 2}}",
            "run.yaml:10: engine.actors: min 3 must be at least 1 and at most max 2",
        ),
        (
            "engine: {actors: 2}",
            "engine: {actors: {min: 3}}",
            "run.yaml:10: engine.actors: expected {min: a, max: b} with two whole numbers",
        ),
        (
            "engine: {actors: 2}",
            "engine: {actors: per_gpu}",
            "run.yaml:10: engine: actors: per_gpu needs gpus_per_actor above 0; on CPUs use a number or "
            "{min: a, max: b}",
        ),
        (
            "engine: {actors: 2}",
            "engine: {gpus_per_actor: 1.5}",
            "run.yaml:10: engine: gpus_per_actor 1.5: a share above 1 must be a whole number of GPUs",
        ),
        (
            "engine: {actors: 2}",
            "engine: {attention: flsh}",
            "run.yaml:10: engine.attention: expected 'auto', 'flash', 'cudnn', 'efficient' or 'math', got text 'flsh'; "
            "did you mean 'flash'?",
        ),
        (
            "engine: {actors: 2}",
            "engine: {attention: cudnn}",
            "run.yaml:10: engine.attention: is cudnn, which runs on GPUs alone, for backbones.tiny with "
            "engine.gpus_per_actor 0: use auto",
        ),
        (
            "engine: {actors: 2}",
            "engine: {attention: flash, gpus_per_actor: 1}",
            "run.yaml:10: engine.attention: is flash, which computes in bfloat16 and float16, not in float32, for "
            "backbones.tiny with engine.gpus_per_actor 1: use auto",
        ),
        ("engine: {actors: 2}", "engine:", "run.yaml:10: engine: expected a section (key: value), got null (nothing)"),
        (
            "engine: {actors: 2}",
            "video: {enabled: yes}",
            "run.yaml:10: video.enabled: expected true or false, got text 'yes'",
        ),
        (
            "engine: {actors: 2}",
            "scoring: {suite: previw}",
            "run.yaml:10: scoring.suite: expected 'judge', 'none', 'preview', 'vbench_long', 'world' or "
            "package.module:Suite, got text 'previw'; did you mean 'preview'?",
        ),
        (
            "{descriptor: avg_pool}",
            "{descriptor: avgpool}",
            "run.yaml:9: methods.rag.descriptor: expected 'ae' or 'avg_pool', got text 'avgpool'; did you mean "
            "'avg_pool'?",
        ),
        (
            "{preset: tiny}",
            "{preset: tinny}",
            "run.yaml:6: backbones.tiny.preset: unknown preset 'tinny'; did you mean 'tiny'?",
        ),
        (
            "{preset: tiny}",
            "{preset: tiny, weights: {random_seed: 1, path: x.pt}}",
            "run.yaml:6: backbones.tiny.weights: give exactly one of path (a checkpoint), random_seed (a random "
            "recipe) and builtin (weights that come with the package)",
        ),
        (
            "{preset: tiny}",
            "{preset: tiny, transformer: {dim: 63}}",
            "run.yaml:6: backbones.tiny.transformer: dim 63 is not a multiple of num_heads 2",
        ),
        (
            "{preset: tiny}",
            "{preset: tiny, products: fp8, transformer: {ffn_dim: 120}}",
            "run.yaml:6: backbones.tiny.products: is fp8, which needs a dim and an ffn_dim that are multiples of 16, "
            "not 64 and 120: use exact",
        ),
        (
            "{preset: tiny}",
            "{preset: tiny, latent: {height: 13}}",
            "run.yaml:6: backbones.tiny: latent frame 13x16 is not a multiple of the patch 2x2",
        ),
        (
            "{preset: tiny}",
            "{preset: tiny, latent: {channels: 8}}",
            "run.yaml:6: backbones.tiny: latent.channels 8 must equal transformer.in_dim 16 and transformer.out_dim 16",
        ),
        (
            "{preset: tiny}",
            "{preset: tiny, vae: {kind: wan}}",
            "run.yaml:6: backbones.tiny.vae: kind wan needs path (Wan2.1_VAE.pth or a Diffusers folder)",
        ),
        (
            "base: {}",
            "basic: {}",
            "run.yaml:8: methods.basic.method: is missing; 'basic' is none of the methods base, rolling_sink, "
            "ema_sink, infinity_rope, deep_forcing, memrope, memflow, rag, dummy_forcing, forcing_kv, rolling_forcing",
        ),
        (
            "base: {}",
            "b: {method: bass}",
            "run.yaml:8: methods.b.method: unknown method 'bass'; did you mean 'base'? Known: base, rolling_sink, "
            "ema_sink, infinity_rope, deep_forcing, memrope, memflow, rag, dummy_forcing, forcing_kv, "
            "rolling_forcing, or package.module:Policy",
        ),
        (
            "base: {}",
            "b: {method: 'no_such_package:Policy'}",
            "run.yaml:8: methods.b.method: method 'no_such_package:Policy': cannot import 'no_such_package' (No module "
            "named 'no_such_package'); is it on PYTHONPATH?",
        ),
        (
            "{descriptor: avg_pool}",
            "{}",
            "run.yaml:9: methods.rag.encoder: is missing: descriptor ae needs the checkpoint of a retrieval encoder; "
            "name it, or set descriptor: avg_pool",
        ),
        (
            "base: {}",
            "'a/b': {method: base}",
            "run.yaml:8: methods.a/b: a name has 1 to 64 letters, digits, '_', '.' or '-' and begins with a letter or "
            "digit",
        ),
        ("[4.5, 9]", "[]", "run.yaml:4: durations_s: must hold at least 1, got an empty list"),
        ("[4.5, 9]", "[9, 9]", "run.yaml:4: durations_s: durations [9.0, 9.0] hold a duplicate"),
        ("[4.5, 9]", "[-1]", "run.yaml:4: durations_s: duration -1.0 s must be above 0 and at most 3600"),
        (
            "prompts: {path: prompts.txt}",
            "prompts: {limit: 3}",
            "run.yaml:3: prompts: give path (a file with one prompt a line), or count to plan without a file",
        ),
        ("run: {uri: runs/small}\n", "", "run.yaml: run: is missing"),
        ("{uri: runs/small}", "{seed: 1}", "run.yaml:2: run.uri: is missing"),
        (
            "job: evaluate",
            "job: evalute",
            "run.yaml:1: job: unknown job 'evalute'; did you mean 'evaluate'?",
        ),
    ],
)
def test_a_mistake_is_named_with_its_line_key_path_and_fix(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert problems(tmp_path, changed(old, new)) == [message]


@pytest.mark.parametrize("uri", ["~/runs", "$HOME/runs", "${RUNS}/a"])
def test_nothing_is_expanded_silently(tmp_path: Path, uri: str) -> None:
    [line] = problems(tmp_path, changed("runs/small", f"'{uri}'"))
    assert line.startswith(f"run.yaml:2: run.uri: '{uri}' holds ~ or a variable, which configuration files do not")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            "{descriptor: avg_pool, window: 9, top_k: 6}",
            "window 9 leaves 2 latent frames for local context after sink 1 and top_k 6, but a block has 3: raise "
            "window to at least 10 or lower the others",
        ),
        (
            "{method: base, window: 3, sink: 1}",
            "window 3 leaves 2 latent frames for local context after sink 1, but a block has 3: raise window to at "
            "least 4 or lower the others",
        ),
        ("{descriptor: avg_pool, window: -2}", "window -2 must be -1 (all frames) or at least 1 latent frame"),
        (
            "{method: deep_forcing, recent: 2}",
            "recent 2 must be at least a block's 3 latent frames",
        ),
    ],
)
def test_a_window_without_room_for_a_block_is_refused(tmp_path: Path, settings: str, message: str) -> None:
    assert problems(tmp_path, changed("{descriptor: avg_pool}", settings)) == [f"run.yaml:9: methods.rag: {message}"]


def test_the_window_of_all_frames_is_exempt(tmp_path: Path) -> None:
    load_config(write(tmp_path, changed("{descriptor: avg_pool}", "{descriptor: avg_pool, window: -1, top_k: 0}")))


def test_absolute_indices_end_at_the_released_table(tmp_path: Path) -> None:
    text = changed("[4.5, 9]", "[255, 257]")
    [line] = problems(tmp_path, text)
    assert line == (
        "run.yaml:8: methods.base: 257 s are 1029 latent frames, but this method counts frames from the first one and "
        "the generator's table of temporal rotations ends at 1024: at most 255.75 s"
    )
    load_config(write(tmp_path, text.replace("  base: {}\n", "")))


def test_all_problems_are_told_at_once_each_with_its_place(tmp_path: Path) -> None:
    text = (
        changed("uri: runs/small}", "uri: runs/small, sead: 1}")
        .replace("{preset: tiny}", "{preset: tiny, dtyp: float32}")
        .replace("{descriptor: avg_pool}", "{topk: 1}")
        .replace("base: {}", "b: {method: rags}")
    )
    lines = problems(tmp_path, text, "engine.actors=none", "prompts.limt=3", "nothing")
    assert lines == [
        "--set nothing: an override is written a.b=value",
        "run.yaml:2: run.sead: unknown key; did you mean 'seed'?",
        "--set prompts.limt=3: prompts.limt: unknown key; did you mean 'limit'?",
        "run.yaml:6: backbones.tiny.dtyp: unknown key; did you mean 'dtype'?",
        "--set engine.actors=none: engine.actors: expected a whole number, per_gpu or {min: a, max: b}, got text "
        "'none'",
        "run.yaml:8: methods.b.method: unknown method 'rags'; did you mean 'rag'? Known: base, rolling_sink, "
        "ema_sink, infinity_rope, deep_forcing, memrope, memflow, rag, dummy_forcing, forcing_kv, "
        "rolling_forcing, or package.module:Policy",
        "run.yaml:9: methods.rag.topk: unknown key; did you mean 'top_k'?",
    ]


def test_secrets_in_addresses_are_refused_and_never_repeated(tmp_path: Path) -> None:
    for uri in ("s3://me:hunter2@bucket/run", "ftp://token-hunter2@host/run"):
        for lines in (problems(tmp_path, changed("runs/small", uri)), problems(tmp_path, SMALL, f"run.uri={uri}")):
            assert len(lines) == 1 and "holds credentials before an @" in lines[0]
            assert "hunter2" not in lines[0]
    (line,) = problems(tmp_path, SMALL, "backbones.tiny.weights.path=https://me:hunter2@host/generator.pt")
    assert "holds credentials before an @" in line and "hunter2" not in line
    (line,) = problems(tmp_path, SMALL, "methods.rag={encoder: s3://me:hunter2/key@bucket/encoder.pt}")
    assert "methods.rag: encoder holds credentials before an @" in line and "hunter2" not in line


def test_an_address_of_a_cluster_holds_host_and_port_alone(tmp_path: Path) -> None:
    for address in ("me:hunter2@10.0.0.1:6379", "ray://me:hunter2@10.0.0.1:10001", "http://10.0.0.1:8265"):
        (line,) = problems(tmp_path, SMALL, f"engine.address={address}")
        assert "engine.address: must be auto, local or host:port, without credentials" in line and "hunter2" not in line
    (line,) = problems(tmp_path, SMALL, "run.uri=s3://KEY:123/hunter2@bucket/run")
    assert "holds credentials before an @" in line and "hunter2" not in line


def test_a_method_from_outside_is_checked_by_its_own_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "outside_method.py").write_text(
        "from dataclasses import dataclass\n"
        "from lrag_ray.context.infinity_rope import InfinityRope\n"
        "from lrag_ray.context.base import BaseSettings\n"
        "@dataclass(frozen=True)\n"
        "class Settings(BaseSettings):\n"
        "    stride: int = 2\n"
        "class Outside(InfinityRope):\n"
        "    Settings = Settings\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    text = changed("base: {}", "o: {method: 'outside_method:Outside', stride: 3}")
    assert resolve_method(load_config(write(tmp_path, text)).methods["o"]).settings.stride == 3
    assert problems(tmp_path, text.replace("stride: 3", "strid: 3")) == [
        "run.yaml:8: methods.o.strid: unknown key; did you mean 'stride'?"
    ]


def test_a_schema_is_read_without_torch() -> None:
    program = "import sys; import lrag_ray.config.schema; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
