"""A run with models at both ends whose driver is killed among its calls; counted at the server."""

from __future__ import annotations

import os
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import ray

from lrag_ray.chat.store import AnswerRecord, ChatStore
from lrag_ray.store.rollouts import RolloutRun
from tests.chat.servers import ChatProxy
from tests.cluster.conftest import KEY_ENV
from tests.cluster.drivers import driver, write_config
from tests.stages.make import BACKBONE, METHODS, make_config

pytestmark = [pytest.mark.cluster, pytest.mark.proof, pytest.mark.timeout(900), pytest.mark.usefixtures("cluster")]

PROMPTS = ["a fox", "a river", "a lamp"]


class Server:
    """Answers at once, except for calls beyond an allowance, which never get an answer."""

    def __init__(self) -> None:
        self.allowed: Counter[str] = Counter()
        self.held = 0
        self._lock = threading.Lock()

    def __call__(self, number: int, body: dict[str, Any]) -> str:
        kind = kind_of(body)
        with self._lock:
            self.allowed[kind] -= 1
            hold = self.allowed[kind] < 0
            self.held += hold
        if hold:
            threading.Event().wait()
        if kind == "judge":
            return "text:Steady light. <score>4</score>"
        return f"text:This is {body['messages'][-1]['content']} in the morning light of the snow."


def kind_of(body: dict[str, Any]) -> str:
    return "judge" if "image_url" in str(body["messages"])[:4000] else "refine"


def answers(run: RolloutRun) -> list[AnswerRecord]:
    paths = [path for path in run.storage.list_files("chat/answers") if path.endswith(".json")]
    return [AnswerRecord.opened_at(path, data) for path, data in run.storage.read_many(paths).items()]


def test_a_run_that_is_killed_twice_asks_nothing_twice_and_shows_no_key(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    server = Server()
    with ChatProxy(None, server) as proxy:
        chat = {"backend": "openai", "model": "m", "base_url": proxy.url, "key_env": KEY_ENV, "concurrency": 1}
        config = make_config(
            tmp_path / "run",
            prompts={"path": str(tmp_path / "prompts.txt"), "refine": chat},
            durations_s=[1.5],
            methods={"base": METHODS["base"]},
            backbones={"tiny": {**BACKBONE, "transformer": {**BACKBONE["transformer"], "text_len": 96}}},
            engine={"address": ray.get_runtime_context().gcs_address, "actors": 1},
            scoring={"suite": "judge", "workers": 1, "settings": {"chat": chat, "max_side": 32}},
        )
        path, run = write_config(tmp_path / "config.yaml", config), RolloutRun(config.run.uri)
        for allowed in ({"refine": 1}, {"refine": 2, "judge": 2}):
            server.allowed, held = Counter(allowed), server.held
            with driver(path) as killed:
                killed.wait_until(lambda held=held: server.held > held)  # type: ignore[misc]
                killed.process.kill()
                killed.wait()
        assert len(answers(run)) == len(PROMPTS) + 2
        server.allowed = Counter(judge=len(PROMPTS) - 2)
        for _ in range(2):
            with driver(path) as last:
                assert last.wait() == 0, last.text
        asked = Counter(kind_of(body) for body in proxy.calls)
        # The two calls that were held got no answer, and were made again.
        assert asked == {"refine": len(PROMPTS) + 1, "judge": len(PROMPTS) + 1}
        assert max(Counter(str(body) for body in proxy.calls).values()) == 2
        assert ChatStore(run.storage).spent().calls == len(proxy.calls)
        key = os.environ[KEY_ENV]
        assert {headers["authorization"] for headers in proxy.headers} == {f"Bearer {key}"}
    prompts = run.require().prompts.values()
    assert sorted(prompt.original for prompt in prompts) == sorted(PROMPTS)
    assert {prompt.text for prompt in prompts} == {f"This is {p} in the morning light of the snow." for p in PROMPTS}
    page = (Path(run.uri) / "summary/report.html").read_text()
    assert "Before refinement" in page and "Steady light." in page
    logs = Path(ray._private.worker._global_node.get_session_dir_path()) / "logs"
    time.sleep(1)  # Ray's logs are behind
    files = [each for folder in (tmp_path, logs) for each in folder.rglob("*") if each.is_file()]
    assert any(each.is_relative_to(logs) for each in files) and len(list(tmp_path.glob("*.log"))) == 4
    assert [each for each in files if key.encode() in each.read_bytes()] == []
