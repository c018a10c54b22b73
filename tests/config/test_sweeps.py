from __future__ import annotations

from pathlib import Path

import pytest

from lrag_ray.config.load import load_config
from lrag_ray.config.methods import resolve_method
from lrag_ray.errors import ConfigError
from tests.config.make import SMALL, write


def swept(folder: Path, methods: str) -> dict[str, object]:
    """Settings by name of the methods that `methods` (the value of the key) comes to."""
    config = load_config(write(folder, SMALL), [f"methods={methods}"])
    return {name: resolve_method(section).settings for name, section in config.methods.items()}


def test_a_list_makes_a_method_of_each_value_in_order_and_in_place(tmp_path: Path) -> None:
    found = swept(tmp_path, "{base: {}, rag: {top_k: [8, 2], descriptor: avg_pool}, infinity_rope: {window: 9}}")
    assert list(found) == ["base", "rag_top_k_8", "rag_top_k_2", "infinity_rope"]
    assert [getattr(found[f"rag_top_k_{k}"], "top_k") for k in (8, 2)] == [8, 2]  # noqa: B009
    assert {getattr(found[f"rag_top_k_{k}"], "descriptor") for k in (8, 2)} == {"avg_pool"}  # noqa: B009


def test_several_lists_make_every_combination_and_values_become_parts_of_names(tmp_path: Path) -> None:
    found = swept(tmp_path, "{deep: {method: deep_forcing, compression: [true, false], recent: [3, 4]}}")
    assert list(found) == [
        "deep_compression_true_recent_3",
        "deep_compression_true_recent_4",
        "deep_compression_false_recent_3",
        "deep_compression_false_recent_4",
    ]
    files = swept(tmp_path, "{rag: {descriptor: ae, encoder: [weights/my ae.pt, weights/other.pt]}}")
    assert list(files) == ["rag_encoder_my-ae", "rag_encoder_other"]


@pytest.mark.parametrize(
    "override", ["methods.\ud800=1", "methods.a\0b={}", "methods={rag: {encoder: [%s, b]}}" % ("x" * 100_000)]
)
def test_what_no_name_can_be_is_refused_in_a_short_message(tmp_path: Path, override: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(write(tmp_path, SMALL), [override])
    assert len(str(caught.value)) < 2000 and '{"job"' not in str(caught.value)


@pytest.mark.parametrize(
    ("methods", "message"),
    [
        ("{rag: {top_k: []}}", r"methods\.rag\.top_k: is an empty list; a sweep needs at least one value"),
        ("{rag: {top_k: [2, 2]}}", r"methods\.rag\.top_k: holds values that would give methods of one name: \[2, 2\]"),
        ("{rag: {top_k: [[2]]}}", r"methods\.rag\.top_k: a sweep lists plain values"),
        ("{rag: {top_k: [2, many]}}", r"top_k: expected a whole number, got text 'many'"),
        ("{rag: {topk: [2, 4]}}", r"methods\.rag\.topk: unknown key; did you mean 'top_k'\?"),
        (
            "{rag: {descriptor: avg_pool, top_k: [2]}, rag_top_k_2: {method: rag, descriptor: avg_pool}}",
            r"methods\.rag_top_k_2: makes a method 'rag_top_k_2', and another section does so too",
        ),
        (
            f"{{base: {{window: {list(range(9, 120))}}}}}",
            r"methods\.base: makes 111 methods; a sweep makes at most 100",
        ),
    ],
)
def test_a_sweep_that_cannot_be_is_refused(tmp_path: Path, methods: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        swept(tmp_path, methods)


def test_a_wrong_value_of_a_sweep_is_placed_at_its_line(tmp_path: Path) -> None:
    text = SMALL.replace("methods:", "methods:\n  swept:\n    method: base\n    window: [9, many]", 1)
    with pytest.raises(ConfigError, match=rf":{text.split('window: [9')[0].count(chr(10)) + 1}: "):
        load_config(write(tmp_path, text))
