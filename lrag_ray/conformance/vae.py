"""Golden video VAE: whole, streaming and chunked decoding, and encoding."""

from __future__ import annotations

import re
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from lrag_ray.conformance.case import Bound, GoldenCase, Sheet
from lrag_ray.conformance.files import CaseRecord, Folder, Vectors, pair
from lrag_ray.errors import WeightsError
from lrag_ray.video.decode import StreamingDecoder
from lrag_ray.wan.state_dict import read_checkpoint
from lrag_ray.wan.vae import WanVae, load_wan_vae

PIXELS = Bound(absolute=1e-5)
PIECE = 3
"""Latent frames pushed at a time by the streaming check."""


def cases(folder: Folder) -> list[GoldenCase]:
    """A case per JSON with the VAE's config and its tensors."""
    records = [r for r in folder.records if r.holds("config") and "z_dim" in r.content["config"]]
    vectors = [file for file in folder.vectors if file.named("weights.decoder.") and "latent_btchw" in file]
    return [
        GoldenCase(case.stem, partial(_check, folder, case.record, case.vectors)) for case in pair(records, vectors)
    ]


def _check(folder: Folder, record: CaseRecord | None, vectors: Vectors | None, sheet: Sheet) -> None:
    if record is None or vectors is None:
        sheet.add("files", "fail", "a case needs a JSON with config and a safetensors file with weights and latents")
        return
    config = {("base_dim" if name == "dim" else name): value for name, value in record.content["config"].items()}
    weights = vectors.group("weights.")
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "vae.safetensors"
        save_file(weights, path)
        vae = load_wan_vae(path, config=config)
        _check_constants(vae, vectors, sheet)
        _check_decode(vae, vectors, sheet)
        if vectors.has("pixels_bcthw", "encode_btchw"):
            ours = torch.stack([vae.encode(clip.transpose(0, 1)) for clip in vectors["pixels_bcthw"]])
            sheet.close("encode_btchw", ours, vectors["encode_btchw"], PIXELS)
    for file in folder.torch_files:
        _check_file(file, config, vae, weights, sheet)


def _check_constants(vae: WanVae, vectors: Vectors, sheet: Sheet) -> None:
    config: Any = vae.model.config
    for name in ("latents_mean", "latents_std"):
        if name in vectors:
            sheet.close(name, torch.tensor(getattr(config, name)), vectors[name], Bound(relative=1e-6))


def _check_decode(vae: WanVae, vectors: Vectors, sheet: Sheet) -> None:
    """Whole decode against the golden pixels, streaming against the whole bit for bit, cold chunks as released."""
    videos = vectors["latent_btchw"]
    whole = torch.stack([vae.decode(video) for video in videos])
    if "decode_raw" in vectors:
        golden = vectors["decode_raw"].clamp(-1, 1).transpose(1, 2)
        sheet.close("decode_raw, clamped", whole, golden, PIXELS)
    sheet.close("streaming decode", _streamed(vae, videos, None), whole, Bound())
    for name in vectors.shapes:
        if match := re.fullmatch(r"decode_chunk(\d+)_btchw", name):
            sheet.close(name, _streamed(vae, videos, int(match[1])), vectors[name], PIXELS)


def _streamed(vae: WanVae, videos: Tensor, cold_chunk: int | None) -> Tensor:
    decoded = []
    for video in videos:
        decoder = StreamingDecoder(vae, cold_chunk=cold_chunk)
        decoded.append(torch.cat([decoder.push_pixels(piece) for piece in video.split(PIECE)]))
    return torch.stack(decoded)


def _check_file(path: Path, config: dict[str, Any], vae: WanVae, weights: dict[str, Tensor], sheet: Sheet) -> None:
    """An original checkpoint file of this VAE loads to the same model."""
    try:
        names = read_checkpoint(path).keys()
    except WeightsError as error:
        sheet.add(path.name, "fail", str(error))
        return
    if names == weights.keys():
        sheet.same(path.name, load_wan_vae(path, config=config).digest, vae.digest)
