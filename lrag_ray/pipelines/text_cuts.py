"""Prompts that the text encoder cuts off at its length, reported before a run: nothing in the videos shows it."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Sequence

from lrag_ray.config.prompts import Prompt, listed
from lrag_ray.config.schema import BackboneConfig
from lrag_ray.stages.text_length import uncut_tokenizer
from lrag_ray.wan.text import clean_prompt


def cut_notes(backbones: Sequence[BackboneConfig], prompts: Sequence[Prompt]) -> Iterator[str]:
    """One note per encoder about the lines that it cuts off, and one per group that the cut makes equal.

    Without the tokenizer, which a plan does not need, only lines of more words than the encoder takes tokens are known
    to be cut. Raises WeightsError for a tokenizer that is there and cannot be loaded.
    """
    for kind, tokenizer, text_len in dict.fromkeys(
        (each.text_encoder.kind, each.text_encoder.tokenizer, each.transformer.text_len) for each in backbones
    ):
        # A token holds at least one character, or one byte of one that the vocabulary lacks.
        long = [
            (each, text) for each in prompts if each.text and _most_tokens(text := clean_prompt(each.text)) > text_len
        ]
        tokenize = uncut_tokenizer(kind, tokenizer) if long else None
        kept: dict[tuple[int, ...], list[Prompt]] = {}
        cut = []
        for prompt, text in long:
            tokens = tokenize(text) if tokenize else []
            if max(len(tokens), text.count(" ") + 2) > text_len:
                cut.append(prompt.line)
            if len(tokens) >= text_len:
                kept.setdefault((*tokens[: text_len - 1], tokens[-1]), []).append(prompt)
        if cut:
            lines = f"line {cut[0]} is" if len(cut) == 1 else f"lines {listed(cut)} are"
            yield f"{lines} cut off at {text_len} tokens, the length of the text encoder: the rest has no effect"
        for group in kept.values():
            if len({prompt.text for prompt in group}) > 1:
                lines = listed([prompt.line for prompt in group])
                yield f"lines {lines} are the same text after that cut: they make the same video"


def _most_tokens(text: str) -> int:
    """An upper bound of umT5's tokens and of the tiny encoder's bytes, with the mark before and that of the end."""
    return max(len(form.encode()) for form in (text, unicodedata.normalize("NFKC", text))) + 2
