"""Embeddings of a stored run: page, data, refusals."""

from __future__ import annotations

import io
import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from typer.testing import CliRunner

from lrag_ray.bench.retrieval import bench_retrieval
from lrag_ray.cli.app import app
from lrag_ray.context.rag import RagSettings
from lrag_ray.errors import LragError, UsageError
from lrag_ray.pipelines.dataset_import import import_dataset
from lrag_ray.pipelines.embeddings import inspect_embeddings
from lrag_ray.report.embeddings import short_names
from lrag_ray.retrieval.encoder import EncoderConfig
from lrag_ray.scoring.vbench_long import networks as networks_module
from lrag_ray.scoring.vbench_long.official import OFFICIAL
from lrag_ray.scoring.vbench_long.vit import VisionTransformer, VitConfig
from lrag_ray.store.dataset_rows import RunIndex
from lrag_ray.store.datasets import LatentDataset
from lrag_ray.store.rollouts import RolloutRun
from lrag_ray.training.checkpoint import checkpoint_bytes
from lrag_ray.training.loop import make_model
from lrag_ray.video.mp4 import read_video
from tests.training.corpus import SHAPE, make_corpus

SETTINGS = RagSettings(window=6, sink=1, top_k=2, recent_exclude=1, descriptor="avg_pool")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_corpus(tmp_path_factory.mktemp("corpus"), count=3)


def encoder(path: Path, shape: tuple[int, int, int] = SHAPE) -> str:
    sizes = EncoderConfig(*shape, 8, (8,))
    config = {**asdict(sizes), "hidden_dims": [8]}
    path.write_bytes(checkpoint_bytes({"config": config, "model": make_model(sizes, 0).state_dict()}))
    return str(path)


def test_every_descriptor_has_a_map_and_numbers(corpus: str, tmp_path: Path) -> None:
    names = ["avg_pool", encoder(tmp_path / "encoder.pt")]
    found = inspect_embeddings(corpus, names, most=2, to=str(tmp_path / "out"), settings=SETTINGS)
    assert [(each.descriptor, len(each.similarity)) for each in found.measures] == [(n, 24) for n in names * 2]
    for each in found.measures:
        np.testing.assert_allclose(np.diag(each.similarity), 1)
        assert each.by_distance[0] == pytest.approx(1)
        assert each.by_distance[5] == pytest.approx(np.diag(each.similarity, 5).mean())
        assert 6 <= each.retrieval.distance <= 24
    page = (tmp_path / "out" / found.files[0]).read_text()
    assert page.count('<svg class="map square"') == 4
    data = np.load(io.BytesIO((tmp_path / "out" / "similarity.npz").read_bytes()))
    np.testing.assert_array_equal(data["map_0"], found.measures[0].similarity)
    assert (tmp_path / "out" / "similarity.png").read_bytes().startswith(b"\x89PNG")
    assert len((tmp_path / "out" / "measures.csv").read_text().splitlines()) == 5


def moving_square(index: int, frames: int) -> NDArray[np.uint8]:
    """A bright square that crosses a dark, noisy picture [4 * frames - 3, 48, 80, 3]."""
    count = 4 * frames - 3
    noise = np.random.default_rng(index).integers(0, 60, (48, 80, 3), dtype=np.uint8)
    pictures = np.repeat(noise[None], count, axis=0)
    for t in range(count):
        left = t * 60 // count
        pictures[t, 10 + 6 * index : 30 + 6 * index, left : left + 20] = (250, 200 - 60 * index, 30)
    return pictures


def dino_by_hand(video: Path, weights: dict[str, torch.Tensor], indices: list[int], heads: int) -> NDArray[np.float64]:
    """CLS features [T, D] of the frames at `indices`: the DINO vision transformer in float64, written out."""
    w = {name: value.double() for name, value in weights.items()}
    x = torch.from_numpy(read_video(video)[indices]).permute(0, 3, 1, 2).double()
    x = F.interpolate(x, (224, int(224 * 80 / 48)), mode="bilinear", align_corners=False) / 255
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    x = (x - mean.double().view(3, 1, 1)) / std.double().view(3, 1, 1)
    rows, columns = x.shape[2] // 16, x.shape[3] // 16
    x = x[..., : 16 * rows, : 16 * columns].unfold(2, 16, 16).unfold(3, 16, 16)
    x = x.permute(0, 2, 3, 1, 4, 5).reshape(len(indices), rows * columns, -1)
    x = x @ w["patch_embed.proj.weight"].flatten(1).T + w["patch_embed.proj.bias"]
    square = w["pos_embed"][0, 1:].view(1, 14, 14, -1).permute(0, 3, 1, 2)
    scale = ((rows + 0.1) / 14, (columns + 0.1) / 14)
    places = F.interpolate(square, scale_factor=scale, mode="bicubic", recompute_scale_factor=False)
    x = x + places.permute(0, 2, 3, 1).flatten(1, 2)
    x = torch.cat([(w["cls_token"] + w["pos_embed"][:, :1]).expand(len(x), -1, -1), x], dim=1)

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        centred = x - x.mean(-1, keepdim=True)
        return (
            centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt() * w[f"{name}.weight"] + w[f"{name}.bias"]
        )

    def linear(x: torch.Tensor, name: str) -> torch.Tensor:
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    for block in range(sum(name.endswith("norm1.weight") for name in w)):
        at = f"blocks.{block}"
        q, k, v = linear(norm(x, f"{at}.norm1"), f"{at}.attn.qkv").unflatten(2, (3, heads, -1)).permute(2, 0, 3, 1, 4)
        attention = ((q @ k.mT) / q.shape[-1] ** 0.5).softmax(-1)
        x = x + linear((attention @ v).transpose(1, 2).flatten(2), f"{at}.attn.proj")
        hidden = linear(norm(x, f"{at}.norm2"), f"{at}.mlp.fc1")
        x = x + linear(hidden * (1 + torch.erf(hidden / 2**0.5)) / 2, f"{at}.mlp.fc2")
    return norm(x, "norm")[:, 0].numpy()


def test_the_dino_map_is_that_of_the_decoded_frames(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A small network in DINO's own file, real mp4 files, and the map computed by hand (paper, Figure 5)."""
    small = VitConfig(patch=16, grid=14, width=24, depth=2, heads=3)
    monkeypatch.setattr(networks_module, "DINO", small)
    network = VisionTransformer(small)
    generator = torch.Generator().manual_seed(5)
    weights = {}
    for name, value in network.state_dict().items():
        # Features of the picture, rather than of biases and of the class token.
        scale = 0.02 if name.endswith("bias") or name == "cls_token" else 0.6
        weights[name] = scale * torch.randn(value.shape, generator=generator) + ("norm" in name and "weight" in name)
    file = tmp_path / "networks" / OFFICIAL["dino_vitb16"].path
    file.parent.mkdir(parents=True)
    torch.save(weights, file)
    corpus = make_corpus(tmp_path / "corpus", count=2, frames=9, video=moving_square)

    arguments = ["inspect", "embeddings", corpus, "--descriptor", "dino", "--weights", str(tmp_path / "networks")]
    shown = CliRunner().invoke(app, [*arguments, "--to", str(tmp_path / "out"), "--json"])
    assert shown.exit_code == 0, shown.output
    found = np.load(tmp_path / "out" / "similarity.npz")
    videos = sorted((tmp_path / "corpus").rglob("*.mp4"))
    rollouts = LatentDataset.open(corpus).rollouts
    for index, entry in enumerate(rollouts):
        (video,) = [path for path in videos if entry.rollout in str(path)]
        features = dino_by_hand(video, weights, [4 * t for t in range(9)], heads=3)
        unit = features / np.linalg.norm(features, axis=1, keepdims=True)
        expected = unit @ unit.T
        assert expected.min() < 0.99, "the map would be flat"
        np.testing.assert_allclose(found[f"map_{index}"], expected, atol=1e-4)
    measures = json.loads(shown.output)["measures"]
    assert [each["descriptor"] for each in measures] == ["dino", "dino"]
    page = (tmp_path / "out" / "embeddings.html").read_text()
    assert page.count('<svg class="map square"') == 2

    whole = videos[0].read_bytes()
    videos[0].write_bytes(whole[:3000].ljust(len(whole), b"\0"))
    damaged = CliRunner().invoke(app, [*arguments, "--to", str(tmp_path / "damaged")])
    assert damaged.exit_code == 1 and "video" in damaged.stderr and "Traceback" not in damaged.output

    # With another size its commit does not count, so its latents are not in the dataset: named, whatever is measured.
    videos[0].write_bytes(whole[:3000])
    pooled = ["inspect", "embeddings", corpus, "--descriptor", "avg_pool", "--to", str(tmp_path / "pooled")]
    shown = CliRunner().invoke(app, pooled)
    assert shown.exit_code == 0 and len(np.load(tmp_path / "pooled" / "similarity.npz")["rollouts"]) == 1
    reason = f"{rollouts[0].rollout}/commit-9.json: names {videos[0].relative_to(corpus)}, which has 3000 bytes instead"
    assert f"left out: {corpus}/{reason}" in shown.stderr
    assert reason in json.loads(CliRunner().invoke(app, [*pooled, "--json"]).stdout)["left_out"][0]
    asked = CliRunner().invoke(app, [*pooled, "--prompt", "scene 0"])
    assert asked.exit_code == 2 and reason in asked.stderr
    # An index knows no videos.
    indexed = RunIndex(RolloutRun(corpus), RolloutRun(corpus).require())
    videos[0].write_bytes(whole)
    indexed.catch_up(RolloutRun(corpus).inventory(), print)
    videos[0].write_bytes(whole[:3000])
    refused = CliRunner().invoke(app, [*arguments, "--to", str(tmp_path / "damaged")])
    assert refused.exit_code == 3 and reason.replace(": names", " does not count: names") in refused.stderr


def test_hostile_prompts_are_escaped(tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path / "corpus", count=1)
    run = tmp_path / "corpus" / "run.json"
    run.write_text(run.read_text().replace("scene 0", "<script>alert(1)</script>"))
    try:
        inspect_embeddings(corpus, ["avg_pool"], to=str(tmp_path / "out"), settings=SETTINGS)
    except LragError:
        # The text is part of the rollout's key: such a run may also be refused.
        return
    assert "<script>" not in (tmp_path / "out" / "embeddings.html").read_text()


@pytest.mark.parametrize(
    ("descriptor", "prompts", "problem"),
    [
        ("absent.pt", [], "absent.pt"),
        ("dino", [], "lrag-ray decode"),
        ("avg_pool", ["no such thing"], "no prompt of"),
    ],
)
def test_what_cannot_be_measured_is_refused(corpus: str, descriptor: str, prompts: list[str], problem: str) -> None:
    with pytest.raises(LragError, match=problem):
        inspect_embeddings(corpus, [descriptor], prompts=prompts, networks="random")


def test_imported_latents_have_no_frames_for_dino(tmp_path: Path) -> None:
    (tmp_path / "latents").mkdir()
    torch.save(torch.zeros(8, *SHAPE), tmp_path / "latents" / "latent_000000.pt")
    import_dataset(str(tmp_path / "latents"), str(tmp_path / "imported"))
    with pytest.raises(UsageError, match="was imported and has no videos"):
        inspect_embeddings(str(tmp_path / "imported"), ["dino"], networks="random", to=str(tmp_path / "out"))


def test_latents_and_descriptors_that_are_not_finite_are_left_out_and_named(tmp_path: Path) -> None:
    source = tmp_path / "latents"
    source.mkdir()
    for index, value in enumerate((float("nan"), 1e36, 1.0)):
        latents = torch.rand(8, *SHAPE, generator=torch.Generator().manual_seed(index))
        latents[4] *= value
        torch.save(latents, source / f"latent_{index:06d}.pt")
    imported = str(tmp_path / "imported")
    import_dataset(str(source), imported)
    arguments = ["inspect", "embeddings", imported, "--to", str(tmp_path / "out"), "--descriptor"]
    shown = CliRunner().invoke(app, [*arguments, encoder(tmp_path / "encoder.pt"), "--rollouts", "1"])
    assert shown.exit_code == 0, shown.output
    assert "latent_000002.pt" in shown.stdout
    assert "latent_000000.pt: latents: 1 latent frame holds NaN or infinity, the first is frame 4" in shown.stderr
    assert "latent_000001.pt: descriptors of" in shown.stderr
    pooled = CliRunner().invoke(app, [*arguments, "avg_pool", "--rollouts", "1"])
    assert pooled.exit_code == 0 and "latent_000001.pt" in pooled.stdout
    (source / "latent_000001.pt").unlink()
    (source / "latent_000002.pt").unlink()
    import_dataset(str(source), str(tmp_path / "none"))
    refused = CliRunner().invoke(app, ["inspect", "embeddings", str(tmp_path / "none")])
    assert refused.exit_code == 2 and "nothing to measure" in refused.stderr and "latent_000000.pt" in refused.stderr


def test_an_encoder_of_another_shape_is_refused(corpus: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="for latents"):
        inspect_embeddings(corpus, [encoder(tmp_path / "other.pt", (16, 4, 4))])


def test_pictures_shorten_paths_as_far_as_they_stay_distinct() -> None:
    paths = ["/runs/a/checkpoints/best.pt", "/runs/b/checkpoints/best.pt"]
    assert list(short_names(["avg_pool", *paths]).values()) == [
        "avg_pool", "a/checkpoints/best.pt", "b/checkpoints/best.pt",
    ]  # fmt: skip
    moved = "/other/a/checkpoints/best.pt"
    assert list(short_names([paths[0], moved, paths[0]])) == [paths[0], moved]
    assert short_names([paths[0], moved])[moved] == "other/a/checkpoints/best.pt"


def test_the_command_prints_a_table_or_json(corpus: str, tmp_path: Path) -> None:
    arguments = ["inspect", "embeddings", corpus, "--descriptor", "avg_pool", "--to", str(tmp_path), "--rollouts", "1"]
    shown = CliRunner().invoke(app, arguments)
    assert shown.exit_code == 0 and "neighbours" in shown.output and "embeddings.html" in shown.output
    found = json.loads(CliRunner().invoke(app, [*arguments, "--json"]).output)
    assert found["measures"][0]["descriptor"] == "avg_pool"
    assert len(found["measures"][0]["by_distance"]) == 24
    assert found["measures"][0]["retrieval"]["distance"] is None or found["measures"][0]["retrieval"]["distance"] > 0
    assert "nan" not in shown.output
    nothing = CliRunner().invoke(app, [*arguments, "--window", "24"])
    page = (tmp_path / "embeddings.html").read_text()
    assert nothing.exit_code == 0 and "nan" not in nothing.output and ">–</td>" in page and ">nan<" not in page
    wrong = CliRunner().invoke(app, [*arguments, "--window", "1"])
    assert wrong.exit_code == 2


def test_the_bench_times_every_part() -> None:
    model = make_model(EncoderConfig(4, 6, 10, 8, (8,)), 0)
    found = bench_retrieval(
        torch.device("cpu"),
        encoder=model,
        latent=(4, 6, 10),
        history=(8, 16),
        kv_shape=(1, 2, 1, 4),
        top_k=2,
        repeats=2,
    )
    assert [(cost.descriptor, cost.history_frames) for cost in found.costs] == [
        ("ae", 8), ("ae", 16), ("avg_pool", 8), ("avg_pool", 16),
    ]  # fmt: skip
    for cost in found.costs:
        assert cost.encode_ms > 0 and cost.search_ms > 0
        assert (cost.transfer_ms, cost.transfer_bytes) == (None, None)
