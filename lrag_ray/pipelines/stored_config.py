"""Later commands on a run without its configuration: `decode RUN` and `score RUN`.

A run directory may come from a stranger: it is data, and nothing in it acts. So only what describes its results is
taken from it (sizes, video settings, names; from ``run.json``) and which scores it was meant to have (suite, mode,
dimensions, controls; from ``config.json``). Everything that acts comes from the caller: addresses, storage, places of
weights, plug-ins. A plug-in that the run names is reported by name and never imported.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lrag_ray.config.load import complete
from lrag_ray.config.schema import RunConfig
from lrag_ray.config.source import Document
from lrag_ray.config.vae import COMPUTES
from lrag_ray.errors import ConfigError, StorageError
from lrag_ray.scoring.intended import intended_scores
from lrag_ray.store.identity import RunIdentity
from lrag_ray.store.rollouts import RolloutRun
from lrag_ray.store.run_dir import CONFIG_FILE
from lrag_ray.store.seal import sealed_json

_DESCRIBES_LATENTS = ("transformer", "sampler", "latent", "dtype")


def store_config(run: RolloutRun, config: RunConfig) -> None:
    """Keep `config`, whose paths are absolute, beside the run, for people and for the scores that it asks for.

    Without `watch`: that belongs to the start, and addresses of hooks may be secrets.
    """
    data = sealed_json(config.model_dump_json(indent=1, exclude={"watch"}))
    if run.storage.read_many([CONFIG_FILE]).get(CONFIG_FILE) != data:
        run.storage.write(CONFIG_FILE, data)


def stored_config(uri: str, overrides: Sequence[str] = (), *, decodes: bool = False) -> RunConfig:
    """A configuration for a command on the run at `uri`, from what describes its data and the caller's `overrides`.

    With `decodes` it has the VAE of each backbone, whose place `overrides` must give where it is a file; the weights
    of generators and text encoders, which neither command reads, are never in it.

    Raises:
        StorageError: there is no run at `uri`, or its ``config.json`` is damaged and no suite is named.
        ConfigError: `overrides` are wrong, or lack the place of a VAE or the name of a plug-in suite.
    """
    run = RolloutRun(uri)
    identity = run.require()
    intended = intended_scores(run.storage)
    unnamed = not decodes and not any(text.startswith("scoring.suite=") for text in overrides)
    if intended.damaged and unnamed:
        raise StorageError(
            f"{run.uri}/{CONFIG_FILE} is damaged, so it is not known which scores the run was meant to have. Fix: name "
            "the suite (--suite), or write the file again (`lrag-ray run CONFIG`)"
        )
    if intended.plug_in is not None and unnamed:
        raise ConfigError(
            f"{run.uri}/{CONFIG_FILE} names the suite {intended.plug_in!r}, which is not part of lrag-ray, and a run "
            "directory never chooses what is imported. Fix: name the suite yourself (--suite)"
        )
    data = {
        "run": {"uri": run.storage.address, "seed": identity.seed},
        "prompts": {"count": max(1, len(identity.prompts))},
        "durations_s": sorted({h.duration_s for backbone in identity.backbones.values() for h in backbone.horizons}),
        "backbones": {name: _backbone(identity, name, decodes=decodes) for name in identity.backbones},
        "methods": {name: {"method": "base"} for name in identity.methods},
        "video": identity.video,
        "scoring": intended.section,
    }
    try:
        return complete(Document(f"{run.uri}/run.json", data), overrides)
    except ConfigError as error:
        if not decodes:
            raise
        raise ConfigError(
            f"{error}\nThe places of weights are never taken from a run directory: name the configuration that the run "
            "was made with (--config), or the VAE (--set backbones.NAME.vae.path=…)"
        ) from None


def _backbone(identity: RunIdentity, name: str, *, decodes: bool) -> dict[str, Any]:
    backbone = identity.backbones[name]
    vae = backbone.pixels.get("vae")
    pixels = {key: vae[key] for key in ("kind", *COMPUTES) if key in vae} if isinstance(vae, dict) else {}
    return {
        **{key: backbone.latents[key] for key in _DESCRIBES_LATENTS if key in backbone.latents},
        "label": backbone.label,
        "weights": {"random_seed": 0},
        "text_encoder": {"kind": "tiny"},
        "vae": pixels if decodes else {"kind": "tiny"},
    }
