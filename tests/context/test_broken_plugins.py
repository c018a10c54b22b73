"""Plug-ins that cannot be imported, whatever they raise."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from lrag_ray.context.registry import policy_class
from lrag_ray.scoring.registry import suite_class

BROKEN = {
    "value": ("import os\n\nraise ValueError('no licence')\n", r"raised ValueError: no licence, at .*\.py, line 3"),
    "syntax": ("def f(:\n", r"raised SyntaxError: .*line 1"),
    "exit": ("import sys\nsys.exit(3)\n", r"raised SystemExit: 3, at .*, line 2"),
    "deep": ("def f():\n    return f()\nf()\n", "raised RecursionError"),
    "mute": (
        "class Mute(Exception):\n    def __str__(self):\n        raise OSError\nraise Mute\n",
        "raised Mute, at .*, line 4",
    ),
    "lazy": ("def __getattr__(name):\n    return 1 / 0\n", "'X' of 'lazy_.*' raised ZeroDivisionError"),
    "other": ("import no_such_package_at_all\n", "cannot import 'other_.*No module named 'no_such_package_at_all'"),
}


@pytest.mark.parametrize("get", [policy_class, suite_class])
@pytest.mark.parametrize("name", BROKEN)
def test_the_message_names_plug_in_exception_and_line(
    name: str, get: Callable[[str], object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, message = BROKEN[name]
    module = f"{name}_{get.__name__}"
    (tmp_path / f"{module}.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match=message) as raised:
        get(f"{module}:X")
    assert f"'{module}:X'" in str(raised.value)
