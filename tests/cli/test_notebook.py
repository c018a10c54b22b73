"""The live display in the kernel of a real notebook, and none elsewhere."""

from __future__ import annotations

from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

CELL = """
import time
import lrag_ray as lr
from lrag_ray.events import StageBegan, StageEnded
with lr.progress() as shown:
    shown(StageBegan("rollouts", 2))
    time.sleep(1.5)
    print("drawn")
    if FAIL:
        raise RuntimeError("stopped")
    shown(StageEnded("rollouts", 3.0))
"""


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> list[list[dict[str, Any]]]:
    """What a cell that succeeds and one that fails draw."""
    cells = [nbformat.v4.new_code_cell(CELL.replace("FAIL", str(fail))) for fail in (False, True)]
    drawn: list[list[dict[str, Any]]] = [[], []]

    class Client(NotebookClient):  # type: ignore[misc]
        def process_message(self, msg: Any, cell: Any, cell_index: int) -> Any:
            if msg["msg_type"] in ("display_data", "update_display_data", "stream"):
                drawn[cell_index].append({"type": msg["msg_type"], **msg["content"]})
            return super().process_message(msg, cell, cell_index)

    resources = {"metadata": {"path": tmp_path_factory.mktemp("notebook")}}
    notebook = nbformat.v4.new_notebook(cells=cells)
    Client(notebook, timeout=120, kernel_name="python3", allow_errors=True, resources=resources).execute()
    return drawn


@pytest.mark.parametrize("fail", [False, True])
def test_a_cell_shows_one_output_that_is_drawn_anew_and_lines_that_stay(
    outputs: list[list[dict[str, Any]]], fail: bool
) -> None:
    found = outputs[fail]
    shown = [each for each in found if each["type"] != "stream"]
    assert [each["type"] for each in shown].count("display_data") == 1, "one output, not one per frame"
    assert len({each["transient"]["display_id"] for each in shown}) == 1
    live = [each["data"] for each in shown if "rollouts" in each["data"]["text/plain"]]
    assert live and live[0]["text/html"].startswith("<pre style=")
    assert shown[-1]["data"]["text/plain"] == "", "nothing stays of what is over, after an error too"
    lines = "".join(each["text"] for each in found if each["type"] == "stream")
    assert "drawn" in lines and ("rollouts: done in 3 s" in lines) is not fail
