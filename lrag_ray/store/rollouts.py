"""Rollouts of a run: their commits, parts and inventory.

::

    rollouts/<backbone>/<method>/<prompt_id>-<sample>/
        attempt-<id>/                 parts and videos that one attempt wrote
        commit-<latent_frames>.json   one per reached horizon, created once

A commit counts if it can be read, is where it says it belongs, and every file it names has the recorded size. A
commit that does not count keeps its name occupied (commits are created once), so before the horizon is made again it is
renamed to ``commit-<latent_frames>.json.invalid-<random>``, where it stays for people to look at.
"""

from __future__ import annotations

import gc
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from lrag_ray.errors import IdentityError, StorageError
from lrag_ray.store.identity import RunIdentity
from lrag_ray.store.records import Commit, FileRecord, PartRecord, RolloutId, why_not
from lrag_ray.store.run_dir import RunDirectory, refusal

_COMMIT = re.compile(r"^(rollouts/[^/]+/[^/]+/[^/]+)/commit-(\d+)\.json$")
_PART = re.compile(r"^(rollouts/[^/]+/[^/]+/[^/]+)/attempt-[^/]+/part-(\d+)-(\d+)\.json$")
METHOD_DEPTH = 2
"""Levels between ``rollouts`` and the folders of methods."""


@contextmanager
def without_cycle_search() -> Iterator[None]:
    """Pause Python's search for cycles: records hold none, and among a hundred thousand it takes most of the time."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


@dataclass(frozen=True)
class CommitState:
    """One commit record as found."""

    path: str
    commit: Commit | None
    """The record, or None where it cannot be read."""
    problem: str | None
    """Why it does not count, or None."""
    data: bytes | None = None
    """Content of the file, where it does not count."""


@dataclass(frozen=True)
class Inventory:
    """What one recursive listing of the rollouts showed."""

    files: Mapping[str, int]
    """Sizes by path."""
    commits: Mapping[str, Mapping[int, CommitState]]
    """By rollout folder and horizon in latent frames."""
    part_records: Mapping[str, list[str]]
    """Paths of part records by rollout folder."""

    def valid_commits(self, rollout: RolloutId) -> dict[int, Commit]:
        """Commits of `rollout` that count, by horizon."""
        states = self.commits.get(rollout.path, {})
        return {frames: s.commit for frames, s in sorted(states.items()) if s.commit is not None and s.problem is None}

    def covering(self, rollout: RolloutId, latent_frames: int, rollout_key: str) -> Commit | None:
        """The commit that makes the cell done: the shortest with this key for the horizon or a longer one."""
        for frames, commit in self.valid_commits(rollout).items():
            if frames >= latent_frames and commit.rollout_key == rollout_key:
                return commit
        return None

    def covered(self, rollout: RolloutId, rollout_keys: Mapping[int, str]) -> set[int]:
        """Horizons, of those with a key in `rollout_keys`, that have a commit with this key or are below one."""
        commits = self.valid_commits(rollout)
        return {
            horizon
            for horizon, key in rollout_keys.items()
            if any(frames >= horizon and commit.rollout_key == key for frames, commit in commits.items())
        }

    def problems(self) -> list[CommitState]:
        """Commits that do not count."""
        return [state for states in self.commits.values() for state in states.values() if state.problem is not None]

    def frames_stored(self, rollout: RolloutId) -> int:
        """Latent frames up to which parts exist, by their names alone (unread, so an upper bound)."""
        ends = (int(match[3]) for path in self.part_records.get(rollout.path, ()) if (match := _PART.match(path)))
        return max(ends, default=0)


class RolloutRun(RunDirectory):
    """A run whose results are rollouts."""

    @without_cycle_search()
    def inventory(self, rollout: RolloutId | None = None) -> Inventory:
        """List the run (or one rollout) and read its commits; what does not count is looked at twice.

        A long listing is not a snapshot: it may show a commit that was made while it continued, and not its files.
        """
        files, commits = self._look(rollout.path) if rollout else self._look("rollouts", METHOD_DEPTH)
        for folder in [folder for folder, states in commits.items() if any(s.problem for s in states.values())]:
            files_again, commits_again = self._look(folder, again=True)
            files.update(files_again)
            commits[folder] = commits_again.get(folder, {})
        parts: dict[str, list[str]] = {}
        for path in sorted(path for path in files if "/part-" in path):
            if match := _PART.match(path):
                parts.setdefault(match[1], []).append(path)
        return Inventory(files, commits, parts)

    def _look(
        self, prefix: str, depth: int = 0, *, again: bool = False
    ) -> tuple[dict[str, int], dict[str, dict[int, CommitState]]]:
        files = self.storage.list_files_in_shares(prefix, depth)
        commit_paths = {path: match for path in files if (match := _COMMIT.match(path))}
        commits: dict[str, dict[int, CommitState]] = {}
        for path, data in self.storage.read_many(list(commit_paths)).items():
            match = commit_paths[path]
            if again and len(data) != files[path]:
                # No damage of the commit, which is never written again: it would be set aside for nothing.
                raise StorageError(
                    f"cannot read {self.uri}/{path}: the store gave {len(data)} bytes of {files[path]}, twice. What "
                    "is between here and the store truncates its answers; the same command continues once that is fixed"
                )
            state = _examined(path, data, files)
            if again and state.problem is not None and state.commit is not None:
                # A listing may lag: a commit would be set aside, and all behind it made again, for nothing.
                files |= self.storage.sizes([file.path for file in state.commit.files if file.path not in files])
                state = _examined(path, data, files)
            commits.setdefault(match[1], {})[int(match[2])] = state
        return files, commits

    def commits(self) -> list[Commit]:
        """All commits that count, ordered by rollout and horizon."""
        inventory = self.inventory()
        return [
            state.commit
            for folder in sorted(inventory.commits)
            for _, state in sorted(inventory.commits[folder].items())
            if state.commit is not None and state.problem is None
        ]

    def own_inventory(self, identity: RunIdentity) -> Inventory:
        """The `inventory` of a run whose record is `identity`; IdentityError if its commits have another."""
        inventory = self.inventory()
        if foreign := self._foreign_commits(identity, inventory):
            raise IdentityError(
                f"{self.uri}/run.json is not the record of these results: {len(foreign)} commits were made with other "
                f"settings, among them {foreign[0]}. Fix: put their own run.json back"
            )
        return inventory

    def refuse_foreign_commits(self, identity: RunIdentity, inventory: Inventory) -> None:
        """IdentityError if a commit was made with other settings than the run's."""
        if foreign := self._foreign_commits(identity, inventory):
            raise IdentityError(refusal(f"{self.uri} holds commits that were made with other settings", foreign))

    def _foreign_commits(self, identity: RunIdentity, inventory: Inventory) -> list[str]:
        return [
            f"{state.path}: rollout key {state.commit.rollout_key[:12]}…, expected {key[:12]}…"
            for states in inventory.commits.values()
            for state in states.values()
            if state.commit is not None
            and identity.knows(state.commit.rollout)
            and (key := identity.rollout_key(state.commit.rollout, state.commit.latent_frames))
            != state.commit.rollout_key
        ]

    def part_records(self, inventory: Inventory, rollout: RolloutId) -> tuple[list[PartRecord], list[str]]:
        """Part records of `rollout`, and what is wrong with those that cannot be read."""
        records, broken = [], []
        for path, data in self.storage.read_many(inventory.part_records.get(rollout.path, [])).items():
            try:
                record = PartRecord.opened(data)
            except ValueError:
                broken.append(f"{path} is not a part record")
                continue
            if _named_elsewhere(rollout.path, [record.latents, record.trace]):
                broken.append(f"{path} names files of another rollout")
            else:
                records.append(record)
        return records, broken

    def commit(self, record: Commit) -> bool:
        """Create the commit; False if another attempt was first (its commit stands)."""
        return self.storage.create(f"{record.rollout.path}/commit-{record.latent_frames}.json", record.sealed())


def _examined(path: str, data: bytes, files: Mapping[str, int]) -> CommitState:
    try:
        commit = Commit.opened(data)
    except ValueError as error:
        return CommitState(path, None, f"not a commit record: {why_not(error)}", data)
    problem = commit_problem(path, commit) or next(_file_problems(commit, files), None)
    return CommitState(path, commit, problem, data if problem else None)


def commit_problem(path: str, commit: Commit) -> str | None:
    """Why the commit at `path` does not count, whatever its files are; or None."""
    folder = commit.rollout.path
    if path != f"{folder}/commit-{commit.latent_frames}.json":
        return f"belongs to {folder}, {commit.latent_frames} latent frames"
    if elsewhere := _named_elsewhere(folder, commit.files):
        return f"names {elsewhere[0]}, a file of another rollout"
    end = 0
    for part in commit.latent_parts:
        if part.first_frame != end:
            return f"latent parts do not follow one another at frame {end}"
        end = part.first_frame + part.frames
    return f"latent parts end at frame {end}" if end != commit.latent_frames else None


def _file_problems(commit: Commit, files: Mapping[str, int]) -> Iterator[str]:
    for file in commit.files:
        size = files.get(file.path)
        if size is None:
            yield f"names {file.path}, which is missing"
        elif size != file.size_bytes:
            yield f"names {file.path}, which has {size} bytes instead of {file.size_bytes}"


def _named_elsewhere(folder: str, files: Sequence[FileRecord]) -> list[str]:
    return [file.path for file in files if not file.path.startswith(f"{folder}/attempt-")]
