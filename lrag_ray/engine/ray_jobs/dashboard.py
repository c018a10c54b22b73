"""The dashboard of a cluster, which takes jobs: its address, the token that it asks for, and whether it suits us.

Ray's own clients let RAY_API_SERVER_ADDRESS and RAY_ADDRESS override an address that is given; so does this one, and
the caller learns which one counts.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from lrag_ray.config.redaction import holds_credentials, is_ray_address, redact
from lrag_ray.errors import ClusterError, UsageError

DEFAULT = "http://127.0.0.1:8265"
LEAST_RAY = (2, 60)
"""As in pyproject.toml; the job API and the engine are written for it."""
LEAST_PYTHON = (3, 11)
"""As in pyproject.toml."""
_LOOK_UP_S = 60.0
_LOOK_UP = "import sys\nfrom ray.dashboard.utils import ray_address_to_api_server_url as url\nprint(url(sys.argv[1]))"


class Dashboard(NamedTuple):
    """Where jobs are submitted."""

    url: str
    """``http://host:port`` without a slash at its end."""
    source: str
    """What named it: ``--address``, a variable, or ``the default``."""
    note: str = ""
    """Says that another address was given and does not count; empty otherwise."""


class Token(NamedTuple):
    """What the cluster may ask for."""

    text: str
    source: str
    """Where it was found; may be shown."""


def find_dashboard(given: str | None = None) -> Dashboard:
    """The dashboard that RAY_API_SERVER_ADDRESS, else RAY_ADDRESS, else `given` names, else that of this machine.

    Raises UsageError for any other address, and ClusterError where Ray cannot say where the dashboard is.
    """
    named = [(name, os.environ.get(name)) for name in ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")]
    named.append(("--address", given))
    source, text = next(((name, text) for name, text in named if text), ("the default", DEFAULT))
    note = ""
    if given and source != "--address" and given.rstrip("/") != (text or "").rstrip("/"):
        note = (
            f"{source} is set to {redact(text or '')}, which overrides --address {redact(given)} as it does for "
            f"`ray job`. Fix: unset {source} if that is not the cluster you mean"
        )
    return Dashboard(_url(text or "", source), source, note)


def find_token() -> Token | None:
    """The token of this user: RAY_AUTH_TOKEN, else the file at RAY_AUTH_TOKEN_PATH, else ~/.ray/auth_token.

    None without one, or where RAY_AUTH_MODE is set to anything but ``token``. Raises UsageError for a file that is
    named and cannot be read.
    """
    mode = os.environ.get("RAY_AUTH_MODE")
    if mode is not None and mode.lower() != "token":
        return None
    if text := os.environ.get("RAY_AUTH_TOKEN", "").strip():
        return Token(text, "RAY_AUTH_TOKEN")
    if named := os.environ.get("RAY_AUTH_TOKEN_PATH"):
        try:
            return Token(Path(named).expanduser().read_text(encoding="utf-8").strip(), f"{named} (RAY_AUTH_TOKEN_PATH)")
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"RAY_AUTH_TOKEN_PATH {named!r} cannot be read: {error}") from None
    try:
        text = (Path.home() / ".ray" / "auth_token").read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError, RuntimeError):
        return None
    return Token(text, "~/.ray/auth_token") if text else None


def check_versions(ray: str, python: str | None, where: str) -> str:
    """A note where Python differs from this one, else nothing. ClusterError where Ray or Python are too old."""
    if _numbers(ray) < LEAST_RAY:
        raise ClusterError(
            f"{where} runs Ray {ray}, and lrag-ray needs {_dotted(LEAST_RAY)} or later there. Fix: install the version "
            "of constraints.txt on every node, or use an image that has it (cluster/docker/Dockerfile)"
        )
    if python is None:
        return ""
    found, here = _numbers(python), sys.version_info[:2]
    if found < LEAST_PYTHON:
        raise ClusterError(
            f"{where} runs Python {python}, and lrag-ray needs {_dotted(LEAST_PYTHON)} or later there. Fix: start the "
            "cluster from an environment with that Python"
        )
    if found != here:
        return (
            f"{where} runs Python {python} and this machine {_dotted(here)}. The job uses the cluster's; plug-ins must "
            "work with it"
        )
    return ""


def _url(text: str, source: str) -> str:
    if holds_credentials(text) or ("@" in text and "://" not in text):
        raise UsageError(f"{source} holds credentials before an @. Fix: take them out; tokens belong in RAY_AUTH_TOKEN")
    if re.fullmatch(r"https?://(\[[0-9A-Fa-f:.]+\]|[^/@?#\s\[\]:]+)(:\d{1,5})?(/[^?#\s]*)?", text):
        return text.rstrip("/")
    if text.startswith("ray://"):
        raise UsageError(
            f"{source} {redact(text)!r} is a Ray Client address, and jobs are submitted to the dashboard. Fix: give "
            "http://host:8265 (on Kubernetes: kubectl port-forward service/NAME-head-svc 8265)"
        )
    if not is_ray_address(text) or text == "local":
        raise UsageError(f"{source} {redact(text)!r} is not the address of a dashboard; expected http://host:8265")
    if text != "auto" and source == "--address":
        return f"http://{text}"
    return _asked(text, source)


def _asked(text: str, source: str) -> str:
    """The dashboard of the cluster at ``auto`` or ``host:port``, which is where its nodes meet; Ray knows it."""
    token = find_token()
    environment = {**os.environ, **({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token.text} if token else {})}
    try:
        # In a process of its own: Ray would try for a quarter of an hour, and end ours where it finds no cluster.
        asked = subprocess.run(
            [sys.executable, "-c", _LOOK_UP, text],
            capture_output=True,
            text=True,
            timeout=_LOOK_UP_S,
            check=False,
            env=environment,
        )
    except subprocess.TimeoutExpired:
        why = f"no answer in {_LOOK_UP_S:g} s"
    else:
        if asked.returncode == 0:
            return asked.stdout.split()[-1].rstrip("/")
        if "AuthenticationError" in asked.stderr:
            used = f"refuses the token in {token.source}" if token else "asks for a token, and there is none here"
            raise ClusterError(f"the cluster at {text} ({source}) {used}. Fix: use the token of that cluster")
        lines = asked.stderr.strip().splitlines()
        why = redact(lines[-1]) if lines else "no cluster is there"
    raise ClusterError(
        f"{source} is {text}, and Ray could not say where the dashboard of that cluster is: {why}. Fix: set "
        "RAY_API_SERVER_ADDRESS to it (http://host:8265)"
    )


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version)[:2])


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))
