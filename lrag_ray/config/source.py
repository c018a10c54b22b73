"""A YAML file as plain data that remembers, for every key, the line it came from.

YAML is read as version 1.2 reads it: ``yes``, ``010``, ``12:30`` and dates stay text, ``1e-6`` is a number. Nothing is
expanded: no environment variables, no interpolation, no ``~``. A key that is given twice is an error.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from lrag_ray.errors import ConfigError
from lrag_ray.text_file import read_text

KeyPath = tuple[str | int, ...]
"""Keys and list positions from the top of the file."""

_TAGS = "tag:yaml.org,2002:"
_TOO_DEEP = "nested too deeply, or an alias that contains itself"
_MOST_DIGITS = 40
_MOST_DEPTH = 100
_MOST_BYTES = 4 << 20
_MOST_NODES = 100_000
"""Values that a file may hold, aliases expanded; far above any real configuration."""
_MOST_WRITTEN = 20_000
"""Values without aliases: reading them takes a second or two."""
_MOST_CHARACTERS = 4 * _MOST_BYTES
"""Of all texts, aliases expanded: a long one that is named again and again takes no memory before it is written."""


@dataclass
class Document:
    """Plain data and where each of its values was written."""

    name: str
    """The file as the user named it."""
    data: dict[str, Any]
    origins: dict[KeyPath, str] = field(default_factory=dict)
    """By key path: ``file:line``, or the override that set the value."""

    def origin(self, path: KeyPath) -> str:
        """Where `path` was written; for what is missing, where the section around it was."""
        for end in range(len(path), -1, -1):
            if path[:end] in self.origins:
                return self.origins[path[:end]]
        return self.name


def dotted(path: KeyPath) -> str:
    """``a.b.0`` for ("a", "b", 0)."""
    return ".".join(str(step) for step in path)


def read_document(path: str | Path) -> Document:
    """Read a YAML file; ConfigError if it cannot be read, is not UTF-8, not YAML, or not a mapping."""
    return parse_document(str(path), read_text(path, "the configuration", ConfigError, most_bytes=_MOST_BYTES))


def parse_document(name: str, text: str) -> Document:
    """Parse the YAML `text` that messages call `name`; ConfigError if it is not YAML, or not a mapping."""
    document = Document(name, {})
    try:
        node = _node(text)
        data = None if node is None else _Builder(document).build(node, ())
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise ConfigError(f"{name}:{line}: not YAML: {_not_allowed(error)}; remove it") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"{name}:{mark.line + 1}" if mark else name
        context = f" ({error.context})" if error.context else ""
        raise ConfigError(f"{place}: not YAML: {error.problem}{context}") from None
    except _TooManyError as error:
        raise ConfigError(f"{name}: {error}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{name}: not YAML: {error}") from None
    except RecursionError:
        raise ConfigError(f"{name}: {_TOO_DEEP}") from None
    if not isinstance(data, dict):
        found = "is empty" if data is None else "holds no keys at its top"
        raise ConfigError(f"{name}: the configuration {found}; it is a YAML mapping, see configs/demo.yaml")
    document.data = data
    return document


def parse_value(text: str) -> Any:
    """One YAML value, as an override gives it; ValueError if it is none.

    Nothing is dropped or folded: a value that is plain text is that text, with any ``#`` and line breaks in it.
    """
    try:
        if _is_plain_text(text):
            return text.strip()
        node = _node(text)
        return None if node is None else _Builder(Document("line", {})).build(node, ())
    except yaml.reader.ReaderError as error:
        raise ValueError(_not_allowed(error)) from None
    except RecursionError:
        raise ValueError(_TOO_DEEP) from None
    except yaml.MarkedYAMLError as error:
        raise ValueError(str(error.problem)) from None
    except (yaml.YAMLError, ConfigError) as error:
        raise ValueError(str(error)) from None


_UNREAD = (
    yaml.AnchorToken,
    yaml.AliasToken,
    yaml.TagToken,
    yaml.DirectiveToken,
    yaml.DocumentStartToken,
    yaml.DocumentEndToken,
)
"""Parts of YAML that no value needs, and that would vanish from a text."""
_STREAM = (yaml.StreamStartToken, yaml.StreamEndToken)


def _is_plain_text(text: str) -> bool:
    """Whether an override's value is unquoted text; ValueError if YAML would drop a part of another value."""
    tokens = list(yaml.scan(text, Loader=_Loader))
    if unread := next((token for token in tokens if isinstance(token, _UNREAD)), None):
        written = text[unread.start_mark.index : unread.end_mark.index]
        raise ValueError(f"YAML does not take '{written}' for text")
    content = [token for token in tokens if not isinstance(token, _STREAM)]
    if all(isinstance(token, yaml.ScalarToken) and token.plain for token in content):
        # A comment is all of a value that begins with #.
        whole = bool(content) and content[0].value == text.strip()
        return not whole or not any(pattern.match(content[0].value) for pattern in _SCALARS.values())
    end = 0
    for token in tokens:
        if comment := text[end : token.start_mark.index].strip():
            raise ValueError(f"YAML takes '{comment}' for a comment")
        end = max(end, token.end_mark.index)
    return False


def _node(text: str) -> yaml.Node | None:
    loader = _Loader(text)
    try:
        return loader.get_single_node()
    finally:
        loader.dispose()


def _not_allowed(error: yaml.reader.ReaderError) -> str:
    return f"the character U+{int(error.character):04X} is not allowed"


class _TooManyError(yaml.YAMLError):  # type: ignore[misc]  # PyYAML is untyped
    """More than a configuration has."""


class _Loader(yaml.SafeLoader):  # type: ignore[misc]  # PyYAML is untyped
    """The safe loader with the scalar rules of YAML 1.2; RecursionError for what is nested too deeply,
    _TooManyError for too many values."""

    depth = written = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """A node and what is in it."""
        if self.depth >= _MOST_DEPTH:
            raise RecursionError
        self.written += 1
        if self.written > _MOST_WRITTEN:
            raise _TooManyError(f"more than {_MOST_WRITTEN} values, which no configuration has")
        self.depth += 1
        try:
            return super().compose_node(parent, index)
        finally:
            self.depth -= 1

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012 - PyYAML's attribute


_SCALARS: dict[str, re.Pattern[str]] = {}
"""What a scalar of each tag looks like, whether the tag was found or written out (``!!int 3``)."""

for _tag, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?(0|[1-9][0-9]*)", list("-+0123456789")),
    (
        "float",
        r"[-+]?(\.[0-9]+|(0|[1-9][0-9]*)(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
):
    _SCALARS[f"{_TAGS}{_tag}"] = re.compile(f"^(?:{_pattern})$")
    _Loader.add_implicit_resolver(f"{_TAGS}{_tag}", _SCALARS[f"{_TAGS}{_tag}"], _first)


class _Builder:
    """Turns the node tree into dicts and lists and notes the line of every value."""

    def __init__(self, document: Document) -> None:
        self._document = document
        self._nodes = 0
        self._characters = 0

    def build(self, node: yaml.Node, path: KeyPath) -> Any:
        self._nodes += 1
        if self._nodes > _MOST_NODES:
            raise ConfigError(f"{self._document.name}: more than {_MOST_NODES} values, aliases expanded")
        if path:
            self._document.origins.setdefault(path, self._place(node))
        if isinstance(node, yaml.MappingNode) and node.tag == f"{_TAGS}map":
            return self._mapping(node, path)
        if isinstance(node, yaml.SequenceNode) and node.tag == f"{_TAGS}seq":
            return [self.build(item, (*path, i)) for i, item in enumerate(node.value)]
        if not isinstance(node, yaml.ScalarNode):
            raise ConfigError(f"{self._place(node)}: the YAML tag {node.tag} is not supported; remove it")
        return self._scalar(node)

    def _scalar(self, node: yaml.ScalarNode) -> Any:
        text, kind = node.value, node.tag.removeprefix(_TAGS)
        if node.tag == f"{_TAGS}str":
            return self._text(node)
        pattern = _SCALARS.get(node.tag)
        if pattern is None:
            raise ConfigError(f"{self._place(node)}: the YAML tag {node.tag} is not supported; remove it")
        if not pattern.match(text):
            raise ConfigError(f"{self._place(node)}: {text[:40]!r} is not of the type {kind} that its tag says")
        if kind == "int":
            if len(text) > _MOST_DIGITS:
                raise ConfigError(f"{self._place(node)}: a whole number of {len(text)} digits; give a smaller one")
            return int(text)
        if kind == "float":
            # Python writes infinity and not-a-number without the point.
            return float(re.sub(r"\.(?=[a-zA-Z])", "", text))
        return text.lower() == "true" if kind == "bool" else None

    def _text(self, node: yaml.ScalarNode) -> str:
        text: str = node.value
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise ConfigError(f"{self._place(node)}: text with half a character (a lone surrogate)")
        if "\0" in text:
            raise ConfigError(f"{self._place(node)}: text with a NUL character; remove it")
        self._characters += len(text)
        if self._characters > _MOST_CHARACTERS:
            raise ConfigError(f"{self._place(node)}: more than {_MOST_CHARACTERS:,} characters, aliases expanded")
        return text

    def _mapping(self, node: yaml.MappingNode, path: KeyPath) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key_node, value_node in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise ConfigError(f"{self._place(key_node)}: a key must be plain text")
            # The text as written: a backbone may be called 13 or true.
            key = self._text(key_node)
            if key in result:
                first = self._document.origins[(*path, key)]
                raise ConfigError(f"{self._place(key_node)}: key '{dotted((*path, key))}' is already given at {first}")
            self._document.origins[(*path, key)] = self._place(key_node)
            result[key] = self.build(value_node, (*path, key))
        return result

    def _place(self, node: yaml.Node) -> str:
        return f"{self._document.name}:{node.start_mark.line + 1}"
