"""Weights of a configuration: listed, pulled from a real HTTP server, verified, converted, cached per node."""

from __future__ import annotations

import hashlib
import json
import resource
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
import typer
import yaml
from safetensors.torch import load_file
from typer.testing import CliRunner

from lrag_ray.cli import weights as cli
from lrag_ray.config.load import load_config
from lrag_ray.config.prompts import make_prompt
from lrag_ray.config.schema import RunConfig
from lrag_ray.errors import WeightsError
from lrag_ray.pipelines.evaluate import evaluate as run
from lrag_ray.retrieval.encoder import EncoderConfig, LatentAutoencoder
from lrag_ray.stages.backbone import load_generator, weights_identity
from lrag_ray.store.address import Storage
from lrag_ray.wan.checkpoint import load_transformer
from lrag_ray.wan.lora import Lora, lora_targets
from lrag_ray.weights.convert import convert
from lrag_ray.weights.local import local_copy, record_at, sizes_at
from lrag_ray.weights.loras import lora_identity
from lrag_ray.weights.needs import Need, needs_of
from lrag_ray.weights.pull import pull
from lrag_ray.weights.verify import verify
from tests.conftest import REPOSITORY
from tests.tiny import CONFIG, tiny_transformer
from tests.waiting import wait_until
from tests.weights.hub import COMMIT, Hub

RAG = "qixinhu11/LongLive-RAG/checkpoints"
CHUNK_BYTES = 10 * 1024 * 1024
"""huggingface_hub writes in pieces of this size; what is less is fetched again."""


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "node-cache"
    monkeypatch.setenv("LRAG_WEIGHTS_CACHE", str(folder))
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    return folder


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with Hub().serve() as serving:
        monkeypatch.setenv("HF_ENDPOINT", serving.endpoint)
        yield serving


def checkpoint(path: Path, lora: Path | None = None) -> None:
    """A generator as published: EMA with FSDP names beside other weights, and a LoRA."""
    model = tiny_transformer()
    ema = {f"model._fsdp_wrapped_module.{name}": value for name, value in model.state_dict().items()}
    plain = {f"model.{name}": torch.zeros_like(value) for name, value in model.state_dict().items()}
    torch.save({"generator": plain, "generator_ema": ema}, path)
    if lora is not None:
        halves = {}
        for name, layer in lora_targets(model).items():
            halves[f"base_model.model.{name}.lora_A.weight"] = torch.randn(2, layer.in_features)
            halves[f"base_model.model.{name}.lora_B.weight"] = torch.randn(layer.out_features, 2)
        torch.save({"generator_lora": halves}, lora)


def config_of(tmp_path: Path, folder: str, **weights: Any) -> RunConfig:
    """A run whose generator and retrieval encoder are in `folder`, with the published names."""
    sizes = {name: getattr(CONFIG, name) for name in ("dim", "ffn_dim", "freq_dim", "text_dim", "text_len")}
    text = {
        "run": {"uri": str(tmp_path / "run")},
        "prompts": {"count": 1},
        "durations_s": [3],
        "backbones": {
            "sf": {
                "preset": "tiny",
                "transformer": {**sizes, "num_heads": CONFIG.num_heads, "num_layers": CONFIG.num_layers},
                "weights": {"path": f"{folder}/self_forcing.pt", "use_ema": True, **weights},
            }
        },
        "methods": {"rag": {"encoder": f"{folder}/ae_latent_mem.pt"}},
    }
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(text), encoding="utf-8")
    return load_config(file)


def need_of(config: RunConfig, kind: str) -> Need:
    return next(need for need in needs_of(config) if need.kind == kind)


def test_table2_needs_every_published_file_once() -> None:
    needs = needs_of(load_config(REPOSITORY / "configs" / "table2.yaml"))
    assert [(need.kind, need.name) for need in needs] == [
        ("transformer", "self_forcing.pt"),
        ("text_encoder", "models_t5_umt5-xxl-enc-bf16.pth"),
        ("tokenizer", "umt5-xxl"),
        ("vae", "Wan2.1_VAE.pth"),
        ("transformer", "causal_forcing.pt"),
        ("transformer", "longlive_base.pt"),
        ("lora", "longlive_lora.pt"),
        ("retrieval_encoder", "ae_latent_mem.pt"),
        ("prompts", "moviegenbench_128_refined.txt"),
    ]
    assert all(need.published is not None for need in needs)
    vae = needs[3]
    assert vae.keys == tuple(f"backbones.{name}.vae.path" for name in ("self_forcing", "causal_forcing", "longlive"))
    assert vae.published is not None and vae.published.size_bytes == 507_609_880


def test_a_pull_survives_a_dropped_connection_and_records_digests(hub: Hub, tmp_path: Path) -> None:
    """Given a connection that breaks midway, the rest alone is asked for, and what arrived is recorded."""
    content = b"PK" + bytes(range(256)) * 50_000
    hub.files[f"{RAG}/self_forcing.pt"] = content
    hub.cut_after[f"{RAG}/self_forcing.pt"] = 12_000_000
    need = need_of(config_of(tmp_path, str(tmp_path / "w")), "transformer")

    assert pull(need).pulled
    assert (tmp_path / "w" / "self_forcing.pt").read_bytes() == content
    assert hub.ranges == [None, f"bytes={CHUNK_BYTES}-"]
    record = record_at(need.address)
    assert record is not None and record.commit == COMMIT
    assert record.files["self_forcing.pt"].sha256 == hashlib.sha256(content).hexdigest()
    # Nothing but the file and its record stays.
    assert sorted(p.name for p in (tmp_path / "w").iterdir()) == ["self_forcing.pt", "self_forcing.pt.pulled.json"]

    assert not pull(need).pulled
    assert len(hub.ranges) == 2, "what is complete is not fetched again"


def test_a_pull_that_was_killed_goes_on_in_another_process(hub: Hub, tmp_path: Path) -> None:
    content = b"PK" + bytes(range(256)) * 50_000
    hub.files[f"{RAG}/self_forcing.pt"] = content
    hub.stall_after[f"{RAG}/self_forcing.pt"] = 12_000_000
    config_of(tmp_path, str(tmp_path / "w"))
    program = """
import sys
from lrag_ray.config.load import load_config
from lrag_ray.config.prompts import make_prompt
from lrag_ray.weights.needs import needs_of
from lrag_ray.weights.pull import pull
pull(needs_of(load_config(sys.argv[1]))[0])
"""
    command = [sys.executable, "-c", program, str(tmp_path / "config.yaml")]
    killed = subprocess.Popen(command, cwd=REPOSITORY)
    try:
        part = tmp_path / "w" / f"self_forcing.pt.{hashlib.sha256(content).hexdigest()[:16]}.part"
        wait_until(lambda: part.exists() and part.stat().st_size >= CHUNK_BYTES)
    finally:
        killed.kill()
        killed.wait()
    assert not (tmp_path / "w" / "self_forcing.pt").exists()
    subprocess.run(command, cwd=REPOSITORY, check=True)
    assert hub.ranges == [None, f"bytes={CHUNK_BYTES}-"]
    assert (tmp_path / "w" / "self_forcing.pt").read_bytes() == content


def test_a_failing_hub_is_told(hub: Hub, tmp_path: Path) -> None:
    hub.files[f"{RAG}/self_forcing.pt"] = b"x"
    hub.closed = True
    with pytest.raises(WeightsError, match="the same command continues from there"):
        pull(need_of(config_of(tmp_path, str(tmp_path / "w")), "transformer"))


def test_content_of_another_digest_is_thrown_away(hub: Hub, tmp_path: Path) -> None:
    hub.files["Wan-AI/Wan2.1-T2V-1.3B/Wan2.1_VAE.pth"] = b"not the VAE"
    config = config_of(tmp_path, str(tmp_path / "w"))
    need = Need("vae", ("backbones.sf.vae.path",), str(tmp_path / "w" / "Wan2.1_VAE.pth"), config.backbones["sf"])
    with pytest.raises(WeightsError, match="expected 38071ab5"):
        pull(need)
    assert not list((tmp_path / "w").iterdir())


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"<html>log in to the network</html>", "a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:7c\nsize 5676\n", "Git LFS pointer"),
    ],
)
def test_a_page_in_place_of_weights_is_thrown_away(hub: Hub, tmp_path: Path, content: bytes, said: str) -> None:
    hub.files[f"{RAG}/self_forcing.pt"] = content
    with pytest.raises(WeightsError, match=f"{said}(.|\\n)*thrown away"):
        pull(need_of(config_of(tmp_path, str(tmp_path / "w")), "transformer"))
    assert not list((tmp_path / "w").iterdir())


def test_a_page_in_place_of_prompts_is_thrown_away(hub: Hub, tmp_path: Path) -> None:
    hub.files[f"{RAG}/moviegenbench_128_refined.txt"] = b"<!DOCTYPE html><title>login</title>"
    need = Need("prompts", ("prompts.path",), str(tmp_path / "w" / "moviegenbench_128_refined.txt"), None)
    with pytest.raises(WeightsError, match="a web page"):
        pull(need)
    hub.files[f"{RAG}/moviegenbench_128_refined.txt"] = b"<- a fox, seen from the left\n"
    assert pull(need).pulled


def test_a_disk_without_room_is_no_matter_of_the_network(hub: Hub, tmp_path: Path) -> None:
    hub.files[f"{RAG}/self_forcing.pt"] = b"PK" + bytes(60_000)
    need = need_of(config_of(tmp_path, str(tmp_path / "w")), "transformer")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    # Past its limit a file gives EFBIG, as a full disk gives ENOSPC; Python ignores the signal.
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))
    try:
        with pytest.raises(WeightsError, match=r"self_forcing\.pt cannot be written: .*make room"):
            pull(need)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert pull(need).pulled


def test_a_token_goes_to_the_hub(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    hub.files[f"{RAG}/self_forcing.pt"] = b"PK"
    pull(need_of(config_of(tmp_path, str(tmp_path / "w")), "transformer"))
    assert set(hub.tokens) == {"Bearer hf_secret"}


def test_without_network_the_error_says_which_file_to_put_where(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    need = need_of(config_of(tmp_path, str(tmp_path / "w")), "retrieval_encoder")
    with pytest.raises(WeightsError) as refused:
        pull(need)
    message = str(refused.value)
    assert "qixinhu11/LongLive-RAG checkpoints/ae_latent_mem.pt" in message
    assert f"put it at {tmp_path / 'w' / 'ae_latent_mem.pt'}" in message
    monkeypatch.setenv("HF_ENDPOINT", "http://me:hunter2@127.0.0.1:9")
    with pytest.raises(WeightsError, match="cannot be fetched") as refused:
        pull(need)
    assert "hunter2" not in str(refused.value)


def test_a_name_that_is_not_published_is_refused(tmp_path: Path) -> None:
    need = need_of(config_of(tmp_path, str(tmp_path), path=str(tmp_path / "mine.pt")), "transformer")
    with pytest.raises(WeightsError, match=r"nothing is published under the name 'mine\.pt'"):
        pull(need)


def test_a_bucket_is_filled_and_every_node_copies_it_once(
    hub: Hub, tmp_path: Path, s3_bucket: str, cache: Path
) -> None:
    """Given weights pulled to a bucket, processes of a node share one local copy, until the original changes."""
    encoder = EncoderConfig(spatial_h=16, spatial_w=16, latent_dim=8, hidden_dims=(8,))
    torch.save(
        {"config": {**vars(encoder), "hidden_dims": [8]}, "model": LatentAutoencoder(encoder).state_dict()},
        tmp_path / "ae.pt",
    )
    hub.files[f"{RAG}/ae_latent_mem.pt"] = (tmp_path / "ae.pt").read_bytes()
    need = need_of(config_of(tmp_path, f"{s3_bucket}/{tmp_path.name}"), "retrieval_encoder")
    assert pull(need).pulled
    assert not pull(need).pulled
    assert verify(need).ok

    copies: list[Path] = []
    threads = [threading.Thread(target=lambda: copies.append(local_copy(need.address))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(copies) == 4 and len(set(copies)) == 1
    written = copies[0].stat().st_mtime_ns
    assert local_copy(need.address).stat().st_mtime_ns == written
    assert not list(cache.rglob("*.part")) and not list((cache / "landing").rglob("*.pt"))

    bucket = Storage(f"{s3_bucket}/{tmp_path.name}")
    bucket.write("ae_latent_mem.pt", b"damaged")
    with pytest.raises(WeightsError, match="arrived differently"):
        local_copy(need.address)
    bucket.remove("ae_latent_mem.pt")
    with pytest.raises(WeightsError, match="holds nothing"):
        local_copy(need.address)


def test_folders_in_a_bucket_are_copied_whole(tmp_path: Path, s3_bucket: str) -> None:
    bucket = Storage(f"{s3_bucket}/{tmp_path.name}")
    for name in ("umt5-xxl/tokenizer.json", "umt5-xxl/deep/a.txt", "umt5-xxl.pulled.json", "umt5-xxl-other/b"):
        bucket.write(name, name.encode())
    address = f"{s3_bucket}/{tmp_path.name}/umt5-xxl"
    assert set(sizes_at(address)) == {"tokenizer.json", "deep/a.txt"}
    copy = local_copy(address)
    assert copy.name == "umt5-xxl"
    assert (copy / "deep" / "a.txt").read_bytes() == b"umt5-xxl/deep/a.txt"
    assert sorted(p.name for p in copy.rglob("*") if p.is_file()) == ["a.txt", "tokenizer.json"]


def test_verify_tells_fit_damage_and_absence(hub: Hub, tmp_path: Path) -> None:
    checkpoint(tmp_path / "source.pt")
    hub.files[f"{RAG}/self_forcing.pt"] = (tmp_path / "source.pt").read_bytes()
    config = config_of(tmp_path, str(tmp_path / "w"))
    need = need_of(config, "transformer")
    assert "published as qixinhu11/LongLive-RAG" in verify(need).detail
    pull(need)
    verdict = verify(need)
    assert verdict.ok and "tensors fit" in verdict.detail and "sha256 as recorded" in verdict.detail

    larger = config_of(tmp_path, str(tmp_path / "w")).backbones["sf"]
    grown = Need(
        "transformer",
        need.keys,
        need.address,
        larger.model_copy(update={"transformer": CONFIG.__class__(**{**vars(CONFIG), "ffn_dim": 48})}),
    )
    assert "set transformer sizes to those of the file (ffn_dim: 32)" in verify(grown).detail

    file = tmp_path / "w" / "self_forcing.pt"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    assert "It is damaged or another file" in verify(need).detail
    assert verify(need, digests=False).ok, "shapes alone do not show a flipped bit"


def test_verify_looks_at_values_where_it_reads_them(tmp_path: Path) -> None:
    config = config_of(tmp_path, str(tmp_path), lora={"path": str(tmp_path / "lora.pt"), "rank": 2, "alpha": 2})
    checkpoint(tmp_path / "self_forcing.pt", tmp_path / "lora.pt")
    needs = [need_of(config, "transformer"), need_of(config, "lora")]
    assert all(verify(need, sizes=False).ok for need in needs)
    for need, key in zip(needs, ("generator_ema", "generator_lora"), strict=True):
        content = torch.load(need.address, weights_only=True)
        next(iter(content[key].values())).view(-1)[0] = float("nan")
        torch.save(content, need.address)
        assert verify(need, digests=False, sizes=False).ok, "the header alone does not show it"
        verdict = verify(need, sizes=False)
        assert not verdict.ok and "holds NaN or infinite values in 1 of" in verdict.detail


def test_a_link_that_leads_nowhere_is_told_and_hides_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "self_forcing.pt").symlink_to("self_forcing.pt")
    config = config_of(tmp_path, str(tmp_path))
    assert "is a symbolic link that leads to itself" in verify(need_of(config, "transformer")).detail
    assert [sizes_at(need.address) for need in needs_of(config)] == [{}, {}]


def test_a_run_with_weights_that_do_not_fit_is_refused_before_anything_starts(tmp_path: Path) -> None:
    (tmp_path / "self_forcing.pt").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:7c\nsize 5676\n")
    (tmp_path / "ae_latent_mem.pt").write_text("<html>not found</html>")
    config = config_of(tmp_path, str(tmp_path))
    with pytest.raises(WeightsError, match=r"Git LFS pointer(.|\n)*web page(.|\n)*Nothing was started"):
        run(config, [make_prompt(0, "a red fox")])
    assert not ray.is_initialized()
    # The digests of such files must not become what the run is.
    assert not (tmp_path / "run" / "run.json").exists()


def test_what_is_not_there_cannot_be_converted_and_is_told_with_its_source(tmp_path: Path) -> None:
    need = need_of(config_of(tmp_path, str(tmp_path / "w")), "transformer")
    with pytest.raises(WeightsError, match=r"nothing at .*; it is published as .*Fix: `lrag-ray weights pull CONFIG`"):
        convert(need, tmp_path / "converted")


def test_converted_generator_is_the_same_bit_for_bit(tmp_path: Path) -> None:
    checkpoint(tmp_path / "self_forcing.pt", tmp_path / "lora.pt")
    lora = {"path": str(tmp_path / "lora.pt"), "rank": 2, "alpha": 4.0}
    config = config_of(tmp_path, str(tmp_path), lora=lora)
    conversion = convert(need_of(config, "transformer"), tmp_path / "out")
    assert conversion is not None
    assert conversion.settings == {
        "backbones.sf.weights.path": str(tmp_path / "out" / "self_forcing-sf.safetensors"),
        "backbones.sf.weights.use_ema": False,
        "backbones.sf.weights.lora": None,
    }
    original = load_transformer(
        tmp_path / "self_forcing.pt",
        CONFIG,
        use_ema=True,
        dtype=torch.float32,
        lora=Lora(tmp_path / "lora.pt", 2, 4.0),
    ).state_dict()
    converted = load_transformer(conversion.target, CONFIG, dtype=torch.float32).state_dict()
    assert original.keys() == converted.keys()
    assert all(torch.equal(value, converted[name]) for name, value in original.items())
    # What is printed is what the configuration takes.
    overrides = [f"{key}={json.dumps(value)}" for key, value in conversion.settings.items()]
    reloaded = load_config(tmp_path / "config.yaml", overrides).backbones["sf"].weights
    assert reloaded.path == str(conversion.target) and reloaded.lora is None and not reloaded.use_ema


def test_the_public_surface_is_this() -> None:
    """Adding a command or an option is a change of the public surface: say so here. Removing one breaks scripts."""
    found = {
        name: [p.metavar if p.param_type_name == "argument" else p.opts[0] for p in command.params]
        for name, command in typer.main.get_command(cli.weights).commands.items()  # type: ignore[attr-defined]
    }
    assert found == {
        "list": ["CONFIG", "--suite", "--folder", "--set", "--json"],
        "pull": ["CONFIG", "--suite", "--folder", "--set", "--again", "--json"],
        "verify": ["CONFIG", "--suite", "--folder", "--set", "--digests", "--json"],
        "convert": ["CONFIG", "--to", "--set", "--json"],
    }
    for name in found:
        shown = CliRunner().invoke(cli.weights, [name, "--help"]).output
        assert f"lrag-ray weights {name} " in shown.partition("Example")[2]


def test_commands(hub: Hub, tmp_path: Path) -> None:
    app = typer.Typer()
    cli.register(app)
    runner = CliRunner()
    checkpoint(tmp_path / "source.pt")
    hub.files[f"{RAG}/self_forcing.pt"] = (tmp_path / "source.pt").read_bytes()
    config_of(tmp_path, str(tmp_path / "w"))
    file = str(tmp_path / "config.yaml")

    listed = json.loads(runner.invoke(app, ["weights", "list", file, "--json"]).stdout)["needs"]
    assert [(row["kind"], row["present_bytes"]) for row in listed] == [
        ("transformer", None),
        ("retrieval_encoder", None),
    ]
    pulled = runner.invoke(app, ["weights", "pull", file, "--json"])
    rows = json.loads(pulled.stdout)["pulled"]
    assert pulled.exit_code == 3, "the encoder is not on this hub"
    assert rows[0]["error"] is None and "ae_latent_mem.pt cannot be fetched" in rows[1]["error"]
    avg_pool = ["--set", "methods.rag={descriptor: avg_pool}"]
    assert runner.invoke(app, ["weights", "pull", file, *avg_pool]).exit_code == 0
    verified = runner.invoke(app, ["weights", "verify", file, *avg_pool])
    assert verified.exit_code == 0 and verified.stdout.startswith("ok")
    converted = runner.invoke(app, ["weights", "convert", file, "--to", str(tmp_path / "out"), *avg_pool])
    assert converted.exit_code == 0 and "--set backbones.sf.weights.path=" in converted.stdout


def test_the_identity_of_a_run_holds_the_strength_of_its_lora(tmp_path: Path) -> None:
    """Rank and alpha are resolved from the file, so that the same strength is the same run however it was written."""
    folder = tmp_path / "w"
    folder.mkdir()
    checkpoint(folder / "self_forcing.pt", folder / "lora.pt")

    def identity(**lora: Any) -> dict[str, Any]:
        config = config_of(tmp_path, str(folder), lora={"path": str(folder / "lora.pt"), **lora})
        found: dict[str, Any] = weights_identity(config.backbones["sf"].weights)["lora"]
        return found

    resolved = identity()
    assert (resolved["rank"], resolved["alpha"]) == (2, 2.0)
    assert resolved == identity(rank=2, alpha=2) == identity(alpha=2.0)
    assert (identity(alpha=256)["rank"], identity(alpha=256)["alpha"]) == (2, 256.0), "as runs before had it stored"
    (folder / "adapter_config.json").write_text(json.dumps({"r": 2, "lora_alpha": 8}))
    assert identity() == resolved | {"alpha": 8.0}


def test_a_lora_in_a_bucket_keeps_the_settings_beside_it(tmp_path: Path) -> None:
    folder = tmp_path / "w"
    folder.mkdir()
    checkpoint(folder / "self_forcing.pt", folder / "lora.pt")
    bucket = Storage("memory://adapters/one")
    bucket.put_file(folder / "lora.pt", "lora.pt")
    bucket.write("adapter_config.json", json.dumps({"r": 2, "lora_alpha": 6}).encode())
    config = config_of(tmp_path, str(folder), lora={"path": "memory://adapters/one/lora.pt"})
    lora = config.backbones["sf"].weights.lora
    assert lora is not None
    assert lora_identity(lora)["alpha"] == 6.0
    verdict = verify(need_of(config, "lora"))
    assert verdict.ok and "20 layers, rank 2, scale 3" in verdict.detail, verdict.detail


def test_loading_verifying_and_converting_agree_on_a_lora_without_alpha(tmp_path: Path) -> None:
    folder = tmp_path / "w"
    folder.mkdir()
    checkpoint(folder / "self_forcing.pt", folder / "lora.pt")
    config = config_of(tmp_path, str(folder), lora={"path": str(folder / "lora.pt")})
    assert "scale 1)" in verify(need_of(config, "lora")).detail
    done = convert(need_of(config, "transformer"), tmp_path / "converted")
    assert done is not None
    halves = torch.load(folder / "lora.pt")["generator_lora"]
    before, layer = tiny_transformer().state_dict(), "blocks.0.self_attn.q"
    update = halves[f"base_model.model.{layer}.lora_B.weight"] @ halves[f"base_model.model.{layer}.lora_A.weight"]
    dtype = getattr(torch, config.backbones["sf"].dtype)
    expected = (before[f"{layer}.weight"] + update).to(dtype)
    torch.testing.assert_close(load_file(done.target)[f"{layer}.weight"], expected, atol=1e-6, rtol=1e-6)
    loaded = load_generator(config.backbones["sf"], torch.device("cpu"), config.engine.kernels).state_dict()
    torch.testing.assert_close(loaded[f"{layer}.weight"], expected, atol=1e-6, rtol=1e-6)
