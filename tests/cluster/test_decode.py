"""Stored latents decoded again on a real cluster."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from lrag_ray.cli.app import app
from lrag_ray.config.schema import RunConfig
from lrag_ray.errors import ConfigError, IdentityError, StorageError, WeightsError
from lrag_ray.events import Notice
from lrag_ray.pipelines.decode import DecodeFailure, decode
from lrag_ray.pipelines.stored_config import store_config
from lrag_ray.report.build import build_report
from lrag_ray.scoring.preview.suite import PREVIEW
from lrag_ray.store.records import HOW_TO_REPAIR
from lrag_ray.store.rollouts import RolloutRun
from lrag_ray.store.seal import opened_json
from lrag_ray.store.videos import committed_videos
from lrag_ray.video.mp4 import read_video
from tests.cluster.test_run import NO_VIDEO, Recorder
from tests.stages.make import BACKBONE, METHODS, do_all, make_config, make_prompts

pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("cluster")]

PROMPTS = make_prompts("a red fox in the snow", "a river at dawn")
LOSSLESS = {"crf": 0}
"""Pixels then do not depend on what x264 decides."""


def config_of(uri: Path, **changes: Any) -> RunConfig:
    engine = {"actors": 1, "checkpoint_every_blocks": 2}
    return make_config(uri, **{"methods": {"rag": METHODS["rag"]}, "engine": engine, **changes})


@pytest.fixture(scope="module")
def stored(cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run without videos; tests work on copies."""
    folder = tmp_path_factory.mktemp("stored")
    run, config = RolloutRun(str(folder)), config_of(folder, video=NO_VIDEO)
    do_all(run, config, PROMPTS)
    store_config(run, config)
    return folder


@pytest.fixture
def latents(stored: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(stored, tmp_path / "run"))


def frames_of(folder: Path) -> dict[tuple[str, int], Any]:
    directory = RolloutRun(str(folder))
    return {
        (video.rollout.path, video.latent_frames): read_video(directory.storage.full(video.video.path))
        for video in committed_videos(directory)
    }


def test_a_run_without_videos_gets_the_frames_that_the_run_itself_would_have_made(
    latents: Path, tmp_path: Path
) -> None:
    shown = tmp_path / "shown"
    do_all(RolloutRun(str(shown)), config_of(shown, video=LOSSLESS), PROMPTS)
    directory = RolloutRun(str(latents))
    commits = directory.storage.list_files("rollouts")
    assert frames_of(latents) == {} and PREVIEW.pending_targets(directory) == []

    outcome = decode(config_of(latents, video=LOSSLESS))

    assert (outcome.exit_code, outcome.videos_made, outcome.videos_there, outcome.failed) == (0, 4, 0, ())
    expected, found = frames_of(shown), frames_of(latents)
    assert len(expected) == 4 and expected.keys() == found.keys()
    assert all(np.array_equal(expected[key], found[key]) for key in expected)
    assert {len(frames) for frames in found.values()} == {1 + 4 * 5, 1 + 4 * 11}
    assert directory.storage.list_files("rollouts") == commits
    assert len(PREVIEW.pending_targets(directory)) == 4
    build_report(directory)
    assert f"../{outcome.folders[0]}/tiny/rag/" in (latents / "summary" / "report.html").read_text()

    # A run that has these videos itself needs none.
    again = decode(config_of(shown, video=LOSSLESS))
    assert (again.videos_made, again.videos_there) == (0, 4)
    assert not (shown / "decoded").exists()


def test_a_run_that_was_moved_is_decoded_by_its_address_alone_and_what_is_missing_is_made(latents: Path) -> None:
    command = ["decode", str(latents), "--set", "video.enabled=true", "--json"]
    shown = CliRunner().invoke(app, command)
    reported = json.loads(shown.stdout)
    assert (shown.exit_code, reported["videos_made"], reported["uri"]) == (0, 4, str(latents))

    victim = next(committed_videos(RolloutRun(str(latents))))
    (latents / victim.video.path).unlink()
    config, recorder, idle = config_of(latents), Recorder(), Recorder()
    outcome = decode(config, listener=recorder)
    assert (outcome.exit_code, outcome.videos_made, outcome.videos_there) == (0, 1, 3)
    assert any("is missing" in notice.text and notice.warning for notice in recorder.of(Notice))
    assert len(frames_of(latents)) == 4
    assert decode(config, listener=idle).videos_there == 4
    assert idle.events == []

    (latents / "config.json").unlink()
    again = CliRunner().invoke(app, command)
    reported = json.loads(again.stdout)
    assert (again.exit_code, reported["videos_made"], reported["videos_there"]) == (0, 0, 4)

    # The place of a VAE that is a file is the caller's to say.
    identity = json.loads(opened_json((latents / "run.json").read_bytes()))
    identity["backbones"]["tiny"]["pixels"]["vae"] = {"kind": "wan", "sha256": "ab" * 32, "dtype": "float32"}
    (latents / "run.json").write_text(json.dumps(identity))
    placeless = CliRunner().invoke(app, ["decode", str(latents)])
    assert placeless.exit_code == 2 and "or the VAE (--set backbones.NAME.vae.path=…)" in placeless.stderr


def test_broken_parts_fail_their_rollouts_from_there_on_and_nothing_else(latents: Path) -> None:
    corrupt, short = (commit for commit in RolloutRun(str(latents)).commits() if commit.latent_frames == 12)
    part = corrupt.latent_parts[-1]
    (latents / part.path).write_bytes(b"\0" * part.size_bytes)
    (latents / short.latent_parts[-1].path).write_bytes(b"short")
    outcome = decode(config_of(latents))
    assert (outcome.exit_code, outcome.videos_made) == (1, 2)
    failed = {failure.rollout: failure for failure in outcome.failed}
    reason = f"{part.path} does not have the recorded checksum. {HOW_TO_REPAIR}"
    assert failed.pop(corrupt.rollout.path) == DecodeFailure(corrupt.rollout.path, (12,), reason)
    ((folder, failure),) = failed.items()
    assert (folder, failure.latent_frames) == (short.rollout.path, (12,))
    assert "5 bytes instead of" in failure.reason and "`lrag-ray run` makes it again" in failure.reason


def test_of_independent_durations_a_broken_one_fails_alone(cluster: None, tmp_path: Path) -> None:
    """Each horizon has parts of its own: where they are nested, the longer one has those of the shorter one."""
    config = config_of(tmp_path, independent_durations=True, video=NO_VIDEO)
    do_all(RolloutRun(str(tmp_path)), config, PROMPTS[:1])
    short, _ = RolloutRun(str(tmp_path)).commits()
    part = short.latent_parts[0]
    (tmp_path / part.path).write_bytes(b"\0" * part.size_bytes)
    outcome = decode(config_of(tmp_path))
    reason = f"{part.path} does not have the recorded checksum. {HOW_TO_REPAIR}"
    assert outcome.failed == (DecodeFailure(short.rollout.path, (short.latent_frames,), reason),)
    assert (outcome.exit_code, outcome.videos_made) == (1, 1)


def test_another_vae_is_refused_unless_it_is_wanted(latents: Path, tmp_path: Path) -> None:
    identity = json.loads(opened_json((latents / "run.json").read_bytes()))
    identity["backbones"]["tiny"]["pixels"]["vae"] = {"kind": "wan", "sha256": "ab" * 32, "dtype": "float32"}
    (latents / "run.json").write_text(json.dumps(identity))
    vae = {"kind": "tiny", "dtype": "bfloat16", "channels_last": True, "fused_norm": True}
    half = config_of(latents, backbones={"tiny": {**BACKBONE, "vae": vae}})
    with pytest.raises(IdentityError, match=r"backbones\.tiny\.vae is .*'tiny'.* here and .*'wan'.* in the run"):
        decode(half)
    with pytest.raises(ConfigError, match="the run has tiny, the configuration has mine"):
        decode(config_of(latents, backbones={"mine": BACKBONE}))
    with pytest.raises(StorageError, match="there is no run at this address"):
        decode(config_of(tmp_path / "nothing"))
    (tmp_path / "Wan2.1_VAE.pth").write_text("<html>not found</html>")
    wan = {"kind": "wan", "path": str(tmp_path / "Wan2.1_VAE.pth")}
    with pytest.raises(WeightsError, match="web page"):
        decode(config_of(latents, backbones={"tiny": {**BACKBONE, "vae": wan}}), other_vae=True)
    assert not (latents / "decoded").exists()

    (tmp_path / "run.yaml").write_text(half.model_dump_json())
    command = ["decode", str(latents), "--config", str(tmp_path / "run.yaml"), "--other-vae", "--set", "video.crf=40"]
    shown = CliRunner().invoke(app, [*command, "--json"])
    assert "plain operations in place of vae.fused_norm: it runs on GPUs alone" in shown.stderr
    reported = json.loads(shown.stdout)
    assert (shown.exit_code, reported["videos_made"], reported["failed"]) == (0, 4, [])
    shown = CliRunner().invoke(app, command)
    assert "Decoded 0 videos (4 were there)" in shown.stdout and reported["folders"][0] in shown.stdout
