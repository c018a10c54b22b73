"""What is asked of a language model and what it answers, the same for all backends."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from lrag_ray.config.chat import ChatSection
from lrag_ray.store.identity import canonical_digest
from lrag_ray.store.records import JsonValue

Role = Literal["system", "user", "assistant"]

_REASONING = re.compile(r"\s*<(think|thinking|thought)>", re.IGNORECASE)
_REASONING_ENDS = re.compile(r"</(think|thinking|thought)>", re.IGNORECASE)

Finish = Literal["stop", "length", "refused"]
"""stop: the model ended it; length: max_tokens cut it off; refused: the model or a filter declined."""


@dataclass(frozen=True)
class Media:
    """A picture or video as bytes. It has no name: nothing but pixels reaches the model."""

    mime: str
    """image/jpeg, image/png or video/mp4."""
    data: bytes = field(repr=False)
    fps: float | None = None
    """Frames per second at which a model should look at a video, where its API takes a rate."""

    @property
    def sha256(self) -> str:
        """Checksum of the bytes."""
        return hashlib.sha256(self.data).hexdigest()


Part = str | Media


@dataclass(frozen=True)
class Message:
    """A turn of the conversation: text and media in their order."""

    role: Role
    parts: tuple[Part, ...]

    def described(self) -> dict[str, JsonValue]:
        """As plain data; media by their checksum."""
        parts: list[JsonValue] = [
            part if isinstance(part, str) else {"mime": part.mime, "sha256": part.sha256, "fps": part.fps}
            for part in self.parts
        ]
        return {"role": self.role, "parts": parts}


def text(role: Role, content: str) -> Message:
    """A message without media."""
    return Message(role, (content,))


@dataclass(frozen=True)
class Question:
    """One call's content."""

    messages: tuple[Message, ...]
    vote: int = 0
    """Number of the repetition: equal questions with different numbers are asked separately."""

    def described(self, section: ChatSection, model: str) -> dict[str, JsonValue]:
        """All that the answer depends on, as plain data: backend, model, settings, messages, media by checksum.

        Addresses, limits and prices are not in it. `model` is the name, of a local folder its digest.
        """
        return {
            "backend": section.backend,
            "model": model,
            "settings": {
                "temperature": section.temperature,
                "max_tokens": section.max_tokens,
                "seed": section.seed,
            },
            "messages": [message.described() for message in self.messages],
            "vote": self.vote,
        }

    def digest(self, section: ChatSection, model: str) -> str:
        """Hex SHA-256 of `described`."""
        return canonical_digest(self.described(section, model))


class Usage(NamedTuple):
    """Tokens of a call, as the server counts them; 0 where it does not say."""

    input_tokens: int = 0
    output_tokens: int = 0


class Reply(NamedTuple):
    """What a backend returns for one question."""

    text: str
    finish: Finish
    """Why the answer ended."""
    usage: Usage
    raw: Any
    """The answer as it came, as JSON data."""


def without_reasoning(answer: str) -> str:
    """An answer without the reasoning before it, which some servers leave in it between ``<think>`` and ``</think>``.

    A chat template may have written the first of them, so that only the second is in the answer. Empty where the
    reasoning never ends.
    """
    opened = _REASONING.match(answer)
    ends = list(_REASONING_ENDS.finditer(answer))
    if opened is None and re.search(r"<(think|thinking|thought)>", answer, re.IGNORECASE):
        return answer
    if ends:
        return answer[ends[-1].end() :].strip()
    return "" if opened else answer
