"""Whether the stored bytes of a run are those that were written: every file against its checksum.

Commits, part records and records of decoded videos name the checksums of latents, traces and videos. Records, text
features and score files carry a checksum of their own (`lrag_ray.store.seal`), and ``summary/`` has an index. What
attempts left that nothing names has no checksum and is not looked at: nobody reads it.

Threads read side by side, without Ray: the work is one pass over the bytes, SHA-256 lets go of the interpreter's lock,
and one machine's network or disk is busy before its cores are.
"""

from __future__ import annotations

import hashlib
import os
import random
import re
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import Literal, NamedTuple

from lrag_ray.store.dataset_card import CARD_FILE, DatasetCard
from lrag_ray.store.dataset_index import MANIFEST_FILE, IndexManifest
from lrag_ray.store.decoded import RECORD as DECODED_RECORD
from lrag_ray.store.decoded import decoded_folder, record_path
from lrag_ray.store.embeddings import FOLDER as EMBEDDINGS
from lrag_ray.store.embeddings import features_in
from lrag_ray.store.failures import FOLDER as FAILURES
from lrag_ray.store.identity import RunIdentity
from lrag_ray.store.lease import FOLDER as LEASE
from lrag_ray.store.lease import Beat, LeaseRecord
from lrag_ray.store.parquet import damage_of
from lrag_ray.store.parts import latent_tensors, value_bytes
from lrag_ray.store.records import (
    Commit,
    DecodedVideo,
    FailureRecord,
    FileIndex,
    FileRecord,
    LatentPart,
    PartRecord,
    Record,
    why_not,
)
from lrag_ray.store.rollouts import RolloutRun, commit_problem, without_cycle_search
from lrag_ray.store.run_dir import CHAT, CONFIG_FILE, RUN_FILE, SUMMARY, SUMMARY_INDEX
from lrag_ray.store.seal import check_placed, parsed_json
from lrag_ray.thread_pool import thread_pool
from lrag_ray.wan.tensor_file import NotTensorsError

Kind = Literal[
    "run", "configuration", "commit", "latents", "trace", "video", "part record", "text features", "decoded video",
    "decoded record", "scores", "answers", "failure record", "lease", "report", "dataset",
    "state", "checkpoint", "losses", "rollouts",
]  # fmt: skip

_ROLLOUT = re.compile(r"^(rollouts/[^/]+/[^/]+/[^/]+)/(?:commit-\d+\.json|attempt-[^/]+/part-\d+-\d+\.json)$")
_PART_FILE = re.compile(r"^(.*/part-\d+-\d+)\.(?:safetensors|trace\.parquet)$")
_AHEAD = 64
"""Items that are being checked or wait to be, so that a long list is not held as futures."""


class Damage(NamedTuple):
    """A stored file that is not what was written, or is missing."""

    path: str
    """Below the run."""
    kind: Kind
    what: str
    """What is wrong with it."""
    repair: str
    """The command that makes it again."""
    rollout: str = ""
    """Folder of the rollout that it belongs to."""


@dataclass
class Coverage:
    """What a verification has read."""

    files: int = 0
    size_bytes: int = 0
    unnamed: list[str] = field(default_factory=list)
    """Stored files without a checksum anywhere: what attempts left, and what other programs put there."""
    left_out: int = 0
    """Of a sample: rollouts and other files that were not drawn."""


@without_cycle_search()
def find_damage(run: RolloutRun, coverage: Coverage, *, sample: int | None = None) -> Iterator[Damage]:
    """Read a run back and yield what is damaged, while it goes on; `coverage` is filled in.

    With `sample` only that many rollouts or other files, drawn at random, are read; records are read in any case.
    Raises StorageError where there is no run, or where the store fails.
    """
    files = run.storage.list_files()
    yield from _Verification(run, files, coverage).run(sample)


class _Verification:
    """One pass over a run."""

    def __init__(self, run: RolloutRun, files: Mapping[str, int], coverage: Coverage) -> None:
        self._run, self._storage, self._files, self._coverage = run, run.storage, files, coverage
        self._again = "lrag-ray run CONFIG --repair"
        self._named: set[str] = set()
        """Files that something has a checksum of."""

    def run(self, sample: int | None) -> Iterator[Damage]:
        if RUN_FILE not in self._files:
            if not any(path.startswith("rollouts/") for path in self._files):
                self._run.require()
            yield self._damage(RUN_FILE, "run", "is missing")
        else:
            self._run.refuse_other_job(self._storage.read_bytes(RUN_FILE))
        items: list[Callable[[], Sequence[Damage]]] = []
        rollouts: dict[str, list[str]] = {}
        for path in self._files:
            if match := _ROLLOUT.match(path):
                rollouts.setdefault(match[1], []).append(path)
        for folder in sorted(rollouts):
            items.append(partial(self._rollout, folder, rollouts[folder]))
        for path in sorted(self._files):
            if (check := self._check_of(path)) is not None:
                self._named.add(path)
                items.append(partial(check, path))
        total = len(items)
        if sample is not None and sample < total:
            items = random.SystemRandom().sample(items, sample)
        self._coverage.left_out = total - len(items)
        with thread_pool(min(32, 4 * (os.cpu_count() or 1)), "verify") as readers:
            waiting = iter(items)
            futures = [readers.submit(item) for item in islice(waiting, _AHEAD)]
            while futures:
                yield from futures.pop(0).result()
                futures += [readers.submit(item) for item in islice(waiting, 1)]
        if not self._coverage.left_out:
            self._coverage.unnamed = sorted(self._files.keys() - self._named)

    def _check_of(self, path: str) -> Callable[[str], Sequence[Damage]] | None:
        """How a file outside of the rollouts is checked."""
        top, name = path.split("/")[0], path.rpartition("/")[2]
        if path == RUN_FILE:
            return lambda path: self._record(path, "run", RunIdentity)
        if path == CONFIG_FILE:
            return self._configuration
        if top == LEASE and name.endswith((".json", ".beat")):
            model: type[Record] = LeaseRecord if name.endswith(".json") else Beat
            return lambda path: self._record(path, "lease", model)
        if top == FAILURES and name.endswith(".json"):
            return lambda path: self._record(path, "failure record", FailureRecord)
        if top == EMBEDDINGS and name.endswith(".safetensors"):
            return self._features
        if top == "scores" and name.endswith(".parquet"):
            return self._scores
        if (top == "scores" or top == CHAT) and name.endswith(".json"):
            return self._answers
        if path == SUMMARY_INDEX:
            return self._summary
        if path == CARD_FILE:
            return lambda path: self._record(path, "dataset", DatasetCard)
        if path == MANIFEST_FILE:
            return self._index
        return self._decoded if DECODED_RECORD.match(path) else None

    def _damage(self, path: str, kind: Kind, what: str, rollout: str = "", repair: str = "") -> Damage:
        return Damage(path, kind, what, repair or self._again, rollout)

    def _read(self, path: str) -> bytes | None:
        """Content of a file, counted; None where it vanished meanwhile."""
        try:
            data = self._storage.read_bytes(path)
        except FileNotFoundError:
            return None
        self._count(len(data))
        return data

    def _count(self, size: int) -> None:
        # Threads add to them, and a count that is off by one harms nobody.
        self._coverage.files += 1
        self._coverage.size_bytes += size

    def _record(self, path: str, kind: Kind, model: type[Record]) -> Sequence[Damage]:
        data = self._read(path)
        if data is None:
            return ()
        try:
            record = model.opened(data)
        except ValueError as error:
            return [self._damage(path, kind, why_not(error))]
        if isinstance(record, FailureRecord) and record.path != path:
            return [self._damage(path, kind, f"is the record of {record.path}")]
        return ()

    def _configuration(self, path: str) -> Sequence[Damage]:
        data = self._read(path)
        try:
            if data is not None and not {"run", "backbones", "scoring"} <= parsed_json(data).keys():
                raise ValueError("it is not a configuration")
        except (ValueError, RecursionError, AttributeError) as error:
            return [self._damage(path, "configuration", str(error))]
        return ()

    def _features(self, path: str) -> Sequence[Damage]:
        data = self._read(path)
        if data is not None and features_in(data, path) is None:
            return [self._damage(path, "text features", "does not have its checksum")]
        return ()

    def _scores(self, path: str) -> Sequence[Damage]:
        data = self._read(path)
        what = damage_of(data, path, self._files) if data is not None else None
        return [self._damage(path, "scores", what)] if what else ()

    def _answers(self, path: str) -> Sequence[Damage]:
        """Answers of models and people, and what was asked."""
        data = self._read(path)
        try:
            if data is not None:
                check_placed(data, path)
        except (ValueError, RecursionError) as error:
            return [self._damage(path, "answers", str(error))]
        return ()

    def _summary(self, path: str) -> Sequence[Damage]:
        repair = f"lrag-ray report {shlex.quote(self._run.uri)}"
        data = self._read(path)
        try:
            index = FileIndex.opened(data) if data is not None else FileIndex(files=[])
        except ValueError as error:
            return [self._damage(path, "report", why_not(error), repair=repair)]
        found = []
        for file in index.files:
            self._named.add(file.path)
            if file.path.startswith(f"{SUMMARY}/") and (what := self._wrong(file)):
                found.append(self._damage(file.path, "report", what, repair=repair))
        return found

    def _index(self, path: str) -> Sequence[Damage]:
        data = self._read(path)
        try:
            manifest = IndexManifest.opened(data) if data is not None else None
        except ValueError as error:
            return [self._damage(path, "dataset", why_not(error))]
        segments = manifest.segments if manifest is not None else []
        self._named.update(segment.path for segment in segments)
        wrong = {segment.path: what for segment in segments if (what := self._wrong(segment))}
        return [self._damage(path, "dataset", what) for path, what in wrong.items()]

    def _wrong(self, file: FileRecord) -> str | None:
        """What is wrong with a file that something names."""
        # Not by the listing, which may be older than what a driver at work has committed since.
        try:
            size, sha256 = self._storage.digest(file.path)
        except FileNotFoundError:
            return "is missing"
        self._count(size)
        if size != file.size_bytes:
            return f"has {size} bytes instead of {file.size_bytes}"
        return None if sha256 == file.sha256 else "does not have the recorded checksum"

    def _decoded(self, path: str) -> Sequence[Damage]:
        folder = path.rpartition("/")[0]
        data = self._read(path)
        if data is None:
            return ()
        try:
            record = DecodedVideo.opened(data)
        except ValueError as error:
            return [self._damage(path, "decoded record", why_not(error), folder)]
        if path != record_path(record.settings, record.rollout, record.latent_frames):
            place = f"{decoded_folder(record.settings, record.rollout)}, {record.latent_frames} latent frames"
            return [self._damage(path, "decoded record", f"belongs to {place}", folder)]
        if not record.video.path.startswith(f"{folder}/attempt-"):
            return [
                self._damage(path, "decoded record", f"names {record.video.path}, a file of another rollout", folder)
            ]
        self._named.add(record.video.path)
        what = self._wrong(record.video)
        return [self._damage(record.video.path, "decoded video", what, folder)] if what else ()

    # Rollouts

    def _rollout(self, folder: str, records: Sequence[str]) -> Sequence[Damage]:
        """Commits and part records of a rollout, and what they name; each file is read once."""
        self._named.update(records)
        found: list[Damage] = []
        commits: list[tuple[str, Commit]] = []
        parts: list[PartRecord] = []
        for path in sorted(records):
            data = self._read(path)
            if data is None:
                continue
            is_commit = "/attempt-" not in path
            try:
                if is_commit:
                    commit = Commit.opened(data)
                    if what := commit_problem(path, commit):
                        raise ValueError(what)
                    commits.append((path, commit))
                else:
                    part = PartRecord.opened(data)
                    if part.latents.path != f"{path.removesuffix('.json')}.safetensors":
                        raise ValueError(f"is the record of {part.latents.path}")
                    parts.append(part)
            except ValueError as error:
                kind: Kind = "commit" if is_commit else "part record"
                found.append(self._damage(path, kind, why_not(error), folder))
        latents: dict[str, LatentPart] = {}
        others: dict[str, tuple[Kind, FileRecord]] = {}
        committed: set[str] = set()
        for _, commit in commits:
            latents |= {each.path: each for each in commit.latent_parts}
            others |= {each.path: ("trace", each) for each in commit.trace_parts}
            if commit.video is not None:
                others[commit.video.path] = ("video", commit.video)
        committed.update(latents, others)
        for part in parts:
            latents.setdefault(part.latents.path, part.latents)
            others.setdefault(part.trace.path, ("trace", part.trace))
        for path in latents.keys() & committed:
            record = f"{path.removesuffix('.safetensors')}.json"
            if _PART_FILE.match(path) and record not in self._files:
                found.append(self._damage(record, "part record", "is missing", folder))
        self._named.update(latents, others)
        wrong = {path: what for path, (_, file) in others.items() if (what := self._wrong(file))}
        found += [self._damage(path, others[path][0], what, folder) for path, what in wrong.items()]
        found += self._latents(folder, latents, commits)
        # What no commit names is a checkpoint: the next start cuts it off and makes it again by itself.
        return [
            damage
            if damage.path in committed or damage.kind in ("commit", "part record")
            else damage._replace(repair="lrag-ray run CONFIG")
            for damage in found
        ]

    def _latents(
        self, folder: str, latents: Mapping[str, LatentPart], commits: Sequence[tuple[str, Commit]]
    ) -> Iterator[Damage]:
        """Latent parts by their checksums, then the digests of commits whose parts are whole by their values."""
        digests = {path: (hashlib.sha256(), [part.path for part in c.latent_parts]) for path, c in commits}
        for latent in sorted(latents.values(), key=lambda part: (part.first_frame, part.path)):
            what, data = None, self._read(latent.path)
            if data is None:
                what = "is missing"
            elif len(data) != latent.size_bytes:
                what = f"has {len(data)} bytes instead of {latent.size_bytes}"
            elif hashlib.sha256(data).hexdigest() != latent.sha256:
                what = "does not have the recorded checksum"
            users = [digest for digest, named in digests.values() if latent.path in named]
            if what is None and data is not None and users:
                try:
                    values = value_bytes(latent_tensors(data, latent.frames)["latents"])
                except NotTensorsError as error:
                    what = f"is not a latent part: {error}"
                else:
                    for digest in users:
                        digest.update(values)
            if what is not None:
                yield self._damage(latent.path, "latents", what, folder)
                digests = {path: pair for path, pair in digests.items() if latent.path not in pair[1]}
        for path, commit in commits:
            if path in digests and digests[path][0].hexdigest() != commit.latents_digest:
                yield self._damage(path, "commit", "its digest is not that of its latents", folder)
