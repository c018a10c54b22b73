"""What S3 clients are made from."""

from __future__ import annotations

from datetime import datetime
from functools import cache
from typing import Any

from lrag_ray.config.schema import StorageSection

READERS = 32
"""Requests side by side."""

_REQUEST_ATTEMPTS = 3


def client_options(options: StorageSection) -> dict[str, Any]:
    """Arguments of s3fs for `options`."""
    return {
        # Listings change under us: other workers commit, and a stale listing would redo what is done.
        "use_listings_cache": False,
        "client_kwargs": {"region_name": options.region} if options.region else {},
        "config_kwargs": {
            "connect_timeout": options.connect_timeout_s,
            "read_timeout": options.read_timeout_s,
            # Per request, below our own per operation: a long listing is hundreds of requests.
            "retries": {"mode": "standard", "total_max_attempts": _REQUEST_ATTEMPTS if options.attempts > 1 else 1},
            "max_pool_connections": READERS,
        },
        "session": _session(options.profile),
        **({"endpoint_url": options.endpoint_url} if options.endpoint_url else {}),
    }


@cache
def _session(profile: str | None) -> Any:
    """One session per profile, whose clients read times quickly: in a long listing that is most of the work.

    Kept, since s3fs takes arguments with another session for another file system with connections of its own.
    """
    from aiobotocore.session import AioSession  # type: ignore[import-untyped]

    session = AioSession(profile=profile)
    session.get_component("response_parser_factory").set_parser_defaults(timestamp_parser=parse_time)
    return session


def parse_time(value: Any) -> datetime:
    """A time as S3 writes it: ISO 8601 in listings, RFC 822 in headers."""
    try:
        return datetime.fromisoformat(value)
    except (TypeError, ValueError):
        from botocore.utils import parse_timestamp  # type: ignore[import-untyped]

        parsed: datetime = parse_timestamp(value)
        return parsed
