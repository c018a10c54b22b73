"""Run directories from strangers: what is wrong in them is reported or left out, never a traceback."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lrag_ray.config.schema import EngineSection, ScoringSection, StorageSection
from lrag_ray.config.vae import VaeConfig
from lrag_ray.errors import ConfigError, StorageError
from lrag_ray.pipelines.stored_config import stored_config
from lrag_ray.report import build_report
from lrag_ray.report.inspect import inspect_rollout
from lrag_ray.store.parts import BrokenPartError, read_part
from lrag_ray.store.records import PartRecord
from lrag_ray.store.rollouts import RolloutRun
from lrag_ray.store.seal import opened_json
from lrag_ray.store.status import run_status
from tests.report.make_run import FRAMES_PER_BLOCK, make_run


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made") / "run"
    make_run(str(folder), ["a fox"], ["rag"])
    return folder


@pytest.fixture
def run(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "run"))


def change(path: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads(opened_json(path.read_bytes()))
    edit(content)
    path.write_text(json.dumps(content))


def test_a_trace_that_is_none_leaves_the_page_without_its_map(run: Path) -> None:
    for trace in run.rglob("*.trace.parquet"):
        trace.write_bytes(b"x" * trace.stat().st_size)
    build_report(RolloutRun(str(run)))
    page = (run / "summary" / "report.html").read_text()
    assert "<video" in page and 'class="map"' not in page
    (commit,) = run.rglob("commit-12.json")
    with pytest.raises(StorageError, match="does not have the recorded checksum"):
        inspect_rollout(str(commit.parent))


@pytest.mark.parametrize("kind", ["latents", "trace"])
def test_a_part_whose_checksum_fits_and_whose_content_does_not_is_broken(run: Path, kind: str) -> None:
    storage = RolloutRun(str(run)).storage
    part = PartRecord.opened(next(run.rglob("part-*.json")).read_bytes())
    other = getattr(part, "trace" if kind == "latents" else "latents")
    swapped = {"path": other.path, "size_bytes": other.size_bytes, "sha256": other.sha256}
    forged = part.model_copy(update={kind: getattr(part, kind).model_copy(update=swapped)})
    with pytest.raises(BrokenPartError):
        read_part(storage, forged, FRAMES_PER_BLOCK)


def test_a_run_whose_backbone_has_no_duration_is_refused(run: Path) -> None:
    change(run / "run.json", lambda content: content["backbones"]["tiny"].update(horizons=[]))
    with pytest.raises(StorageError, match=r"horizons.*damaged"):
        run_status(RolloutRun(str(run)))


def test_a_commit_without_a_frame_rate_does_not_count(run: Path) -> None:
    for commit in run.rglob("commit-*.json"):
        change(commit, lambda content: content.update(fps=0))
    status = run_status(RolloutRun(str(run)))
    assert len(status.problems) == 2 and not status.done
    build_report(RolloutRun(str(run)))


def test_a_damaged_configuration_beside_the_run_is_not_needed(run: Path) -> None:
    for text in ('{"run": 3}', '{"scoring": {"suite": 7}}', "\x00", "[" * 10_000):
        (run / "config.json").write_text(text)
        assert stored_config(str(run)).scoring == ScoringSection()


def test_what_describes_scores_is_taken_from_a_run_and_what_acts_is_not(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Engine address, storage, weights, plug-ins and paths of a stranger: nothing of it reaches the configuration."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "stranger.py").write_text("from pathlib import Path\nPath('ran').touch()\n")
    hostile: dict[str, Any] = {
        "run": {"uri": "s3://elsewhere/run"},
        "engine": {"address": "10.9.8.7:6379", "threads_per_actor": 9},
        "storage": {"endpoint_url": "http://10.9.8.7:9000"},
        "scoring": {
            "suite": "vbench_long",
            "mode": "compat",
            "dimensions": ["imaging_quality"],
            "weights": "/etc",
            "workers": 64,
            "settings": {"x": 1},
        },
        "methods": {"zen": {"method": "stranger:Policy"}},
    }
    (run / "config.json").write_text(json.dumps(hostile))
    change(run / "run.json", lambda content: content["methods"]["rag"].update(method="stranger:Policy"))
    config = stored_config(str(run))
    assert config.run.uri == str(run)
    assert (config.scoring.suite, config.scoring.mode, config.scoring.dimensions) == (
        "vbench_long",
        "compat",
        ["imaging_quality"],
    )
    assert (config.scoring.weights, config.scoring.workers, config.scoring.settings) == (None, None, {})
    assert (config.engine, config.storage) == (EngineSection(), StorageSection())
    hostile["scoring"]["suite"] = "stranger:Suite"
    (run / "config.json").write_text(json.dumps(hostile))
    with pytest.raises(ConfigError, match=r"names the suite 'stranger:Suite'.*--suite"):
        stored_config(str(run))
    assert stored_config(str(run), ["scoring.suite=preview"]).scoring.suite == "preview"
    assert not (tmp_path / "ran").exists() and "stranger" not in sys.modules


def test_the_place_of_a_vae_comes_from_the_user(run: Path, tmp_path: Path) -> None:
    vae: dict[str, Any] = {"kind": "wan", "sha256": "0" * 64, "dtype": "float32", "path": "/etc/passwd"}
    vae |= {"channels_last": True, "fused_norm": True}
    change(run / "run.json", lambda content: content["backbones"]["tiny"]["pixels"].update(vae=vae))
    with pytest.raises(ConfigError, match=r"never taken from a run directory: name the configuration .*--config"):
        stored_config(str(run), decodes=True)
    named = stored_config(str(run), ["backbones.tiny.vae.path=/models/vae.pth"], decodes=True)
    expected = VaeConfig(path="/models/vae.pth", channels_last=True, fused_norm=True)
    assert named.backbones["tiny"].vae == expected
    # Scoring needs no VAE.
    assert stored_config(str(run)).backbones["tiny"].vae.path is None
