from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator

from lrag_ray.config.json_schema import json_schema
from tests.config.make import SMALL

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


@pytest.fixture(scope="module")
def validator() -> Draft202012Validator:
    schema = json_schema()
    Draft202012Validator.check_schema(schema)
    return Draft202012Validator(schema)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_our_own_files_fit_and_name_it(validator: Draft202012Validator, path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert list(validator.iter_errors(yaml.safe_load(text))) == []
    assert text.splitlines()[0] == "# yaml-language-server: $schema=schema.json"


@pytest.mark.parametrize(
    "methods",
    [
        {"base": None},
        {"rag": {"top_k": [2, 4]}},
        {"mine": {"method": "rag", "top_k": 2}},
        {"base": {"method": "infinity_rope", "sink": 2}},
        {"mine": {"method": "my_methods:Mine", "anything": 1}},
        {"memrope": {"preset": "released", "sink": 2}},
    ],
)
def test_methods_that_load_fit(validator: Draft202012Validator, methods: dict[str, Any]) -> None:
    assert validator.is_valid({**yaml.safe_load(SMALL), "methods": methods})


@pytest.mark.parametrize(
    "change",
    [
        {"metods": {}},
        {"job": "evaluat"},
        {"durations_s": "30"},
        {"methods": {"rag": {"topk": 2}}},
        {"methods": {"mine": {"top_k": 2}}},
        {"methods": {"mine": {"method": "rag", "top_k": "many"}}},
        {"methods": {"base": {"method": "rag", "windw": 2}}},
        {"methods": {"rag": {"preset": "released"}}},
        {"methods": {"ema_sink": {"update": "replace"}}},
        {"backbones": {"tiny": {"preset": "tyny"}}},
        {"engine": {"actors": "per_gpus"}},
    ],
)
def test_slips_are_marked(validator: Draft202012Validator, change: dict[str, Any]) -> None:
    small = yaml.safe_load(SMALL)
    assert validator.is_valid(small)
    assert not validator.is_valid({**small, **change})
