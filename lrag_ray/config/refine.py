"""How prompts are refined by a language model before generation."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from lrag_ray.config.chat import ChatSection
from lrag_ray.config.section import Address

PRESET = "extend"


class RefineSection(ChatSection):
    """Prompt refinement: every prompt is rewritten once, before its text is encoded."""

    template: Address = PRESET
    """extend: the instruction that comes with the program. Otherwise a text file: the system message, with the prompt
    as the user's; or, where it holds {prompt}, one message with the prompt in its place."""
    max_tokens: int = Field(default=512, ge=1, le=1_000_000)
    """Most tokens of an answer."""
    language: Literal["en", "same", "any"] = "en"
    """Language that a refined prompt must have: English, that of the original, or any."""
    retries: int = Field(default=2, ge=0, le=20)
    """How often the model is asked again, with the reason, after an answer that is empty, refused, in another language
    or longer than a text encoder takes."""
    on_failure: Literal["stop", "original"] = "stop"
    """After the last retry: stop leaves the prompt out of the run (exit code 1), original takes it as it was. Both are
    reported."""


def described(section: RefineSection) -> str:
    """Model and template, as run.json and reports name them."""
    name = Path(section.model).name if section.backend == "local" else section.model
    return f"{name} ({section.backend}), template {Path(section.template).name}"
