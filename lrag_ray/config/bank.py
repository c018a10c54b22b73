"""The `engine.bank` section: where each rollout keeps its history."""

from __future__ import annotations

from pydantic import Field, model_validator

from lrag_ray.config.section import Section


class BankSection(Section):
    """Where each rollout keeps its history; results do not depend on it. Free to change between starts."""

    device_gb: float = Field(default=0, ge=0, le=1e6)
    """GPU memory per rollout; filled first."""
    host_gb: float | None = Field(default=None, gt=0, le=1e6)
    """Host memory per rollout, which its actor reserves; None for all that is left."""
    disk: str | None = Field(default=None, min_length=1)
    """Folder on a local disk of every node for what exceeds `host_gb`. Its file vanishes with the rollout."""

    @model_validator(mode="after")
    def _disk_is_used(self) -> BankSection:
        if self.disk is not None and self.host_gb is None:
            raise ValueError("disk takes what exceeds host_gb: give host_gb, or leave disk out")
        return self
