"""Answers and calls of a run on its storage: what was answered is never asked again, and what was spent is known.

::

    RUN/chat/answers/<digest, 2>/<digest>.json   one per question: what was asked, the raw answer, tokens
    RUN/chat/calls/<number>.json                 one per call, created before it is made: the ledger of the budget

Calls are numbered across all processes and starts: creating a file that exists fails, so each number is one call.
"""

from __future__ import annotations

import threading
import uuid
from typing import NamedTuple, TypeVar

from pydantic import Field, ValidationError

from lrag_ray.chat.messages import Finish, Usage
from lrag_ray.config.chat import ChatSection
from lrag_ray.errors import BudgetError
from lrag_ray.store.address import Storage
from lrag_ray.store.records import JsonValue, Record, now_utc

FOLDER = "chat"

RecordT = TypeVar("RecordT", bound=Record)


class AnswerRecord(Record):
    """A stored answer."""

    question: dict[str, JsonValue]
    """What was asked, see `Question.described`."""
    text: str
    finish: Finish
    input_tokens: int = Field(ge=0)
    output_tokens: int = Field(ge=0)
    raw: JsonValue
    """The answer as it came."""
    answered_at: str
    seconds: float = Field(ge=0)


class CallRecord(Record):
    """A call, begun or ended."""

    digest: str
    """Of the question."""
    call_id: str
    began_at: str
    reserved_tokens: int = Field(ge=0)
    """What it counts as while it is open."""
    ended: bool = False
    input_tokens: int = Field(default=0, ge=0)
    output_tokens: int = Field(default=0, ge=0)
    problem: str = ""
    """Why it brought no answer."""

    @property
    def tokens(self) -> int:
        """What it counts as."""
        return self.input_tokens + self.output_tokens if self.ended else self.reserved_tokens


class Spent(NamedTuple):
    """What a run's calls came to."""

    calls: int
    input_tokens: int
    output_tokens: int
    open_tokens: int
    """Reserved by calls whose end is not known, such as those of a process that died."""

    def cost(self, section: ChatSection) -> float | None:
        """In the currency of the prices; None where none are given."""
        if section.price_per_million_input is None and section.price_per_million_output is None:
            return None
        price_in, price_out = section.price_per_million_input or 0, section.price_per_million_output or 0
        return (self.input_tokens * price_in + self.output_tokens * price_out) / 1e6

    def described(self, section: ChatSection) -> str:
        """``12 calls, 3,456 input and 789 output tokens, cost 0.01``."""
        cost = self.cost(section)
        text = f"{self.calls:,} calls, {self.input_tokens:,} input and {self.output_tokens:,} output tokens"
        return text if cost is None else f"{text}, cost {cost:.2f}"


def answer_path(digest: str) -> str:
    """Where the answer to a question is, relative to the run."""
    return f"{FOLDER}/answers/{digest[:2]}/{digest}.json"


class ChatStore:
    """Answers and ledger below the run. Safe in threads and across processes."""

    def __init__(self, storage: Storage) -> None:
        self.storage = storage
        self._lock = threading.Lock()
        self._next: int | None = None
        self._calls: dict[int, CallRecord] = {}

    def answer(self, digest: str) -> AnswerRecord | None:
        """The stored answer, or None where there is none or it cannot be read."""
        try:
            data = self.storage.read_bytes(answer_path(digest))
        except FileNotFoundError:
            return None
        return _parsed(AnswerRecord, data)

    def keep(self, digest: str, answer: AnswerRecord) -> AnswerRecord:
        """Store an answer; where another process was first, its answer counts and is returned."""
        data = answer.model_dump_json().encode()
        if self.storage.create(answer_path(digest), data):
            return answer
        first = self.answer(digest)
        if first is None:
            # What is there cannot be read: it is replaced.
            self.storage.write(answer_path(digest), data)
        return first or answer

    def begin(self, digest: str, section: ChatSection) -> tuple[int, CallRecord]:
        """Number a call before it is made. Raises BudgetError where the budget is used up."""
        reserved = section.max_tokens
        with self._lock:
            if section.max_total_tokens is not None:
                self._refresh()
                used = sum(call.tokens for call in self._calls.values())
                if used + reserved > section.max_total_tokens:
                    raise BudgetError(
                        f"the budget of {section.max_total_tokens:,} tokens (max_total_tokens) has no room for another "
                        f"call: {used:,} are used, and an answer may take {reserved:,}. Raise it and start again: what "
                        "is answered is kept"
                    )
            if self._next is None:
                self._next = 1 + max(self._numbers(), default=-1)
            record = CallRecord(digest=digest, call_id=uuid.uuid4().hex, began_at=now_utc(), reserved_tokens=reserved)
            data = record.model_dump_json().encode()
            while True:
                if section.max_calls is not None and self._next >= section.max_calls:
                    raise BudgetError(
                        f"the budget of {section.max_calls:,} calls (max_calls) is used up. Raise it and start again: "
                        "what is answered is kept"
                    )
                number, self._next = self._next, self._next + 1
                if self.storage.create(_call_path(number), data):
                    self._calls[number] = record
                    return number, record

    def end(self, number: int, record: CallRecord, usage: Usage | None = None, problem: str = "") -> None:
        """Record what a call came to."""
        usage = usage or Usage()
        ended = record.model_copy(
            update={
                "ended": True,
                "input_tokens": usage.input_tokens,
                "output_tokens": usage.output_tokens,
                "problem": problem,
            }
        )
        self.storage.write(_call_path(number), ended.model_dump_json().encode())
        with self._lock:
            self._calls[number] = ended

    def spent(self) -> Spent:
        """What all starts together have spent."""
        with self._lock:
            self._refresh()
            calls = list(self._calls.values())
        return Spent(
            calls=len(calls),
            input_tokens=sum(call.input_tokens for call in calls),
            output_tokens=sum(call.output_tokens for call in calls),
            open_tokens=sum(call.reserved_tokens for call in calls if not call.ended),
        )

    def _numbers(self) -> list[int]:
        names = (path.rpartition("/")[2].removesuffix(".json") for path in self.storage.list_files(f"{FOLDER}/calls"))
        return [int(name) for name in names if name.isdecimal()]

    def _refresh(self) -> None:
        stale = [n for n in self._numbers() if n not in self._calls or not self._calls[n].ended]
        for path, data in self.storage.read_many([_call_path(number) for number in stale]).items():
            # One that cannot be read was begun all the same.
            record = _parsed(CallRecord, data) or CallRecord(digest="", call_id="", began_at="", reserved_tokens=0)
            self._calls[int(path.rpartition("/")[2].removesuffix(".json"))] = record


def _call_path(number: int) -> str:
    return f"{FOLDER}/calls/{number:08d}.json"


def _parsed(kind: type[RecordT], data: bytes) -> RecordT | None:
    try:
        return kind.model_validate_json(data)
    except ValidationError:
        return None
