"""Everything a report shows, read once from storage."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import Any

from lrag_ray.context.policy import Family
from lrag_ray.context.registry import family
from lrag_ray.errors import UsageError
from lrag_ray.printable import listed
from lrag_ray.report.choice import choose_suite
from lrag_ray.report.differences import BlockStatistics, block_statistics
from lrag_ray.report.judged import Counted, Judged, beside, judged
from lrag_ray.report.merge import merged_identity
from lrag_ray.report.prompt_columns import MOST_SHOWN, prompt_columns, shown_columns
from lrag_ray.scoring.drift import DriftPoint, drift
from lrag_ray.scoring.intended import intended_scores
from lrag_ray.scoring.ranks import RankBlock, Unit, average_ranks, without_ranks
from lrag_ray.scoring.registry import NONE
from lrag_ray.scoring.scores import Scores
from lrag_ray.scoring.suite import Suite
from lrag_ray.store.identity import RunIdentity
from lrag_ray.store.records import RolloutId
from lrag_ray.store.rollouts import RolloutRun
from lrag_ray.store.status import RunStatus, run_status
from lrag_ray.store.videos import CommittedVideo, committed_videos
from lrag_ray.wan.devices import shown_kind

_MOST_NAMED = 4
"""Methods or backbones that a title names one by one."""


@dataclass(frozen=True)
class Source:
    """One of the runs."""

    run_dir: RolloutRun
    status: RunStatus


@dataclass(frozen=True)
class ShownRollout:
    """A rollout that has videos."""

    run_dir: RolloutRun
    """Where they are."""
    videos: Sequence[CommittedVideo]
    """Shortest duration first."""


@dataclass(frozen=True)
class ReportData:
    """One run, or several as one: scores, ranks and what stands beside them."""

    sources: Sequence[Source]
    """The runs, in the order in which they were given."""
    identity: RunIdentity
    """Their union."""
    methods: Mapping[str, Sequence[str]]
    """Methods that are compared, by backbone."""
    suite: Suite[Any]
    other_suites: Sequence[str]
    """Suites and modes that have scores too, and are not shown."""
    scores: Scores
    blocks: Sequence[RankBlock]
    """One per backbone and duration."""
    statistics: Sequence[BlockStatistics]
    """One per block."""
    rollouts: Mapping[RolloutId, ShownRollout]
    """In prompt-major order."""
    run_notes: Sequence[str] = ()
    """In what labelled runs differ."""
    judged: Sequence[Judged] = ()
    """Answers of judges, the shown suite's included; never ranked with other suites."""
    unscored: bool = False
    """The runs were not meant to have scores, and have none."""

    @property
    def uris(self) -> list[str]:
        """Addresses of the runs, as they may be shown."""
        return [source.run_dir.uri for source in self.sources]

    @cached_property
    def prompt_columns(self) -> Mapping[str, Mapping[str, str]]:
        """By prompt_id: the other columns of the prompt table, at most `MOST_SHOWN` of them."""
        names = prompt_columns(self.identity)[:MOST_SHOWN]
        return {prompt_id: shown_columns(prompt, names) for prompt_id, prompt in self.identity.prompts.items()}

    @cached_property
    def drift(self) -> Sequence[DriftPoint]:
        """Curves over the time of the video, where the suite has clips."""
        return drift(self.scores.clips, self.blocks)

    def families(self, methods: Iterable[str]) -> list[tuple[Family, list[str]]]:
        """Methods of the run by family, in the order in which they are given, in which families stand together."""
        return [
            (name, list(group))
            for name, group in groupby(methods, lambda method: family(self.identity.methods[method].method))
        ]

    def duration_s(self, backbone: str, latent_frames: int) -> float:
        """The duration as the configuration names it."""
        horizons = self.identity.backbones[backbone].horizons
        return next(horizon.duration_s for horizon in horizons if horizon.latent_frames == latent_frames)

    def frozen_units(self, block: RankBlock) -> list[Unit]:
        """Those of a block's units that have the control: it may be scored for some prompts or samples alone."""
        found = self.scores.frozen.get(block.backbone, {})
        return [unit for unit in block.weights if unit in found]

    def frozen_means(self, block: RankBlock) -> dict[str, float]:
        """The control beside a block, over its `frozen_units`; empty where there are none."""
        found = self.scores.frozen.get(block.backbone, {})
        weights = {unit: block.weights[unit] for unit in self.frozen_units(block)}
        total = sum(weights.values())
        return {
            measure.name: sum(weight * found[unit][measure.name] for unit, weight in weights.items()) / total
            for measure in self.suite.measures
            if weights and all(measure.name in found[unit] for unit in weights)
        }

    @property
    def title(self) -> str:
        """What is compared, in a few words."""
        methods, backbones = list(self.identity.methods), list(self.identity.backbones)
        durations = sorted({each.duration_s for found in self.identity.backbones.values() for each in found.horizons})
        named = listed(methods) if len(methods) <= _MOST_NAMED else f"{len(methods)} methods"
        where = listed(backbones) if len(backbones) <= _MOST_NAMED else f"{len(backbones)} backbones"
        return f"{named} on {where}, {listed([f'{seconds:g}' for seconds in durations])} s"

    @property
    def labels(self) -> list[str]:
        """What must be said of the backbones on every table and page, e.g. ``tiny, untrained``."""
        return list(dict.fromkeys(backbone.label for backbone in self.identity.backbones.values() if backbone.label))

    @property
    def untrained(self) -> list[str]:
        """The labels that say that a backbone's weights are random, so that nothing follows about the methods."""
        return [label for label in self.labels if "untrained" in label]

    @property
    def durations_note(self) -> str:
        """That durations are prefixes of one rollout, and of which methods they are not; '' where they are of none."""
        several = any(len(backbone.horizons) > 1 for backbone in self.identity.backbones.values())
        anew = [name for name, method in self.identity.methods.items() if not method.nested]
        if not several or len(anew) == len(self.identity.methods):
            return ""
        but = f" (except of {', '.join(anew)}, with a rollout per duration)" if anew else ""
        return f"Durations are prefixes of one rollout{but}, not independent samples"

    @property
    def device_kinds(self) -> Mapping[str, int]:
        """Number of rollouts per kind of device."""
        return Counter(shown_kind(rollout.videos[-1].commit.device_kind) for rollout in self.rollouts.values())


def collect(
    run_dirs: Sequence[RolloutRun],
    suite: str | Suite[Any] | None = None,
    mode: str | None = None,
    *,
    suites: Sequence[Suite[Any]] = (),
    must_have: bool = False,
    labels: Sequence[str | None] | None = None,
) -> ReportData:
    """Read one run, or several as one; without `suite` and `mode` the scores that compare best are shown.

    `suite` is a suite or its name; `suites` are others to consider besides those that come with the package; `labels`,
    one per run, tell apart methods that several runs have (see `merged_identity`).

    Where two runs hold the same rollout, the first one's counts. With `must_have`, scores that are asked for and are
    not there are refused where there are others.

    Raises:
        StorageError: an address holds no run.
        UsageError: no run, one run twice, runs that cannot stand in one table, a mode of a suite that has none, or
            scores that are not there.
    """
    twice = [uri for uri, times in Counter(run_dir.uri for run_dir in run_dirs).items() if times > 1]
    if twice or not run_dirs:
        raise UsageError(f"{twice[0]} was given twice: name every run once" if twice else "no run was given")
    merged = merged_identity(run_dirs, labels or [None] * len(run_dirs))
    choice, others = choose_suite(run_dirs, suite, mode, suites=suites, must_have=must_have)
    scores = Scores()
    rollouts: dict[RolloutId, ShownRollout] = {}
    counted: list[Counted] = []
    for run_dir, names in zip(run_dirs, merged.names, strict=True):
        videos: dict[RolloutId, list[CommittedVideo]] = {}
        for video in committed_videos(run_dir):
            if names.rollout(video.rollout) not in rollouts:
                videos.setdefault(video.rollout, []).append(video)
        rollouts |= {names.rollout(rollout): ShownRollout(run_dir, group) for rollout, group in videos.items()}
        counted.append(Counted(run_dir, names, videos))
        counted[-1].read(choice, scores)
    shown = choice.shown(scores)
    blocks = [
        block
        for backbone, methods in merged.methods.items()
        for block in average_ranks(
            (video for video in scores.videos if video.backbone == backbone), methods, shown.measures, shown.pooling
        )
    ]
    if not shown.ranked:
        blocks = [without_ranks(block) for block in blocks]
    own = [judged(shown, scores, merged.methods)] if shown.beside else []
    methods_by_name = merged.identity.methods
    return ReportData(
        sources=[Source(run_dir, run_status(run_dir, scores=False)) for run_dir in run_dirs],
        identity=merged.identity,
        methods=merged.methods,
        suite=shown,
        other_suites=others,
        scores=scores,
        blocks=blocks,
        statistics=[block_statistics(block, scores.videos, methods_by_name, shown.measures) for block in blocks],
        rollouts=_prompt_major(rollouts, merged.identity),
        run_notes=merged.notes,
        judged=[*own, *beside(shown, counted, merged.methods, suites)],
        unscored=not blocks and all(intended_scores(run.storage).section.get("suite") == NONE for run in run_dirs),
    )


def _prompt_major(rollouts: Mapping[RolloutId, ShownRollout], identity: RunIdentity) -> dict[RolloutId, ShownRollout]:
    return {rollout: rollouts[rollout] for rollout in identity.ordered(rollouts)}
