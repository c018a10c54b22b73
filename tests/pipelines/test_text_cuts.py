"""Which prompts are cut off at the text encoder's length, and which are then the same text."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from lrag_ray.config.load import load_config
from lrag_ray.config.prompts import listed, make_prompt
from lrag_ray.config.schema import BackboneConfig
from lrag_ray.pipelines.text_cuts import cut_notes
from lrag_ray.wan.text import byte_tokenizer, clean_prompt
from tests.config.make import SMALL, write

LENGTH = 256


def notes(backbone: BackboneConfig, *texts: str) -> list[str]:
    return list(cut_notes([backbone], [make_prompt(index, text) for index, text in enumerate(texts)]))


@pytest.fixture
def tiny(tmp_path: Path) -> BackboneConfig:
    return load_config(write(tmp_path, SMALL)).backbones["tiny"]


def test_lines_that_are_cut_are_named_and_those_that_are_then_alike(tiny: BackboneConfig) -> None:
    assert tiny.transformer.text_len == LENGTH
    head = "x" * (LENGTH - 1)
    assert notes(tiny, f"{head} a fox", f"{head} a bear") == [
        "lines 1 and 2 are cut off at 256 tokens, the length of the text encoder: the rest has no effect",
        "lines 1 and 2 are the same text after that cut: they make the same video",
    ]
    assert notes(tiny, "a fox", f"{head}y") == [
        "line 2 is cut off at 256 tokens, the length of the text encoder: the rest has no effect"
    ]
    # What just fits is not cut, and equals what is cut to it.
    assert notes(tiny, head) == []
    assert notes(tiny, head, f"{head}!")[1:] == [
        "lines 1 and 2 are the same text after that cut: they make the same video"
    ]
    # The encoder cleans a prompt before it counts.
    assert notes(tiny, f"a{' ' * LENGTH}fox") == []


@given(st.lists(st.text(st.sampled_from("aé 水\ufdfa"), min_size=60, max_size=LENGTH + 3), max_size=4))
def test_a_line_is_named_if_and_only_if_the_encoder_cuts_it(texts: list[str]) -> None:
    backbone = BackboneConfig.model_validate(
        {
            "transformer": {"text_len": LENGTH},
            "weights": {"random_seed": 0},
            "text_encoder": {"kind": "tiny"},
            "vae": {"kind": "tiny"},
        }
    )
    cleaned = [clean_prompt(text) for text in texts]
    cut = [line for line, text in enumerate(cleaned, 1) if byte_tokenizer(9999)(text) != byte_tokenizer(LENGTH)(text)]
    found = [note.partition(" cut off")[0] for note in notes(backbone, *texts) if "cut off" in note]
    assert found == ([] if not cut else [f"line {cut[0]} is"] if len(cut) == 1 else [f"lines {listed(cut)} are"])


def test_umt5_counts_with_its_tokenizer_or_by_words_where_that_is_missing(tiny: BackboneConfig, tmp_path: Path) -> None:
    words = " ".join(["fox"] * 600)
    folder = tmp_path / "tokenizer"

    def umt5() -> BackboneConfig:
        encoder = {"kind": "umt5", "path": str(tmp_path / "missing.pth"), "tokenizer": str(folder)}
        changed = {"text_encoder": encoder, "transformer": {"text_len": 512}}
        return BackboneConfig.model_validate(tiny.model_dump() | changed | {"latent": tiny.latent.model_dump()})

    cut = "line 2 is cut off at 512 tokens, the length of the text encoder: the rest has no effect"
    assert notes(umt5(), "a fox", words, "x" * 600) == [cut]
    folder.mkdir()
    made = Tokenizer(models.WordLevel({"<pad>": 0, "</s>": 1, "<unk>": 2, "fox": 3}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    made.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>"}')
    assert notes(umt5(), "a fox", words, f"{words} fox", "x" * 600) == [
        cut.replace("line 2 is", "lines 2 and 3 are"),
        "lines 2 and 3 are the same text after that cut: they make the same video",
    ]
