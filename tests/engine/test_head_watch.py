from __future__ import annotations

import queue
import socket

import pytest

from lrag_ray.engine import head_watch as module
from lrag_ray.engine.head_watch import head_watch
from tests.cluster.nodes import free_port


def listener(port: int) -> socket.socket:
    return socket.create_server(("127.0.0.1", port), backlog=1000)


def test_a_head_that_goes_and_comes_back_is_told_once_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LOOK_EVERY_S", 0.02)
    told: queue.Queue[str] = queue.Queue()
    # One that nobody is given while it is free.
    port = free_port()
    head = listener(port)
    with head_watch(f"127.0.0.1:{port}", told.put):
        head.close()
        gone = told.get(timeout=60)
        head = listener(port)
        back = told.get(timeout=60)
    head.close()
    assert f"head of the Ray cluster (127.0.0.1:{port}) does not answer" in gone and "the same command" in gone
    assert back.endswith("answers again") and told.empty()
