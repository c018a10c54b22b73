"""What a rollout continues from: the parts that earlier attempts stored, of one row on one kind of device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from lrag_ray.store.parts import PartChain, read_chain
from lrag_ray.store.records import PartRecord, RolloutId
from lrag_ray.store.rollouts import Inventory, RolloutRun
from lrag_ray.wan.devices import same_kind


class Continued(NamedTuple):
    """What is taken, and why not more."""

    chain: PartChain
    notes: list[str]


@dataclass(frozen=True)
class BegunRollout:
    """The stored parts of a rollout."""

    run: RolloutRun
    rollout: RolloutId
    rollout_key: str
    frames_per_block: int
    records: Sequence[PartRecord]
    """Those with its key."""
    broken: Sequence[str]
    """What is wrong with others, one line each."""

    @classmethod
    def look(
        cls, run: RolloutRun, inventory: Inventory, rollout: RolloutId, rollout_key: str, frames_per_block: int
    ) -> BegunRollout:
        """Read the records of its parts."""
        records, broken = run.part_records(inventory, rollout)
        records = [record for record in records if record.rollout_key == rollout_key]
        return cls(run, rollout, rollout_key, frames_per_block, records, broken)

    def best_of(self, kinds: Sequence[str]) -> int | None:
        """Which of these kinds of device has come furthest; None where none has begun."""
        ends = [
            max((record.end_frame for record in self.records if same_kind(record.device_kind, kind)), default=0)
            for kind in kinds
        ]
        return ends.index(max(ends)) if any(ends) else None

    def chain(self, device_kind: str, end_frame: int, *, on_any: bool) -> Continued:
        """The parts to continue from to `end_frame`: those of `device_kind`, or of all kinds with `on_any`."""
        own = [record for record in self.records if on_any or same_kind(record.device_kind, device_kind)]
        chain, notes = self._read(own), []
        foreign = [record for record in self.records if record not in own]
        if chain.end_frame < end_frame and max((record.end_frame for record in foreign), default=0) > chain.end_frame:
            whole = self._read(self.records)
            if whole.end_frame >= end_frame:
                # Nothing is left to generate, so no rollout is continued on another kind of device.
                chain = whole
            else:
                kinds = ", ".join(sorted({record.device_kind for record in foreign}))
                notes.append(
                    f"{self.rollout.path}: parts made on {kinds} are left unused, this is {device_kind} "
                    "(resume.on: any continues from them)"
                )
        notes += [f"{line}: cut back to frame {chain.end_frame}" for line in [*self.broken, *chain.broken]]
        return Continued(chain, notes)

    def _read(self, records: Sequence[PartRecord]) -> PartChain:
        storage, n = self.run.storage, self.frames_per_block
        return read_chain(storage, records, rollout_key=self.rollout_key, frames_per_block=n)
