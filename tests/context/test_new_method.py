"""The worked example of lrag_ray/context/README.md, run from outside the package as its reader would."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import lrag_ray.context
from lrag_ray.context.policy import ContextPolicy
from lrag_ray.context.registry import policy_class
from tests.tiny import generate, start, tiny_transformer

GUIDE = Path(lrag_ray.context.__file__).with_name("README.md")


@pytest.fixture
def every_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> type[ContextPolicy]:
    code = re.findall(r"```python\n(.*?)```", GUIDE.read_text(encoding="utf-8"), re.DOTALL)
    (tmp_path / "my_methods.py").write_text("\n".join(code), encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    return policy_class("my_methods:EveryOther")


def test_it_attends_to_every_second_cached_frame(every_other: type[ContextPolicy]) -> None:
    results = list(start(tiny_transformer(), every_other).blocks(8))
    rows = [(row.kind, row.frame, row.temporal_index) for row in results[7].trace[0]]
    local = [("local", frame, 1 + i) for i, frame in enumerate((14, 16, 18, 20))]
    assert rows == [("sink", 0, 0), *local, *[("current", 21 + i, 5 + i) for i in range(3)]]


def test_it_keeps_its_promises(every_other: type[ContextPolicy]) -> None:
    model, settings = tiny_transformer(), every_other.Settings(stride=3, window=14)
    whole = generate(start(model, every_other, settings), 8)
    assert torch.equal(generate(start(model, every_other, settings), 5), whole[:, :15])
    resumed = start(model, every_other, settings)
    resumed.replay(whole[:, :15])
    assert torch.equal(generate(resumed, 3), whole[:, 15:])


def test_its_settings_are_checked(every_other: type[ContextPolicy]) -> None:
    with pytest.raises(ValueError, match="stride 0 must be at least 1"):
        every_other.Settings(stride=0)
