"""Human raters: a page of blinded cases to send away, and the answers that come back."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
import random
import secrets
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from lrag_ray.config.schema import StorageSection
from lrag_ray.errors import UsageError
from lrag_ray.scoring.judge.cases import all_cases
from lrag_ray.scoring.judge.human import MOST_BYTES, ExportKey, HiddenCase, key_path, store_answers
from lrag_ray.scoring.judge.media import make_media
from lrag_ray.scoring.judge.questions import QuestionSet
from lrag_ray.scoring.judge.settings import JudgeSettings
from lrag_ray.scoring.judge.suite import Judge
from lrag_ray.scoring.judge.worker import Case
from lrag_ray.scoring.video_rows import ScoreTarget
from lrag_ray.store.address import Storage
from lrag_ray.store.local_copy import local_copy
from lrag_ray.store.records import now_utc
from lrag_ray.store.rollouts import RolloutRun
from lrag_ray.store.scratch import scratch_folder

MOST_STEPS = 21
"""Buttons of a scale; finer ones are shown in this many steps."""


@dataclass(frozen=True)
class Exported:
    """A page that was written."""

    page: str
    export: str
    """Its number, which the answers carry."""
    cases: int
    videos: int
    size_bytes: int


@dataclass(frozen=True)
class Imported:
    """Answers that were stored."""

    export: str
    rater: str
    answers: int
    cases: int
    """Of the export."""


def export_page(uri: str, to: str, settings: JudgeSettings, storage: StorageSection | None = None) -> Exported:
    """Write one HTML file with the sampled cases of a run, videos included, and store its key in the run.

    Which method made a video is on the page in no form: cases have random numbers and a random order, and videos are
    encoded again from their pixels. Raises UsageError without cases or for a file that is there; StorageError.
    """
    target = Path(to)
    if target.exists():
        raise UsageError(f"{to} is there already: name another file, or remove it")
    run = RolloutRun(uri, storage or StorageSection())
    settings = dataclasses.replace(settings, media="video")
    suite = Judge(settings)
    cases = list(all_cases(run, settings, list(suite.sets), suite.folder))
    if not cases:
        raise UsageError(f"{run.uri}: no videos to rate (questions, cases and duration leave none)")
    draw = random.SystemRandom()
    draw.shuffle(cases)
    key: dict[str, HiddenCase] = {}
    shown: list[dict[str, Any]] = []
    videos: dict[str, str] = {}
    names: dict[ScoreTarget, str] = {}
    for case in cases:
        number, swapped = secrets.token_hex(4), len(case.targets) > 1 and draw.random() < 0.5
        key[number] = HiddenCase(
            question=case.questions.name,
            targets=[dataclasses.asdict(target) for target in case.targets],
            swapped=swapped,
        )
        order = case.targets[::-1] if swapped else case.targets
        for each in order:
            if each not in names:
                names[each] = secrets.token_hex(4)
                videos[names[each]] = _encoded(run.storage, each, settings)
        shown.append(
            {
                "id": number,
                "question": question_text(case),
                "choices": choices(case.questions),
                "videos": [names[each] for each in order],
            }
        )
    export = secrets.token_hex(8)
    record = ExportKey(
        path=key_path(suite.folder, export),
        export=export,
        questions=[each.model_dump(mode="json", by_alias=True, exclude_defaults=True) for each in suite.sets],
        cases=key,
        created_at=now_utc(),
    )
    page = render({"export": export, "cases": shown, "videos": dict(sorted(videos.items()))})
    run.storage.write(record.path, record.sealed())
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(page, encoding="utf-8")
    return Exported(str(target), export, len(cases), len(videos), len(page.encode()))


def import_answers(uri: str, path: str, storage: StorageSection | None = None) -> Imported:
    """Store the answers of a file that the page saved. UsageError for one that does not fit the run; StorageError."""
    run = RolloutRun(uri, storage or StorageSection())
    run.require()
    file = Path(path)
    if not file.is_file() or file.stat().st_size > MOST_BYTES:
        raise UsageError(f"{path}: not a file that the rating page saved (missing, or larger than {MOST_BYTES} bytes)")
    found, cases = store_answers(run.storage, Judge(JudgeSettings()).folder, file.read_bytes(), path)
    return Imported(found.export, found.rater, len(found.answers), cases)


def question_text(case: Case) -> str:
    """What a person reads: the judge's question, without the form of its answer."""
    return case.questions.question.replace("{prompt}", case.prompt).strip()


def choices(questions: QuestionSet) -> list[str]:
    """Answers to choose from."""
    if questions.compare:
        return ["A", "B", "tie"]
    if questions.values:
        return list(questions.values)
    scale = questions.scale
    width = scale.upper - scale.lower
    steps = min(int(width), MOST_STEPS - 1) if scale.integer else MOST_STEPS - 1
    values = (scale.lower + width * i / steps for i in range(steps + 1))
    return [f"{round(value) if scale.integer else value:.10g}" for value in values]


def render(data: dict[str, Any]) -> str:
    """The page as one file."""
    script = files("lrag_ray.report").joinpath("rating.js").read_text(encoding="utf-8")
    environment = Environment(loader=PackageLoader("lrag_ray.report", "."), autoescape=True, undefined=StrictUndefined)
    # JSON in a script element ends where it says "</": no text may say so.
    text = json.dumps(data, ensure_ascii=False).replace("<", "\\u003c")
    return environment.get_template("rating.html.j2").render(
        data=Markup(text),
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )


def _encoded(storage: Storage, target: ScoreTarget, settings: JudgeSettings) -> str:
    with scratch_folder() as scratch:
        video = local_copy(storage, target.video_path, target.video_sha256, scratch)
        (media,) = make_media(video, target, settings, scratch)
    return base64.b64encode(media.data).decode()
