"""The text encoder against the public one's recorded outputs; cleaning, padding and loaders."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from lrag_ray.errors import WeightsError
from lrag_ray.wan.text import (
    TextEncoder,
    UMT5Sizes,
    clean_prompt,
    load_text_encoder,
    load_tokenizer,
    mapped_text_encoder,
    pad_text,
    tiny_text_encoder,
    umt5_from_state_dict,
)


@pytest.fixture(scope="module")
def tensors(golden: Path) -> dict[str, Tensor]:
    return load_file(golden / "text_encoder" / "tiny_umt5.safetensors")


@pytest.fixture(scope="module")
def weights(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix("weights."): value for name, value in tensors.items() if name.startswith("weights.")}


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    words = ["<pad>", "</s>", "<unk>", "a", "red", "fox", "runs"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)
    return folder


def test_features_match_the_public_encoder(tensors: dict[str, Tensor], weights: dict[str, Tensor]) -> None:
    sizes = UMT5Sizes.of(weights)
    assert sizes == UMT5Sizes(vocab_size=64, dim=32, head_dim=16, num_heads=2, ffn_dim=64, num_layers=2)
    encoder = TextEncoder(umt5_from_state_dict(weights, sizes, "golden"), lambda text: [], "")
    for ids, mask, expected in zip(tensors["ids"], tensors["mask"], tensors["output_padding_zeroed"], strict=True):
        rows = encoder.encode_ids(ids[mask.bool()].tolist())
        torch.testing.assert_close(pad_text(rows, len(ids)), expected, rtol=0, atol=1e-5)


def test_layers_have_position_tables_of_their_own(weights: dict[str, Tensor]) -> None:
    one, two = (weights[f"blocks.{i}.pos_embedding.embedding.weight"] for i in (0, 1))
    assert not torch.equal(one, two)
    model = umt5_from_state_dict(weights, UMT5Sizes.of(weights), "golden")
    loaded = model.state_dict()["encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight"]
    assert torch.equal(loaded, two)


def test_the_number_of_position_buckets_is_read_from_the_weights(weights: dict[str, Tensor]) -> None:
    table = "pos_embedding.embedding.weight"
    fewer = {name: value[:16] if name.endswith(table) else value for name, value in weights.items()}
    sizes = UMT5Sizes.of(fewer)
    assert sizes.num_buckets == 16
    encoder = TextEncoder(umt5_from_state_dict(fewer, sizes, "sixteen"), lambda text: [], "")
    assert encoder.encode_ids([3, 4, 5]).isfinite().all()


def test_original_file_and_diffusers_folder_are_the_same_encoder(
    weights: dict[str, Tensor], tokenizer_folder: Path, tmp_path: Path
) -> None:
    torch.save(weights, tmp_path / "umt5.pth")
    sizes = UMT5Sizes.of(weights)
    original = load_text_encoder(tmp_path / "umt5.pth", tokenizer_folder, text_len=8, sizes=sizes, dtype=torch.float32)
    model: Any = original.model
    model.save_pretrained(tmp_path / "text_encoder")
    folder = load_text_encoder(tmp_path / "text_encoder", tokenizer_folder, text_len=8, dtype=torch.float32)
    assert folder.digest == original.digest
    assert torch.equal(folder.encode(["a red fox"])[0], original.encode(["a red fox"])[0])
    other_length = load_text_encoder(tmp_path / "text_encoder", tokenizer_folder, text_len=9, dtype=torch.float32)
    assert other_length.digest != folder.digest
    save_file(
        {"encoder.final_layer_norm.weight": weights["norm.weight"]}, tmp_path / "text_encoder" / "old.safetensors"
    )
    with pytest.raises(WeightsError, match=r"old\.safetensors and another file both hold encoder\.final_layer_norm"):
        mapped_text_encoder(tmp_path / "text_encoder")


def test_tokenizer_folder_truncates_and_ends(
    weights: dict[str, Tensor], tokenizer_folder: Path, tmp_path: Path
) -> None:
    save_file(weights, tmp_path / "umt5.safetensors")
    encoder = load_text_encoder(
        tmp_path / "umt5.safetensors", tokenizer_folder, text_len=4, sizes=UMT5Sizes.of(weights)
    )
    assert encoder.tokenize("a red fox runs") == [3, 4, 5, 1]
    assert encoder.tokenize("") == [1]
    assert encoder.encode(["a"])[0].dtype == torch.bfloat16


def test_bad_files_are_refused(weights: dict[str, Tensor], tokenizer_folder: Path, tmp_path: Path) -> None:
    sizes = UMT5Sizes.of(weights)
    renamed = {name.replace("norm.weight", "layernorm.weight"): value for name, value in weights.items()}
    with pytest.raises(WeightsError, match=r"unexpected 1: layernorm\.weight"):
        umt5_from_state_dict(renamed, sizes, "file")
    torch.save({name: value for name, value in weights.items() if "blocks.1" not in name}, tmp_path / "half.pth")
    with pytest.raises(WeightsError, match=r"missing 10: encoder\.block\.1"):
        load_text_encoder(tmp_path / "half.pth", tokenizer_folder, sizes=sizes)
    with pytest.raises(WeightsError, match="misshapen"):
        load_text_encoder(tmp_path / "half.pth", tokenizer_folder)
    torch.save(weights | {"norm.weight": weights["norm.weight"] / 0}, tmp_path / "wild.pth")
    with pytest.raises(WeightsError, match=r"NaN or infinite .*: encoder\.final_layer_norm\.weight"):
        load_text_encoder(tmp_path / "wild.pth", tokenizer_folder, sizes=sizes)
    with pytest.raises(WeightsError, match="not a Diffusers folder"):
        load_text_encoder(tmp_path, tokenizer_folder)
    torch.save(weights, tmp_path / "whole.pth")
    with pytest.raises(WeightsError, match="no tokenizer in"):
        load_text_encoder(tmp_path / "whole.pth", tmp_path / "nowhere", sizes=sizes)


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        ("  a\n\tred   fox ", "a red fox"),
        ("Tom &amp;amp; Jerry", "Tom & Jerry"),
        ("schÃ¶n", "schön"),
        ("“quoted”", '"quoted"'),
        ("\u00a0 \u3000", ""),
    ],
)
def test_cleaning(raw: str, clean: str) -> None:
    assert clean_prompt(raw) == clean


def test_features_do_not_depend_on_company() -> None:
    encoder = tiny_text_encoder(text_dim=24, text_len=64)
    together = encoder.encode(["a fox", "a much longer prompt about a river", "a fox"])
    assert torch.equal(together[0], together[2])
    assert torch.equal(together[0], encoder.encode(["a fox"])[0])
    assert together[0].shape == (6, 24)


def test_tiny_encoder_is_reproducible_and_truncates() -> None:
    encoder = tiny_text_encoder(text_dim=24, text_len=8)
    assert encoder.digest == tiny_text_encoder(text_dim=24, text_len=8).digest
    assert encoder.digest != tiny_text_encoder(text_dim=24, text_len=8, seed=1).digest
    assert encoder.encode(["a prompt that is too long"])[0].shape == (8, 24)
    assert encoder.encode([""])[0].shape == (1, 24)


@given(st.text(max_size=40))
def test_tiny_tokens_are_in_the_vocabulary(text: str) -> None:
    ids = _TINY.tokenize(text)
    assert ids[-1] == 1 and len(ids) <= 16
    assert all(3 <= token < 259 for token in ids[:-1])


_TINY = tiny_text_encoder(text_dim=8, text_len=16)


def test_padding_is_zero_and_too_many_rows_are_refused() -> None:
    padded = pad_text(torch.ones(2, 3), 4)
    assert padded.tolist() == [[1] * 3] * 2 + [[0] * 3] * 2
    with pytest.raises(ValueError, match="5 rows"):
        pad_text(torch.ones(5, 3), 4)


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("tokenizer.json", None, "it holds no tokenizer.json"),
        ("tokenizer.json", '{"version": "1.0", "truncat', "no tokenizer in"),
        ("tokenizer_config.json", "<html>", "no tokenizer in"),
        ("tokenizer_config.json", "[1]", "no tokenizer in"),
    ],
)
def test_damaged_tokenizers_are_refused(
    tokenizer_folder: Path, tmp_path: Path, file: str, content: str | None, said: str
) -> None:
    folder = tmp_path / "umt5-xxl"
    shutil.copytree(tokenizer_folder, folder)
    (folder / file).unlink()
    if content is not None:
        (folder / file).write_text(content)
    with pytest.raises(WeightsError, match=f"{said}(.|\\n)*Fix:"):
        load_tokenizer(folder, 8)


@pytest.mark.parametrize("config", [None, "{", "[]", '{"d_model": -4}'])
def test_a_folder_that_no_encoder_can_be_built_from_is_refused(tmp_path: Path, config: str | None) -> None:
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    with pytest.raises(WeightsError, match=r"not a Diffusers folder of a umT5 encoder: .*Fix:"):
        mapped_text_encoder(tmp_path)


def test_a_repacked_encoder_loads_without_its_tokenizer_and_decoder(weights: dict[str, Tensor], tmp_path: Path) -> None:
    """ComfyUI's files have transformers' names and carry the tokenizer; a whole umT5 has a decoder."""
    original = umt5_from_state_dict(weights, UMT5Sizes.of(weights), "golden").state_dict()
    stored = {name: value.contiguous() for name, value in original.items() if name != "encoder.embed_tokens.weight"}
    more = {"spiece_model": torch.zeros(9, dtype=torch.uint8), "decoder.final_layer_norm.weight": torch.zeros(2)}
    save_file(stored | more, tmp_path / "umt5_fp16.safetensors")
    loaded = mapped_text_encoder(tmp_path / "umt5_fp16.safetensors").state_dict()
    assert all(torch.equal(loaded[name], original[name]) for name in original)
    save_file(stored | more | {"scaled_fp8": torch.zeros(1)}, tmp_path / "umt5_fp8_scaled.safetensors")
    with pytest.raises(WeightsError, match="Fix: the file is quantised to fp8"):
        mapped_text_encoder(tmp_path / "umt5_fp8_scaled.safetensors")


def test_a_missing_part_of_the_encoder_is_named(weights: dict[str, Tensor], tmp_path: Path) -> None:
    model: Any = umt5_from_state_dict(weights, UMT5Sizes.of(weights), "golden")
    model.save_pretrained(tmp_path / "text_encoder", max_shard_size="20KB")
    mapped_text_encoder(tmp_path / "text_encoder")
    part = sorted((tmp_path / "text_encoder").glob("model-*.safetensors"))[1]
    part.unlink()
    with pytest.raises(WeightsError, match=rf"text encoder .* lacks {part.name} \(1 of its \d parts\)\. Fix: "):
        mapped_text_encoder(tmp_path / "text_encoder")
