"""Answers of people: what an exported page hides, what it gives back, and how far people and judge agree.

::

    scores/judge/<version>/human/<export>/key.json         which case is behind each of the page's numbers
    scores/judge/<version>/human/<export>/raters/<id>.json  what one person answered
"""

from __future__ import annotations

import codecs
import hashlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from pydantic import Field, field_validator

from lrag_ray.errors import UsageError
from lrag_ray.printable import counted
from lrag_ray.scoring.judge.agreement import krippendorff_alpha
from lrag_ray.scoring.judge.questions import QuestionSet, UnreadableError
from lrag_ray.scoring.judge.records import CaseRecord
from lrag_ray.store.address import Storage
from lrag_ray.store.records import JsonValue, PlacedRecord, Record, why_not

MOST_BYTES = 1 << 24
"""Of a file that is imported."""


class HiddenCase(Record):
    """What is behind a number of the page."""

    question: str
    targets: list[dict[str, JsonValue]] = Field(min_length=1, max_length=2)
    swapped: bool = False
    """Of a comparison: the second target is A."""


class ExportKey(PlacedRecord):
    """The key of an export; never on the page."""

    export: str
    questions: list[dict[str, JsonValue]]
    cases: dict[str, HiddenCase]
    created_at: str

    def set_of(self, case: HiddenCase) -> QuestionSet:
        """The question of a case. KeyError where the key holds no such question."""
        found = {each.name: each for each in map(QuestionSet.model_validate, self.questions)}
        return found[case.question]


class PersonAnswer(Record):
    """An answer to one case, as the page saves it."""

    answer: str = Field(max_length=100)
    note: str = Field(default="", max_length=4000)


class PageAnswers(Record):
    """What the page saves."""

    export: str = Field(pattern=r"^[0-9a-f]{16}$")
    rater: str = Field(min_length=1, max_length=64)
    answers: dict[str, PersonAnswer]

    @field_validator("rater")
    @classmethod
    def _named(cls, value: str) -> str:
        if not value.strip() or not value.isprintable():
            raise ValueError("must be a name of printable characters")
        return value.strip()


class StoredAnswers(PlacedRecord):
    """What one person answered, as it is stored."""

    page: PageAnswers


def human_folder(folder: str, export: str) -> str:
    """Where an export's files are, relative to the run."""
    return f"{folder}/human/{export}"


def key_path(folder: str, export: str) -> str:
    """Where the key of an export is, relative to the run."""
    return f"{human_folder(folder, export)}/key.json"


def number_of(questions: QuestionSet, case: HiddenCase, answer: str) -> float:
    """The value of an answer; of a comparison the share of the first target. ValueError where it is none."""
    try:
        value = questions.value_of(answer)
    except UnreadableError as error:
        raise ValueError(str(error)) from None
    return 1 - value if case.swapped else value


def store_answers(rows: Storage, folder: str, data: bytes, name: str) -> tuple[PageAnswers, int]:
    """Check a saved file and store it below the run; returns it and the number of cases of its export.

    UsageError for a file that is not one, of another run, or with answers that do not fit. The same rater's earlier
    file of the same export is replaced.
    """
    try:
        # Some editors write a byte order mark.
        found = PageAnswers.opened(data.removeprefix(codecs.BOM_UTF8))
    except ValueError as error:
        raise UsageError(f"{name}: not a file that the rating page saved ({why_not(error)})") from None
    key = read_key(rows, folder, found.export)
    if key is None:
        raise UsageError(f"{name}: it belongs to export {found.export}, which is not of this run")
    for number, given in found.answers.items():
        if number not in key.cases:
            raise UsageError(f"{name}: answers.{number}: the export has no such case")
        case = key.cases[number]
        try:
            number_of(key.set_of(case), case, given.answer)
        except (ValueError, KeyError) as error:
            raise UsageError(f"{name}: answers.{number}.answer: {error}") from None
    rater = hashlib.sha256(found.rater.encode()).hexdigest()[:12]
    path = f"{human_folder(folder, found.export)}/raters/{rater}.json"
    rows.write(path, StoredAnswers(path=path, page=found).sealed())
    return found, len(key.cases)


def read_key(rows: Storage, folder: str, export: str) -> ExportKey | None:
    """The key of an export; None where there is none that can be read."""
    path = key_path(folder, export)
    try:
        return ExportKey.opened_at(path, rows.read_bytes(path))
    except (FileNotFoundError, ValueError, RecursionError):
        return None


def human_lines(
    rows: Storage, folder: str, cases: Sequence[CaseRecord], sets: Sequence[QuestionSet], damaged: list[str]
) -> list[str]:
    """Agreement among people, and of people with the judge, one line per question.

    Files that cannot be read are left out and added to `damaged`.
    """
    by_people = _answers(rows, folder, damaged)
    by_judge = {
        (case.question, _identity(case.targets)): fmean(case.scores)
        for case in cases
        if case.scores and not case.reason
    }
    lines = []
    for each in sets:
        title = each.title or each.name
        own = {key: values for key, values in by_people.items() if key[0] == each.name}
        raters = {rater for values in own.values() for rater in values}
        if not raters:
            continue
        among = krippendorff_alpha(list(values.values()) for values in own.values())
        both = [[fmean(values.values()), by_judge[key]] for key, values in own.items() if key in by_judge]
        against = krippendorff_alpha(both)
        people = f"{counted(len(raters), 'person', 'people')} rated {counted(len(own), 'case')}"
        line = f"{title}: {people}"
        if len(raters) > 1:
            line += f"; Krippendorff's alpha among them {_shown(among)}"
        line += f"; between their mean and the judge {_shown(against)}, over {len(both)} cases"
        lines.append(line)
    return lines


def _answers(rows: Storage, folder: str, damaged: list[str]) -> Mapping[tuple[str, Any], dict[str, float]]:
    """Values by question and targets, by rater."""
    found: dict[tuple[str, Any], dict[str, float]] = defaultdict(dict)
    listed = rows.list_files(f"{folder}/human")
    paths = [path for path in listed if "/raters/" in path and path.endswith(".json")]
    keys: dict[str, ExportKey | None] = {}
    for path, data in sorted(rows.read_many(paths).items()):
        try:
            page = StoredAnswers.opened_at(path, data).page
        except (ValueError, RecursionError):
            damaged.append(path)
            continue
        if page.export not in keys:
            keys[page.export] = read_key(rows, folder, page.export)
            if keys[page.export] is None:
                damaged.append(key_path(folder, page.export))
        key = keys[page.export]
        for number, given in page.answers.items():
            case = key.cases.get(number) if key else None
            if key is None or case is None:
                continue
            try:
                value = number_of(key.set_of(case), case, given.answer)
            except (ValueError, KeyError):
                continue
            found[case.question, _identity(case.targets)][page.rater] = value
    return found


def _identity(targets: Sequence[Mapping[str, JsonValue]]) -> tuple[Any, ...]:
    return tuple((t.get("rollout_path"), t.get("latent_frames"), t.get("video_sha256")) for t in targets)


def _shown(alpha: float | None) -> str:
    return "unknown (too few or equal answers)" if alpha is None else f"{alpha:.2f}"
