"""A small generator and its files."""

from __future__ import annotations

import io

import torch
from safetensors.torch import save
from torch import Tensor

from lrag_ray.wan.config import WanConfig

CONFIG = WanConfig(dim=24, ffn_dim=32, freq_dim=16, text_dim=8, text_len=4, num_heads=2, num_layers=2)

State = dict[str, Tensor]


def wrapped(state: State, inner: str = "") -> State:
    return {f"model.{inner}{name}": value for name, value in state.items()}


def saved(state: State, form: str) -> bytes:
    buffer = io.BytesIO()
    if form == "safetensors":
        return save(state)
    torch.save({"generator": wrapped(state)}, buffer, _use_new_zipfile_serialization=form == "zip")
    return buffer.getvalue()
