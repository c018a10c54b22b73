"""VBench-Long as a `Suite`."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, Self, get_args

import pyarrow as pa

from lrag_ray.config.schema import ScoringSection
from lrag_ray.errors import ConfigError
from lrag_ray.scoring.flow_discontinuity import FLOW_DISCONTINUITY
from lrag_ray.scoring.scores import Scores
from lrag_ray.scoring.suite import (
    Banner,
    LooseVideo,
    LooseVideoSuite,
    ScoringTask,
    Suite,
    VideoReader,
    WeightFile,
)
from lrag_ray.scoring.vbench_long import pending, reader, videos
from lrag_ray.scoring.vbench_long.dimensions import DIMENSIONS, in_order, networks_of
from lrag_ray.scoring.vbench_long.names import DIMENSION_NAMES, Mode
from lrag_ray.scoring.vbench_long.networks import Networks
from lrag_ray.scoring.vbench_long.official import NETWORKS, OFFICIAL
from lrag_ray.scoring.vbench_long.parquet import folder
from lrag_ray.scoring.vbench_long.settings import VbenchSettings
from lrag_ray.scoring.vbench_long.worker import VbenchTask, VbenchWorker
from lrag_ray.store.address import Storage
from lrag_ray.store.records import RolloutId
from lrag_ray.store.rollouts import RolloutRun
from lrag_ray.store.videos import CommittedVideo

_MODES: tuple[Mode, ...] = ("compat", "direct")
"""The one that compares with published numbers first."""
assert set(_MODES) == set(get_args(Mode))


class VbenchLong(LooseVideoSuite[VbenchSettings]):
    """The six dimensions of `long_custom_input`."""

    name = "vbench_long"
    uses_gpu = True
    pooling = "clips"
    unranked = (FLOW_DISCONTINUITY,)

    def __init__(self, settings: VbenchSettings) -> None:
        super().__init__(settings)
        self.mode: Mode = settings.mode
        self.measures = [dimension.measure for dimension in in_order(settings.dimensions)]

    @classmethod
    def of(cls, scoring: ScoringSection) -> Self:
        """From the keys of the scoring section; there are none below ``scoring.settings``."""
        return cls(VbenchSettings.of(scoring))

    @classmethod
    def variants(cls) -> Sequence[Suite[Any]]:
        """Both modes."""
        return [cls(VbenchSettings(mode=mode)) for mode in _MODES]

    @property
    def folder(self) -> str:
        """One per mode."""
        return folder(self.mode)

    @property
    def title(self) -> str:
        """Name and mode."""
        return f"VBench-Long, {self.mode} mode"

    @property
    def note(self) -> str:
        """What the means are over."""
        return "Values are the official ones: unweighted means over all 2-second clips of the compared videos."

    def banner(self, scores: Scores) -> Banner:
        """What the mode compares with."""
        if self.mode == "compat":
            whose = "With the official weights, scores" if scores.untrained else "Scores"
            text = (
                f"Clips are re-encoded as the official splitter does it. {whose} of this mode, and of this mode alone, "
                "may stand beside published numbers."
            )
        else:
            text = (
                "Clips are cut from the decoded video in memory. Methods compare with each other here; beside "
                "published numbers only scores of compat mode may stand."
            )
        return Banner(f"{self.title}.", text)

    def warnings(self, scores: Scores) -> list[str]:
        """Missing dimensions, and mixed precisions."""
        found = []
        if len(self.measures) < len(DIMENSIONS):
            found.append(
                f"Scores of {len(self.measures)} of the {len(DIMENSIONS)} dimensions: the average rank is not the "
                "paper's."
            )
        precisions = {how.split(", ")[1] for how in scores.computed}
        if len(precisions) > 1:
            found.append(f"Scores were computed in different ways ({', '.join(sorted(precisions))}).")
        return found

    def weight_files(self) -> Sequence[WeightFile]:
        """The official files of all networks; none for random weights."""
        if self.settings.untrained:
            return ()
        needed = networks_of(self.settings.dimensions)
        return [
            WeightFile(
                name=name,
                places=tuple(self.settings.files.places(name)),
                url=official.url,
                licence=official.licence,
                member=official.member,
                size_bytes=official.size_bytes,
                sha256=official.sha256,
                needed=name in needed,
            )
            for name, official in ((name, OFFICIAL[name]) for name in NETWORKS)
        ]

    def check_loads(self, name: str) -> Collection[str]:
        """Build the network; several weight files may be behind one."""
        networks = Networks(self.settings.files)
        networks.build(next(network for network in NETWORKS if network == name))
        return networks.digests.keys()

    @property
    def pull_command(self) -> str:
        """Into the configured folder."""
        return self.settings.files.pull_command

    @property
    def advice(self) -> str:
        """How to get the networks, or do without them."""
        return (
            f"Fix: {self.pull_command}, set scoring.weights to the folder that has them, or score "
            "without them (scoring.dimensions, or scoring.suite: preview)"
        )

    def check_stored(self, rows: Storage) -> None:
        """Trained and untrained networks never share a table."""
        pending.refuse_mixture(rows, self.folder, untrained=self.settings.untrained)

    def pending(self, run: RolloutRun, *, settled: bool = False) -> list[ScoringTask]:
        """One task per rollout, whose longest video serves all its durations."""
        return pending.pending_tasks(run, self.settings, settled=settled)

    def worker(self, rows: Storage, videos: Storage | None, *, threads: int, device: str) -> VbenchWorker:
        """Networks are loaded when the first video needs them."""
        return VbenchWorker(rows, videos, self.settings, threads=threads, device=device)

    def progress(self, rows: Storage, payload: VbenchTask) -> int:
        """Row files of the video."""
        return len(rows.list_files(payload.folder))

    def read(self, scores: Scores, run: RolloutRun, videos: Mapping[RolloutId, Sequence[CommittedVideo]]) -> None:
        """Clip by clip."""
        reader.read_scores(scores, run, videos, self.mode)

    def shown(self, scores: Scores) -> VbenchLong:
        """With the dimensions that were scored."""
        scored = scores.dimensions or set(DIMENSION_NAMES)
        dimensions = tuple(name for name in DIMENSION_NAMES if name in scored)
        return type(self)(VbenchSettings(mode=self.mode, dimensions=dimensions))

    def table(self, scores: Scores) -> pa.Table:
        """One row per clip."""
        return reader.clips_table(scores, self)

    def files_behind(self, run: RolloutRun, damaged: Collection[str]) -> set[str]:
        """The files that end the tasks of damaged ones."""
        return pending.files_behind(run, self.settings, damaged)

    def check_videos(self, rows: Storage) -> None:
        """No controls; trained and untrained networks never share a table."""
        if self.settings.controls:
            raise ConfigError(
                "scoring.controls apply to runs: the first frame of which method to hold is not known of other videos"
            )
        pending.refuse_mixture(rows, self.mode, untrained=self.settings.untrained)

    def pending_videos(self, videos_: Sequence[LooseVideo], rows: Storage) -> list[ScoringTask]:
        """Videos without the file that ends their task."""
        return videos.pending_videos(videos_, rows, self.settings)

    def read_videos(self, rows: Storage) -> VideoReader:
        """All rows of the mode."""
        return videos.StoredVideos(rows, self.settings)
