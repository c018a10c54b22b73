"""What is asked about one prompt, which answers are accepted, and what follows from those that are not.

A pure function of the answers: the worker asks for what is missing, the driver reads the result from the stored ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import NamedTuple

from lrag_ray.chat.language import language_of
from lrag_ray.chat.messages import Message, Question, text, without_reasoning
from lrag_ray.chat.store import AnswerRecord
from lrag_ray.config.refine import PRESET, RefineSection
from lrag_ray.config.schema import BackboneConfig
from lrag_ray.errors import ConfigError
from lrag_ray.stages.text_length import least_tokens, uncut_tokenizer
from lrag_ray.text_file import read_text

_QUOTES = {'"': '"', "“": "”", "'": "'", "«": "»", "`": "`"}


class EncoderLimit(NamedTuple):
    """A text encoder that must take the refined prompt."""

    kind: str
    tokenizer: str | None
    text_len: int
    """Tokens."""


@dataclass(frozen=True)
class Refined:
    """What became of a prompt."""

    text: str
    """The refined prompt; the original one where `failed` and section.on_failure says so."""
    problems: Sequence[str] = ()
    """Why answers were not accepted, in their order."""
    failed: bool = False
    """No answer was accepted."""


class Refiner:
    """Template, checks and limits of a run."""

    def __init__(self, section: RefineSection, template: str, limits: Sequence[EncoderLimit]) -> None:
        """`template` is the text of the instruction. Raises WeightsError for a tokenizer that cannot be loaded."""
        self.section = section
        self._template = template
        self._limits = [(limit.text_len, uncut_tokenizer(limit.kind, limit.tokenizer)) for limit in limits]

    def settle(self, prompt: str, answer_of: Callable[[Question], AnswerRecord | None]) -> Refined | Question:
        """What became of `prompt`, or the question whose answer is still needed."""
        problems: list[str] = []
        messages = self._first(prompt)
        for _ in range(self.section.retries + 1):
            question = Question(messages)
            answer = answer_of(question)
            if answer is None:
                return question
            said = without_reasoning(answer.text).strip()
            found = cleaned(said)
            problem = self._problem(prompt, found, answer)
            if problem is None:
                return Refined(found, problems)
            problems.append(problem)
            # The reason makes it another question, so that it is not answered from the store.
            request = f"This cannot be used: {problem}. Write the description again, and nothing else."
            messages = (*messages, text("assistant", said or "(no answer)"), text("user", request))
        return Refined(prompt, problems, failed=True)

    def _first(self, prompt: str) -> tuple[Message, ...]:
        if "{prompt}" in self._template:
            return (text("user", self._template.replace("{prompt}", prompt).strip()),)
        return (text("system", self._template.strip()), text("user", prompt))

    def _problem(self, prompt: str, found: str, answer: AnswerRecord) -> str | None:
        if answer.finish == "refused":
            return "the model declined"
        if not found:
            return "the answer is empty"
        if answer.finish == "length":
            return f"the answer was cut off at max_tokens {self.section.max_tokens}"
        wanted = {"en": "en", "same": language_of(prompt), "any": ""}[self.section.language]
        language = language_of(found)
        if wanted and language and language != wanted:
            return f"the answer is in another language ({language}, expected {wanted})"
        for text_len, tokenize in self._limits:
            tokens = least_tokens(tokenize, found)
            if tokens > text_len:
                return f"the answer has {tokens} tokens, and the text encoder takes {text_len}"
        return None


def cleaned(answer: str) -> str:
    """One line of plain text without quotation marks around it, nor a sign that a spreadsheet would compute."""
    line = " ".join("".join(c if c.isprintable() or c.isspace() else " " for c in answer).split())
    while len(line) > 1 and _QUOTES.get(line[0]) == line[-1] and not {line[0], line[-1]} & set(line[1:-1]):
        line = line[1:-1].strip()
    return line.lstrip("=+-@ ")


def read_template(section: RefineSection) -> str:
    """The instruction. ConfigError for a file that cannot be read or is empty."""
    if section.template == PRESET:
        return files("lrag_ray.chat").joinpath(f"{PRESET}.txt").read_text(encoding="utf-8")
    missing = f"no such template (prompts.refine.template): give a text file, or {PRESET}"
    found = read_text(section.template, "the template", ConfigError, missing=missing)
    if not found.strip():
        raise ConfigError(f"{section.template}: the template (prompts.refine.template) is empty")
    return found


def encoder_limits(backbones: Iterable[BackboneConfig]) -> list[EncoderLimit]:
    """Text encoders of these backbones, each once."""
    limits = (
        EncoderLimit(each.text_encoder.kind, each.text_encoder.tokenizer, each.transformer.text_len)
        for each in backbones
    )
    return list(dict.fromkeys(limits))
