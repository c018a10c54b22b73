"""How two runs differ: what they are, and what came out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from lrag_ray.report.merge import flat
from lrag_ray.store.identity import RunIdentity
from lrag_ray.store.records import Commit
from lrag_ray.store.rollouts import RolloutRun


@dataclass(frozen=True)
class Change:
    """A value that the runs do not share; None where a run does not have it."""

    path: str
    first: Any
    second: Any


@dataclass(frozen=True)
class CellDiff:
    """Rollouts of one backbone, method and horizon that both runs committed."""

    backbone: str
    method: str
    latent_frames: int
    equal: int
    """With equal latents."""
    different: int


@dataclass(frozen=True)
class RunDiff:
    """Two runs side by side."""

    configuration: list[Change]
    """Settings of what both runs have, weights apart."""
    weights: list[Change]
    """Digests of checkpoints, LoRA, text encoders, VAEs and retrieval encoders."""
    only_first: Mapping[str, list[str]]
    """Backbones, methods, durations and prompts that the second run lacks, by kind."""
    only_second: Mapping[str, list[str]]
    cells: list[CellDiff]

    @property
    def equal(self) -> bool:
        """Whether the runs are the same, as far as both have got."""
        same = not (self.configuration or self.weights or any(cell.different for cell in self.cells))
        return same and not any(self.only_first.values()) and not any(self.only_second.values())


def diff_runs(first: RolloutRun, second: RolloutRun) -> RunDiff:
    """Compare two runs by their storage alone; latents by the digests of their commits.

    Rollouts are paired by backbone, method, prompt and sample. Raises StorageError where there is no run.
    """
    one, other = first.require(), second.require()
    changes = [*_changes(_shared(one, other), _shared(other, one))]
    names, other_names = _names(one), _names(other)
    return RunDiff(
        configuration=[change for change in changes if not _is_weight(change.path)],
        weights=[change for change in changes if _is_weight(change.path)],
        only_first={kind: [name for name in names[kind] if name not in other_names[kind]] for kind in names},
        only_second={kind: [name for name in other_names[kind] if name not in names[kind]] for kind in names},
        cells=[*_cells(first.commits(), second.commits())],
    )


def _shared(identity: RunIdentity, other: RunIdentity) -> dict[str, Any]:
    return flat(
        {
            "numerics_version": identity.numerics_version,
            "run": {"seed": identity.seed},
            "samples": identity.samples,
            "video": identity.video,
            "backbones": {
                name: {**backbone.latents, **backbone.pixels}
                for name, backbone in identity.backbones.items()
                if name in other.backbones
            },
            "methods": {
                name: {"method": method.method, "nested": method.nested, "history": method.history, **method.settings}
                for name, method in identity.methods.items()
                if name in other.methods
            },
        }
    )


def _changes(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> Iterator[Change]:
    for path in sorted(ours.keys() | theirs.keys()):
        if ours.get(path) != theirs.get(path):
            yield Change(path, ours.get(path), theirs.get(path))


def _is_weight(path: str) -> bool:
    return path.rpartition(".")[2] in ("sha256", "random_seed", "tokenizer")


def _names(identity: RunIdentity) -> dict[str, list[str]]:
    durations = {horizon.duration_s for backbone in identity.backbones.values() for horizon in backbone.horizons}
    return {
        "backbones": [*identity.backbones],
        "methods": [*identity.methods],
        "durations": [f"{duration:g} s" for duration in sorted(durations)],
        "prompts": [prompt.text for prompt in identity.prompts.values()],
    }


def _cells(ours: list[Commit], theirs: list[Commit]) -> Iterator[CellDiff]:
    others = {(commit.rollout, commit.latent_frames): commit.latents_digest for commit in theirs}
    counts: dict[tuple[str, str, int], list[int]] = {}
    for commit in ours:
        digest = others.get((commit.rollout, commit.latent_frames))
        if digest is not None:
            cell = counts.setdefault((commit.rollout.backbone, commit.rollout.method, commit.latent_frames), [0, 0])
            cell[digest != commit.latents_digest] += 1
    for (backbone, method, latent_frames), (equal, different) in counts.items():
        yield CellDiff(backbone, method, latent_frames, equal, different)
