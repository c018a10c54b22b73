"""The `watch` section: who receives the events of a start besides the person in front of it. All off by default."""

from __future__ import annotations

import re
from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import Field, StringConstraints, field_validator, model_validator

from lrag_ray.config.redaction import holds_credentials
from lrag_ray.config.section import CREDENTIALS, Address, Section

_DAY_S = 24 * 3600.0
_VARIABLE = r"^[A-Za-z_][A-Za-z0-9_]*$"

Variable = Annotated[str, StringConstraints(pattern=_VARIABLE)]
"""Name of an environment variable."""
Label = Annotated[str, StringConstraints(min_length=1, max_length=200)]
"""A name that another service shows."""


class TensorBoardSection(Section):
    """TensorBoard event files. Needs the extra `tensorboard`."""

    folder: Address
    """Folder for the event files; every start adds a folder of its own to it."""

    @field_validator("folder")
    @classmethod
    def _local(cls, value: str) -> str:
        if "://" in value:
            raise ValueError(f"'{value}' must be a folder: event files are written on the driver's machine")
        return value


class WandbSection(Section):
    """Weights & Biases. Needs the extra `wandb`; the key comes from WANDB_API_KEY or `wandb login`."""

    project: Label
    """Project."""
    entity: Label | None = None
    """Team or user; None takes the default of the key."""
    name: Label | None = None
    """Name of the W&B run; None takes the last part of run.uri. Every start is a W&B run of its own, grouped by it."""
    mode: Literal["online", "offline"] = "online"
    """offline writes files for `wandb sync`."""
    folder: Address | None = None
    """Folder of W&B's own files; None takes WANDB_DIR, else ./wandb."""


class MlflowSection(Section):
    """MLflow. Needs the extra `mlflow`; credentials come from MLFLOW_TRACKING_TOKEN, or _USERNAME and _PASSWORD."""

    tracking_uri: Address | None = None
    """Tracking server (https://host), or what else MLflow takes; None takes MLFLOW_TRACKING_URI."""
    experiment: Label = "lrag-ray"
    """Experiment; created where it does not exist."""
    name: Label | None = None
    """Name of the MLflow run; None takes the last part of run.uri. Every start is a run of its own."""


class OnEndSection(Section):
    """What is called once when a start has ended, however it ended. It never changes the exit code.

    It receives the `RunEnded` event as JSON: run, job, exit code, what is missing. Give exactly one of `webhook`,
    `webhook_from` and `command`.
    """

    webhook: str | None = None
    """Address that gets a POST with the JSON. One that is a secret belongs in the environment: `webhook_from`."""
    webhook_from: Variable | None = None
    """Environment variable that holds the address of the webhook."""
    token_from: Variable | None = None
    """Environment variable that holds a token, sent as ``Authorization: Bearer``."""
    command: list[str] | None = Field(default=None, min_length=1)
    """Program and arguments, started without a shell on the driver's machine; the JSON is its standard input, and
    LRAG_RUN and LRAG_EXIT_CODE are in its environment."""
    timeout_s: float = Field(default=10, gt=0, le=_DAY_S)
    """Longest duration of one attempt."""
    attempts: int = Field(default=3, ge=1, le=100)
    """Attempts of a webhook that does not answer, or answers 408, 429 or 5xx. A command is started once."""

    @field_validator("webhook")
    @classmethod
    def _http(cls, value: str | None) -> str | None:
        return value if value is None else webhook_address(value)

    @model_validator(mode="after")
    def _one(self) -> OnEndSection:
        if sum(each is not None for each in (self.webhook, self.webhook_from, self.command)) != 1:
            raise ValueError("give exactly one of webhook, webhook_from and command")
        if self.token_from is not None and self.command is not None:
            raise ValueError("token_from is for webhooks; a command inherits the environment")
        return self


class WatchSection(Section):
    """Who else receives the events of a start. Free to change between starts, and never stored with the run."""

    metrics: bool = False
    """Export Prometheus metrics through Ray (lrag_blocks_total, lrag_rollouts, lrag_block_seconds, …)."""
    metrics_linger_s: float = Field(default=30, ge=0, le=_DAY_S)
    """metrics: how long the driver stays connected after the report, so that the final values are scraped."""
    tensorboard: TensorBoardSection | None = None
    """TensorBoard."""
    wandb: WandbSection | None = None
    """Weights & Biases."""
    mlflow: MlflowSection | None = None
    """MLflow."""
    on_end: OnEndSection | None = None
    """Webhook or command at the end."""


def webhook_address(value: str) -> str:
    """`value`, if it is an address for a POST. ValueError otherwise, which never repeats it: it may be a secret."""
    try:
        parts = urlsplit(value)
        port = parts.port
    except ValueError:
        raise ValueError("is not an address such as https://host/path") from None
    if parts.scheme not in ("http", "https") or not parts.hostname or port == 0 or re.search(r"\s", value):
        raise ValueError("must be an address such as https://host/path")
    if holds_credentials(value):
        raise ValueError(f"holds {CREDENTIALS}, or use webhook_from and token_from")
    return value
