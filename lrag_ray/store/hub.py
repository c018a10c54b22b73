"""Dataset repositories of the Hugging Face Hub: one file in, one folder out.

The environment is that of huggingface_hub: HF_TOKEN (the only place a token is taken from), HF_ENDPOINT for a mirror,
HF_HUB_OFFLINE to forbid the network.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, TypeVar

import httpx2
from huggingface_hub import HfApi, constants, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, OfflineModeIsEnabled, RepositoryNotFoundError

from lrag_ray.config.redaction import redact
from lrag_ray.errors import StorageError, UsageError

SCHEME = "hub://"
T = TypeVar("T")

_NAME = r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9])?"
_PLACE = re.compile(rf"hub://({_NAME}/{_NAME})(?:/([^@\s]+))?(?:@([^\s@]{{1,100}}))?")
_TOKEN = "Fix: set HF_TOKEN to a token of yours that may {}"


class HubPlace(NamedTuple):
    """What ``hub://OWNER/NAME[/FILE][@REVISION]`` names."""

    repository: str
    file: str
    """Empty where none is named."""
    revision: str
    """A branch, tag or commit."""


def hub_place(address: str) -> HubPlace:
    """The parts of an address. UsageError where it is none."""
    found = _PLACE.fullmatch(address)
    if found is None or ".." in (found[2] or "").split("/"):
        raise UsageError(f"{redact(address)!r} is not an address on the Hub. Fix: hub://OWNER/NAME, as on its page")
    return HubPlace(found[1], found[2] or "", found[3] or "main")


class Hub:
    """The Hub as this environment reaches it."""

    def __init__(self) -> None:
        self._token = os.environ.get("HF_TOKEN", "")
        self.endpoint = (os.environ.get("HF_ENDPOINT") or constants.ENDPOINT).rstrip("/")
        # False: without it huggingface_hub would take a token that somebody has logged in with on this machine.
        self._api = HfApi(endpoint=self.endpoint, token=self._token or False)

    def files(self, place: HubPlace) -> list[str]:
        """Paths of all files, sorted. StorageError where the repository cannot be read."""
        listed = self._asked(place, "read it", self._api.list_repo_files, place.repository, **_at(place))
        return sorted(listed)

    def fetch(self, place: HubPlace, folder: Path) -> Path:
        """One file, into `folder`. StorageError where it cannot be read."""
        return Path(
            self._asked(
                place,
                "read it",
                hf_hub_download,
                place.repository,
                place.file,
                **_at(place),
                local_dir=folder,
                endpoint=self.endpoint,
                token=self._token or False,
            )
        )

    def check_target(self, place: HubPlace, *, public: bool) -> None:
        """UsageError without a token, or for a public repository that is not meant to be one."""
        if not self._token:
            raise UsageError(f"{SCHEME}{place.repository} cannot be written without a token. {_TOKEN.format('write')}")
        try:
            info = self._asked(place, "read it", self._api.repo_info, place.repository, repo_type="dataset")
        except _NoRepositoryError:
            return
        if not info.private and not public:
            raise UsageError(
                f"{SCHEME}{place.repository} is public: everybody would see prompts, scores and videos. Fix: give "
                "another name, which is created as private, or --public if that is what you want"
            )

    def push(self, place: HubPlace, folder: Path, *, public: bool, message: str) -> str:
        """Commit all files of `folder` to the repository, which is created as private unless `public`; its page.

        Files of other names that are there already stay. See `check_target`; StorageError where it cannot be written.
        """
        self.check_target(place, public=public)
        self._asked(
            place,
            "write it",
            self._api.create_repo,
            place.repository,
            repo_type="dataset",
            private=not public,
            exist_ok=True,
        )
        self._asked(
            place,
            "write it",
            self._api.upload_folder,
            repo_id=place.repository,
            repo_type="dataset",
            folder_path=folder,
            commit_message=message,
        )
        return f"{redact(self.endpoint)}/datasets/{place.repository}"

    def _asked(self, place: HubPlace, what: str, call: Callable[..., T], *arguments: object, **named: object) -> T:
        try:
            return call(*arguments, **named)
        except RepositoryNotFoundError as error:
            raise _NoRepositoryError(
                f"{SCHEME}{place.repository} is not there, or not for you. {_TOKEN.format(what)}"
            ) from error
        except OfflineModeIsEnabled as error:
            raise StorageError(
                f"{SCHEME}{place.repository} cannot be reached: HF_HUB_OFFLINE is set. Fix: unset it"
            ) from error
        except (OSError, EntryNotFoundError, httpx2.HTTPError, httpx2.InvalidURL, ValueError) as error:
            status = getattr(getattr(error, "response", None), "status_code", None)
            hint = f" {_TOKEN.format(what)}" if status in (401, 403) else ""
            reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(". ")
            if self._token:
                reason = reason.replace(self._token, "***")
            raise StorageError(
                f"{SCHEME}{place.repository} at {redact(self.endpoint)}: {redact(reason)}.{hint}"
            ) from error


class _NoRepositoryError(StorageError):
    """The repository is not there, or not visible."""


def _at(place: HubPlace) -> dict[str, str]:
    return {"repo_type": "dataset", "revision": place.revision}
