"""What is stored of a judge.

::

    scores/judge/<version>/<judge>/judge.json                        who judged, and every question in full
    scores/judge/<version>/<judge>/cases/<question>/<backbone>/<methods>/<prompt_id>-<sample>/<frames>-<video>.json

``<judge>`` is a digest of model, settings, media and questions. A comparison's ``<methods>`` are two, joined by ``~``,
which names do not contain.
"""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field

from lrag_ray.scoring.judge.questions import QuestionSet
from lrag_ray.scoring.video_rows import ScoreTarget
from lrag_ray.store.records import JsonValue, PlacedRecord, Record


class Vote(Record):
    """One answer, after any repetitions."""

    swapped: bool = False
    """Of a comparison: the second method's video came first."""
    score: float | None
    """None where no answer could be read; of a comparison the share of the first method."""
    text: str
    """What the judge wrote last."""
    problem: str = ""
    """Why there is no score."""
    answers: list[str]
    """Digests of all answers, in chat/answers."""


def counted_scores(votes: Sequence[Vote], *, pairs: bool) -> list[float]:
    """Scores of the votes that count: all that have one; of a comparison (`pairs`) those that have one in both orders.

    An answer in one order alone would count the pull of the place.
    """
    if not pairs:
        return [vote.score for vote in votes if vote.score is not None]
    return [share for both in both_orders(votes) for share in both]


def both_orders(votes: Sequence[Vote]) -> list[tuple[float, float]]:
    """Shares of the first method, shown first and shown second, of the votes of a comparison that have both."""
    first, second = ([vote.score for vote in votes if vote.swapped == swapped] for swapped in (False, True))
    return [(a, b) for a, b in zip(first, second, strict=False) if a is not None and b is not None]


class CaseRecord(PlacedRecord):
    """A question about one video, or about a pair."""

    question: str
    """Name of the question set."""
    targets: list[dict[str, JsonValue]] = Field(min_length=1, max_length=2)
    """What was judged, see `ScoreTarget`."""
    votes: list[Vote]
    reason: str = ""
    """Why there is no score at all."""
    shown: str
    """What the judge saw, such as ``30 pictures of 768x432``."""
    versions: str
    judged_at: str

    @property
    def scores(self) -> list[float]:
        """Of the votes that count."""
        return counted_scores(self.votes, pairs=len(self.targets) > 1)

    def target(self, index: int = 0) -> ScoreTarget:
        """One of the targets. TypeError where the record does not hold one."""
        return ScoreTarget(**self.targets[index])


class JudgeRecord(PlacedRecord):
    """Who judged, and what was asked."""

    backend: str
    model: str
    settings: dict[str, JsonValue]
    """Temperature, votes, media: what answers depend on."""
    questions: list[dict[str, JsonValue]]
    """Question sets in full."""
    sampling: str
    """How cases were drawn, for people."""
    used_at: str
    """When it last began to score; of several judges the report shows the last one."""

    @property
    def sets(self) -> list[QuestionSet]:
        """The question sets. ValidationError where the record holds something else."""
        return [QuestionSet.model_validate(each) for each in self.questions]


def parsed_case(path: str, data: bytes) -> CaseRecord | None:
    """The case stored at `path`; None where it cannot be read."""
    try:
        record = CaseRecord.opened_at(path, data)
        for index in range(len(record.targets)):
            record.target(index)
    except (ValueError, TypeError, RecursionError):
        return None
    return record


def parsed_judge(path: str, data: bytes) -> JudgeRecord | None:
    """The judge stored at `path`; None where it cannot be read."""
    try:
        record = JudgeRecord.opened_at(path, data)
        return record if record.sets else None
    except (ValueError, RecursionError):
        return None
