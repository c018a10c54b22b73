"""The section that names a language model and how it is asked. Keys never stand here, but in the environment."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from lrag_ray.config.redaction import holds_credentials
from lrag_ray.config.section import Section

Backend = Literal["openai", "gemini", "local"]

_DAY_S = 24 * 3600.0
_HTTP = re.compile(r"https?://(\[[0-9A-Fa-f:.]+\]|[^/@?#\s\[\]:]+)(:\d{1,5})?(/[^?#\s]*)?")
_DEFAULT_KEY = {"openai": "OPENAI_API_KEY", "gemini": "GEMINI_API_KEY"}


def _endpoint(value: str) -> str:
    if not _HTTP.fullmatch(value):
        raise ValueError(
            "must be http or https and a host, such as http://localhost:8000/v1, without user, options or a key: keys "
            "belong in the environment (key_env names the variable)"
        )
    return value


def _variable(value: str) -> str:
    if not re.fullmatch(r"[A-Z_][A-Z0-9_]{0,63}", value):
        # The value may be the key itself: it is not repeated.
        raise ValueError("must be the name of an environment variable in capitals, such as MY_API_KEY, not the key")
    return value


def _model(value: str) -> str:
    if not value.strip() or holds_credentials(value):
        raise ValueError("must be the name of a model, or a folder for backend local, without credentials")
    return value


class ChatSection(Section):
    """A language model and how it is asked."""

    backend: Backend
    """openai: any OpenAI-compatible server (vLLM, SGLang, transformers serve, hosted). gemini: Google's API, with video
    upload. local: a Hugging Face model folder, run by the workers of this run."""
    model: Annotated[str, AfterValidator(_model)]
    """Name of the model at the server; local: its folder."""
    base_url: Annotated[str, AfterValidator(_endpoint)] | None = None
    """Address of the server, http://host:8000/v1; None takes the vendor's own."""
    key_env: Annotated[str, AfterValidator(_variable)] | None = None
    """Environment variable, on every node, that holds the key. None takes OPENAI_API_KEY or GEMINI_API_KEY for the
    vendor's own address, and sends no key to any other."""
    temperature: float = Field(default=0.0, ge=0, le=2)
    """Sampling temperature; 0 takes the likeliest token."""
    max_tokens: int = Field(default=1024, ge=1, le=1_000_000)
    """Most tokens of an answer."""
    seed: int | None = Field(default=None, ge=0, lt=2**31)
    """Sampling seed, where the server takes one; each vote adds its number."""
    concurrency: int = Field(default=4, ge=1, le=1024)
    """Calls at a time per worker; local: messages per batch."""
    requests_per_minute: float | None = Field(default=None, gt=0, le=1_000_000)
    """Calls that one worker begins per minute at most."""
    timeout_s: float = Field(default=300, gt=0, le=_DAY_S)
    """Longest wait for an answer."""
    attempts: int = Field(default=6, ge=1, le=100)
    """Calls per answer, before the task fails: rate limits, server errors, timeouts, cut or malformed answers."""
    max_wait_s: float = Field(default=300, ge=0, le=_DAY_S)
    """Longest wait between two of them; a server that asks for more (Retry-After) ends the task."""
    max_calls: int | None = Field(default=None, ge=0, le=10_000_000)
    """Budget of the model in a run: calls of all starts together, retries included. Used up, the run ends with exit
    code 1, and a larger one continues it."""
    max_total_tokens: int | None = Field(default=None, ge=0, le=10**12)
    """Budget of the model in a run: tokens of all starts together, as the server counts them. An open call counts as
    max_tokens."""
    price_per_million_input: float | None = Field(default=None, ge=0, le=1e6)
    """Price of a million input tokens, to show the cost."""
    price_per_million_output: float | None = Field(default=None, ge=0, le=1e6)
    """Price of a million output tokens, to show the cost."""

    @model_validator(mode="after")
    def _fits_backend(self) -> ChatSection:
        if self.backend == "local" and (self.base_url or self.key_env):
            raise ValueError("backend local takes neither base_url nor key_env: model is a folder on every node")
        return self

    @property
    def key_variable(self) -> str | None:
        """Environment variable of the key; None where no key is sent."""
        return self.key_env or (None if self.base_url else _DEFAULT_KEY.get(self.backend))
