"""The LoRA of a configuration: its files on this machine, and what identifies its strength."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from lrag_ray.config.lora import LoraConfig
from lrag_ray.wan.lora import Lora, read_lora
from lrag_ray.weights.digests import weights_digest
from lrag_ray.weights.local import is_remote, local_copy, sizes_at

_ADAPTER_CONFIG = "adapter_config.json"


def local_lora(config: LoraConfig) -> Lora:
    """The LoRA on this machine, with the adapter_config.json beside it where its file is in a bucket.

    Raises WeightsError where there is nothing; StorageError.
    """
    path = local_copy(config.path)
    beside = None
    if is_remote(config.path) and not path.is_dir():
        address = f"{config.path.rstrip('/').rsplit('/', 1)[0]}/{_ADAPTER_CONFIG}"
        beside = local_copy(address) if sizes_at(address) else None
    return Lora(path, config.rank, config.alpha, beside)


def lora_identity(config: LoraConfig) -> dict[str, Any]:
    """Digest, rank and alpha; what the configuration leaves to the file is read from it.

    Ranks or alphas that differ between layers are named by a digest over all of them.
    """
    identity: dict[str, Any] = {"sha256": weights_digest(config.path), "rank": config.rank, "alpha": config.alpha}
    if config.rank is not None and config.alpha is not None:
        # Checked against the file when it is loaded.
        return identity
    layers = {name: [update.rank, float(update.alpha)] for name, update in read_lora(local_lora(config)).items()}
    ranks, alphas = {rank for rank, _ in layers.values()}, {alpha for _, alpha in layers.values()}
    if len(ranks) == len(alphas) == 1:
        return identity | {"rank": ranks.pop(), "alpha": alphas.pop()}
    named = json.dumps(sorted(layers.items()))
    return identity | {"rank": None, "alpha": None, "layers": hashlib.sha256(named.encode()).hexdigest()}
