"""The run directory, whatever its job: ``run.json`` and what is below one address.

::

    RUN/
      run.json                          what the run is (`RunIdentity`)
      config.json                       the configuration that it was last started with
      lease/<epoch>.json, .beat         the driver at work (`lrag_ray.store.lease`)
      rollouts/                         results of rollouts (`lrag_ray.store.rollouts`)
      failures/                         why attempts failed (`lrag_ray.store.failures`)
      embeddings/<text encoder>/<prompt>.safetensors
      scores/<suite>/…  summary/…
"""

from __future__ import annotations

import secrets

from pydantic import ValidationError

from lrag_ray.config.schema import StorageSection
from lrag_ray.errors import IdentityError, StorageError
from lrag_ray.store.address import Storage
from lrag_ray.store.identity import FORMAT_VERSION, RunIdentity, differences, grown

RUN_FILE = "run.json"
_MOST_DIFFERENCES_SHOWN = 10


class RunDirectory:
    """One run at one address. Raises StorageError for an address that cannot be opened."""

    def __init__(self, uri: str, options: StorageSection = StorageSection()) -> None:  # noqa: B008 - frozen
        self.storage = Storage(uri, options)

    @property
    def uri(self) -> str:
        """The address as it may be shown (no credentials)."""
        return self.storage.uri

    def read(self) -> RunIdentity | None:
        """What the run is, or None where there is no run yet; StorageError if ``run.json`` cannot be understood."""
        try:
            data = self.storage.read_bytes(RUN_FILE)
        except FileNotFoundError:
            return None
        try:
            identity = RunIdentity.model_validate_json(data)
        except ValidationError as error:
            first = error.errors()[0]
            reason = f"{first['msg']} at {'.'.join(map(str, first['loc'])) or 'its start'}"
        else:
            if identity.format_version == FORMAT_VERSION:
                return identity
            reason = f"its format_version is {identity.format_version}"
        raise StorageError(
            f"{self.uri}/{RUN_FILE} is not a run of format {FORMAT_VERSION} ({reason}). It was written by another "
            "version of lrag-ray or damaged: use that version, or set run.uri to a new address"
        )

    def require(self) -> RunIdentity:
        """What the run is; StorageError where there is no run."""
        identity = self.read()
        if identity is None:
            raise StorageError(
                f"{self.uri} holds no {RUN_FILE}: there is no run at this address. Give that of the run directory, "
                "which is run.uri of its configuration"
            )
        return identity

    def ensure(self, wanted: RunIdentity) -> RunIdentity:
        """Create the run or grow it to hold `wanted`; IdentityError, and nothing written, if it is another run."""
        stored = self.read()
        if stored is None:
            if self.storage.create(RUN_FILE, _json(wanted)):
                return wanted
            stored = self.require()
        self._refuse_changes(stored, wanted)
        union = grown(stored, wanted)
        if union != stored:
            self.storage.write(RUN_FILE, _json(union))
        return union

    def continued(self, wanted: RunIdentity) -> RunIdentity:
        """`wanted` as the run at this address draws its noise; only reads.

        IdentityError if the address holds a run that cannot grow to `wanted`.
        """
        stored = self.read()
        if stored is None:
            return wanted
        self._refuse_changes(stored, wanted)
        return wanted.model_copy(update={"noise": stored.noise})

    def _refuse_changes(self, stored: RunIdentity, wanted: RunIdentity) -> None:
        changes = differences(stored, wanted)
        if changes:
            raise IdentityError(refusal(f"{self.uri} holds a run with other settings", changes))

    def set_aside(self, path: str) -> str:
        """Rename a file that does not count, so that it can be made again; returns its new path."""
        target = f"{path}.invalid-{secrets.token_hex(4)}"
        self.storage.move(path, target)
        return target


def _json(identity: RunIdentity) -> bytes:
    return identity.model_dump_json(indent=1).encode()


def refusal(headline: str, lines: list[str]) -> str:
    """A message that lists what does not fit the run, and the two ways out."""
    shown = lines[:_MOST_DIFFERENCES_SHOWN]
    more = [f"… and {len(lines) - len(shown)} more"] if len(lines) > len(shown) else []
    listed = "\n".join(f"  {line}" for line in [*shown, *more])
    return (
        f"{headline}:\n{listed}\nTwo ways out: set run.uri to a new address, or put these values back in the "
        "configuration (a changed backbone or method can be added under a new name)"
    )
