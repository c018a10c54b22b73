"""Gemini's API through the official client library (extra `chat`): pictures inline, videos by upload."""

from __future__ import annotations

import io
import json
import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

from lrag_ray.chat.backend import Backend, RejectedError, TransientError, key_of, retry_after, storable
from lrag_ray.chat.http_client import AnswerClient
from lrag_ray.chat.messages import Finish, Media, Message, Question, Reply, Usage
from lrag_ray.config.chat import ChatSection
from lrag_ray.config.redaction import redact
from lrag_ray.errors import ChatError

_VENDOR = "https://generativelanguage.googleapis.com"
_MOST_UPLOADS = 32
_LOOK_EVERY_S = 0.5
_REFUSED = {"SAFETY", "RECITATION", "PROHIBITED_CONTENT", "BLOCKLIST", "SPII", "IMAGE_SAFETY"}
_FINISH: dict[str, Finish] = {"STOP": "stop", "MAX_TOKENS": "length"}


class GeminiBackend(Backend):
    """generateContent. A video is uploaded once, without a name, and deleted at the end."""

    def __init__(self, section: ChatSection) -> None:
        """Raises ChatError without the library or the key."""
        try:
            from google import genai
            from google.genai import errors, types
        except ImportError:
            raise ChatError("backend gemini needs its client library. Fix: pip install 'lrag-ray[chat]'") from None
        self._section = section
        self._key = key_of(section)
        self._types, self._errors = types, errors
        self._http = AnswerClient(section, _VENDOR)
        self._client = genai.Client(
            vertexai=False,
            api_key=self._key or "none",
            http_options=types.HttpOptions(
                base_url=section.base_url,
                timeout=round(section.timeout_s * 1000),
                httpx_client=self._http,
            ),
        )
        self._uploads: OrderedDict[str, Any] = OrderedDict()
        self._lock = threading.Lock()

    def ask(self, questions: Sequence[Question]) -> list[Reply]:
        """One generateContent, after the uploads that it needs."""
        (question,) = questions
        section, types = self._section, self._types
        system = [str(part) for m in question.messages if m.role == "system" for part in m.parts]
        try:
            response = self._client.models.generate_content(
                model=section.model,
                contents=[self._content(message) for message in question.messages if message.role != "system"],
                config=types.GenerateContentConfig(
                    system_instruction="\n\n".join(system) or None,
                    temperature=section.temperature,
                    max_output_tokens=section.max_tokens,
                    seed=None if section.seed is None else section.seed + question.vote,
                ),
            )
            body = json.loads(response.model_dump_json(exclude_none=True, exclude={"sdk_http_response"}))
        except self._errors.APIError as error:
            raise self._failure(error) from None
        except (TransientError, RejectedError, ChatError):
            raise
        except Exception as error:  # noqa: BLE001 - the library lets errors of its HTTP client and parser through
            raise TransientError(self._safe(f"{type(error).__name__}: {error}")) from None
        return [_reply(storable(body, self._key))]

    def close(self) -> None:
        """Delete what was uploaded."""
        with self._lock:
            uploads, self._uploads = list(self._uploads.values()), OrderedDict()
        for file in uploads:
            self._delete(file)
        self._http.close()

    def _content(self, message: Message) -> Any:
        role = "model" if message.role == "assistant" else "user"
        return self._types.Content(role=role, parts=[self._part(part) for part in message.parts])

    def _part(self, part: str | Media) -> Any:
        types = self._types
        if isinstance(part, str):
            return types.Part(text=part)
        if not part.mime.startswith("video/"):
            return types.Part.from_bytes(data=part.data, mime_type=part.mime)
        file = self._uploaded(part)
        metadata = types.VideoMetadata(fps=part.fps) if part.fps else None
        return types.Part(file_data=types.FileData(file_uri=file.uri, mime_type=part.mime), video_metadata=metadata)

    def _uploaded(self, media: Media) -> Any:
        with self._lock:
            if (known := self._uploads.get(media.sha256)) is not None:
                self._uploads.move_to_end(media.sha256)
                return known
            # From memory: a path would tell its name.
            file: Any = self._client.files.upload(file=io.BytesIO(media.data), config={"mime_type": media.mime})
            deadline_s = time.monotonic() + self._section.timeout_s
            while str(getattr(file.state, "value", file.state)) == "PROCESSING":
                if time.monotonic() > deadline_s:
                    raise TransientError(f"the uploaded video was not ready in {self._section.timeout_s:g} s")
                time.sleep(_LOOK_EVERY_S)
                file = self._client.files.get(name=file.name)
            if str(getattr(file.state, "value", file.state)) == "FAILED":
                raise RejectedError("the server could not process the uploaded video")
            self._uploads[media.sha256] = file
            old = self._uploads.popitem(last=False)[1] if len(self._uploads) > _MOST_UPLOADS else None
        if old is not None:
            self._delete(old)
        return file

    def _delete(self, file: Any) -> None:
        try:
            self._client.files.delete(name=file.name)
        except Exception:  # noqa: BLE001 - the server deletes it after two days by itself
            return

    def _failure(self, error: Any) -> Exception:
        section, code = self._section, error.code
        text = self._safe(f"HTTP {code}: {error.message or error.status}")
        where = f"Gemini model '{section.model}'"
        if code in (401, 403) or "API_KEY_INVALID" in json.dumps(error.details, default=str):
            return ChatError(f"{where}: the key is refused ({text}). Fix: check the key in {section.key_variable}")
        if code == 404:
            return ChatError(f"{where}: the server does not have it ({text}). Fix: check model and base_url")
        if code in (408, 409, 425, 429) or code >= 500:
            return TransientError(text, _asked_wait(error))
        return RejectedError(text)

    def _safe(self, text: str) -> str:
        return redact(str(storable(text, self._key)))[:500]


def _asked_wait(error: Any) -> float | None:
    headers = getattr(error.response, "headers", None) or {}
    if (asked := retry_after(headers.get("retry-after"))) is not None:
        return asked
    details = error.details.get("error", error.details) if isinstance(error.details, dict) else {}
    for detail in details.get("details", []) if isinstance(details, dict) else []:
        delay = detail.get("retryDelay") if isinstance(detail, dict) else None
        if isinstance(delay, str):
            return retry_after(delay.removesuffix("s"))
    return None


def _reply(body: Any) -> Reply:
    usage = body.get("usage_metadata") or {}
    counted = Usage(
        int(usage.get("prompt_token_count") or 0),
        int(usage.get("candidates_token_count") or 0) + int(usage.get("thoughts_token_count") or 0),
    )
    if (body.get("prompt_feedback") or {}).get("block_reason"):
        return Reply("", "refused", counted, body)
    candidates = body.get("candidates") or []
    if not candidates:
        raise TransientError("the answer holds no candidate")
    finish = str(candidates[0].get("finish_reason") or "STOP")
    parts = (candidates[0].get("content") or {}).get("parts") or []
    answer = "".join(part.get("text", "") for part in parts if not part.get("thought"))
    if finish in _REFUSED:
        return Reply(answer, "refused", counted, body)
    if finish not in _FINISH:
        raise TransientError(f"the answer ended with {finish}")
    return Reply(answer, _FINISH[finish], counted, body)
