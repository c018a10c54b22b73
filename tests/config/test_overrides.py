from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lrag_ray.config.overrides import apply_override, quoted
from lrag_ray.config.source import Document


def overridden(data: dict[str, Any], *overrides: str) -> Document:
    document = Document("run.yaml", data)
    for override in overrides:
        apply_override(document, override)
    return document


def test_an_override_replaces_adds_and_makes_sections() -> None:
    document = overridden(
        {"run": {"uri": "a", "seed": 1}}, "run.uri=b", "run.extra=[1, 2]", "engine.actors=4", "x=null"
    )
    assert document.data == {
        "run": {"uri": "b", "seed": 1, "extra": [1, 2]},
        "engine": {"actors": 4},
        "x": None,
    }


def test_the_last_override_wins_and_is_where_the_value_came_from() -> None:
    document = overridden({"run": {"seed": 1}}, "run.seed=2", "run.seed=3")
    assert document.data["run"]["seed"] == 3
    assert document.origin(("run", "seed")) == "--set run.seed=3"


def test_only_what_is_overridden_changes_its_place() -> None:
    document = Document("run.yaml", {"run": {"uri": "a"}}, {("run",): "run.yaml:1", ("run", "uri"): "run.yaml:2"})
    apply_override(document, "run.seed=7")
    assert document.origin(("run",)) == "run.yaml:1"
    assert document.origin(("run", "uri")) == "run.yaml:2"
    apply_override(document, "run={uri: b}")
    assert document.origin(("run", "uri")) == "--set run={uri: b}"


def test_list_items_are_replaced_by_position() -> None:
    assert overridden({"durations_s": [30, 60]}, "durations_s.1=120").data == {"durations_s": [30, 120]}


def test_names_with_dots_are_found_where_they_are_given() -> None:
    data = {"backbones": {"wan2.1": {"label": "a"}, "wan2": {"label": "b"}}}
    assert overridden(data, "backbones.wan2.1.label=c").data["backbones"] == {
        "wan2.1": {"label": "c"},
        "wan2": {"label": "b"},
    }


def test_an_equals_sign_in_the_value_stays() -> None:
    assert overridden({}, "run.uri=s3://b/r?a=1&b=2").data["run"]["uri"] == "s3://b/r?a=1&b=2"


@pytest.mark.parametrize("text", ["out/exp #2", "#2", "a # b # c", "12 #3", "one\ntwo", "a  b", "a#b", "a, b"])
def test_text_is_taken_literally(text: str) -> None:
    assert overridden({}, f"run.uri={text}").data["run"]["uri"] == text


@given(st.text(st.characters(codec="utf-8", exclude_characters="\0")))
def test_quoted_text_is_read_back_as_it_is(text: str) -> None:
    assert overridden({}, f"run.uri={quoted(text)}").data["run"]["uri"] == text
    assert overridden({}, f"names={quoted([text, 'a'])}").data["names"] == [text, "a"]


@given(st.text(st.characters(codec="utf-8", exclude_characters="\0")))
def test_nothing_of_a_value_is_dropped(text: str) -> None:
    """Every text is taken as it is, read as another kind of value, or refused."""
    try:
        found = overridden({}, f"run.uri={text}").data["run"]["uri"]
    except ValueError:
        return
    assert not isinstance(found, str) or found == text.strip() or text.strip()[0] in "\"'|>"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("run.uri", "an override is written a.b=value"),
        ("=3", "an override is written a.b=value"),
        ("run..uri=3", "an override is written a.b=value"),
        ("run.uri=", "no value after 'run.uri='; write null to unset"),
        ("run.uri=[1", "the value is not YAML"),
        ("run.uri=@x", "the value is not YAML"),
        ("durations_s=[1] # two", "YAML takes '# two' for a comment"),
        ("run.uri='a' # two", "YAML takes '# two' for a comment"),
        ("run.uri=&here a", "YAML does not take '&here' for text"),
        ("run.uri=!!str a", "YAML does not take '!!str' for text"),
        ("run.uri=--- a", "YAML does not take '---' for text"),
        ("run.uri=[*here]", "YAML does not take '*here' for text"),
        (f"run.uri={'[' * 5000}", "nested too deeply"),
        (f"run.seed={'9' * 5000}", "a whole number of 5000 digits"),
        ('run.uri="\\0"', "text with a NUL character"),
        ("run.uri.x=1", "'run.uri' is a value, not a section"),
        ("durations_s.2=1", "'durations_s' is a list of 2; '2' is not one of its positions"),
        ("durations_s.first=1", "'durations_s' is a list of 2; 'first' is not one of its positions"),
    ],
)
def test_a_bad_override_says_what_is_wrong(override: str, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        overridden({"run": {"uri": "a"}, "durations_s": [1, 2]}, override)
    assert message in str(caught.value)


@given(
    st.lists(st.sampled_from(["a", "b", "c"]), min_size=1, max_size=4),
    st.integers(),
    st.dictionaries(st.sampled_from(["a", "b", "c"]), st.dictionaries(st.sampled_from(["a", "b"]), st.none())),
)
def test_an_override_sets_its_path_and_nothing_beside_it(path: list[str], value: int, data: dict[str, Any]) -> None:
    before = {key: dict(inner) for key, inner in data.items()}
    after = overridden(data, f"{'.'.join(path)}={value}").data
    found: Any = after
    for step in path:
        found = found[step]
    assert found == value
    assert {key: inner for key, inner in after.items() if key != path[0]} == {
        key: inner for key, inner in before.items() if key != path[0]
    }


def test_a_large_number_of_overrides_is_applied_in_order(tmp_path: Path) -> None:
    document = overridden({}, *(f"n.k{i % 7}={i}" for i in range(70)))
    assert document.data == {"n": {f"k{i}": 63 + i for i in range(7)}}
