"""The interface of scoring suites.

A suite is one object made from its settings. It says what its measures are and where its scores are stored, finds what
is not scored yet, sets up a worker in a process and reads stored scores back for reports. It knows neither Ray nor
stages. Adding one takes a package and a line in `lrag_ray.scoring.registry`, or no edit at all where a configuration
names it as ``package.module:Suite``. Suites that score every video by itself need only a few lines on top of
`lrag_ray.scoring.per_video.PerVideoSuite`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, NamedTuple, Protocol, Self, TypeVar

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from lrag_ray.config.plugin_settings import parse_settings
from lrag_ray.config.schema import ScoringSection
from lrag_ray.errors import WeightsError
from lrag_ray.scoring.measure import Measure
from lrag_ray.scoring.ranks import Pooling

if TYPE_CHECKING:
    from lrag_ray.scoring.scores import Scores
    from lrag_ray.store.address import Storage
    from lrag_ray.store.records import RolloutId
    from lrag_ray.store.rollouts import RolloutRun
    from lrag_ray.store.videos import CommittedVideo

SettingsT = TypeVar("SettingsT")

KeepGoing = Callable[[], bool]
"""Whether a worker should continue; asked between the clips of a video."""


class UnscorableError(Exception):
    """A worker's answer: this video can never be scored, for this reason."""


class StoppedError(Exception):
    """A worker's answer: it was asked to stop before the video was done; what it finished is stored."""


class ScoringTask(NamedTuple):
    """Something to score."""

    name: str
    """As people see it; unique among what is pending."""
    payload: Any
    """What the worker receives; picklable."""


class SuiteWorker(Protocol):
    """A suite set up in a process. Scores one payload at a time."""

    def score(self, payload: Any, keep_going: KeepGoing) -> None:
        """Score a payload and store the result.

        Raises UnscorableError, StoppedError, or anything else for an attempt that failed and may be repeated.
        """


class WeightFile(NamedTuple):
    """A published weight file of a suite, or a folder of files from an archive."""

    name: str
    """As messages and records call it; unique within the suite."""
    places: tuple[Path, ...]
    """Where it is looked for, in order; pulled to the first."""
    url: str
    """Where it is published; an archive where `member` is set."""
    licence: str
    member: str = ""
    """Path inside the archive; a folder's ends in a slash."""
    size_bytes: int | None = None
    """Of the file, not of its archive; None where it is not known."""
    sha256: str | None = None
    """Of the file, not of its archive; None where it is not known."""
    needed: bool = True
    """Whether the suite's settings make use of it."""

    @property
    def path(self) -> Path:
        """Where it is, or where it is put."""
        return next((place for place in self.places if place.exists()), self.places[0])


class Banner(NamedTuple):
    """What a report says about a suite before any number."""

    headline: str
    text: str
    strong: bool = False
    """The scores are easily mistaken for something else."""


class FrameRow(NamedTuple):
    """Frames of a video that a page shows side by side."""

    label: str
    """Beside the method's name; '' where there is one row."""
    indices: Sequence[int]
    """Of the frames; every row of a video has as many."""
    measure: str = ""
    """Name of the measure whose value of the video stands below the label."""


class FrameMark(NamedTuple):
    """What a suite reads in a part of a row of frames, and what it says of it; – where it is neither."""

    seen: NDArray[np.uint8] | None = None
    """Picture [H, W, 4] of what it takes that part for, red, green, blue and opacity."""
    right: bool | None = None
    """Whether that is right (✓) or wrong (✗); None without a judgement."""


@dataclass(frozen=True)
class NoSettings:
    """A suite without settings."""


class Suite(ABC, Generic[SettingsT]):
    """A set of measures and everything needed to compute, store and read them. Picklable."""

    name: ClassVar[str]
    """In paths, tables and files."""
    version: ClassVar[int] = 1
    """Changes with the meaning of any measure."""
    Settings: ClassVar[type] = NoSettings
    """Dataclass of the keys below ``scoring.settings``. Defaults must allow stored scores to be read."""
    uses_gpu: ClassVar[bool] = False
    """Whether a worker reserves ``scoring.gpus_per_worker``."""
    beside: ClassVar[bool] = False
    """Whether a report also shows its table beside another suite's."""
    pooling: ClassVar[Pooling] = "prompts"
    """What the mean of a table is over, see `lrag_ray.scoring.ranks`."""
    measures: Sequence[Measure]
    """Columns of its tables, in order."""
    unranked: Sequence[Measure] = ()
    """Measures beside them that have no place in ranks and differences: a video may lack them."""
    strips: ClassVar[int] = 3
    """Prompts per backbone that get strips by default."""
    strips_note: str = ""
    """How to read the rows of `frame_rows`."""
    mode: str = ""
    """How its values are computed, where there are several ways; values of two modes never share a table."""

    def __init__(self, settings: SettingsT) -> None:
        self.settings = settings

    @classmethod
    def of(cls, scoring: ScoringSection) -> Self:
        """The suite with the settings of a configuration."""
        return cls(parse_settings(cls.Settings, scoring.settings))

    @classmethod
    def variants(cls) -> Sequence[Suite[Any]]:
        """One suite per mode whose scores a run may have; the one that compares best first."""
        return [cls.of(ScoringSection())]

    # Names and places

    @property
    def folder(self) -> str:
        """Where its score files are, relative to the run."""
        return f"scores/{self.name}/{self.version}"

    @property
    def title(self) -> str:
        """What every table of its values says."""
        return f"{self.name} suite{f', {self.mode} mode' if self.mode else ''}"

    @property
    def label(self) -> str:
        """Suite and mode as options name them."""
        return f"{self.name}, {self.mode} mode" if self.mode else self.name

    @property
    def ranked(self) -> bool:
        """Whether a report ranks methods by its values."""
        return True

    @property
    def note(self) -> str:
        """What a reader of the tables should know about how values come about."""
        return ""

    def banner(self, scores: Scores) -> Banner | None:
        """What a report says first."""
        return None

    def warnings(self, scores: Scores) -> list[str]:
        """What must be known of these scores before any number is read."""
        return []

    def in_words(self, means: Mapping[str, Mapping[str, float]]) -> str:
        """The means of a table, by method and measure, in one sentence for readers who do not know the measures."""
        return ""

    def frame_rows(self, frames: int) -> Sequence[FrameRow]:
        """Rows of a video of `frames` frames that show what the suite measures, set edge to edge at full size.

        None of them: a page shows one row of small frames in equal steps.
        """
        return ()

    def marked_frames(self, frames: int) -> Sequence[int]:
        """Indices of the video frames that `frame_marks` looks at, of a video with `frames`; ascending."""
        return ()

    def frame_marks(self, pictures: Sequence[NDArray[np.uint8]], prompt: str) -> Mapping[str, Sequence[FrameMark]]:
        """What is read in the `frame_rows` of a video and judged, by label.

        `pictures` [H, W, 3] are its `marked_frames`. The marks of a row stand below it in cells of equal width.
        """
        return {}

    # Before scoring

    def plan_notes(self, backbones: int, methods: int, durations_s: Sequence[float], units: int) -> Sequence[str]:
        """What scoring costs besides arithmetic, with `units` prompts and samples per cell."""
        return ()

    def spent(self, rows: Storage) -> str:
        """What scoring has cost so far besides time, or ''."""
        return ""

    def weight_files(self) -> Sequence[WeightFile]:
        """Files that `weights list|pull|verify` and `doctor` handle."""
        return ()

    def check_loads(self, name: str) -> Collection[str]:
        """Load what a weight file is for; returns the names of all files that were read. Raises WeightsError."""
        return [name]

    def check_weights(self) -> None:
        """WeightsError, naming all that is missing, unless every needed weight file is here."""
        missing = [file for file in self.weight_files() if file.needed and not file.path.exists()]
        if missing:
            places = "\n  ".join(f"{file.name}: nothing at {file.path}" for file in missing)
            raise WeightsError(f"scoring.suite {self.name} needs files that are not here:\n  {places}\n{self.advice}")

    @property
    def pull_command(self) -> str:
        """What brings the weight files to their first places."""
        return f"lrag-ray weights pull --suite {self.name}"

    @property
    def advice(self) -> str:
        """What to do about missing weight files."""
        return f"Fix: {self.pull_command}, or choose another scoring.suite"

    def check_prompts(self, prompts: Mapping[str, str]) -> None:
        """ConfigError where one of the prompts, by the place where it is written, cannot be scored."""

    def check_stored(self, rows: Storage) -> None:
        """ConfigError where stored scores do not belong in one table with those that would be added."""

    # Scoring

    @abstractmethod
    def pending(self, run: RolloutRun, *, settled: bool = False) -> list[ScoringTask]:
        """What is committed and not scored, in prompt-major order.

        With `settled` only what no later commit of its rollout will replace. Raises StorageError.
        """

    @abstractmethod
    def worker(self, rows: Storage, videos: Storage | None, *, threads: int, device: str) -> SuiteWorker:
        """Set up in a worker's process.

        Scores are stored in `rows`; paths are in `videos`, or on this machine where that is None. `device` is cpu or
        cuda.
        """

    def progress(self, rows: Storage, payload: Any) -> int:
        """How much of a payload is stored, in any unit that grows: a worker's death after progress is not counted."""
        return 0

    # Reading

    @abstractmethod
    def read(self, scores: Scores, run: RolloutRun, videos: Mapping[RolloutId, Sequence[CommittedVideo]]) -> None:
        """Add a run's stored scores of these videos to `scores`. Files that cannot be read go to `scores.damaged`."""

    def shown(self, scores: Scores) -> Suite[SettingsT]:
        """The suite with the measures that a report of `scores` shows."""
        return self

    @abstractmethod
    def table(self, scores: Scores) -> pa.Table:
        """Everything behind the tables, one row per stored value set."""

    def files_behind(self, run: RolloutRun, damaged: Collection[str]) -> set[str]:
        """Stored files that claim a video is fully scored although one of its files is `damaged`."""
        return set()


class LooseVideo(NamedTuple):
    """A video outside a run."""

    path: str
    """Where workers open it."""
    name: str
    """As people see it."""
    identity: str
    """Under which its scores are stored; changes with the content."""
    durations_s: tuple[float, ...] = ()
    """Lengths under which it counts, ascending; the last one is the whole file."""


@dataclass(frozen=True)
class VideoSetScores:
    """Scores of a set of videos at one duration; values from 0 to 1, videos by identity."""

    per_video: Mapping[str, Mapping[str, float]]
    clips: Mapping[str, int]
    mean_over_clips: Mapping[str, float]
    mean_of_video_means: Mapping[str, float]
    missing: Mapping[str, Mapping[str, str]]
    """By video and measure: why there is no value; the measure is empty where the whole video is missing."""
    notes: Mapping[str, str]
    """By video: what a person should know of it."""


class VideoReader(Protocol):
    """Stored scores of videos outside a run."""

    def at(self, videos: Sequence[LooseVideo], duration_s: float | None) -> VideoSetScores:
        """Scores at a duration, which is None for whole files of unnamed length."""

    def untrained(self, videos: Sequence[LooseVideo]) -> bool:
        """Whether any of their scores comes from networks with random weights."""


class LooseVideoSuite(Suite[SettingsT]):
    """A suite that also scores videos outside a run."""

    @abstractmethod
    def check_videos(self, rows: Storage) -> None:
        """ConfigError for settings that need a run, or scores in `rows` that these do not belong beside."""

    @abstractmethod
    def pending_videos(self, videos: Sequence[LooseVideo], rows: Storage) -> list[ScoringTask]:
        """Those that are not fully scored."""

    @abstractmethod
    def read_videos(self, rows: Storage) -> VideoReader:
        """What is stored in `rows`."""
