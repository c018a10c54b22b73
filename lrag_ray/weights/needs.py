"""What a configuration needs: every weights file or folder that it names, with the places that name it.

Prompts are listed where they are a published file, because they are fetched from the same place.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from lrag_ray.config.jobs import JobConfig
from lrag_ray.config.methods import resolve_method
from lrag_ray.config.schema import BackboneConfig, RunConfig
from lrag_ray.context.weights import WeightFile
from lrag_ray.retrieval.encoder import load_encoder
from lrag_ray.weights.published import PUBLISHED, Published


@dataclass(frozen=True)
class Need:
    """One file or folder."""

    kind: str
    """transformer, lora, text_encoder, tokenizer, vae, prompts, or what a context method calls its own."""
    keys: tuple[str, ...]
    """Key paths of the configuration that name it."""
    address: str
    """Path, or fsspec address of a bucket."""
    backbone: BackboneConfig | None
    """What it must fit; None for what fits every backbone: weights of context methods, and prompts."""
    file: WeightFile | None = None
    """How a context method reads its own weights; None for everything else."""

    @property
    def name(self) -> str:
        """Last component of the address."""
        return self.address.rstrip("/").rsplit("/", 1)[-1]

    @property
    def published(self) -> Published | None:
        """Where it is published, by its name; None for a name that is not."""
        return PUBLISHED.get(self.name)


def needs_of(config: JobConfig) -> list[Need]:
    """Everything that `config` needs, each once, in the order in which a run reads it."""
    merged: dict[tuple[object, ...], Need] = {}
    for need in _all(config):
        key = (need.kind, need.address, *_must_fit(need))
        if key in merged:
            need = replace(merged[key], keys=(*merged[key].keys, *need.keys))
        merged[key] = need
    return list(merged.values())


def _must_fit(need: Need) -> tuple[object, ...]:
    """What two uses of one file must share to be one need."""
    backbone = need.backbone
    if backbone is None:
        return (need.file and need.file.load,)
    if need.kind in ("transformer", "lora"):
        return (backbone.transformer, backbone.weights, backbone.dtype)
    return (backbone.transformer.text_dim, backbone.transformer.text_len)


def _all(config: JobConfig) -> Iterator[Need]:
    if not isinstance(config, RunConfig):
        if config.training.start_from is not None:
            file = WeightFile("start_from", "retrieval_encoder", load_encoder)
            yield Need(file.kind, ("training.start_from",), config.training.start_from, None, file)
        return
    for name, backbone in config.backbones.items():
        at = f"backbones.{name}"
        weights, text, vae = backbone.weights, backbone.text_encoder, backbone.vae
        if weights.path is not None:
            yield Need("transformer", (f"{at}.weights.path",), weights.path, backbone)
        if weights.lora is not None:
            yield Need("lora", (f"{at}.weights.lora.path",), weights.lora.path, backbone)
        if text.kind == "umt5" and text.path is not None:
            yield Need("text_encoder", (f"{at}.text_encoder.path",), text.path, backbone)
        if text.kind == "umt5" and text.tokenizer is not None:
            yield Need("tokenizer", (f"{at}.text_encoder.tokenizer",), text.tokenizer, backbone)
        if vae.kind == "wan" and vae.path is not None:
            yield Need("vae", (f"{at}.vae.path",), vae.path, backbone)
    for name, method in config.methods.items():
        for file, address in resolve_method(method).weights:
            yield Need(file.kind, (f"methods.{name}.{file.key}",), address, None, file)
    if config.prompts.path is not None:
        prompts = Need("prompts", ("prompts.path",), config.prompts.path, None)
        if prompts.published is not None:
            yield prompts
