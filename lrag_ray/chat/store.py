"""Answers and calls of a run on its storage: what was answered is never asked again, and what was spent is known.

::

    RUN/chat/answers/<digest, 2>/<digest>.json   one per question: what was asked, the raw answer, tokens
    RUN/chat/calls/<model, 12>/<number>.json     one per call, created before it is made: the ledger of the budget

Every model has a ledger, since budgets and prices are those of a model. Its calls are numbered across all processes and
starts: creating a file that exists fails, so each number is one call.
"""

from __future__ import annotations

import re
import threading
import uuid
from collections.abc import Sequence
from typing import NamedTuple, TypeVar

from pydantic import Field

from lrag_ray.chat.messages import Finish, Usage
from lrag_ray.config.chat import ChatSection
from lrag_ray.errors import BudgetError
from lrag_ray.printable import counted
from lrag_ray.store.address import Storage
from lrag_ray.store.identity import canonical_digest
from lrag_ray.store.records import JsonValue, PlacedRecord, now_utc
from lrag_ray.store.run_dir import CHAT

_LOOK_EVERY_S = 0.5
_LEDGERS = f"{CHAT}/calls"
_CALL = re.compile(rf"{_LEDGERS}/[0-9a-f]{{12}}/\d{{8,}}\.json", re.ASCII)

RecordT = TypeVar("RecordT", bound=PlacedRecord)


class AnswerRecord(PlacedRecord):
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


class CallRecord(PlacedRecord):
    """A call, begun or ended."""

    digest: str
    """Of the question."""
    model: str = ""
    """Backend and name of the model."""
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
    """What calls came to."""

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
        text = f"{counted(self.calls, 'call')}, {self.input_tokens:,} input and {self.output_tokens:,} output tokens"
        return text if cost is None else f"{text}, cost {cost:.2f}"


def answer_path(digest: str) -> str:
    """Where the answer to a question is, relative to the run."""
    return f"{CHAT}/answers/{digest[:2]}/{digest}.json"


class ChatStore:
    """Answers and ledger below the run. Safe in threads and across processes."""

    def __init__(self, storage: Storage) -> None:
        self.storage = storage
        self._changed = threading.Condition()
        self._under_way: set[str] = set()
        """Calls of this process, by path."""
        self._next: dict[str, int] = {}
        """By ledger."""
        self._calls: dict[str, CallRecord] = {}
        """By path."""

    def answer(self, digest: str) -> AnswerRecord | None:
        """The stored answer, or None where there is none or it cannot be read."""
        path = answer_path(digest)
        try:
            data = self.storage.read_bytes(path)
        except FileNotFoundError:
            return None
        return _parsed(AnswerRecord, path, data)

    def keep(self, digest: str, answer: AnswerRecord) -> AnswerRecord:
        """Store an answer; where another process was first, its answer counts and is returned."""
        if self.storage.create(answer.path, answer.sealed()):
            return answer
        first = self.answer(digest)
        if first is None:
            # What is there cannot be read: it is replaced.
            self.storage.write(answer.path, answer.sealed())
        return first or answer

    def begin(self, digests: Sequence[str], section: ChatSection) -> list[CallRecord]:
        """Number calls before they are made: one per question, or as many of the first ones as the budget allows.

        Raises BudgetError where it allows none. Where calls under way in other threads may leave room, it waits.
        """
        with self._changed:
            ledger = ledger_of(section)
            count = self._affordable(len(digests), section, ledger)
            if ledger not in self._next:
                self._next[ledger] = 1 + max(map(_number, self._listed(ledger)), default=-1)
            begun: list[CallRecord] = []
            while len(begun) < count:
                if section.max_calls is not None and self._next[ledger] >= section.max_calls:
                    if begun:
                        break
                    raise BudgetError(
                        f"the budget of {counted(section.max_calls, 'call')} (max_calls) is used up. Raise it "
                        f"and start again: "
                        "what is answered is kept"
                    )
                number = self._next[ledger]
                self._next[ledger] += 1
                record = CallRecord(
                    path=f"{ledger}/{number:08d}.json",
                    digest=digests[len(begun)],
                    model=f"{section.backend} {section.model}",
                    call_id=uuid.uuid4().hex,
                    began_at=now_utc(),
                    reserved_tokens=section.max_tokens,
                )
                if self.storage.create(record.path, record.sealed()):
                    self._calls[record.path] = record
                    self._under_way.add(record.path)
                    begun.append(record)
            return begun

    def _affordable(self, count: int, section: ChatSection, ledger: str) -> int:
        """How many of `count` calls the budget of tokens has room for, at least one."""
        limit, reserved = section.max_total_tokens, section.max_tokens
        if limit is None:
            return count
        while True:
            calls = self._refreshed(ledger)
            used = sum(call.tokens for call in calls.values())
            if room := min(count, (limit - used) // reserved if used < limit else 0):
                return room
            under_way = self._under_way & calls.keys()
            spent = used - sum(calls[path].tokens for path in under_way)
            if not under_way or spent + reserved > limit:
                raise BudgetError(
                    f"the budget of {limit:,} tokens (max_total_tokens) has no room for another call: {used:,} are "
                    f"used, and an answer may take {reserved:,}. Raise it and start again: what is answered is kept"
                )
            self._changed.wait(_LOOK_EVERY_S)

    def end(self, record: CallRecord, usage: Usage | None = None, problem: str = "") -> None:
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
        self.storage.write(ended.path, ended.sealed())
        with self._changed:
            self._calls[ended.path] = ended
            self._under_way.discard(ended.path)
            self._changed.notify_all()

    def spent(self, section: ChatSection | None = None) -> Spent:
        """What all starts together have spent on the section's model; without one, on all models."""
        with self._changed:
            calls = list(self._refreshed(ledger_of(section) if section else _LEDGERS).values())
        return Spent(
            calls=len(calls),
            input_tokens=sum(call.input_tokens for call in calls),
            output_tokens=sum(call.output_tokens for call in calls),
            open_tokens=sum(call.reserved_tokens for call in calls if not call.ended),
        )

    def _listed(self, ledger: str) -> list[str]:
        paths = self.storage.list_files(ledger)
        return [path for path in paths if _CALL.fullmatch(path)]

    def _refreshed(self, ledger: str) -> dict[str, CallRecord]:
        """Calls of a ledger by path, as they are stored now."""
        listed = self._listed(ledger)
        stale = [path for path in listed if path not in self._calls or not self._calls[path].ended]
        for path, data in self.storage.read_many(stale).items():
            # One that cannot be read was begun all the same.
            unknown = CallRecord(path=path, digest="", call_id="", began_at="", reserved_tokens=0)
            self._calls[path] = _parsed(CallRecord, path, data) or unknown
        return {path: call for path, call in self._calls.items() if path.startswith(f"{ledger}/")}


def ledger_of(section: ChatSection) -> str:
    """Folder of the calls to a model, relative to the run."""
    return f"{_LEDGERS}/{canonical_digest([section.backend, section.model])[:12]}"


def _number(path: str) -> int:
    return int(path.rpartition("/")[2].removesuffix(".json"))


def _parsed(kind: type[RecordT], path: str, data: bytes) -> RecordT | None:
    try:
        return kind.opened_at(path, data)
    except (ValueError, RecursionError):
        return None
