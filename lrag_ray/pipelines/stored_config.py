"""The configuration that a run was last started with, kept beside the run.

``RUN/config.json`` says where the VAE and the weights lie, which the run's identity (digests) leaves open. It is for
later commands on the run alone, and decides nothing about what counts.
"""

from __future__ import annotations

from collections.abc import Sequence

from lrag_ray.config.load import complete
from lrag_ray.config.schema import RunConfig
from lrag_ray.config.source import parse_document
from lrag_ray.errors import ConfigError
from lrag_ray.store.rollouts import RolloutRun

CONFIG_FILE = "config.json"


def store_config(run: RolloutRun, config: RunConfig) -> None:
    """Keep `config`, whose paths are absolute, as the run's last one."""
    run.storage.write(CONFIG_FILE, config.model_dump_json(indent=1).encode())


def stored_config(uri: str, overrides: Sequence[str] = ()) -> RunConfig:
    """The run's last configuration with `overrides`, for the run as it lies at `uri` now.

    Raises:
        StorageError: there is no run at `uri`.
        ConfigError: the run has no configuration, or one that this version does not understand.
    """
    run = RolloutRun(uri)
    run.require()
    name = f"{run.uri}/{CONFIG_FILE}"
    try:
        text = run.storage.read_bytes(CONFIG_FILE).decode()
    except FileNotFoundError:
        raise ConfigError(f"{name} is missing; give the run's configuration with --config") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{name} is damaged; give the run's configuration with --config") from None
    document = parse_document(name, text)
    section = document.data.setdefault("run", {})
    if isinstance(section, dict):
        section["uri"] = run.storage.address
    return complete(document, overrides)
