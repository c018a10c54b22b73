"""The networks of VBench-Long as they are published: names, places, licences, digests.

A weights folder is laid out as VBench's own cache, so that an existing ``~/.cache/vbench`` serves as it is. The
licences are those of the repositories that publish the files. A digest stands here where the address holds it (CLIP)
or where the file has not changed for years and several independent users recorded the same one; a file of another
digest is refused when it is pulled. Elsewhere the digest at pull is recorded.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, NamedTuple, get_args

NetworkName = Literal[
    "dino_vitb16",
    "dinov2_vitb14",
    "clip_vitb32",
    "clip_vitl14",
    "laion_linear",
    "raft_things",
    "amt_s",
    "musiq_spaq",
    "dreamsim_clip_vitb16",
    "dreamsim_open_clip_vitb16",
    "dreamsim_ensemble_lora",
]
NETWORKS: tuple[NetworkName, ...] = get_args(NetworkName)


class OfficialFile(NamedTuple):
    """A published weight file, or a folder of files in an archive."""

    path: str
    """Place in a weights folder."""
    url: str
    """Where it is published; an archive where `member` is set."""
    licence: str
    member: str = ""
    """Path inside the archive; a folder's ends in a slash."""
    elsewhere: str = ""
    """Place below ``~/.cache`` where another tool leaves it."""
    size_bytes: int | None = None
    """Of the file, not of its archive; None where it is not known."""
    sha256: str | None = None
    """Of the file, not of its archive; None where it is not known."""


_DREAMSIM = (
    "https://github.com/ssundaram21/dreamsim/releases/download/v0.2.0-checkpoints/dreamsim_ensemble_checkpoint.zip"
)
_OPENAI = "https://openaipublic.azureedge.net/clip/models"
_CLIP_B32 = "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af"
_CLIP_L14 = "b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836"

OFFICIAL: Mapping[NetworkName, OfficialFile] = {
    "dino_vitb16": OfficialFile(
        "dino_model/dino_vitbase16_pretrain.pth",
        "https://dl.fbaipublicfiles.com/dino/dino_vitbase16_pretrain/dino_vitbase16_pretrain.pth",
        "Apache-2.0",
        elsewhere="torch/hub/checkpoints/dino_vitbase16_pretrain.pth",
        size_bytes=343_242_485,
        sha256="bf34ad0f424b9029b593e8dc3ed553bf26e88bcba0d32bf3e62a6209cb64c85e",
    ),
    "dinov2_vitb14": OfficialFile(
        "dinov2_model/dinov2_vitb14_pretrain.pth",
        "https://dl.fbaipublicfiles.com/dinov2/dinov2_vitb14/dinov2_vitb14_pretrain.pth",
        "Apache-2.0",
        elsewhere="torch/hub/checkpoints/dinov2_vitb14_pretrain.pth",
        size_bytes=346_378_731,
        sha256="0b8b82f85de91b424aded121c7e1dcc2b7bc6d0adeea651bf73a13307fad8c73",
    ),
    "clip_vitb32": OfficialFile(
        "clip_model/ViT-B-32.pt",
        f"{_OPENAI}/{_CLIP_B32}/ViT-B-32.pt",
        "MIT",
        elsewhere="clip/ViT-B-32.pt",
        size_bytes=353_976_522,
        sha256=_CLIP_B32,
    ),
    "clip_vitl14": OfficialFile(
        "clip_model/ViT-L-14.pt",
        f"{_OPENAI}/{_CLIP_L14}/ViT-L-14.pt",
        "MIT",
        elsewhere="clip/ViT-L-14.pt",
        size_bytes=932_768_134,
        sha256=_CLIP_L14,
    ),
    "laion_linear": OfficialFile(
        "aesthetic_model/emb_reader/sa_0_4_vit_l_14_linear.pth",
        "https://github.com/LAION-AI/aesthetic-predictor/blob/main/sa_0_4_vit_l_14_linear.pth?raw=true",
        "MIT",
        size_bytes=4_071,
        sha256="2cd4e60f4f24ae3bcd57b847b13c1f3ba27edc28cc1a7f9ce74ee9f421243cba",
    ),
    "raft_things": OfficialFile(
        "raft_model/models/raft-things.pth",
        "https://dl.dropboxusercontent.com/s/4j4z58wuv8o0mfz/models.zip",
        "BSD-3-Clause",
        member="models/raft-things.pth",
        size_bytes=21_108_000,
        sha256="fcfa4125d6418f4de95d84aec20a3c5f4e205101715a79f193243c186ac9a7e1",
    ),
    "amt_s": OfficialFile(
        "amt_model/amt-s.pth",
        "https://huggingface.co/lalala125/AMT/resolve/main/amt-s.pth",
        "CC-BY-NC-SA-4.0",
    ),
    "musiq_spaq": OfficialFile(
        "pyiqa_model/musiq_spaq_ckpt-358bb6af.pth",
        "https://github.com/chaofengc/IQA-PyTorch/releases/download/v0.1-weights/musiq_spaq_ckpt-358bb6af.pth",
        "CC-BY-NC-SA-4.0",
        sha256="358bb6af275e28ea56821d44fb55c6cb83645db11f394d3ad65b2d149965ab50",
    ),
    "dreamsim_clip_vitb16": OfficialFile(
        "dreamsim_model/clip_vitb16_pretrain.pth.tar",
        _DREAMSIM,
        "MIT",
        member="clip_vitb16_pretrain.pth.tar",
        elsewhere="clip_vitb16_pretrain.pth.tar",
    ),
    "dreamsim_open_clip_vitb16": OfficialFile(
        "dreamsim_model/open_clip_vitb16_pretrain.pth.tar",
        _DREAMSIM,
        "MIT",
        member="open_clip_vitb16_pretrain.pth.tar",
        elsewhere="open_clip_vitb16_pretrain.pth.tar",
    ),
    "dreamsim_ensemble_lora": OfficialFile(
        "dreamsim_model/ensemble_lora", _DREAMSIM, "MIT", member="ensemble_lora/", elsewhere="ensemble_lora"
    ),
}
"""One file (for the LoRA a folder with ``adapter_model.*`` and ``adapter_config.json``) per network."""
