"""Embeddings of a stored run: page, data, refusals."""

from __future__ import annotations

import io
import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from lrag_ray.bench.retrieval import bench_retrieval
from lrag_ray.cli.app import app
from lrag_ray.context.rag import RagSettings
from lrag_ray.errors import LragError, UsageError
from lrag_ray.pipelines.embeddings import inspect_embeddings
from lrag_ray.retrieval.encoder import EncoderConfig
from lrag_ray.training.checkpoint import checkpoint_bytes
from lrag_ray.training.loop import make_model
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


def test_an_encoder_of_another_shape_is_refused(corpus: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="for latents"):
        inspect_embeddings(corpus, [encoder(tmp_path / "other.pt", (16, 4, 4))])


def test_the_command_prints_a_table_or_json(corpus: str, tmp_path: Path) -> None:
    arguments = ["inspect", "embeddings", corpus, "--descriptor", "avg_pool", "--to", str(tmp_path), "--rollouts", "1"]
    shown = CliRunner().invoke(app, arguments)
    assert shown.exit_code == 0 and "neighbours" in shown.output and "embeddings.html" in shown.output
    found = json.loads(CliRunner().invoke(app, [*arguments, "--json"]).output)
    assert found["measures"][0]["descriptor"] == "avg_pool"
    assert len(found["measures"][0]["by_distance"]) == 24
    assert found["measures"][0]["retrieval"]["distance"] is None or found["measures"][0]["retrieval"]["distance"] > 0
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
        assert cost.transfer_bytes == 2 * 2 * 8 * 2
