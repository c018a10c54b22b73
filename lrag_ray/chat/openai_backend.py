"""OpenAI-compatible servers through the official client library (extra `chat`)."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from typing import Any

from lrag_ray.chat.backend import Backend, RejectedError, TransientError, key_of, retry_after, storable
from lrag_ray.chat.http_client import AnswerClient
from lrag_ray.chat.messages import Finish, Media, Message, Question, Reply, Usage
from lrag_ray.config.chat import ChatSection
from lrag_ray.config.redaction import redact
from lrag_ray.errors import ChatError

_VENDOR = "https://api.openai.com/v1"
_FINISH: Mapping[str, Finish] = {"length": "length", "content_filter": "refused"}
_BROKEN = ("abort", "error")
"""How vLLM, SGLang and routers end an answer that they did not finish."""


class OpenAIBackend(Backend):
    """Chat completions. Videos go as ``video_url``, which vLLM and SGLang take."""

    def __init__(self, section: ChatSection) -> None:
        """Raises ChatError without the library or the key."""
        try:
            import openai
        except ImportError:
            raise ChatError("backend openai needs its client library. Fix: pip install 'lrag-ray[chat]'") from None
        self._section = section
        self._key = key_of(section)
        self._errors = openai
        # Retries are ours: they count against the budget and wait for all threads.
        self._client = openai.OpenAI(
            api_key=self._key or "none",
            base_url=section.base_url or _VENDOR,
            timeout=section.timeout_s,
            max_retries=0,
            http_client=AnswerClient(section, _VENDOR),
        )

    def ask(self, questions: Sequence[Question]) -> list[Reply]:
        """One chat completion."""
        (question,) = questions
        section, errors = self._section, self._errors
        options: dict[str, Any] = {"temperature": section.temperature}
        # Newer models of the vendor refuse the old name, and other servers know no other.
        options["max_tokens" if section.base_url else "max_completion_tokens"] = section.max_tokens
        if section.seed is not None:
            options["seed"] = section.seed + question.vote
        try:
            response = self._client.chat.completions.with_raw_response.create(
                model=section.model,
                messages=[_message(message) for message in question.messages],  # type: ignore[misc]
                **options,
            )
            body = response.http_response.text
        except errors.APIStatusError as error:
            return [self._status(error)]
        except (errors.APIConnectionError, errors.APIResponseValidationError) as error:
            if isinstance(error.__cause__, ChatError):
                raise error.__cause__ from None
            cause = error.__cause__ or error
            raise TransientError(self._safe(f"{type(error).__name__}: {cause}")) from None
        # The key goes before anything is quoted, and before what is quoted is cut.
        return [_reply(storable(_parsed(str(storable(body, self._key))), self._key))]

    def close(self) -> None:
        """Close its connections."""
        self._client.close()

    def _status(self, error: Any) -> Reply:
        status, body = error.status_code, storable(error.body, self._key)
        text = self._safe(f"HTTP {status}: {error.message}")
        code = str(error.code or "")
        if code in ("content_filter", "content_policy_violation"):
            return Reply("", "refused", Usage(), body)
        if status == 402 or code in ("insufficient_quota", "billing_hard_limit_reached"):
            raise ChatError(f"{self._where} has no credit left ({text})") from None
        if status in (408, 409, 425, 429) or status >= 500:
            raise TransientError(text, retry_after(error.response.headers.get("retry-after"))) from None
        if status in (401, 403):
            variable = self._section.key_variable
            fix = f"check the key in {variable}" if variable else "name the variable that holds a key with key_env"
            raise ChatError(f"{self._where} refuses the key ({text}). Fix: {fix}") from None
        if status == 404:
            raise ChatError(f"{self._where} does not serve it ({text}). Fix: check model and base_url") from None
        raise RejectedError(text) from None

    @property
    def _where(self) -> str:
        return f"model '{self._section.model}' at {self._section.base_url or _VENDOR}:"

    def _safe(self, text: str) -> str:
        return redact(str(storable(text, self._key)))[:500]


def _message(message: Message) -> dict[str, Any]:
    if all(isinstance(part, str) for part in message.parts):
        return {"role": message.role, "content": "\n\n".join(map(str, message.parts))}
    return {"role": message.role, "content": [_part(part) for part in message.parts]}


def _part(part: str | Media) -> dict[str, Any]:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    kind = "video_url" if part.mime.startswith("video/") else "image_url"
    return {"type": kind, kind: {"url": f"data:{part.mime};base64,{base64.b64encode(part.data).decode()}"}}


def _parsed(body: str) -> Any:
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        raise TransientError(f"the answer is not JSON: {body[:80]!r}") from None


def _reply(body: Any) -> Reply:
    try:
        choice = body["choices"][0]
        message = choice["message"]
        content, refusal, finish = message.get("content"), message.get("refusal"), choice.get("finish_reason")
    except (KeyError, IndexError, TypeError, AttributeError):
        raise TransientError(f"the answer holds no message: {json.dumps(body)[:200]}") from None
    if finish in _BROKEN:
        raise TransientError(f"the answer ended with {finish}")
    if refusal or content is None or not isinstance(content, str):
        if not refusal and finish != "content_filter" and content is not None:
            raise TransientError(f"the answer's content is not text: {json.dumps(body)[:200]}")
        return Reply(
            str(refusal or ""), "refused" if refusal or finish == "content_filter" else "stop", _usage(body), body
        )
    return Reply(content, _FINISH.get(str(finish), "stop"), _usage(body), body)


def _usage(body: Mapping[str, Any]) -> Usage:
    usage = body.get("usage")
    counts = usage if isinstance(usage, Mapping) else {}
    return Usage(*(_count(counts.get(name)) for name in ("prompt_tokens", "completion_tokens")))


def _count(value: Any) -> int:
    return value if isinstance(value, int) and value > 0 else 0
