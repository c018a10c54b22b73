"""Several runs as one: their union, refused where equal names mean different things."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from lrag_ray.context.registry import by_family
from lrag_ray.errors import IdentityError
from lrag_ray.store.identity import RunIdentity, grown
from lrag_ray.store.rollouts import RolloutRun

_MOST_SHOWN = 10


class MergedIdentity(NamedTuple):
    """What several runs are together."""

    identity: RunIdentity
    methods: Mapping[str, Sequence[str]]
    """Methods that any of the runs has for a backbone: those that are compared there."""


def merged_identity(run_dirs: Sequence[RolloutRun]) -> MergedIdentity:
    """The union of the runs' backbones, methods, prompts and durations; methods of a family stand together.

    Raises:
        StorageError: an address holds no run.
        IdentityError: runs differ in what must be equal for their videos to stand in one table.
    """
    identities = [run_dir.require() for run_dir in run_dirs]
    union = identities[0]
    for i, other in enumerate(identities[1:], start=1):
        for before, earlier in zip(run_dirs[:i], identities[:i], strict=True):
            _refuse_conflicts(before.uri, earlier, run_dirs[i].uri, other)
        union = grown(union, other)
    ordered = sorted(union.methods.items(), key=lambda item: by_family(item[1].method))
    compared: dict[str, set[str]] = {}
    for identity in identities:
        for backbone in identity.backbones:
            compared.setdefault(backbone, set()).update(identity.methods)
    return MergedIdentity(
        union.model_copy(update={"methods": dict(ordered)}),
        {backbone: [name for name, _ in ordered if name in names] for backbone, names in compared.items()},
    )


def _refuse_conflicts(one_uri: str, one: RunIdentity, other_uri: str, other: RunIdentity) -> None:
    ours, theirs = _comparable(one, other), _comparable(other, one)
    differing = [path for path in sorted(ours.keys() | theirs.keys()) if ours.get(path) != theirs.get(path)]
    if differing:
        lines = [f"  {path}: {ours.get(path)!r} in the first, {theirs.get(path)!r} in the second" for path in differing]
        more = [f"  … and {len(lines) - _MOST_SHOWN} more"] if len(lines) > _MOST_SHOWN else []
        listed = "\n".join([*lines[:_MOST_SHOWN], *more])
        raise IdentityError(
            f"{one_uri} and {other_uri} cannot stand in one table, because equal names mean different things:\n"
            f"{listed}\nReport them one by one, or give what differs a name of its own and run it again"
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
            "methods": {
                name: method.model_dump() for name, method in identity.methods.items() if name in other.methods
            },
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
