"""The client: answers from the run's store or from a backend, within limits.

::

    with ChatClient(section, ChatStore(storage)) as client:
        (answer,) = client.ask([Question((text("user", "Describe rain."),))])

Every question is asked until it is answered, and never again: the answer is stored before anything else is done with
it. Only a call that is under way when its process is killed may be repeated.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import wait
from contextlib import contextmanager
from types import TracebackType

from lrag_ray.chat.backend import Backend, RejectedError, TransientError
from lrag_ray.chat.messages import Question, Reply
from lrag_ray.chat.store import AnswerRecord, CallRecord, ChatStore, answer_path
from lrag_ray.config.chat import ChatSection
from lrag_ray.errors import ChatError
from lrag_ray.printable import counted
from lrag_ray.store.records import now_utc
from lrag_ray.thread_pool import thread_pool

_FIRST_WAIT_S = 1.0
_LOOK_EVERY_S = 0.5
_MOST_UNANSWERED = 3
"""Questions in a row without an answer after which the model counts as out of order; one alone may be at fault."""


class LeftError(Exception):
    """The caller was asked to stop; what is answered is stored."""


class UnansweredError(Exception):
    """A question got no answer in all its attempts; nothing is stored, and the next start asks again."""


Outcome = AnswerRecord | RejectedError | UnansweredError
"""The answer to a question, or why it has none."""


class ChatClient:
    """Asks questions of one model."""

    def __init__(
        self,
        section: ChatSection,
        store: ChatStore,
        backend: Backend | None = None,
        *,
        device: str = "cpu",
        keep_going: Callable[[], bool] = lambda: True,
    ) -> None:
        """`backend` is made at the first call unless it is given: nothing is loaded where all is answered.

        `device` is that of backend local. `keep_going` is asked before every call and while waiting.
        """
        self.section = section
        self.store = store
        self._model = model_identity(section)
        self._backend = backend
        self._device = device
        self._keep_going = keep_going
        self._lock = threading.Lock()
        self._not_before_s = 0.0
        """No call begins earlier, on the monotonic clock."""
        self._unanswered_in_row = 0
        self._stopped = threading.Event()
        """No call of this round begins any more."""

    def ask(self, questions: Sequence[Question]) -> list[Outcome]:
        """Answers in the order of the questions.

        Raises, after all calls under way have ended and their answers are stored: BudgetError; ChatError where the
        model cannot be asked or keeps failing; LeftError.
        """
        digests = [question.digest(self.section, self._model) for question in questions]
        by_digest = dict(zip(digests, questions, strict=True))
        found: dict[str, Outcome] = {}
        for digest in by_digest:
            if (stored := self.store.answer(digest)) is not None:
                found[digest] = stored
        open_digests = [digest for digest in by_digest if digest not in found]
        if open_digests:
            size = self.section.concurrency if self._held().batched else 1
            groups = [open_digests[i : i + size] for i in range(0, len(open_digests), size)]
            threads = 1 if self._held().batched else min(self.section.concurrency, len(groups))
            self._stopped.clear()

            def work(group: Sequence[str]) -> list[Outcome]:
                with self._stops_others():
                    return self._answered(group, [by_digest[digest] for digest in group])

            with thread_pool(threads, "chat") as pool, self._stops_others():
                futures = [pool.submit(work, group) for group in groups]
                wait(futures)
            errors = [error for future in futures if (error := future.exception())]
            if errors:
                # What stopped the others says more than that they were stopped.
                raise next((error for error in errors if not isinstance(error, LeftError)), errors[0])
            for group, future in zip(groups, futures, strict=True):
                found |= zip(group, future.result(), strict=True)
        return [found[digest] for digest in digests]

    def close(self) -> None:
        """Let go of connections and models."""
        if self._backend is not None:
            self._backend.close()

    def __enter__(self) -> ChatClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _held(self) -> Backend:
        with self._lock:
            if self._backend is None:
                self._backend = make_backend(self.section, self._device)
            return self._backend

    @contextmanager
    def _stops_others(self) -> Iterator[None]:
        """Where the block raises, no other call begins."""
        try:
            yield
        except BaseException:
            self._stopped.set()
            raise

    def _answered(self, digests: Sequence[str], questions: Sequence[Question]) -> list[Outcome]:
        """Ask in one call, several questions where the backend is `batched`, until there are answers."""
        section = self.section
        not_before_s = 0.0
        later: list[tuple[str, Question]] = []
        found: list[Outcome] = []
        for attempt in range(1, section.attempts + 1):
            self._wait_for_turn(not_before_s)
            calls = self.store.begin(digests, section)
            # The budget may have no room for all of them.
            later = [*zip(digests[len(calls) :], questions[len(calls) :], strict=True), *later]
            digests, questions = digests[: len(calls)], questions[: len(calls)]
            try:
                found = self._made(calls, digests, questions)
            except TransientError as error:
                wait_s = self._wait_s(attempt, error.retry_after_s)
                if error.retry_after_s is not None and wait_s > section.max_wait_s:
                    raise ChatError(
                        f"model '{section.model}' asks to wait {wait_s:.0f} s, which is more than max_wait_s: {error}. "
                        "The same command continues"
                    ) from None
                if attempt == section.attempts:
                    found = [self._unanswered(str(error))] * len(digests)
                    break
                not_before_s = time.monotonic() + wait_s
                if error.retry_after_s is not None:
                    # What the server says holds for all threads.
                    with self._lock:
                        self._not_before_s = max(self._not_before_s, not_before_s)
                continue
            except RejectedError as error:
                if len(questions) == 1:
                    found = [error]
                    break
                # One alone may be at fault.
                for digest, question in zip(digests, questions, strict=True):
                    found += self._answered([digest], [question])
                break
            with self._lock:
                self._unanswered_in_row = 0
            break
        return found + (self._answered(*zip(*later, strict=True)) if later else [])

    def _unanswered(self, reason: str) -> UnansweredError:
        """A question that used up its attempts; ChatError where others did before, and none was answered since."""
        calls = f"{counted(self.section.attempts, 'call')}"
        with self._lock:
            self._unanswered_in_row += 1
            if self._unanswered_in_row >= _MOST_UNANSWERED:
                raise ChatError(
                    f"model '{self.section.model}' answers none of {self._unanswered_in_row} questions in a row, asked "
                    f"{calls} each: {reason}. The same command continues"
                )
        return UnansweredError(f"no answer in {calls}: {reason}")

    def _made(
        self, calls: Sequence[CallRecord], digests: Sequence[str], questions: Sequence[Question]
    ) -> list[Outcome]:
        """Make one call that is begun, store its answers, record how it ended. Raises what the backend raises."""
        began_s = time.monotonic()
        try:
            replies = self._held().ask(questions)
        except BaseException as error:
            expected = isinstance(error, TransientError | RejectedError)
            for call in calls:
                self.store.end(call, problem=str(error) if expected else type(error).__name__)
            raise
        seconds = time.monotonic() - began_s
        kept = [self._kept(*each, seconds) for each in zip(digests, questions, replies, strict=True)]
        for call, reply in zip(calls, replies, strict=True):
            self.store.end(call, reply.usage)
        return kept

    def _kept(self, digest: str, question: Question, reply: Reply, seconds: float) -> Outcome:
        return self.store.keep(
            digest,
            AnswerRecord(
                path=answer_path(digest),
                question=question.described(self.section, self._model),
                text=reply.text,
                finish=reply.finish,
                input_tokens=reply.usage.input_tokens,
                output_tokens=reply.usage.output_tokens,
                raw=reply.raw,
                answered_at=now_utc(),
                seconds=seconds,
            ),
        )

    def _wait_for_turn(self, not_before_s: float) -> None:
        """Wait until then, while the server wants none of our calls, and for the rate that is allowed."""
        while True:
            if self._stopped.is_set() or not self._keep_going():
                raise LeftError
            with self._lock:
                now_s = time.monotonic()
                wait_s = max(self._not_before_s, not_before_s) - now_s
                if wait_s <= 0:
                    if self.section.requests_per_minute:
                        self._not_before_s = now_s + 60 / self.section.requests_per_minute
                    return
            time.sleep(min(wait_s, _LOOK_EVERY_S))

    def _wait_s(self, attempt: int, asked_s: float | None) -> float:
        """How long to wait: what the server asks for, otherwise doubling.

        With jitter, so that many workers do not come back at the same moment.
        """
        if asked_s is not None:
            return asked_s + random.uniform(0, min(1.0, 0.1 * asked_s))
        return random.uniform(0.5, 1) * float(min(_FIRST_WAIT_S * 2 ** (attempt - 1), self.section.max_wait_s))


def model_identity(section: ChatSection) -> str:
    """What names the model in digests: its name, or of a local folder the digest of its files."""
    if section.backend != "local":
        return section.model
    from lrag_ray.chat.local_backend import folder_digest

    return folder_digest(section.model)


def make_backend(section: ChatSection, device: str = "cpu") -> Backend:
    """The backend that a section names. ChatError where a library, a key or the model's folder is missing."""
    if section.backend == "openai":
        from lrag_ray.chat.openai_backend import OpenAIBackend

        return OpenAIBackend(section)
    if section.backend == "gemini":
        from lrag_ray.chat.gemini_backend import GeminiBackend

        return GeminiBackend(section)
    from lrag_ray.chat.local_backend import LocalBackend

    return LocalBackend(section, device)


def check_backend(section: ChatSection) -> None:
    """ChatError where a library, a key or a folder is missing on this machine; asks nothing of any server."""
    if section.backend == "local":
        model_identity(section)
        return
    make_backend(section).close()
