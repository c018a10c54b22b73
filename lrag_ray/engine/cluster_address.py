"""Addresses of Ray clusters: parsed, so that only host and port are ever shown or contacted."""

from __future__ import annotations

import os
import re
from typing import NamedTuple

from lrag_ray.config.redaction import RAY_ADDRESS_FORM, is_ray_address, redact
from lrag_ray.config.schema import WorkersSection
from lrag_ray.errors import ClusterError

RAY_PORT = 6379
"""Of the head, where the user sets no other."""


class ClusterAddress(NamedTuple):
    """Where a cluster is."""

    text: str
    """As Ray takes it: ``auto`` or ``host:port``."""
    host: str | None
    """None for ``auto``, where Ray itself knows the cluster of this machine."""
    port: int


def cluster_address(engine: WorkersSection | None) -> ClusterAddress | None:
    """The cluster that `engine.address`, else RAY_ADDRESS names; None where a local one is to be started.

    Raises ClusterError for an address that a run cannot use; the message shows no credentials.
    """
    configured = engine.address if engine is not None else None
    text, source = (configured, "engine.address") if configured else (os.environ.get("RAY_ADDRESS"), "RAY_ADDRESS")
    if not text or text == "local":
        return None
    if text.startswith("ray://") and "@" not in text:
        raise ClusterError(
            f"{source} {redact(text)!r} is a Ray Client address, and a run needs more of Ray than its client offers "
            f"(nodes that join and leave). Fix: on a machine of the cluster set {source} to the head's host:port "
            f"(port {RAY_PORT} unless set otherwise), or `lrag-ray submit` from here (--address http://HEAD:8265)"
        )
    if not is_ray_address(text):
        shown = "holds user info before an @" if "@" in text else f"{redact(text)!r} is not a Ray address"
        raise ClusterError(
            f"{source} {shown}; expected {RAY_ADDRESS_FORM}. Fix: correct it; tokens belong in RAY_AUTH_TOKEN"
        )
    if text == "auto":
        return ClusterAddress(text, None, 0)
    match = re.fullmatch(r"\[?([^\[\]]+?)\]?:(\d+)", text)
    assert match is not None, "is_ray_address checks the form"
    return ClusterAddress(text, match[1], int(match[2]))
