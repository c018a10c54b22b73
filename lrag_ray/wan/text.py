"""Prompts to text features: umT5 (encoder half) behind the cleaning and padding of the public Wan pipeline.

Features leave here as the valid rows only, one tensor [rows, text_dim] per prompt; `pad_text` makes the fixed
[text_len, text_dim] input of the generator, whose padding is zero and *is* attended. Each prompt is encoded alone and
unpadded, so its features do not depend on what else is encoded with it.
"""

from __future__ import annotations

import hashlib
import html
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lrag_ray.errors import WeightsError
from lrag_ray.wan.diffusers_folder import model_of_folder, read_config
from lrag_ray.wan.file_kinds import refuse_odd_files
from lrag_ray.wan.random_weights import fill_random
from lrag_ray.wan.state_dict import load_strict, refuse_non_finite, state_dict_digest, unwrapped
from lrag_ray.wan.tokenizer_process import TokenizerError, TokenizerProcess
from lrag_ray.wan.weight_parts import read_weights

if TYPE_CHECKING:
    from transformers import UMT5Config

Tokenize = Callable[[str], list[int]]
"""Cleaned text to token ids, truncated to the text length, end-of-text included."""

_END, _BYTE_OFFSET = 1, 3
"""Byte vocabulary: 0 padding, 1 end of text, 2 unknown as in umT5, then the 256 bytes."""


@dataclass(frozen=True)
class UMT5Sizes:
    """Sizes of the encoder; the defaults are umT5-xxl."""

    vocab_size: int = 256384
    """Rows of the token embedding."""
    dim: int = 4096
    """Width of the features (text_dim)."""
    head_dim: int = 64
    """Width of one attention head."""
    num_heads: int = 64
    """Attention heads."""
    ffn_dim: int = 10240
    """Hidden width of the feed-forward layers."""
    num_layers: int = 24
    """Layers, each with a relative-position table of its own."""
    num_buckets: int = 32
    """Rows of that table."""

    @classmethod
    def of(cls, state: Mapping[str, Tensor]) -> UMT5Sizes:
        """Sizes that a state dict with the original key names implies."""
        vocab_size, dim = state["token_embedding.weight"].shape
        num_buckets, num_heads = state["blocks.0.pos_embedding.embedding.weight"].shape
        return cls(
            vocab_size=vocab_size,
            dim=dim,
            head_dim=state["blocks.0.attn.q.weight"].shape[0] // num_heads,
            num_heads=num_heads,
            ffn_dim=state["blocks.0.ffn.fc1.weight"].shape[0],
            num_layers=1 + max(int(name.split(".")[1]) for name in state if name.startswith("blocks.")),
            num_buckets=num_buckets,
        )

    def transformers_config(self) -> UMT5Config:
        """The same sizes as transformers' UMT5Config."""
        from transformers import UMT5Config

        return UMT5Config(
            vocab_size=self.vocab_size,
            d_model=self.dim,
            d_kv=self.head_dim,
            num_heads=self.num_heads,
            d_ff=self.ffn_dim,
            num_layers=self.num_layers,
            relative_attention_num_buckets=self.num_buckets,
        )


def clean_prompt(text: str) -> str:
    """The public pipeline's cleaning: repair mojibake, unescape HTML twice, collapse white space."""
    import ftfy

    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return re.sub(r"\s+", " ", text).strip()


def pad_text(rows: Tensor, text_len: int) -> Tensor:
    """Valid rows [rows, text_dim] followed by zeros: [text_len, text_dim]."""
    if rows.shape[0] > text_len:
        raise ValueError(f"{rows.shape[0]} rows of text features do not fit into text_len {text_len}")
    return torch.cat([rows, rows.new_zeros(text_len - rows.shape[0], rows.shape[1])])


class TextEncoder:
    """A loaded umT5 encoder with its tokenizer, frozen. `model` is transformers' UMT5EncoderModel."""

    def __init__(self, model: nn.Module, tokenize: Tokenize, tokenizer_id: str) -> None:
        self.model = model.eval().requires_grad_(False)
        self.tokenize = tokenize
        self._tokenizer_id = tokenizer_id

    @cached_property
    def digest(self) -> str:
        """SHA-256 over the weights, the tokenizer and its truncation: all that features depend on but the prompt."""
        weights = state_dict_digest(self.model.state_dict())
        return hashlib.sha256(f"{weights}\0{self._tokenizer_id}".encode()).hexdigest()

    def encode(self, prompts: Sequence[str]) -> list[Tensor]:
        """Features [rows, text_dim] of each prompt, on the model's device; rows = tokens, end of text included."""
        return [self.encode_ids(self.tokenize(clean_prompt(prompt))) for prompt in prompts]

    @torch.inference_mode()
    def encode_ids(self, ids: Sequence[int]) -> Tensor:
        """Features [len(ids), text_dim] of a token sequence without padding."""
        device = next(self.model.parameters()).device
        tokens = torch.tensor([list(ids)], device=device)
        features: Tensor = self.model(input_ids=tokens, attention_mask=torch.ones_like(tokens)).last_hidden_state
        return features[0]


def byte_tokenizer(text_len: int) -> Tokenize:
    """Tokens of the tiny text encoder: UTF-8 bytes."""

    def tokenize(text: str) -> list[int]:
        kept = text.encode("utf-8")[: text_len - 1]
        return [*(byte + _BYTE_OFFSET for byte in kept), _END]

    return tokenize


def tiny_text_encoder(text_dim: int, text_len: int, seed: int = 0) -> TextEncoder:
    """The text encoder of the tiny backbone: two random umT5 layers over UTF-8 bytes."""
    from transformers import UMT5EncoderModel

    sizes = UMT5Sizes(
        vocab_size=256 + _BYTE_OFFSET, dim=text_dim, head_dim=16, num_heads=2, ffn_dim=2 * text_dim, num_layers=2
    )
    model = UMT5EncoderModel(sizes.transformers_config())
    fill_random(model, seed)
    return TextEncoder(model, byte_tokenizer(text_len), f"bytes-{text_len}")


def load_text_encoder(
    path: str | Path,
    tokenizer: str | Path,
    *,
    text_len: int = 512,
    sizes: UMT5Sizes | None = None,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cpu",
) -> TextEncoder:
    """Load umT5 from ``models_t5_umt5-xxl-enc-bf16.pth`` or a Diffusers folder, with a folder of tokenizer files.

    `sizes` is for an original file of other than the released sizes; a Diffusers folder brings its own config.json.

    Raises:
        WeightsError: missing, damaged or misfitting files, values that are not finite.
    """
    tokenize, tokenizer_id = load_tokenizer(Path(tokenizer), text_len)
    model = mapped_text_encoder(path, sizes).to(device=device, dtype=dtype)
    refuse_non_finite(model.state_dict(), f"text encoder {path}")
    return TextEncoder(model, tokenize, tokenizer_id)


def mapped_text_encoder(path: str | Path, sizes: UMT5Sizes | None = None) -> nn.Module:
    """The UMT5EncoderModel whose tensors are mapped to the file (or folder) as they are stored; none is read.

    Raises WeightsError with everything that does not fit, so it is also the check of a file.
    """
    path = Path(path)
    if path.is_dir():
        return _from_folder(path)
    content = read_weights(path, "text encoder")
    state = _of_encoder(content)
    if sizes is None and "spiece_model" in content:
        sizes = _sizes_of(state)
    return umt5_from_state_dict(state, sizes or UMT5Sizes(), f"text encoder {path}")


def _of_encoder(state: Mapping[str, Any]) -> dict[str, Any]:
    """The tensors of the encoder, without prefixes, the decoder, and the tokenizer that ComfyUI's files carry."""
    bare = {unwrapped(name.removeprefix("text_encoders.umt5xxl.transformer.")): name for name in state}
    return {
        name: state[key]
        for name, key in bare.items()
        if name not in ("spiece_model", "lm_head.weight") and not name.startswith("decoder.")
    }


def _sizes_of(state: Mapping[str, Any]) -> UMT5Sizes | None:
    """Sizes of a repacked umT5 of another width than xxl (of which no layer may be missing), or None."""
    try:
        sizes = UMT5Sizes.of({_original_name(name): value for name, value in state.items()})
    except (KeyError, ValueError, AttributeError, IndexError):
        return None
    return sizes if sizes.dim != UMT5Sizes.dim else None


def umt5_from_state_dict(state: Mapping[str, Tensor], sizes: UMT5Sizes, source: str) -> nn.Module:
    """UMT5EncoderModel from a state dict with the original key names (golden/text_encoder/README.md has the map)."""
    from transformers import UMT5EncoderModel

    renamed = {_transformers_name(name): value for name, value in state.items()}
    with torch.device("meta"):
        model = UMT5EncoderModel(sizes.transformers_config())
    return _filled(model, renamed, source)


def _filled(model: nn.Module, state: dict[str, Tensor], source: str) -> nn.Module:
    """A UMT5EncoderModel on the meta device with the tensors of `state`, under transformers' names."""
    # transformers ties the two names to one table; files hold it once, a strict load wants both.
    for here, there in (
        ("shared.weight", "encoder.embed_tokens.weight"),
        ("encoder.embed_tokens.weight", "shared.weight"),
    ):
        if here in state:
            state = {there: state[here], **state}
    fix = "give models_t5_umt5-xxl-enc-bf16.pth, or a Diffusers `text_encoder` folder with all of its parts"
    if any("scale_weight" in name or name == "scaled_fp8" for name in state):
        fix = (
            f"the file is quantised to fp8 (it holds scales beside the weights), and only plain weights are read; {fix}"
        )
    load_strict(model, state, source, fix)
    return model


_IN_LAYER = {
    "norm1.weight": "layer.0.layer_norm.weight",
    "attn.q.weight": "layer.0.SelfAttention.q.weight",
    "attn.k.weight": "layer.0.SelfAttention.k.weight",
    "attn.v.weight": "layer.0.SelfAttention.v.weight",
    "attn.o.weight": "layer.0.SelfAttention.o.weight",
    "pos_embedding.embedding.weight": "layer.0.SelfAttention.relative_attention_bias.weight",
    "norm2.weight": "layer.1.layer_norm.weight",
    "ffn.gate.0.weight": "layer.1.DenseReluDense.wi_0.weight",
    "ffn.fc1.weight": "layer.1.DenseReluDense.wi_1.weight",
    "ffn.fc2.weight": "layer.1.DenseReluDense.wo.weight",
}


def _transformers_name(name: str) -> str:
    """transformers' name of an original key; an unknown key is returned as it is and fails the strict load."""
    if name == "token_embedding.weight":
        return "shared.weight"
    if name == "norm.weight":
        return "encoder.final_layer_norm.weight"
    if match := re.fullmatch(r"blocks\.(\d+)\.(.+)", name):
        layer, rest = match.groups()
        return f"encoder.block.{layer}.{_IN_LAYER.get(rest, rest)}"
    return name


def _original_name(name: str) -> str:
    """The original name of a key of transformers; any other is returned as it is."""
    if name in ("shared.weight", "encoder.embed_tokens.weight"):
        return "token_embedding.weight"
    if match := re.fullmatch(r"encoder\.block\.(\d+)\.(.+)", name):
        layer, rest = match.groups()
        return f"blocks.{layer}.{_FROM_TRANSFORMERS.get(rest, rest)}"
    return name


_FROM_TRANSFORMERS = {theirs: ours for ours, theirs in _IN_LAYER.items()}

_UMT5_SETTINGS = {
    "vocab_size",
    "d_model",
    "d_kv",
    "d_ff",
    "num_layers",
    "num_heads",
    "relative_attention_num_buckets",
    "relative_attention_max_distance",
    "layer_norm_epsilon",
    "feed_forward_proj",
}
"""What a config.json may set."""


def _from_folder(path: Path) -> nn.Module:
    from transformers import UMT5Config, UMT5EncoderModel

    # Not from_pretrained, which gives its defaults where the file is absent.
    model = model_of_folder(path, "umT5 encoder", _UMT5_SETTINGS, lambda config: UMT5EncoderModel(UMT5Config(**config)))
    # Mapped part by part; from_pretrained would copy them, and only warn about what is missing.
    return _filled(model, _of_encoder(read_weights(path, "text encoder")), f"text encoder {path}")


_TOKENIZERS = {None, "T5Tokenizer", "T5TokenizerFast", "PreTrainedTokenizerFast", "TokenizersBackend"}
"""Classes that read tokenizer.json; some others read pickles."""
_MODELS = {None, "t5", "umt5", "mt5"}


def _check_tokenizer(folder: Path) -> None:
    """ValueError for a folder whose configuration makes the library do more than read tokenizer.json."""
    if not (folder / "tokenizer.json").is_file():
        raise ValueError("it holds no tokenizer.json")
    refuse_odd_files(folder)
    if list(folder.glob("chat_template*")):
        raise ValueError("it holds a chat template, which is a program of its own and not of umT5")
    for file, key, known in (
        ("tokenizer_config.json", "tokenizer_class", _TOKENIZERS),
        ("config.json", "model_type", _MODELS),
    ):
        if (folder / file).exists():
            value = read_config(folder / file).get(key)
            if not (value is None or isinstance(value, str)) or value not in known:
                raise ValueError(f"{file} asks for {key} {str(value)[:80]!r}, expected that of umT5")


def load_tokenizer(folder: Path, text_len: int) -> tuple[Tokenize, str]:
    """Tokenizer of a folder, and the digest of its files with the text length.

    Raises WeightsError where there is none; so does the tokenizer over a text that it cannot take within its limits.
    """

    def unusable(error: Exception) -> WeightsError:
        reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(". ")
        return WeightsError(
            f"no tokenizer in {folder}: {reason}. Fix: give the folder that holds tokenizer.json and "
            "tokenizer_config.json (google/umt5-xxl beside the checkpoint)"
        )

    try:
        _check_tokenizer(folder)
        process = TokenizerProcess(folder)
    except (TokenizerError, WeightsError, ValueError, OSError) as error:
        raise unusable(error) from error

    def tokenize(text: str) -> list[int]:
        try:
            return process.tokens(text, text_len)
        except TokenizerError as error:
            raise unusable(error) from error

    files = hashlib.sha256()
    for file in sorted(folder.glob("*.json")) + sorted(folder.glob("*.model")):
        files.update(f"{file.name}\0".encode() + file.read_bytes())
    return tokenize, f"{files.hexdigest()}-{text_len}"
