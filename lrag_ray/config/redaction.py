"""Secrets in text: recognised in addresses, which may hold none, and taken out of whatever is shown or stored.

Addresses are parsed: host, port, bucket, path and harmless options stay, everything else goes. In prose, values of
parameters with the names of secrets go.
"""

from __future__ import annotations

import re

# Repetitions have bounds where a match may begin at every character: a stranger's text of a megabyte would take hours.
_ADDRESS = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]{0,60})://(?P<rest>[^\s'\"<>]+)")
_SERVER_SCHEMES = {"http", "https", "ftp", "ftps", "hdfs", "webhdfs", "ray", "grpc", "tcp", "ws", "wss"}
"""Schemes whose authority is host[:port]; that of all others is one name, a bucket."""
_HOST = re.compile(r"(?:\[[0-9A-Fa-f:.]+\]|[^\s:@\[\]]*)(?::\d{1,5})?")
_CONTAINER = re.compile(r"[a-z0-9-]+@[a-z0-9-]+(?:\.[a-z0-9-]+)+")
"""Azure names a container and an account."""
_BUCKET = re.compile(r"arn:[\w:-]+|[^\s:@]*")
_OPTIONS = {"raw", "download", "dl", "versionid"}
"""Query parameters whose values may be shown."""

# Not: tokens, tokenizer, and prose about credentials.
_SECRET_PARAMETER = re.compile(
    r"(?i)((?:secret|password|passwd|passphrase|pwd|token(?!s|i[sz])|signature|credential(?!s:\s)"
    r"|(?:api|access|account|private|shared|storage|master|encryption)[_-]?key|authorization|cookie)[\w-]{0,200}"
    r"|\b(?:pass(?=[\"']?=)|sig|sas))"
    r"""(["']?\s*[=:]\s*(?:(?:basic|bearer)\s+)?)("[^"]*"|'[^']*'|(?:(?:basic|bearer)\s+)?[^\s"'&,;]+)"""
)
_BARE_USER_INFO = re.compile(r"""(?<![\w/:@.-])[^\s:@/'"=,;()]{1,128}:(?!//)[^\s@/'",;]{1,1024}+@(?=[\w\[])""")
"""``user:password@host`` where no scheme stands before it."""
_KNOWN_TOKEN = re.compile(
    r"\b(?:(?:AKIA|ASIA)[A-Z0-9]{16}|hf_[A-Za-z0-9]{20,}|gh[pousr]_[A-Za-z0-9]{20,}|sk-[A-Za-z0-9_-]{20,}"
    r"|AIza[\w-]{35})(?a:(?![\w-]))|(?i:(?<=bearer )[\w.~+/=-]{8,})"
)

RAY_ADDRESS_FORM = "auto, local or host:port"
_RAY_ADDRESS = re.compile(r"auto|local|(?:\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+):(\d{1,5})")


def redact(text: str) -> str:
    """`text` without user info and unknown options in addresses, and without values of secret-looking parameters."""
    text = _ADDRESS.sub(lambda found: f"{found['scheme']}://{_shown(found['scheme'], found['rest'])}", text)
    text = _BARE_USER_INFO.sub("***@", text)
    return _KNOWN_TOKEN.sub("***", _SECRET_PARAMETER.sub(r"\1\2***", text))


def holds_credentials(text: str) -> bool:
    """Whether `text` is a known kind of key, or an address in it has user info or options that look like secrets."""
    return bool(_KNOWN_TOKEN.search(text)) or any(
        _user_info_end(found["scheme"], found["rest"]) or _SECRET_PARAMETER.search(found["rest"].partition("?")[2])
        for found in _ADDRESS.finditer(text)
    )


def is_ray_address(text: str) -> bool:
    """Whether `text` is an address that `ray.init` takes, without anything else in it."""
    found = _RAY_ADDRESS.fullmatch(text)
    return found is not None and (found[1] is None or 0 < int(found[1]) < 65536)


def _user_info_end(scheme: str, rest: str) -> int:
    """Length of what stands before host or bucket; 0 where nothing does.

    A secret key may hold slashes and a password an @: where the authority is not what its scheme has, all before the
    last @ is taken for user info.
    """
    scheme = scheme.lower()
    authority = re.split(r"[/?#]", rest, maxsplit=1)[0]
    if scheme in ("abfs", "abfss", "wasb", "wasbs") and _CONTAINER.fullmatch(authority):
        return 0
    if (_HOST if scheme in _SERVER_SCHEMES else _BUCKET).fullmatch(authority):
        return 0
    return rest.rfind("@") + 1 or len(authority)


def _shown(scheme: str, rest: str) -> str:
    if end := _user_info_end(scheme, rest):
        rest = ("***@" if rest[end - 1] == "@" else "***") + rest[end:]
    address, mark, options = rest.partition("?")
    if not mark:
        return rest
    return address + mark + "&".join(map(_option, options.split("&")))


def _option(text: str) -> str:
    name, equals, _ = text.partition("=")
    return text if not equals or name.lower() in _OPTIONS else f"{name}=***"
