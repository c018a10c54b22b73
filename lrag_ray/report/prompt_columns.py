"""The other columns of a prompt table, such as an id or references, as a report shows them beside the prompt."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping

from lrag_ray.store.identity import PromptIdentity, RunIdentity

MOST_SHOWN = 100
"""Columns of a report; a run directory may claim any number of them."""
ORIGINAL = "original_prompt"
"""Column of data files with the prompt before it was refined, in runs that refine."""
PREFIX = "prompt."
"""Of their names in data files, which have columns of their own."""


def prompt_columns(identity: RunIdentity) -> list[str]:
    """Names in order of appearance."""
    return list(dict.fromkeys(name for prompt in identity.prompts.values() for name in prompt.columns))


def shown_columns(prompt: PromptIdentity, names: list[str]) -> dict[str, str]:
    """Those of `names` that the prompt has; what is not text as JSON."""
    return dict(_shown(prompt.columns, names))


def _shown(columns: Mapping[str, object], names: list[str]) -> Iterator[tuple[str, str]]:
    for name in names:
        value = columns.get(name)
        if value is not None:
            yield name, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
