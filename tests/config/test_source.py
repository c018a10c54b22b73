from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from lrag_ray.config.source import dotted, parse_value, read_document
from lrag_ray.errors import ConfigError
from tests.config.make import write

PLAIN = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(codec="utf-8", exclude_categories=("Cc", "Cs", "Zl", "Zp", "Cn", "Co")), max_size=12),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text("abcdefgh_-", min_size=1, max_size=6), inner, max_size=3)
    ),
    max_leaves=12,
)


def refused(folder: Path, text: str | bytes) -> str:
    path = folder / "bad.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ConfigError) as caught:
        read_document(path)
    return str(caught.value).replace(f"{folder}/", "")


def test_every_value_knows_its_line(tmp_path: Path) -> None:
    path = write(tmp_path, "a:\n  b: 1\n  c:\n  - x\n  - y: 2\n\nd: &anchor {e: 3}\nf: *anchor\n")
    document = read_document(path)
    assert document.data == {"a": {"b": 1, "c": ["x", {"y": 2}]}, "d": {"e": 3}, "f": {"e": 3}}
    lines = {dotted(key): int(place.rpartition(":")[2]) for key, place in document.origins.items()}
    assert lines == {
        "a": 1,
        "a.b": 2,
        "a.c": 3,
        "a.c.0": 4,
        "a.c.1": 5,
        "a.c.1.y": 5,
        "d": 7,
        "d.e": 7,
        "f": 8,
        "f.e": 7,
    }
    assert document.origin(("a", "b", "missing")) == f"{path}:2"
    assert document.origin(("nowhere",)) == path


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-6", 1e-6),
        ("1e3", 1000.0),
        ("-.5", -0.5),
        ("12", 12),
        ("+3", 3),
        ("010", "010"),
        ("1_000", "1_000"),
        ("12:30", "12:30"),
        ("0x1f", "0x1f"),
        ("yes", "yes"),
        ("off", "off"),
        ("true", True),
        ("2026-01-01", "2026-01-01"),
        ("null", None),
        ("~", None),
        ("~/runs", "~/runs"),
        ("'12'", "12"),
        ("${HOME}", "${HOME}"),
        ("s3://bucket/run?x=1", "s3://bucket/run?x=1"),
        ("[4.5, 9]", [4.5, 9]),
        ("{method: rag, top_k: 4}", {"method": "rag", "top_k": 4}),
    ],
)
def test_values_are_read_as_yaml_1_2_and_never_expanded(text: str, value: Any) -> None:
    found = parse_value(text)
    assert found == value and type(found) is type(value)


@given(PLAIN)
def test_what_any_yaml_writer_writes_is_read_back(value: Any) -> None:
    # JSON is YAML 1.2, so its text is a second, independent writer.
    assert parse_value(json.dumps(value, ensure_ascii=False)) == value
    # PyYAML writes by the rules of YAML 1.1, under which 0E0 is text.
    if isinstance(value, dict | list) and not _holds_non_text(value):
        assert parse_value(yaml.safe_dump(value, default_style='"')) == value


def _holds_non_text(value: Any) -> bool:
    if isinstance(value, dict):
        return any(_holds_non_text(item) for item in value.values())
    if isinstance(value, list):
        return any(_holds_non_text(item) for item in value)
    return not isinstance(value, str)


def test_a_missing_file_a_folder_and_an_empty_file_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.yaml: cannot read the configuration: No such file"):
        read_document(tmp_path / "nowhere.yaml")
    with pytest.raises(ConfigError, match="Is a directory"):
        read_document(tmp_path)
    assert refused(tmp_path, "# nothing\n").startswith("bad.yaml: the configuration is empty")
    assert refused(tmp_path, "- a\n").startswith("bad.yaml: the configuration holds no keys")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: [1, 2\nc: 3\n", "bad.yaml:3: not YAML: expected ',' or ']'"),
        ("a: 1\n\tb: 2\n", "bad.yaml:2: not YAML: found character '\\t'"),
        ("a: 1\nb: 2\na: 3\n", "bad.yaml:3: key 'a' is already given at bad.yaml:1"),
        ("run:\n  uri: x\n  uri: y\n", "bad.yaml:3: key 'run.uri' is already given at bad.yaml:2"),
        ("a: 1\n---\nb: 2\n", "bad.yaml:2: not YAML: but found another document"),
        (
            "a: !!python/object/apply:os.system [ls]\n",
            "bad.yaml:1: the YAML tag tag:yaml.org,2002:python",
        ),
        ("a: *nothing\n", "bad.yaml:1: not YAML: found undefined alias"),
        ('a: "\\ud800"\n', "bad.yaml:1: text with half a character"),
        ('"\\ud800": 1\n', "bad.yaml:1: text with half a character"),
        ("[a, b]: 1\n", "bad.yaml:1: a key must be plain text"),
        ("a: &a [*a]\n", "bad.yaml: nested too deeply, or an alias that contains itself"),
        (b"a: 1\nb: \xff\n", "bad.yaml:2: byte 0xff at offset 8 is not UTF-8"),
    ],
)
def test_what_is_no_configuration_is_refused_with_its_line(tmp_path: Path, text: str | bytes, message: str) -> None:
    assert refused(tmp_path, text).startswith(message)


def test_what_is_not_a_file_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.yaml")
    for path in (tmp_path / "pipe.yaml", Path("/dev/zero"), Path("/dev/null")):
        with pytest.raises(ConfigError, match="a pipe, a socket or a device, not a file"):
            read_document(path)
    with pytest.raises(ConfigError, match="cannot be the path of the configuration"):
        read_document("a\0b")
    with (tmp_path / "large.yaml").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(ConfigError, match=r"large\.yaml: the configuration is larger than 4,194,304 bytes"):
        read_document(tmp_path / "large.yaml")


def test_utf16_is_read_by_its_mark_and_recognised_without(tmp_path: Path) -> None:
    for encoding in ("utf-16", "utf-32", "utf-8-sig"):
        (tmp_path / "a.yaml").write_bytes("a: ü\n".encode(encoding))
        assert read_document(tmp_path / "a.yaml").data == {"a": "ü"}
    (tmp_path / "a.yaml").write_bytes("a: 1\n".encode("utf-16-le"))
    with pytest.raises(ConfigError, match="looks like UTF-16 without a byte order mark"):
        read_document(tmp_path / "a.yaml")


def test_aliases_cannot_be_expanded_without_bound(tmp_path: Path) -> None:
    layers = ["a: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    layers += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 9)]
    assert refused(tmp_path, "\n".join(layers)).startswith("bad.yaml: more than 100000 values")


def test_values_without_end_are_refused_before_they_are_all_read(tmp_path: Path) -> None:
    keys = "\n".join(f"k{i}: 1" for i in range(200_000))
    assert refused(tmp_path, keys) == "bad.yaml: more than 20000 values, which no configuration has"


def test_a_byte_order_mark_is_accepted(tmp_path: Path) -> None:
    path = tmp_path / "bom.yaml"
    path.write_bytes(b"\xef\xbb\xbfa: 1\r\nb: 2\r\n")
    assert read_document(path).data == {"a": 1, "b": 2}
