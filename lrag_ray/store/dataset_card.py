"""The card of a latent dataset: where its latents come from. ``dataset/card.json``, and for people ``README.md``."""

from __future__ import annotations

import json
from collections.abc import Iterator

from pydantic import Field, ValidationError

from lrag_ray.store.address import Storage
from lrag_ray.store.dataset_index import FOLDER, LatentForm
from lrag_ray.store.records import Count, JsonValue, Record

CARD_FILE = f"{FOLDER}/card.json"
READ_ME = f"{FOLDER}/README.md"


class WeightsSource(Record):
    """A file that the latents were made with."""

    name: str
    kind: str
    source: str
    """Where it is published, or "unknown"."""
    licence: str


class DatasetCard(Record):
    """What a dataset is made of, and how."""

    origin: str
    """``generated``, or what was imported."""
    licence: str
    """Of the latents; "unknown" unless somebody said it."""
    seed: int | None = None
    prompts: dict[str, JsonValue] = Field(default_factory=dict)
    """File, sample and number."""
    backbones: dict[str, JsonValue] = Field(default_factory=dict)
    """What determines the latents, weights by digest."""
    methods: dict[str, JsonValue] = Field(default_factory=dict)
    weights: list[WeightsSource] = Field(default_factory=list)
    numerics_version: int | None = None
    versions: dict[str, str] = Field(default_factory=dict)
    form: LatentForm | None = None
    rollouts: Count = 0
    frames: Count = 0
    digest: str | None = None
    """Of all latents; None while the dataset grows."""
    updated_at: str

    def write(self, storage: Storage) -> None:
        """Write both files."""
        storage.write(CARD_FILE, self.model_dump_json(indent=1).encode())
        storage.write(READ_ME, ("\n".join(self._lines()) + "\n").encode())

    def _lines(self) -> Iterator[str]:
        yield "# Latent dataset"
        yield ""
        yield "| | |"
        yield "|---|---|"
        facts: dict[str, object] = {
            "origin": self.origin,
            "licence": self.licence,
            "rollouts": f"{self.rollouts:,}",
            "latent frames": f"{self.frames:,}",
            "one frame": self.form,
            "digest": self.digest or "still growing",
            "seed": self.seed,
            "prompts": json.dumps(self.prompts, ensure_ascii=False) if self.prompts else None,
            "numerics version": self.numerics_version,
            "versions": ", ".join(f"{name} {version}" for name, version in self.versions.items()) or None,
        }
        yield from (f"| {name} | {_cell(value)} |" for name, value in facts.items() if value is not None)
        if self.weights:
            yield from ("", "| weights | kind | source | licence |", "|---|---|---|---|")
            for each in self.weights:
                yield f"| {' | '.join(map(_cell, (each.name, each.kind, each.source, each.licence)))} |"
        for title, group in (("Methods", self.methods), ("Backbones", self.backbones)):
            for name, value in group.items():
                yield from ("", f"## {title}: {name}", "")
                yield from (f"    {line}" for line in json.dumps(value, indent=1, ensure_ascii=False).splitlines())
        yield ""
        yield "Latents are safetensors files; `dataset/index.json` names the parquet files that say what is where."


def read_card(storage: Storage) -> DatasetCard | None:
    """The card of the dataset at an address; None where there is none or it cannot be understood."""
    try:
        return DatasetCard.model_validate_json(storage.read_bytes(CARD_FILE))
    except (FileNotFoundError, ValidationError):
        return None


def _cell(value: object) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ")
