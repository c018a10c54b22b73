"""How many tokens a prompt has for a backbone's text encoder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from lrag_ray.wan.text import byte_tokenizer, clean_prompt, load_tokenizer

_UNCUT = 1 << 30


def uncut_tokenizer(kind: str, folder: str | None) -> Callable[[str], list[int]] | None:
    """Tokens of a cleaned prompt without a limit; None where the tokenizer is not on this machine.

    Raises WeightsError for one that is there and cannot be loaded.
    """
    if kind == "tiny":
        return byte_tokenizer(_UNCUT)
    if folder is None or not Path(folder).is_dir():
        return None
    return load_tokenizer(Path(folder), _UNCUT)[0]


def least_tokens(tokenize: Callable[[str], list[int]] | None, prompt: str) -> int:
    """Tokens of a prompt with the mark of the end; without the tokenizer a lower bound, from its words."""
    text = clean_prompt(prompt)
    return max(len(tokenize(text)) if tokenize else 0, text.count(" ") + 2)
