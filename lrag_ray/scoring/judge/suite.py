"""The judge as a `Suite`."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import cached_property
from statistics import fmean
from typing import Any

import pyarrow as pa

from lrag_ray.chat.client import check_backend, model_identity
from lrag_ray.chat.store import ChatStore, Spent
from lrag_ray.config.chat import ChatSection
from lrag_ray.errors import ConfigError
from lrag_ray.printable import counted
from lrag_ray.scoring.judge.agreement import krippendorff_alpha, position_bias
from lrag_ray.scoring.judge.cases import all_cases
from lrag_ray.scoring.judge.human import human_lines
from lrag_ray.scoring.judge.questions import QuestionSet, load_questions
from lrag_ray.scoring.judge.records import CaseRecord, JudgeRecord, both_orders, parsed_case, parsed_judge
from lrag_ray.scoring.judge.settings import JudgeSettings
from lrag_ray.scoring.judge.worker import JudgeWorker
from lrag_ray.scoring.measure import Measure
from lrag_ray.scoring.ranks import VideoScore
from lrag_ray.scoring.scores import Scores
from lrag_ray.scoring.suite import Banner, ScoringTask, Suite
from lrag_ray.store.address import Storage
from lrag_ray.store.identity import canonical_digest
from lrag_ray.store.records import JsonValue, RolloutId, now_utc
from lrag_ray.store.rollouts import RolloutRun
from lrag_ray.store.videos import CommittedVideo

NOT_VBENCH = "A judge's number is not VBench, and does not compare with another model's, question's or paper's."
_SECTION = "scoring.settings.chat"
_TOKENS_PER_PICTURE = 258
"""Of Gemini 2.0, for a tile of 768x768 pixels or a frame of a video. Other models differ: plans say "about"."""


class Judge(Suite[JudgeSettings]):
    """Answers of a vision-language model about videos."""

    name = "judge"
    beside = True
    Settings = JudgeSettings

    def __init__(self, settings: JudgeSettings) -> None:
        """Reads the question sets; ConfigError for one that is not there or does not fit."""
        super().__init__(settings)
        self.sets: Sequence[QuestionSet] = [load_questions(name) for name in settings.questions]
        names = [each.name for each in self.sets]
        if twice := {name for name in names if names.count(name) > 1}:
            raise ConfigError(f"scoring.settings.questions: two sets have the name '{min(twice)}'; names must differ")
        chat = settings.chat
        if chat is not None and settings.votes > 1 and chat.temperature == 0:
            raise ConfigError(
                f"scoring.settings.votes {settings.votes} with {_SECTION}.temperature 0: all votes would be the same. "
                "Set temperature above 0, such as 0.7, or votes to 1"
            )
        if chat is not None and chat.backend == "local" and settings.whole_video:
            raise ConfigError(
                "scoring.settings.media video with backend local, which takes pictures. Set media to frames or auto"
            )
        self.measures: Sequence[Measure] = [each.measure for each in self.sets]
        self._judge: JudgeRecord | None = None
        """Of the scores that are shown."""

    @property
    def uses_gpu(self) -> bool:  # type: ignore[override]  # depends on the backend
        """A local model does."""
        return self.settings.chat is not None and self.settings.chat.backend == "local"

    @property
    def ranked(self) -> bool:
        """Only where asked for."""
        return self.settings.ranks

    @property
    def title(self) -> str:
        """Names the model and says what it is not."""
        who = f" {self._judge.model}" if self._judge else ""
        return f"judge{who}, not VBench"

    @property
    def note(self) -> str:
        """How answers come about."""
        judge = self._judge
        asked = f" Asked: {judge.model} ({judge.backend}), {judge.sampling}." if judge else ""
        return f"{NOT_VBENCH} Names, methods and file names were hidden from it.{asked}"

    def banner(self, scores: Scores) -> Banner:
        """Says what the numbers are."""
        return Banner("Answers of a language model, not VBench.", self.note, strong=True)

    def warnings(self, scores: Scores) -> list[str]:
        """Agreement and bias, before any number is read."""
        return list(scores.remarks_on_all)

    # Before scoring

    def check_weights(self) -> None:
        """ConfigError without a model, ChatError without a key, library or model folder. Asks nothing."""
        check_backend(self._chat)

    @property
    def _chat(self) -> ChatSection:
        """ConfigError without a model, as where a run directory alone says that a judge was meant."""
        if self.settings.chat is None:
            raise ConfigError(
                f"{_SECTION} is not given: it names the judge. For example scoring: {{suite: judge, settings: {{chat: "
                "{backend: openai, model: NAME, base_url: http://host:8000/v1}}}"
            )
        return self.settings.chat

    def plan_notes(self, backbones: int, methods: int, durations_s: Sequence[float], units: int) -> Sequence[str]:
        """Calls and tokens; how many tokens a picture has is a guess, for models differ."""
        settings, chat = self.settings, self.settings.chat
        if chat is None:
            return ()
        drawn = min(units, settings.cases or units)
        lengths_s = [each for each in durations_s if settings.duration_s in (None, each)]
        calls = tokens_in = 0
        for each in self.sets:
            # Both orders of every pair, two videos each; otherwise one of every method.
            asked = methods * (methods - 1) if each.compare else methods
            made = drawn * settings.votes * backbones * asked
            calls += made * len(lengths_s)
            for length_s in lengths_s:
                shown = length_s * settings.fps if settings.whole_video else self._pictures(length_s)
                pictures = math.ceil(shown) * (2 if each.compare else 1)
                tokens_in += made * (len(each.question) // 4 + pictures * _TOKENS_PER_PICTURE)
        found = [
            f"the judge {chat.model} is asked about {counted(drawn, 'case')} per cell: about "
            f"{Spent(calls, tokens_in, calls * chat.max_tokens, 0).described(chat)} at most, without retries"
        ]
        if not lengths_s:
            found.append(f"no duration is scoring.settings.duration_s {settings.duration_s:g}: nothing is judged")
        if chat.max_calls is not None and chat.max_calls < calls:
            found.append(
                f"{_SECTION}.max_calls {chat.max_calls} is less than the {counted(calls, 'call')} of the judge"
            )
        return found

    def _pictures(self, length_s: float) -> float:
        return max(1.0, min(self.settings.max_frames, length_s * self.settings.fps))

    def spent(self, rows: Storage) -> str:
        """Calls, tokens and cost of the run."""
        chat = self.settings.chat
        return f"judge: {ChatStore(rows).spent(chat).described(chat)} in this run so far" if chat is not None else ""

    @property
    def record(self) -> JudgeRecord:
        """Who judges, as it is stored; ConfigError without a model."""
        settings, chat = self.settings, self._chat
        described: dict[str, JsonValue] = {
            "temperature": chat.temperature,
            "max_tokens": chat.max_tokens,
            "seed": chat.seed,
            "votes": settings.votes,
            "parse_retries": settings.parse_retries,
            "media": "video" if settings.whole_video else "frames",
            "fps": settings.fps,
            "max_side": settings.max_side,
        }
        if not settings.whole_video:
            described["max_frames"] = settings.max_frames
        drawn = (
            f"{counted(settings.cases, 'case')} per cell drawn with seed {settings.seed}"
            if settings.cases
            else "all cases"
        )
        seen = f"the whole video at {settings.fps:g} frames per second"
        if not settings.whole_video:
            seen = f"{settings.fps:g} frames per second, at most {settings.max_frames} per video"
        return JudgeRecord(
            path="",
            backend=chat.backend,
            model=model_identity(chat),
            settings=described,
            questions=[each.model_dump(mode="json", by_alias=True, exclude_defaults=True) for each in self.sets],
            sampling=f"{drawn}, {seen}, {counted(settings.votes, 'vote')}",
            used_at=now_utc(),
        )

    @cached_property
    def judge_folder(self) -> str:
        """Where this judge's scores are, relative to the run."""
        identity = self.record.model_dump(mode="json", exclude={"path", "sampling", "used_at"})
        return f"{self.folder}/{canonical_digest(identity)[:12]}"

    # Scoring

    def pending(self, run: RolloutRun, *, settled: bool = False) -> list[ScoringTask]:
        """Cases whose videos are committed and that have no record; all of them where that of the judge is lost."""
        there = run.storage.list_files(self.judge_folder)
        if f"{self.judge_folder}/judge.json" not in there:
            # A worker stores it; answers are there already.
            there = {}
        cases = all_cases(run, self.settings, list(self.sets), self.judge_folder)
        return [ScoringTask(case.title, case) for case in cases if case.path not in there]

    def worker(self, rows: Storage, videos: Storage | None, *, threads: int, device: str) -> JudgeWorker:
        """Set up in a worker's process. A local model is loaded with the first question."""
        if videos is None:
            raise ValueError("suite judge scores videos of runs only")
        path = f"{self.judge_folder}/judge.json"
        rows.write(path, self.record.model_copy(update={"path": path}).sealed())
        return JudgeWorker(self.settings, self._chat, rows, videos, device)

    # Reading

    def read(self, scores: Scores, run: RolloutRun, videos: Mapping[RolloutId, Sequence[CommittedVideo]]) -> None:
        """Add the stored answers: of the configured judge, otherwise of the one that scored last."""
        folder, judge = self._stored_judge(run.storage, scores)
        if judge is None:
            return
        self._judge, self.sets = judge, judge.sets
        self.measures = [each.measure for each in self.sets]
        paths = [path for path in run.storage.list_files(f"{folder}/cases") if path.endswith(".json")]
        order = {
            (video.rollout.path, video.latent_frames, video.video.sha256): video
            for group in videos.values()
            for video in group
        }
        values: dict[tuple[str, int, str], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
        cases: list[CaseRecord] = []
        for path, data in sorted(run.storage.read_many(paths).items()):
            case = parsed_case(path, data)
            if case is None:
                scores.damaged.append(path)
                continue
            targets = [case.target(index) for index in range(len(case.targets))]
            keys = [(target.rollout_path, target.latent_frames, target.video_sha256) for target in targets]
            if not all(key in order for key in keys):
                continue
            cases.append(case)
            if case.reason:
                scores.failures[targets[0].video_path] = f"{case.question}: {case.reason}"
                continue
            mean = fmean(case.scores)
            for key, value in zip(keys, (mean, 1 - mean), strict=False):
                values[key][case.question].append(value)
            for index, target in enumerate(targets):
                scores.remarks.setdefault((target.rollout_path, target.latent_frames), []).extend(_remarks(case, index))
        for key, video in order.items():
            if key not in values:
                continue
            rollout, means = video.rollout, {name: fmean(found) for name, found in values[key].items()}
            scores.videos.append(
                VideoScore(
                    rollout.backbone, rollout.method, video.latent_frames, rollout.prompt_id, rollout.sample, means
                )
            )
        scores.computed[f"{judge.model}, {judge.backend}"] += len(cases)
        scores.records += cases
        scores.remarks_on_all += agreement_lines(cases, self.sets)
        scores.remarks_on_all += human_lines(run.storage, self.folder, cases, self.sets, scores.damaged)

    def table(self, scores: Scores) -> pa.Table:
        """One row per vote."""
        names = ["question", "backbone", "method", "other_method", "prompt_id", "sample", "latent_frames", "vote"]
        rows: list[dict[str, Any]] = []
        for case in scores.records:
            first = case.target()
            other = case.target(1).method if len(case.targets) > 1 else None
            for number, vote in enumerate(case.votes):
                where = (case.question, first.backbone, first.method, other, first.prompt_id, first.sample)
                row = dict(zip(names, (*where, first.latent_frames, number), strict=True))
                rows.append(row | vote.model_dump(include={"swapped", "score", "text", "problem"}))
        schema = pa.schema(
            [(name, pa.int32() if name in ("sample", "latent_frames", "vote") else pa.string()) for name in names]
            + [("swapped", pa.bool_()), ("score", pa.float64()), ("text", pa.string()), ("problem", pa.string())]
        )
        return pa.Table.from_pylist(rows, schema=schema)

    def _stored_judge(self, storage: Storage, scores: Scores) -> tuple[str, JudgeRecord | None]:
        listed = storage.list_files(self.folder)
        paths = [path for path in listed if path.endswith("/judge.json") and path.count("/") == 4]
        found = {path: parsed_judge(path, data) for path, data in storage.read_many(paths).items()}
        scores.damaged += [path for path, record in found.items() if record is None]
        judges = {path.rpartition("/")[0]: record for path, record in found.items() if record is not None}
        if self.settings.chat is not None:
            return self.judge_folder, judges.get(self.judge_folder)
        if not judges:
            return self.folder, None
        chosen = max(judges, key=lambda folder: (judges[folder].used_at, folder))
        if len(judges) > 1:
            others = "; ".join(f"{judges[each].model} ({each})" for each in sorted(judges) if each != chosen)
            scores.remarks_on_all.append(f"other judges have scores too and are not shown: {others}")
        return chosen, judges[chosen]


def agreement_lines(cases: Sequence[CaseRecord], sets: Sequence[QuestionSet]) -> list[str]:
    """Agreement between votes and the pull of the place, one line per question where there is something to say."""
    lines = []
    for each in sets:
        own = [case for case in cases if case.question == each.name and not case.reason]
        title = each.title or each.name
        alpha = krippendorff_alpha(votes for case in own for votes in _by_order(case))
        if alpha is not None:
            lines.append(f"{title}: Krippendorff's alpha between votes {alpha:.2f}")
        if each.compare and (bias := position_bias(pair for case in own for pair in both_orders(case.votes))):
            lines.append(
                f"{title}: {bias.consistent:.0%} of {counted(bias.pairs, 'pair')} got the same answer in both "
                f"orders; the first "
                f"place gets {bias.first:.0%} (50% is no bias)"
            )
    return lines


def _by_order(case: CaseRecord) -> list[list[float]]:
    """Scores of the votes; of a comparison those of each order, since the order is not noise."""
    return [
        [vote.score for vote in case.votes if vote.score is not None and vote.swapped == swapped]
        for swapped in (False, True)
    ]


def _remarks(case: CaseRecord, index: int) -> list[str]:
    against = f" against {case.target(1 - index).method}" if len(case.targets) > 1 else ""
    found = []
    for vote in case.votes:
        share = vote.score if index == 0 or vote.score is None else 1 - vote.score
        score = "no score" if share is None else f"{share:g}"
        found.append(f"{case.question}{against}: {score}. {vote.text or vote.problem}".strip())
    return found
