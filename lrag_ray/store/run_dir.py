"""The run directory, whatever its job: ``run.json`` and what is below one address.

::

    RUN/
      run.json                          what the run is (`RunIdentity`)
      config.json                       the configuration that it was last started with
      lease/<epoch>.json, .beat         the driver at work (`lrag_ray.store.lease`)
      rollouts/                         results of rollouts (`lrag_ray.store.rollouts`)
      failures/                         why attempts failed (`lrag_ray.store.failures`)
      embeddings/<text encoder>/<prompt>.safetensors
      chat/                             answers of language models (`lrag_ray.chat.store`)
      scores/<suite>/…  summary/…
"""

from __future__ import annotations

import secrets
from abc import ABC, abstractmethod
from typing import Any, ClassVar, Generic, Protocol, Self, TypeVar

from lrag_ray.config.schema import StorageSection
from lrag_ray.errors import IdentityError, StorageError
from lrag_ray.store.address import Storage
from lrag_ray.store.identity import FORMAT_VERSION, RunIdentity, differences, grown
from lrag_ray.store.records import why_not
from lrag_ray.store.seal import DamagedError, is_sealed_json

RUN_FILE = "run.json"
CONFIG_FILE = "config.json"
"""The configuration that a run was last started with."""
CHAT = "chat"
"""Folder of answers of language models, relative to the run."""
SUMMARY = "summary"
"""Folder of the report of one run, relative to the run."""
SUMMARY_INDEX = f"{SUMMARY}/files.json"
"""Checksums of what is in it."""
_MOST_DIFFERENCES_SHOWN = 10


class Identity(Protocol):
    """Content of a ``run.json``: what a run is."""

    @property
    def format_version(self) -> int:
        """Of the run directory."""

    @classmethod
    def opened(cls, data: bytes) -> Self:
        """From what was stored; ValueError for anything else."""

    def sealed(self) -> bytes:
        """To store."""


AnyIdentity = TypeVar("AnyIdentity", bound=Identity)


class IdentifiedRun(ABC, Generic[AnyIdentity]):
    """One run of any job at one address. Raises StorageError for an address that cannot be opened."""

    identity: ClassVar[type[Any]]
    """Type of what is in ``run.json``."""
    absent: ClassVar[str]
    """What to say where there is no ``run.json``."""
    unreadable: ClassVar[str]
    """What ``run.json`` is not, where it cannot be understood."""
    advice: ClassVar[str]
    """What to do then."""
    changed: ClassVar[str]
    """What the address holds, where that is another run."""

    def __init__(self, uri: str, options: StorageSection = StorageSection()) -> None:  # noqa: B008 - frozen
        self.storage = Storage(uri, options)

    @property
    def uri(self) -> str:
        """The address as it may be shown (no credentials)."""
        return self.storage.uri

    @abstractmethod
    def differences(self, stored: AnyIdentity, wanted: AnyIdentity) -> list[str]:
        """Changes from `stored` to `wanted` that are not growth, one line each."""

    @abstractmethod
    def grown(self, stored: AnyIdentity, wanted: AnyIdentity) -> AnyIdentity:
        """`stored` with what `wanted` adds to it."""

    def refuse_other_job(self, data: bytes) -> None:
        """StorageError where ``run.json`` with this content is that of another job."""

    def read(self) -> AnyIdentity | None:
        """What the run is, or None where there is no run yet; StorageError if ``run.json`` cannot be understood."""
        try:
            data = self.storage.read_bytes(RUN_FILE)
        except FileNotFoundError:
            return None
        try:
            found: AnyIdentity = self.identity.opened(data)
        except ValueError as error:
            self.refuse_other_job(data)
            reason = why_not(error)
        else:
            if found.format_version == FORMAT_VERSION:
                return found
            reason = f"its format_version is {found.format_version}"
        raise StorageError(
            f"{self.uri}/{RUN_FILE} is not {self.unreadable} of format {FORMAT_VERSION} ({reason}). {self.advice}"
        )

    def require(self) -> AnyIdentity:
        """What the run is; StorageError where there is no run."""
        found = self.read()
        if found is None:
            raise StorageError(f"{self.uri} holds no {RUN_FILE}: {self.absent}")
        return found

    def refuse_another_run(self, wanted: AnyIdentity) -> AnyIdentity | None:
        """What is stored, if anything; IdentityError if that cannot grow to `wanted`. Only reads."""
        stored = self.read()
        if stored is not None:
            self._refuse_changes(stored, wanted)
        return stored

    def ensure(self, wanted: AnyIdentity) -> AnyIdentity:
        """Create the run or grow it to hold `wanted`; IdentityError, and nothing written, if it is another run."""
        stored = self.refuse_another_run(wanted)
        if stored is None:
            if self.storage.create(RUN_FILE, wanted.sealed()):
                return wanted
            stored = self.require()
            self._refuse_changes(stored, wanted)
        union = self.grown(stored, wanted)
        if union != stored or not is_sealed_json(self.storage.read_bytes(RUN_FILE)):
            # A run of a version before seals gets one: such a version would take its new commits for damaged.
            self.storage.write(RUN_FILE, union.sealed())
        return union

    def _refuse_changes(self, stored: AnyIdentity, wanted: AnyIdentity) -> None:
        if changes := self.differences(stored, wanted):
            raise IdentityError(refusal(f"{self.uri} holds {self.changed} with other settings", changes))


class RunDirectory(IdentifiedRun[RunIdentity]):
    """One run with rollouts."""

    identity = RunIdentity
    absent = "there is no run at this address. Give that of the run directory, which is run.uri of its configuration"
    unreadable = "a run"
    advice = (
        "It was written by another version of lrag-ray or damaged: use that version, or make the file again from the "
        "configuration of the run (`lrag-ray run CONFIG --repair`)"
    )
    changed = "a run"

    def differences(self, stored: RunIdentity, wanted: RunIdentity) -> list[str]:
        """Changes that are not growth."""
        if found := differences(stored, wanted):
            return found
        too_many = grown(stored, wanted).too_many_cells()
        return [] if too_many is None else [f"together, {too_many}"]

    def grown(self, stored: RunIdentity, wanted: RunIdentity) -> RunIdentity:
        """With more prompts, samples, methods, backbones or durations."""
        return grown(stored, wanted)

    def refuse_other_job(self, data: bytes) -> None:
        """StorageError where ``run.json`` with this content is that of an encoder training."""
        if b'"train_encoder"' in data[:200]:
            raise StorageError(
                f"{self.uri} holds an encoder training, which has no rollouts. Fix: `lrag-ray status` and "
                "`lrag-ray report` show it; give another address for rollouts"
            )

    def continued(self, wanted: RunIdentity) -> RunIdentity:
        """`wanted` as the run at this address draws its noise; only reads.

        IdentityError if the address holds a run that cannot grow to `wanted`.
        """
        stored = self.refuse_another_run(wanted)
        return wanted if stored is None else wanted.model_copy(update={"noise": stored.noise})

    def exists(self) -> bool:
        """Whether anything is stored at the address."""
        return bool(self.storage.list_files())

    def is_damaged(self) -> bool:
        """Whether ``run.json`` is there and not what was written; what another version wrote is not damaged."""
        data = self.storage.read_many([RUN_FILE]).get(RUN_FILE)
        if data is None:
            return False
        try:
            RunIdentity.opened(data)
        except DamagedError:
            return True
        except ValueError:
            return not is_sealed_json(data)
        return False

    def set_aside(self, path: str, examined: bytes | None = None) -> str:
        """Rename a file that does not count, so that it can be made again; returns its new path.

        Where `examined` is given and the file has other content by now, another driver has made it again: it gets its
        name back, and StorageError is raised.
        """
        target = f"{path}.invalid-{secrets.token_hex(4)}"
        self.storage.move(path, target)
        if examined is not None and (moved := self.storage.read_bytes(target)) != examined:
            self.storage.create(path, moved)
            self.storage.remove(target)
            raise StorageError(
                f"{self.uri}/{path} was made again by another driver meanwhile. Let one driver work at a time; the "
                "same command continues"
            )
        return target


def refusal(headline: str, lines: list[str]) -> str:
    """A message that lists what does not fit the run, and the two ways out."""
    shown = lines[:_MOST_DIFFERENCES_SHOWN]
    more = [f"… and {len(lines) - len(shown)} more"] if len(lines) > len(shown) else []
    listed = "\n".join(f"  {line}" for line in [*shown, *more])
    return (
        f"{headline}:\n{listed}\nTwo ways out: set run.uri to a new address, or put these values back in the "
        "configuration (a changed backbone or method can be added under a new name)"
    )
