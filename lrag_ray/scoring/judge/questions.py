"""Question sets: what a judge is asked, on which scale, and how its answer is read. YAML files, ours or the user's.

::

    name: exposure                  # of the measure: in tables and paths
    title: Exposure
    about: one sentence for readers of the report
    compare: false                  # true: two videos, the answer is A, B or tie
    question: |                     # what the judge reads; {prompt} becomes the text of the video
      Rate …
    scale: {lower: 0, upper: 5, integer: true, higher_is_better: true}
    answer: {tag: score}            # or {pattern: 'Rating: (\\d)'}, or {json: rating}
    values: {poor: 1, good: 5}      # optional: words instead of numbers
"""

from __future__ import annotations

import json
import re
from collections import Counter
from functools import cached_property
from importlib.resources import files
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError, field_validator, model_validator

from lrag_ray.config.schema import Name
from lrag_ray.config.section import Section
from lrag_ray.config.source import read_document
from lrag_ray.errors import ConfigError
from lrag_ray.scoring.measure import Measure

CHOICES = {"a": 1.0, "b": 0.0, "tie": 0.5}
"""Share of the first video."""
_NUMBER = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)", re.ASCII)
_AROUND = " \t\n*_`'\""
"""What models put around an answer."""


class UnreadableError(Exception):
    """An answer without a score; the text says what is wrong, for the judge too."""


class Scale(Section):
    """Numbers that count as an answer."""

    lower: float = 0
    """Least."""
    upper: float = 5
    """Greatest."""
    integer: bool = True
    """Whole numbers only."""
    higher_is_better: bool = True
    """Direction for ranks."""

    @model_validator(mode="after")
    def _ordered(self) -> Scale:
        if self.lower >= self.upper:
            raise ValueError(f"lower {self.lower:g} must be less than upper {self.upper:g}")
        if self.integer and (self.lower % 1 or self.upper % 1):
            raise ValueError("lower and upper must be whole numbers, or set integer: false")
        return self


class AnswerForm(Section):
    """Where the score is in an answer. Exactly one of the three."""

    tag: str | None = Field(default=None, pattern=r"^[A-Za-z][A-Za-z0-9_-]{0,31}$")
    """Between <tag> and </tag>; the last one counts."""
    pattern: str | None = Field(default=None, min_length=1, max_length=500)
    """A regular expression whose first group holds it; the last match counts."""
    json_field: str | None = Field(default=None, alias="json", min_length=1, max_length=64)
    """A field of the JSON object in the answer."""

    @field_validator("pattern")
    @classmethod
    def _compiles(cls, value: str | None) -> str | None:
        if value is not None:
            try:
                groups = re.compile(value).groups
            except re.error as error:
                raise ValueError(f"is not a regular expression: {error}") from None
            if groups < 1:
                raise ValueError("has no group: put what is the score into parentheses")
        return value

    @model_validator(mode="after")
    def _one(self) -> AnswerForm:
        if sum(each is not None for each in (self.tag, self.pattern, self.json_field)) != 1:
            raise ValueError("give exactly one of tag, pattern and json")
        return self

    @property
    def described(self) -> str:
        """What the question says about the form of the answer."""
        if self.tag:
            return f"<{self.tag}>…</{self.tag}>"
        if self.json_field:
            return json.dumps({self.json_field: "…"}, ensure_ascii=False)
        return f"text that matches {self.pattern}"

    def find(self, answer: str) -> str:
        """What stands where the score should be. UnreadableError if nothing does."""
        found: list[Any] = []
        if self.tag:
            # A tag that is mentioned and never closed does not begin the answer.
            opening = rf"<{self.tag}(?:\s[^<>]*)?>"
            form = rf"{opening}((?:(?!{opening}).)*?)</{self.tag}\s*>"
            found = re.findall(form, answer, re.DOTALL | re.IGNORECASE)
        elif self.pattern:
            found = [match[1] for match in re.finditer(self.pattern, answer) if match[1] is not None]
        else:
            found = [data[self.json_field] for data in _objects(answer) if self.json_field in data]
        if not found:
            raise UnreadableError(f"it holds no {self.described}")
        return str(found[-1]).strip(_AROUND)


class QuestionSet(Section):
    """One question and how its answers become numbers."""

    name: Name
    """Name of the measure."""
    title: str = Field(default="", max_length=60)
    """As people read it; the name if empty."""
    about: str = Field(default="", max_length=400)
    """What is asked, in one sentence."""
    compare: bool = False
    """Two videos at a time, each pair in both orders; the answer is A, B or tie."""
    question: str = Field(min_length=1, max_length=50_000)
    """What the judge reads."""
    scale: Scale = Scale()
    """Not of comparisons."""
    answer: AnswerForm = AnswerForm(tag="score")
    """Where the score is."""
    values: dict[str, float] = Field(default={}, max_length=100)
    """Numbers of words, in any case; empty: the answer is a number."""

    @model_validator(mode="after")
    def _fits(self) -> QuestionSet:
        if self.compare and (self.values or "scale" in self.model_fields_set):
            raise ValueError("a comparison takes neither scale nor values: its answers are A, B and tie")
        if twice := next((w for w, n in Counter(map(str.casefold, self.values)).items() if n > 1), None):
            raise ValueError(f"values.{twice} stands there twice (capitals do not count)")
        for word, value in self.values.items():
            if not self.scale.lower <= value <= self.scale.upper:
                raise ValueError(f"values.{word} {value:g} is outside the scale")
        return self

    @cached_property
    def measure(self) -> Measure:
        """Its column."""
        title, about = self.title or self.name, self.about or "What the judge answers"
        if self.compare:
            return Measure(self.name, title, about, 0, 1, higher_is_better=True, unit="percent")
        scale = self.scale
        return Measure(self.name, title, about, scale.lower, scale.upper, higher_is_better=scale.higher_is_better)

    @property
    def form(self) -> str:
        """The end of the question."""
        what = "A, B or tie" if self.compare else ", ".join(self.values) if self.values else self._range
        return (
            f"First write one or two sentences on what you saw, then the final answer ({what}) in this form and only "
            f"once: {self.answer.described}"
        )

    @property
    def _range(self) -> str:
        kind = "a whole number" if self.scale.integer else "a number"
        return f"{kind} from {self.scale.lower:g} to {self.scale.upper:g}"

    def read(self, answer: str) -> float:
        """The score of an answer; of a comparison the share of the first video. UnreadableError."""
        return self.value_of(self.answer.find(answer))

    def value_of(self, found: str) -> float:
        """The number of what stands where the score should be. UnreadableError where it is none of the scale."""
        words = CHOICES if self.compare else {word.casefold(): value for word, value in self.values.items()}
        if words:
            said = found.casefold()
            value = words.get(said, words.get(said.strip(f"{_AROUND}.,;:!")))
            if value is None:
                expected = "A, B or tie" if self.compare else ", ".join(self.values)
                raise UnreadableError(f"'{found[:40]}' is none of {expected}")
            return value
        # Some models write a minus sign, not a hyphen.
        said = found.replace("\N{MINUS SIGN}", "-")
        if not _NUMBER.fullmatch(said):
            raise UnreadableError(f"'{found[:40]}' is not {self._range}")
        number = float(said)
        if not self.scale.lower <= number <= self.scale.upper or (self.scale.integer and number % 1):
            raise UnreadableError(f"{found} is not {self._range}")
        return number


SHIPPED: tuple[str, ...] = ("exposure", "identity", "text_alignment", "artefacts", "preference")
"""Question sets that come with the program."""


def load_questions(name: str) -> QuestionSet:
    """A question set by name, or from the user's YAML file. ConfigError names what is wrong with it."""
    if name in SHIPPED:
        path = Path(str(files("lrag_ray.scoring.judge") / "sets" / f"{name}.yaml"))
    else:
        path = Path(name)
        if path.suffix not in (".yaml", ".yml"):
            raise ConfigError(
                f"scoring.settings.questions: '{name}' is neither a YAML file nor one of {', '.join(SHIPPED)}"
            )
    document = read_document(path)
    try:
        return QuestionSet.model_validate_json(json.dumps(document.data), strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"]))
        raise ConfigError(f"{path}: {f'{place}: ' if place else ''}{first['msg']}") from None


def _objects(answer: str) -> list[dict[str, Any]]:
    """JSON objects in a text, in their order."""
    decoder, found, at = json.JSONDecoder(), [], 0
    while (at := answer.find("{", at)) >= 0:
        try:
            value, at = decoder.raw_decode(answer, at)
        except (ValueError, RecursionError):
            at += 1
            continue
        if isinstance(value, dict):
            found.append(value)
    return found
