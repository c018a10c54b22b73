"""Secrets in text: recognised in addresses, which may hold none, and taken out of whatever is shown or stored."""

from __future__ import annotations

import re

# A secret key may hold slashes, a password an @. Digits and a slash after the colon are a port.
_USER_INFO = re.compile(r"(?<=://)(?:[^/\s:@]+:(?!\d{1,5}/)\S*|[^/\s]*)@")
# Not: tokens, tokenizer, and prose about credentials.
_SECRET_PARAMETER = re.compile(
    r"(?i)\b([\w-]*(?:secret|password|passwd|token(?!s|i[sz])|signature|credential(?!s:\s)|api_?key|access_?key"
    r"|authorization)[\w-]*|sig)"
    r"""(["']?\s*[=:]\s*["']?(?:(?:basic|bearer)\s+)?)[^\s"'&,;]+"""
)


def redact(text: str) -> str:
    """`text` without user info in addresses and without values of secret-looking parameters."""
    return _SECRET_PARAMETER.sub(r"\1\2***", _USER_INFO.sub("***@", text))


def holds_credentials(text: str) -> bool:
    """Whether an address in `text` has user info (``s3://key:secret@bucket``)."""
    return _USER_INFO.search(text) is not None
