"""Several runs as one: their union, refused where equal names mean different things."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from lrag_ray.context.registry import by_family
from lrag_ray.errors import IdentityError
from lrag_ray.store.identity import BackboneIdentity, RunIdentity, grown
from lrag_ray.store.records import RolloutId
from lrag_ray.store.rollouts import RolloutRun

_MOST_SHOWN = 10


class Names(NamedTuple):
    """What the report calls the methods and backbones of one run, where it renames them."""

    methods: Mapping[str, str]
    backbones: Mapping[str, str]

    def rollout(self, rollout: RolloutId) -> RolloutId:
        """The rollout under the report's names."""
        method = self.methods.get(rollout.method, rollout.method)
        backbone = self.backbones.get(rollout.backbone, rollout.backbone)
        return rollout.model_copy(update={"method": method, "backbone": backbone})

    def identity(self, identity: RunIdentity) -> RunIdentity:
        """The run under the report's names."""
        methods = {self.methods.get(name, name): method for name, method in identity.methods.items()}
        backbones = {self.backbones.get(name, name): backbone for name, backbone in identity.backbones.items()}
        return identity.model_copy(update={"methods": methods, "backbones": backbones})


class MergedIdentity(NamedTuple):
    """What several runs are together."""

    identity: RunIdentity
    methods: Mapping[str, Sequence[str]]
    """Methods that any of the runs has for a backbone: those that are compared there."""
    names: Sequence[Names]
    """One per run."""
    notes: Sequence[str]
    """In what labelled runs differ besides their methods."""


def merged_identity(run_dirs: Sequence[RolloutRun], labels: Sequence[str | None]) -> MergedIdentity:
    """The union of the runs' backbones, methods, prompts and durations; methods of a family stand together.

    `labels` has one per run, or None. A method of a labelled run whose name another run has too is called
    ``method (label)``. So is a backbone whose durations are other numbers of latent frames there.

    Raises:
        StorageError: an address holds no run.
        IdentityError: runs without labels differ in what must be equal for their videos to stand in one table.
    """
    stored = [run_dir.require() for run_dir in run_dirs]
    names = [_names(i, stored, label) for i, label in enumerate(labels)]
    identities = [each.identity(identity) for each, identity in zip(names, stored, strict=True)]
    union = identities[0]
    notes = []
    for i, other in enumerate(identities[1:], start=1):
        for j in range(i):
            differing = _differing(identities[j], other)
            if differing and labels[i] is None and labels[j] is None:
                raise _refusal(run_dirs[j].uri, run_dirs[i].uri, differing)
            if differing:
                one, two = labels[j] or run_dirs[j].uri, labels[i] or run_dirs[i].uri
                notes.append(f"{one} and {two} differ in {_in_short(differing)}.")
        union = grown(union, other)
    ordered = sorted(union.methods.items(), key=lambda item: by_family(item[1].method))
    compared: dict[str, set[str]] = {}
    for identity in identities:
        for backbone in identity.backbones:
            compared.setdefault(backbone, set()).update(identity.methods)
    return MergedIdentity(
        union.model_copy(update={"methods": dict(ordered)}),
        {backbone: [name for name, _ in ordered if name in names] for backbone, names in compared.items()},
        names,
        notes,
    )


def _names(index: int, identities: Sequence[RunIdentity], label: str | None) -> Names:
    if label is None:
        return Names({}, {})
    others = [identity for i, identity in enumerate(identities) if i != index]
    own = identities[index]
    shared = [name for name in own.methods if any(name in other.methods for other in others)]
    apart = [
        name
        for name, backbone in own.backbones.items()
        if any(name in other.backbones and not _same_frames(backbone, other.backbones[name]) for other in others)
    ]
    return Names({name: f"{name} ({label})" for name in shared}, {name: f"{name} ({label})" for name in apart})


def _same_frames(one: BackboneIdentity, other: BackboneIdentity) -> bool:
    """Whether blocks and common durations have as many latent frames in both."""
    frames = {horizon.duration_s: horizon.latent_frames for horizon in one.horizons}
    return one.frames_per_block == other.frames_per_block and all(
        frames.get(horizon.duration_s, horizon.latent_frames) == horizon.latent_frames for horizon in other.horizons
    )


def _differing(one: RunIdentity, other: RunIdentity) -> dict[str, tuple[Any, Any]]:
    """Values of both by key path, where they must be equal and are not."""
    ours, theirs = _comparable(one, other), _comparable(other, one)
    return {
        path: (ours.get(path), theirs.get(path))
        for path in sorted(ours.keys() | theirs.keys())
        if ours.get(path) != theirs.get(path)
    }


def _in_short(differing: Mapping[str, tuple[Any, Any]]) -> str:
    paths = list(differing)
    more = f" and {len(paths) - _MOST_SHOWN} more" if len(paths) > _MOST_SHOWN else ""
    return f"{', '.join(paths[:_MOST_SHOWN])}{more}"


def _refusal(one: str, other: str, differing: Mapping[str, tuple[Any, Any]]) -> IdentityError:
    lines = [f"  {path}: {ours!r} in the first, {theirs!r} in the second" for path, (ours, theirs) in differing.items()]
    more = [f"  … and {len(lines) - _MOST_SHOWN} more"] if len(lines) > _MOST_SHOWN else []
    listed = "\n".join([*lines[:_MOST_SHOWN], *more])
    return IdentityError(
        f"{one} and {other} cannot stand in one table, because equal names mean different things:\n{listed}\n"
        f"Fix: give each run a label, which its methods then carry: `A={one} B={other}`"
    )


def _comparable(identity: RunIdentity, other: RunIdentity) -> dict[str, Any]:
    """What must be equal in both, by key path. Prompts may differ: they are paired by line and text."""
    return flat(
        {
            "numerics_version": identity.numerics_version,
            "run": {"seed": identity.seed, "noise": identity.noise},
            "video": identity.video,
            "backbones": {
                name: {**backbone.latents, **backbone.pixels}
                for name, backbone in identity.backbones.items()
                if name in other.backbones
            },
            "methods": {name: method.compared() for name, method in identity.methods.items() if name in other.methods},
        }
    )


def flat(value: Any, path: str = "") -> dict[str, Any]:
    """Values of nested mappings by dotted key path."""
    if isinstance(value, Mapping):
        found: dict[str, Any] = {}
        for key, inner in value.items():
            found |= flat(inner, f"{path}.{key}" if path else str(key))
        return found
    return {path: value}
