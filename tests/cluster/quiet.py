"""The run that nothing disturbs, made in this process without Ray, and the comparison of another one with it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lrag_ray.config.prompts import load_prompts
from lrag_ray.config.schema import RunConfig
from lrag_ray.store.parts import read_latents, read_trace
from lrag_ray.store.records import Commit
from lrag_ray.store.rollouts import RolloutRun
from lrag_ray.video.mp4 import read_video
from tests.stages import make
from tests.stages.make import METHODS

SUBJECTS = ["a red fox", "a river", "two dancers", "a lighthouse", "an old tram", "a kite", "a forge", "a whale"]
DEEP = {"method": "deep_forcing", "window": 9, "budget": 9, "recent": 3, "sink": 3}
ALL_METHODS = {**METHODS, "deep_forcing": DEEP}


class Gate:
    """A method whose rollouts wait in their middle until a test opens the gate, however quick all else is.

    By then the first of the two horizons is committed where `behind_commit`, and parts beyond the last commit are there
    in either case.
    """

    def __init__(self, folder: Path, *, behind_commit: bool = False, opened: bool = False) -> None:
        self._folder = folder
        folder.mkdir()
        at_block = 11 if behind_commit else 3
        marker = str(folder)
        self.method = {"method": "tests.cluster.disturbed:Disturbed", "how": "wait", "marker": marker, "window": 9}
        self.method |= {"at_block": at_block}
        if opened:
            self.open()

    def open(self) -> None:
        """Let all rollouts through, now and later."""
        (self._folder / "open").touch()


def make_config(
    folder: Path, address: str | None = None, prompts: int = 4, gates: Sequence[Gate] = (), **changes: Any
) -> RunConfig:
    """A run below `folder` with horizons of 24 and 48 latent frames, a part every 6 and no videos.

    Of every prompt, the rollouts of `gates` are begun before those of the other `methods` (all).
    """
    folder.mkdir(exist_ok=True)
    texts = [f"{SUBJECTS[i % len(SUBJECTS)]}, take {i}" for i in range(prompts)]
    (folder / "prompts.txt").write_text("\n".join(texts), encoding="utf-8")
    engine = {"address": address, "actors": 2, "checkpoint_every_blocks": 2, **changes.pop("engine", {})}
    # Methods are begun in the order of the file, which sorts them.
    methods = {f"a_gate_{number}": gate.method for number, gate in enumerate(gates)}
    methods |= changes.pop("methods", ALL_METHODS)
    fields = {"durations_s": [6, 12], "methods": methods, "video": {"enabled": False}, **changes}
    config = make.make_config(folder / "run", prompts={"path": str(folder / "prompts.txt")}, engine=engine, **fields)
    return make.store_features(config, load_prompts(config.prompts))


def quiet_run(config: RunConfig) -> RolloutRun:
    """Do every rollout of `config` in one go."""
    run = RolloutRun(config.run.uri)
    make.do_all(run, config, load_prompts(config.prompts))
    return run


def assert_equal(found: RolloutRun, expected: RolloutRun) -> None:
    """One valid commit per horizon, no more, with the same latents, trace rows and decoded frames."""
    ours, theirs = by_horizon(found), by_horizon(expected)
    assert ours.keys() == theirs.keys()
    for key, commit in ours.items():
        other = theirs[key]
        assert commit.latents_digest == other.latents_digest, key
        assert torch.equal(_latents(found, commit), _latents(expected, other)), key
        assert _rows(found, commit) == _rows(expected, other), key
        assert (commit.video is None) == (other.video is None), key
        if commit.video is not None:
            assert np.array_equal(_frames(found, commit), _frames(expected, other)), key


def by_horizon(run: RolloutRun) -> dict[tuple[str, int], Commit]:
    """Commits that count, by rollout and horizon."""
    commits = run.commits()
    found = {(commit.rollout.path, commit.latent_frames): commit for commit in commits}
    assert len(found) == len(commits)
    return found


def attempts(commit: Commit) -> set[str]:
    """The attempts that a commit is made of: the one that committed, and those whose parts it took."""
    return {commit.attempt, *(part.path.split("/attempt-")[1].split("/")[0] for part in commit.latent_parts)}


def part_records(run: RolloutRun) -> list[str]:
    """Records of all parts that exist."""
    return [path for paths in run.inventory().part_records.values() for path in paths]


def open_parts(run: RolloutRun) -> list[str]:
    """Records of parts beyond the last commit of rollouts that have parts left to make.

    So whoever made them is in the middle of something, and not only about to commit it.
    """
    if (identity := run.read()) is None:
        return []
    inventory = run.inventory()
    longest = max(horizon.latent_frames for b in identity.backbones.values() for horizon in b.horizons)
    found = []
    for folder, paths in inventory.part_records.items():
        committed = max(inventory.commits.get(folder, ()), default=0)
        ends = {path: int(path.rsplit("-", 1)[1].removesuffix(".json")) for path in paths}
        if max(ends.values()) < longest:
            found += [path for path, end in ends.items() if end > committed]
    return found


def _latents(run: RolloutRun, commit: Commit) -> torch.Tensor:
    return torch.cat([read_latents(run.storage, part) for part in commit.latent_parts])


def _rows(run: RolloutRun, commit: Commit) -> list[Any]:
    return [row for part in commit.trace_parts for row in read_trace(run.storage.read_bytes(part.path))]


def _frames(run: RolloutRun, commit: Commit) -> np.ndarray[Any, Any]:
    assert commit.video is not None
    return np.asarray(read_video(run.storage.full(commit.video.path)))
