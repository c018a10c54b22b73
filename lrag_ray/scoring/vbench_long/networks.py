"""The networks of the six dimensions: built when first asked for, kept on one device, fed in batches.

RAFT and AMT-S are defined by the vbench package, MUSIQ by pyiqa; the vision transformers are ours (`vit`), because
their public definitions are fetched from GitHub at run time.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lrag_ray.errors import RunEnvironmentError, WeightsError
from lrag_ray.scoring.vbench_long.amt import FLOWS, RADIUS, FrameInterpolator
from lrag_ray.scoring.vbench_long.correlation import LEVELS
from lrag_ray.scoring.vbench_long.musiq import ImageRater
from lrag_ray.scoring.vbench_long.official import NetworkName
from lrag_ray.scoring.vbench_long.preprocess import CLIP, IMAGENET, normalise
from lrag_ray.scoring.vbench_long.raft import FlowEstimator
from lrag_ray.scoring.vbench_long.vit import VisionTransformer, VitConfig, clip_name
from lrag_ray.scoring.vbench_long.weights import Weights, WeightSource
from lrag_ray.wan.state_dict import load_strict, misfits, state_dict_digest

Precision = Literal["float32", "official"]
"""float32: everywhere, TF32 off. official: what the official code computes with on that device; the same on a CPU,
and on CUDA TF32 convolutions and both CLIP networks in float16."""

DINO = VitConfig(patch=16, grid=14)
DINOV2 = VitConfig(patch=14, grid=37, layer_scale=True, mask_token=True)
CLIP_B32 = VitConfig(patch=32, grid=7, eps=1e-5, patch_bias=False, pre_norm=True, quick_gelu=True, projection=512)
CLIP_L14 = VitConfig(
    patch=14,
    grid=16,
    width=1024,
    depth=24,
    heads=16,
    eps=1e-5,
    patch_bias=False,
    pre_norm=True,
    quick_gelu=True,
    projection=768,
)
DREAMSIM_DINO = VitConfig(patch=16, grid=14, readout="block")
DREAMSIM_CLIP = VitConfig(patch=16, grid=14, eps=1e-5, pre_norm=True, quick_gelu=True, projection=512)
DREAMSIM_OPEN_CLIP = VitConfig(patch=16, grid=14, eps=1e-5, pre_norm=True, projection=512)
_LORA_RANK = 16

_USERS: Mapping[NetworkName, str] = {
    "dino_vitb16": "dino",
    "dinov2_vitb14": "dinov2",
    "clip_vitb32": "clip_b32",
    "clip_vitl14": "clip_l14",
    "laion_linear": "aesthetic_head",
    "raft_things": "raft",
    "amt_s": "amt",
    "musiq_spaq": "musiq",
    "dreamsim_clip_vitb16": "dreamsim",
    "dreamsim_open_clip_vitb16": "dreamsim",
    "dreamsim_ensemble_lora": "dreamsim",
}
"""Property of `Networks` by the weights that it is built from."""


@dataclass(frozen=True)
class BatchSizes:
    """How much goes through a network at once; results do not depend on it beyond rounding."""

    frames: int
    """Frames per batch of the vision transformers and MUSIQ."""
    pairs: int
    """Frame pairs per batch of RAFT and AMT-S (a pair at 832x480 takes about 0.5 GB of correlations); fewer where the
    frames are too large for one lookup (see `correlation.pairs_at_once`)."""

    @classmethod
    def for_device(cls, device: torch.device, frames: int | None = None, pairs: int | None = None) -> BatchSizes:
        """What is given, and where it is not, what suits the device.

        A GPU is only filled by a batch; on a CPU a large one outgrows the caches and goes slower than one by one.
        """
        suited = _ON_CPU if device.type == "cpu" else _ON_GPU
        return cls(frames or suited.frames, pairs or suited.pairs)

    def __post_init__(self) -> None:
        if self.frames < 1 or self.pairs < 1:
            raise ValueError(f"batch sizes are {self.frames} frames and {self.pairs} pairs, expected at least 1")


_ON_CPU = BatchSizes(frames=8, pairs=1)
_ON_GPU = BatchSizes(frames=32, pairs=4)


class DreamSim(nn.Module):
    """The DreamSim ensemble: three towers, LoRA merged, embeddings centred and normalised. (Fu et al. 2023.)"""

    def __init__(self) -> None:
        super().__init__()
        self.dino = VisionTransformer(DREAMSIM_DINO)
        self.clip = VisionTransformer(DREAMSIM_CLIP)
        self.open_clip = VisionTransformer(DREAMSIM_OPEN_CLIP)

    def forward(self, images: Tensor) -> Tensor:
        """0..1 images [B, 3, 224, 224] to embeddings [B, 1792]."""
        towers = [(self.dino, IMAGENET), (self.clip, CLIP), (self.open_clip, CLIP)]
        embedding = torch.cat([tower(normalise(images, statistics)) for tower, statistics in towers], dim=1)
        embedding = embedding - embedding.mean(dim=1, keepdim=True)
        unit: Tensor = embedding / embedding.norm(dim=1, keepdim=True)
        return unit


class Networks:
    """Lazily built networks on one device, and the digests of those that were built."""

    def __init__(
        self,
        weights: WeightSource,
        device: str | torch.device = "cpu",
        *,
        precision: Precision = "official",
        batch: BatchSizes | None = None,
    ) -> None:
        self.device = torch.device(device)
        self.precision: Precision = precision
        self.batch = batch or BatchSizes.for_device(self.device)
        self._weights = weights
        self.digests: dict[NetworkName, str] = {}
        """SHA-256 of the tensors of each network that was built."""

    def build(self, name: NetworkName) -> None:
        """Build the network that uses the weights `name` now, not when a clip first needs it."""
        getattr(self, _USERS[name])

    @property
    def device_kind(self) -> str:
        """cpu, or the name of the GPU."""
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else self.device.type

    @contextmanager
    def numerics(self) -> Iterator[None]:
        """Inference without gradients in the chosen precision; torch's global switches are put back."""
        before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
        torch.backends.cudnn.allow_tf32 = self.precision == "official"
        torch.backends.cuda.matmul.allow_tf32 = False
        try:
            with torch.inference_mode():
                yield
        finally:
            torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before

    def clip_features(self, network: nn.Module, images: Tensor) -> Tensor:
        """Features [T, C] of a CLIP network, in float16 where the official code runs it so."""
        half = self.precision == "official" and self.device.type == "cuda"
        with torch.autocast("cuda", torch.float16, enabled=half):
            return self.features(network, images).float()

    def features(self, network: nn.Module, images: Tensor) -> Tensor:
        """Features [T, C] of normalised images [T, 3, H, W], batch by batch."""
        return torch.cat([network(part) for part in images.split(self.batch.frames)])

    @cached_property
    def dino(self) -> nn.Module:
        """DINO ViT-B/16."""
        return self._built("dino_vitb16", lambda: VisionTransformer(DINO))

    @cached_property
    def dinov2(self) -> nn.Module:
        """DINOv2 ViT-B/14."""
        return self._built("dinov2_vitb14", lambda: VisionTransformer(DINOV2))

    @cached_property
    def clip_b32(self) -> nn.Module:
        """Image tower of CLIP ViT-B/32."""
        return self._clip("clip_vitb32", CLIP_B32)

    @cached_property
    def clip_l14(self) -> nn.Module:
        """Image tower of CLIP ViT-L/14."""
        return self._clip("clip_vitl14", CLIP_L14)

    @cached_property
    def aesthetic_head(self) -> nn.Module:
        """LAION's linear map from CLIP ViT-L/14 features to a rating."""
        return self._built("laion_linear", lambda: nn.Linear(768, 1))

    @cached_property
    def raft(self) -> FlowEstimator:
        """RAFT, trained on FlyingThings."""
        raft = public_network("vbench.third_party.RAFT.core.raft", "RAFT")
        options = argparse.Namespace(small=False, mixed_precision=False, alternate_corr=False)
        return FlowEstimator(self._built("raft_things", lambda: raft(options)))

    @cached_property
    def amt(self) -> FrameInterpolator:
        """AMT-S frame interpolation."""
        model = public_network("vbench.third_party.amt.networks.AMT-S", "Model")
        shape = {"corr_radius": RADIUS, "corr_lvls": LEVELS, "num_flows": FLOWS}
        return FrameInterpolator(self._built("amt_s", lambda: model(**shape)))

    @cached_property
    def musiq(self) -> ImageRater:
        """MUSIQ, trained on SPAQ."""
        musiq = public_network("pyiqa.archs.musiq_arch", "MUSIQ")
        return ImageRater(self._built("musiq_spaq", lambda: musiq(pretrained=False, num_class=1)))

    @cached_property
    def dreamsim(self) -> DreamSim:
        """The DreamSim ensemble."""
        with torch.device("meta"):
            model = DreamSim()
        self._fill(model.dino, "dino_vitb16")
        self._fill(model.clip, "dreamsim_clip_vitb16")
        self._fill(model.open_clip, "dreamsim_open_clip_vitb16")
        self._merge_lora([model.dino, model.clip, model.open_clip])
        return model.eval().requires_grad_(False).to(self.device)

    def _clip(self, name: NetworkName, config: VitConfig) -> nn.Module:
        with torch.device("meta"):
            model = VisionTransformer(config)
        ours = model.state_dict()
        official = {clip_name(key): key for key in ours}
        # CLIP's own embeddings have no batch dimension.
        expected = {
            theirs: ours[key].squeeze() if "embedding" in theirs else ours[key] for theirs, key in official.items()
        }
        weights = self._read(name, expected)
        renamed = {official.get(theirs, theirs): tensor for theirs, tensor in weights.tensors.items()}
        for key in renamed.keys() & {"cls_token", "pos_embed"}:
            renamed[key] = renamed[key][(None,) * (3 - renamed[key].ndim)]
        load_strict(model, renamed, weights.source, _AGAIN)
        return self._ready(model)

    def _built(self, name: NetworkName, make: Callable[[], nn.Module]) -> nn.Module:
        with torch.device("meta"):
            model = make()
        self._fill(model, name)
        return self._ready(model)

    def _ready(self, model: nn.Module) -> nn.Module:
        return model.eval().requires_grad_(False).to(self.device)

    def _fill(self, model: nn.Module, name: NetworkName) -> None:
        weights = self._read(name, model.state_dict())
        load_strict(model, weights.tensors, weights.source, _AGAIN)

    def _read(self, name: NetworkName, expected: Mapping[str, Tensor]) -> Weights:
        weights = self._weights.read(name, expected)
        self.digests[name] = state_dict_digest(weights.tensors)
        return weights

    def _merge_lora(self, towers: list[VisionTransformer]) -> None:
        """W += scale · B A in every qkv projection."""
        stem = "base_model.model.extractor_list.{}.model.blocks.{}.attn.qkv.lora_{}.weight"
        width = DINO.width
        shapes = {"A": (_LORA_RANK, width), "B": (3 * width, _LORA_RANK)}
        expected = {
            stem.format(tower, block, side): torch.empty(shape, device="meta")
            for tower in range(len(towers))
            for block in range(DINO.depth)
            for side, shape in shapes.items()
        }
        weights = self._read("dreamsim_ensemble_lora", expected)
        if wrong := misfits(weights.tensors, expected):
            raise WeightsError(f"{weights.source} does not fit DreamSim:\n  " + "\n  ".join(wrong) + f"\nFix: {_AGAIN}")
        for tower, model in enumerate(towers):
            for block, layer in enumerate(model.blocks):
                qkv: Any = layer.get_submodule("attn.qkv")
                a, b = (weights.tensors[stem.format(tower, block, side)] for side in "AB")
                # Out of place: the tensors may be mapped to the file.
                qkv.weight = nn.Parameter(qkv.weight + weights.lora_scale * (b @ a))


_AGAIN = "give the published file (lrag-ray weights pull --suite vbench_long --again)"


def public_network(module: str, name: str) -> Callable[..., nn.Module]:
    """A network class of a public package, imported without letting it configure logging."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found: Callable[..., nn.Module] = getattr(importlib.import_module(module), name)
    except ImportError as error:
        raise RunEnvironmentError(
            f"{module} cannot be imported ({error}). Fix: make install, or "
            "pip install '.[score]' and then pip install --no-deps vbench==0.1.5 pyiqa==0.1.16"
        ) from error
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)
    return found
