from __future__ import annotations

import threading
import time

from lrag_ray.events import Event, Notice
from lrag_ray.watch.background import BackgroundListener

EVENT = Notice("hello")


def test_events_arrive_in_order_in_another_thread() -> None:
    got: list[tuple[Event, str]] = []
    warnings: list[str] = []
    listener = BackgroundListener(
        "x", lambda event: got.append((event, threading.current_thread().name)), warnings.append
    )
    events = [Notice(str(number)) for number in range(100)]
    for event in events:
        listener(event)
    listener.close(10)
    assert [event for event, _ in got] == events and {thread for _, thread in got} == {"watch-x"}
    assert warnings == []


def test_the_first_error_ends_it_and_is_reported_once_without_secrets() -> None:
    warnings: list[str] = []
    calls: list[Event] = []

    def fail(event: Event) -> None:
        calls.append(event)
        raise OSError("https://user:hunter2@host refused")

    listener = BackgroundListener("watch.x", fail, warnings.append)
    listener(EVENT)
    deadline = time.monotonic() + 10
    while not warnings and time.monotonic() < deadline:
        time.sleep(0.01)
        listener(EVENT)
    listener(EVENT)
    listener.close(10)
    (warning,) = warnings
    assert "watch.x: OSError" in warning and "The run continues without it" in warning and "hunter2" not in warning
    assert calls == [EVENT]


def test_one_that_hangs_holds_nobody_up() -> None:
    warnings: list[str] = []
    go = threading.Event()

    def hang(_: Event) -> None:
        go.wait(30)

    listener = BackgroundListener("watch.x", hang, warnings.append)
    began = time.monotonic()
    for _ in range(1000):
        listener(EVENT)
    listener.close(0.2)
    go.set()
    assert time.monotonic() - began < 5
    assert warnings == ["watch.x: it did not finish within 0.2 s; what it had not sent is lost"]
