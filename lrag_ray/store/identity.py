"""What a run is, as written to ``run.json``, and the key of everything that determines a rollout's latents."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping

from pydantic import Field, model_validator

from lrag_ray.config.schema import MOST_CELLS
from lrag_ray.rollout.noise import NoiseVersion
from lrag_ray.store.records import Count, JsonValue, Record, RolloutId

FORMAT_VERSION = 1
"""Layout of the run directory; raised when an older program could misread a newer run."""

_FORMER_ALPHA = 256.0
"""Default of lora.alpha until it came from the file."""


class Horizon(Record):
    """A duration of the configuration in latent frames of one backbone."""

    duration_s: float = Field(gt=0, le=1e9)
    latent_frames: int = Field(ge=1, lt=2**31)


class BackboneIdentity(Record):
    """A generator, by what determines its results."""

    latents: dict[str, JsonValue]
    """What determines the latents: sizes, weights' digests, sampler, latent shape, dtype, attention, text encoder."""
    pixels: dict[str, JsonValue]
    """What determines the pixels besides: the VAE."""
    label: str
    """Shown beside the name; free to change."""
    frames_per_block: int = Field(ge=1, lt=2**31)
    horizons: list[Horizon] = Field(min_length=1)
    """By duration; grows."""


class MethodIdentity(Record):
    """A context policy with resolved settings; files are named by their digest."""

    method: str
    settings: dict[str, JsonValue]
    nested: bool
    """Shorter durations are prefixes of the longest rollout; otherwise each horizon is a rollout of its own."""
    history: str = Field(default="exact", exclude_if=lambda kind: kind == "exact")
    """How the history is stored (`retrieval.payload`). Absent where it is exact, as it always was before there was a
    choice."""
    summary: str = Field(default="", exclude_if=lambda text: not text)
    """What a plug-in says of itself, for people (`context.policy.summary_of`); free to change. Absent for methods that
    come with the package, which readers know, so that earlier versions can read the run."""

    def compared(self) -> dict[str, JsonValue]:
        """All that two runs must agree on."""
        return self.model_dump(exclude={"summary"})


class PromptIdentity(Record):
    """One prompt of the run."""

    index: Count
    """Line number in the prompt file, or position in a table, from 0."""
    text: str
    columns: dict[str, JsonValue] = Field(default_factory=dict, exclude_if=lambda columns: not columns)
    """The other columns of the prompt file, such as an id or references; free to change. Absent where there are none,
    so that earlier versions can read the run."""
    original: str = Field(default="", exclude_if=lambda text: not text)
    """The text before it was refined. Absent where it was not."""
    refined_by: str = Field(default="", exclude_if=lambda text: not text)
    """Model and template that refined it; for people."""


class RunIdentity(Record):
    """Content of ``run.json``. Grows by prompts, samples, methods, backbones and durations; else never changes."""

    format_version: int = FORMAT_VERSION
    numerics_version: int
    seed: int = Field(ge=-(2**63), lt=2**63)
    noise: NoiseVersion = Field(default=1, exclude_if=lambda version: version == 1)
    """How noise is drawn (`rollout.noise`). A run keeps the version that it was begun with; absent in runs that were
    begun before there were two."""
    samples: int = Field(ge=1, lt=2**31)
    video: dict[str, JsonValue]
    backbones: dict[str, BackboneIdentity]
    methods: dict[str, MethodIdentity]
    prompts: dict[str, PromptIdentity]
    """By prompt_id, in file order."""
    created_at: str
    versions: dict[str, str] = Field(default_factory=dict)
    """Program versions that created the run; for people."""

    @model_validator(mode="after")
    def _bounded(self) -> RunIdentity:
        if (problem := self.too_many_cells()) is not None:
            raise ValueError(problem)
        return self

    def too_many_cells(self) -> str | None:
        """What is wrong, where there are more than MOST_CELLS."""
        cells = len(self.methods) * sum(len(backbone.horizons) for backbone in self.backbones.values())
        if cells <= MOST_CELLS:
            return None
        return f"methods times backbones times durations come to {cells:,}; a run has at most {MOST_CELLS:,}"

    def rollout_key(self, rollout: RolloutId, latent_frames: int) -> str:
        """Hash of all that determines the latents of `rollout` up to `latent_frames`; KeyError if not in the run.

        Names of backbones and methods, line numbers, engine, storage and display settings are not in it; the horizon
        is only where the method is not nested.
        """
        method = self.methods[rollout.method]
        later: dict[str, JsonValue] = {} if self.noise == 1 else {"noise": self.noise}
        if method.history != "exact":
            later["history"] = method.history
        return canonical_digest(
            later
            | {
                "numerics_version": self.numerics_version,
                "seed": self.seed,
                "backbone": self.backbones[rollout.backbone].latents,
                "method": method.method,
                "settings": method.settings,
                "prompt": self.prompts[rollout.prompt_id].text,
                "sample": rollout.sample,
                "latent_frames": None if method.nested else latent_frames,
            }
        )

    def rollout_keys(self, rollout: RolloutId) -> dict[int, str]:
        """Key of `rollout` by horizon of the run, in latent frames, ascending."""
        horizons = sorted({horizon.latent_frames for horizon in self.backbones[rollout.backbone].horizons})
        if self.methods[rollout.method].nested:
            # One key for all of them; it costs a hash, and there are many rollouts.
            return dict.fromkeys(horizons, self.rollout_key(rollout, horizons[-1]))
        return {latent_frames: self.rollout_key(rollout, latent_frames) for latent_frames in horizons}

    def rollouts(self) -> Iterator[RolloutId]:
        """All rollouts of the run, prompt-major, one by one: a run directory may claim any number of them."""
        for prompt_id in self.prompts:
            for sample in range(self.samples):
                for backbone in self.backbones:
                    for method in self.methods:
                        yield RolloutId(backbone=backbone, method=method, prompt_id=prompt_id, sample=sample)

    def rollouts_at(self, folders: Iterable[str]) -> list[RolloutId]:
        """The rollouts of the run among `folders` (``rollouts/…``), prompt-major."""
        found = {rollout for folder in folders if (rollout := RolloutId.at(folder)) and self.knows(rollout)}
        return self.ordered(found)

    def ordered(self, rollouts: Iterable[RolloutId]) -> list[RolloutId]:
        """Rollouts of the run, prompt-major."""
        prompts, backbones, methods = (
            {name: i for i, name in enumerate(names)} for names in (self.prompts, self.backbones, self.methods)
        )
        return sorted(
            rollouts, key=lambda r: (prompts[r.prompt_id], r.sample, backbones[r.backbone], methods[r.method])
        )

    def knows(self, rollout: RolloutId) -> bool:
        """Whether the rollout belongs to the run as it is written down."""
        return (
            rollout.backbone in self.backbones
            and rollout.method in self.methods
            and rollout.prompt_id in self.prompts
            and 0 <= rollout.sample < self.samples
        )


def canonical_digest(value: JsonValue) -> str:
    """Hex SHA-256 of the canonical JSON of `value` (sorted keys, no spaces, UTF-8)."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def differences(stored: RunIdentity, wanted: RunIdentity) -> list[str]:
    """Changes from `stored` to `wanted` that are not growth, one line each, by key path."""
    found = [
        *compare("run.seed", stored.seed, wanted.seed),
        *compare("numerics_version (of lrag-ray)", stored.numerics_version, wanted.numerics_version),
        *compare("video", stored.video, wanted.video),
    ]
    for name in stored.backbones.keys() & wanted.backbones.keys():
        old, new = stored.backbones[name], wanted.backbones[name]
        for part in ("latents", "pixels"):
            found += compare(f"backbones.{name}", getattr(old, part), getattr(new, part))
        found += _former_alpha(name, old, new)
    for name in stored.methods.keys() & wanted.methods.keys():
        found += compare(
            f"methods.{name}",
            stored.methods[name].compared(),
            wanted.methods[name].compared(),
        )
    lines = {prompt.index: prompt.text for prompt in stored.prompts.values()}
    for prompt in wanted.prompts.values():
        old_text = lines.get(prompt.index, prompt.text)
        found += compare(f"prompts, line {prompt.index + 1}", _shortened(old_text), _shortened(prompt.text))
        if old_text != prompt.text and _shortened(old_text) == _shortened(prompt.text):
            found.append(f"prompts, line {prompt.index + 1}: the texts differ after their first words")
    return sorted(found)


def _former_alpha(name: str, old: BackboneIdentity, new: BackboneIdentity) -> Iterator[str]:
    """What an absent lora.alpha used to mean, where a run was begun so."""
    before, now = _lora_of(old), _lora_of(new)
    if before.get("alpha") == _FORMER_ALPHA and now and now.get("alpha") != _FORMER_ALPHA:
        yield (
            f"backbones.{name}.weights.lora.alpha: an absent alpha used to mean {_FORMER_ALPHA:g}; it now means that "
            "of the file, else the rank. `lora.alpha: 256` continues this run as begun, if the file states none; "
            "another run.uri begins one at the strength of the file"
        )


def _lora_of(backbone: BackboneIdentity) -> Mapping[str, JsonValue]:
    weights = backbone.latents.get("weights")
    lora = weights.get("lora") if isinstance(weights, Mapping) else None
    return lora if isinstance(lora, Mapping) else {}


def grown(stored: RunIdentity, wanted: RunIdentity) -> RunIdentity:
    """`stored` with what `wanted` adds to it; only defined where `differences` finds none."""
    backbones = dict(stored.backbones)
    for name, backbone in wanted.backbones.items():
        known = backbones[name].horizons if name in backbones else []
        by_duration = {horizon.duration_s: horizon for horizon in [*known, *backbone.horizons]}
        horizons = [by_duration[duration] for duration in sorted(by_duration)]
        backbones[name] = backbone.model_copy(update={"horizons": horizons})
    prompts = sorted({**stored.prompts, **wanted.prompts}.items(), key=lambda item: item[1].index)
    return stored.model_copy(
        update={
            "samples": max(stored.samples, wanted.samples),
            "backbones": backbones,
            "methods": {**stored.methods, **wanted.methods},
            "prompts": dict(prompts),
        }
    )


def compare(path: str, old: JsonValue, new: JsonValue) -> Iterator[str]:
    """Lines for what differs between a stored and a wanted value, by key path."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for key in sorted(old.keys() | new.keys()):
            yield from compare(f"{path}.{key}", old.get(key), new.get(key))
    elif old != new:
        yield f"{path}: {old!r} in the run, {new!r} in the configuration"


def _shortened(text: str) -> str:
    return text if len(text) <= 60 else text[:57] + "..."
