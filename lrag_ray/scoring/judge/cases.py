"""Which videos are judged: a sample of prompts, the same for all methods, and for comparisons all pairs of methods."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from itertools import combinations

from lrag_ray.scoring.judge.questions import QuestionSet
from lrag_ray.scoring.judge.settings import JudgeSettings
from lrag_ray.scoring.judge.worker import Case
from lrag_ray.scoring.per_video import score_target
from lrag_ray.scoring.ranks import Unit
from lrag_ray.scoring.video_rows import ScoreTarget
from lrag_ray.store.identity import RunIdentity
from lrag_ray.store.rollouts import RolloutRun
from lrag_ray.store.videos import CommittedVideo, committed_videos


def sampled_units(identity: RunIdentity, cases: int | None, seed: int) -> set[Unit]:
    """Prompts and samples that are judged, drawn without replacement.

    Every unit has a random place that depends on the seed, the prompt's text and the sample alone: the draw is the same
    in every cell, on every machine, and changes little when a run grows.
    """

    def place(unit: Unit) -> bytes:
        prompt_id, sample = unit
        return hashlib.sha256(f"{seed}\0{identity.prompts[prompt_id].text}\0{sample}\0{prompt_id}".encode()).digest()

    units = [(prompt_id, sample) for prompt_id in identity.prompts for sample in range(identity.samples)]
    return set(sorted(units, key=place)[:cases])


def all_cases(run: RolloutRun, settings: JudgeSettings, sets: list[QuestionSet], folder: str) -> Iterator[Case]:
    """Every case whose videos are committed, prompt-major. Raises StorageError where there is no run."""
    identity = run.require()
    chosen = sampled_units(identity, settings.cases, settings.seed)
    groups: dict[tuple[Unit, str, int], list[ScoreTarget]] = {}
    for video in committed_videos(run):
        if (unit := _unit(video)) in chosen and settings.duration_s in (None, video.duration_s):
            groups.setdefault((unit, video.rollout.backbone, video.latent_frames), []).append(score_target(video))
    for ((prompt_id, _), _, _), targets in groups.items():
        prompt = identity.prompts[prompt_id].text
        for questions in sets:
            for shown in combinations(targets, 2) if questions.compare else ((target,) for target in targets):
                # The order must not depend on which methods were there first.
                ordered = tuple(sorted(shown, key=lambda target: target.method))
                yield Case(questions, ordered, prompt, case_path(folder, questions.name, ordered))


def case_path(folder: str, question: str, targets: tuple[ScoreTarget, ...]) -> str:
    """Where the record of a case goes, relative to the run."""
    first = targets[0]
    methods = "~".join(target.method for target in targets)
    digest = hashlib.sha256("".join(target.video_sha256 for target in targets).encode()).hexdigest()[:16]
    where = f"{first.backbone}/{methods}/{first.prompt_id}-{first.sample}/{first.latent_frames}-{digest}.json"
    return f"{folder}/cases/{question}/{where}"


def _unit(video: CommittedVideo) -> Unit:
    return video.rollout.prompt_id, video.rollout.sample
