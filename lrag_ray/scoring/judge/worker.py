"""Asks the judge about one case and stores its votes."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field

from lrag_ray import __version__
from lrag_ray.chat.backend import RejectedError
from lrag_ray.chat.client import ChatClient, LeftError, UnansweredError, model_identity
from lrag_ray.chat.messages import Media, Message, Part, Question, text, without_reasoning
from lrag_ray.chat.store import ChatStore
from lrag_ray.config.chat import ChatSection
from lrag_ray.errors import BudgetError, ChatError
from lrag_ray.printable import counted
from lrag_ray.scoring.judge.media import make_media
from lrag_ray.scoring.judge.questions import QuestionSet, UnreadableError
from lrag_ray.scoring.judge.records import CaseRecord, Vote, counted_scores
from lrag_ray.scoring.judge.settings import JudgeSettings
from lrag_ray.scoring.suite import KeepGoing, StoppedError, UnscorableError
from lrag_ray.scoring.video_rows import ScoreTarget
from lrag_ray.store.address import Storage
from lrag_ray.store.local_copy import local_copy
from lrag_ray.store.records import now_utc
from lrag_ray.store.scratch import scratch_folder
from lrag_ray.video.mp4 import VideoError


@dataclass(frozen=True)
class Case:
    """A question about one video, or about two of the same prompt."""

    questions: QuestionSet
    targets: tuple[ScoreTarget, ...]
    prompt: str
    """Text that the videos were made from."""
    path: str
    """Where its record goes, relative to the run."""

    @property
    def title(self) -> str:
        """As people see it."""
        first = self.targets[0]
        other = f" against {self.targets[1].method}" if len(self.targets) > 1 else ""
        return f"{self.questions.name} of {first.rollout_path}{other} at {first.latent_frames} latent frames"


@dataclass
class _Open:
    """A vote that has no score yet."""

    swapped: bool
    number: int
    messages: tuple[Message, ...]
    answers: list[str] = field(default_factory=list)
    said: str = ""
    problem: str = ""


class JudgeWorker:
    """Judges one case at a time; its votes are asked side by side."""

    def __init__(
        self, settings: JudgeSettings, section: ChatSection, rows: Storage, videos: Storage, device: str
    ) -> None:
        self._settings, self._section = settings, section
        self._rows, self._videos = rows, videos
        self._keep_going: KeepGoing = lambda: True
        self._client = ChatClient(section, ChatStore(rows), device=device, keep_going=lambda: self._keep_going())
        self._model = model_identity(section)
        self._broken = ""

    def score(self, payload: Case, keep_going: KeepGoing) -> None:
        """Store the votes; a case without any is stored as such and then refused."""
        if self._broken:
            # What every question would meet is not asked again for each case.
            raise UnscorableError(self._broken)
        self._keep_going = keep_going
        try:
            record = self._judged(payload)
        except LeftError:
            raise StoppedError from None
        except UnansweredError as error:
            raise UnscorableError(str(error)) from None
        except (BudgetError, ChatError) as error:
            self._broken = str(error)
            raise UnscorableError(str(error)) from None
        self._rows.create(payload.path, record.sealed())
        if record.reason:
            raise UnscorableError(record.reason)

    def _judged(self, case: Case) -> CaseRecord:
        votes: list[Vote] = []
        reason = shown = ""
        with scratch_folder() as scratch:
            try:
                media = [
                    make_media(
                        local_copy(self._videos, target.video_path, target.video_sha256, scratch),
                        target,
                        self._settings,
                        scratch,
                    )
                    for target in case.targets
                ]
            except VideoError as error:
                reason = str(error).replace(f"{scratch}/", "").replace(f"{self._videos.root}/", "")
            else:
                shown = f"{len(media[0])} pictures" if media[0][0].mime == "image/jpeg" else "the whole video"
                shown += f", longest side at most {self._settings.max_side} pixels"
                votes = self._votes(case, media)
                if not counted_scores(votes, pairs=case.questions.compare):
                    problems = "; ".join(dict.fromkeys(vote.problem for vote in votes if vote.problem))
                    what = "no vote has a score in both orders" if case.questions.compare else "no answer has a score"
                    reason = f"{what}: {problems}"
        return CaseRecord(
            path=case.path,
            question=case.questions.name,
            targets=[dataclasses.asdict(target) for target in case.targets],
            votes=votes,
            reason=reason,
            shown=shown,
            versions=f"{self._section.model}, lrag-ray {__version__}",
            judged_at=now_utc(),
        )

    def _votes(self, case: Case, media: Sequence[tuple[Media, ...]]) -> list[Vote]:
        orders = (False, True) if case.questions.compare else (False,)
        waiting = [
            _Open(swapped, number, (question_message(case, media[::-1] if swapped else media),))
            for number in range(self._settings.votes)
            for swapped in orders
        ]
        done: dict[tuple[int, bool], Vote] = {}
        for _ in range(self._settings.parse_retries + 1):
            left = []
            questions = [Question(vote.messages, vote.number) for vote in waiting]
            for vote, question, answer in zip(waiting, questions, self._client.ask(questions), strict=True):
                if isinstance(answer, UnansweredError):
                    raise answer
                if isinstance(answer, RejectedError):
                    vote.problem = f"the model rejects the question: {answer}"
                    done[vote.number, vote.swapped] = _closed(vote)
                    continue
                vote.answers.append(question.digest(self._section, self._model))
                vote.said = without_reasoning(answer.text)
                try:
                    if answer.finish == "refused":
                        raise UnreadableError("the judge declined")
                    score = case.questions.read(vote.said)
                except UnreadableError as error:
                    vote.problem = str(error)
                    request = f"Your answer cannot be used: {error}. {case.questions.form}"
                    # What the judge said may be empty, which some servers refuse.
                    vote.messages += (text("assistant", vote.said or "(nothing)"), text("user", request))
                    left.append(vote)
                else:
                    done[vote.number, vote.swapped] = _closed(vote, 1 - score if vote.swapped else score)
            waiting = left
            if not waiting:
                break
        done |= {(vote.number, vote.swapped): _closed(vote) for vote in waiting}
        return [done[key] for key in sorted(done)]


def question_message(case: Case, media: Sequence[tuple[Media, ...]]) -> Message:
    """What the judge gets: question, then pictures or videos, then the form of the answer. No names."""
    parts: list[Part] = [case.questions.question.replace("{prompt}", case.prompt).strip()]
    for label, group in zip(("First video (A):", "Second video (B):") if len(media) > 1 else ("",), media, strict=True):
        if group[0].mime == "image/jpeg":
            intro = f"{counted(len(group), 'frame')} in their order, evenly spread over the video:"
        else:
            intro = "The video:" if not label else ""
        if line := f"{label} {intro}".strip():
            parts.append(line)
        parts += group
    parts.append(case.questions.form)
    return Message("user", tuple(parts))


def _closed(vote: _Open, score: float | None = None) -> Vote:
    return Vote(
        swapped=vote.swapped,
        score=score,
        text=vote.said,
        problem="" if score is not None else vote.problem,
        answers=vote.answers,
    )
