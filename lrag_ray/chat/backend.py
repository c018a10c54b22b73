"""What a backend of the client does: one request to a language model, and what its failures mean."""

from __future__ import annotations

import math
import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, ClassVar

from lrag_ray.chat.messages import Question, Reply
from lrag_ray.config.chat import ChatSection
from lrag_ray.errors import ChatError


class TransientError(Exception):
    """A call that failed and may be repeated."""

    def __init__(self, reason: str, retry_after_s: float | None = None) -> None:
        super().__init__(reason)
        self.retry_after_s = retry_after_s
        """How long the server asks to wait."""


class RejectedError(Exception):
    """A question that this model can never answer, such as one that is too long; others may be fine."""


class Backend(ABC):
    """A way to ask a model. Used by several threads at a time unless it is `batched`."""

    batched: ClassVar[bool] = False
    """Whether it takes several questions in one pass, in one thread."""

    @abstractmethod
    def ask(self, questions: Sequence[Question]) -> list[Reply]:
        """Answers in the order of the questions, one question unless it is `batched`.

        Raises TransientError, RejectedError, or ChatError for what every other question would meet too.
        """

    def close(self) -> None:
        """Let go of what it holds."""


def key_of(section: ChatSection) -> str | None:
    """The key from the environment, or None where none is sent. ChatError where it is not set."""
    variable = section.key_variable
    if variable is None:
        return None
    key = os.environ.get(variable, "").strip()
    if not key:
        raise ChatError(
            f"the environment variable {variable} holds no key for {section.backend} model '{section.model}'. Fix: "
            f"export {variable}=... on every node (or name another variable with key_env)"
        )
    return key


def storable(value: Any, key: str | None = None) -> Any:
    """JSON data as it can be stored: without the key, should a server repeat it; what JSON of ours lacks as text."""
    match value:
        case str():
            plain = value.encode("utf-8", "replace").decode()
            return plain.replace(key, "***") if key else plain
        case list():
            return [storable(item, key) for item in value]
        case dict():
            return {storable(str(name), key): storable(item, key) for name, item in value.items()}
        case bool() | None:
            return value
        case int() if -(2**63) <= value < 2**63:
            return value
        case float() if math.isfinite(value):
            return value
    return str(value)[:100]


def retry_after(value: str | None) -> float | None:
    """Seconds of a Retry-After header, which holds a number or a date; None where it holds neither."""
    if value is None:
        return None
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        moment = parsedate_to_datetime(value)
    except ValueError:
        return None
    if moment.tzinfo is None:
        # A date without a zone, or with -0000, is in UTC.
        moment = moment.replace(tzinfo=UTC)
    return max(0.0, (moment - datetime.now(UTC)).total_seconds())
