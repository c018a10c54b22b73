"""The part of a configuration that scoring of any videos needs: no run, no prompts, no generators."""

from __future__ import annotations

import json
from collections.abc import Sequence

from pydantic import ValidationError

from lrag_ray.config.load import check_suite
from lrag_ray.config.overrides import apply_overrides
from lrag_ray.config.problems import raise_problems, translate
from lrag_ray.config.schema import EngineSection, ScoringSection, StorageSection
from lrag_ray.config.section import Section
from lrag_ray.config.source import Document


class VideosConfig(Section):
    """How videos outside a run are scored."""

    scoring: ScoringSection = ScoringSection(suite="vbench_long")
    """Suite, networks, workers."""
    engine: EngineSection = EngineSection()
    """Only the address of the cluster counts."""
    storage: StorageSection = StorageSection()
    """How the videos' store and that of the rows are reached."""


def videos_config(overrides: Sequence[str]) -> VideosConfig:
    """Defaults with ``a.b=value`` overrides.

    Raises:
        ConfigError: names each override that is wrong and what was expected.
    """
    document = Document("--set", {"scoring": {"suite": "vbench_long"}})
    refused = [*apply_overrides(document, overrides)]
    try:
        config = VideosConfig.model_validate_json(json.dumps(document.data), strict=True)
    except ValidationError as error:
        raise_problems(document, translate(error, VideosConfig), refused)
        raise
    raise_problems(document, check_suite(document.data), refused)
    return config
