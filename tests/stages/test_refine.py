from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from lrag_ray.chat.language import language_of
from lrag_ray.chat.messages import Question
from lrag_ray.chat.store import AnswerRecord, ChatStore
from lrag_ray.config.refine import RefineSection
from lrag_ray.config.schema import EngineSection
from lrag_ray.errors import BudgetError
from lrag_ray.stages.refine import RefineStage, RefineTask
from lrag_ray.stages.refinement import EncoderLimit, Refined, Refiner, cleaned
from lrag_ray.stages.spec import LocalHost, Refused, Result, Yielded
from lrag_ray.store.address import Storage
from tests.chat.servers import ChatProxy

GOOD = "A red fox walks through the snow in the morning light."


def answer(text: str, finish: Any = "stop") -> AnswerRecord:
    return AnswerRecord(
        path="",
        question={},
        text=text,
        finish=finish,
        input_tokens=1,
        output_tokens=1,
        raw=None,
        answered_at="",
        seconds=0,
    )


def settled(answers: list[AnswerRecord], *, text_len: int = 512, prompt: str = "a fox", **section: Any) -> Refined:
    values: dict[str, Any] = {"backend": "openai", "model": "m", "retries": 2} | section
    refiner = Refiner(RefineSection(**values), "Rewrite it.", [EncoderLimit("tiny", None, text_len)])
    asked: list[Question] = []

    def answer_of(question: Question) -> AnswerRecord | None:
        asked.append(question)
        return answers[len(asked) - 1]

    found = refiner.settle(prompt, answer_of)
    assert isinstance(found, Refined)
    assert len(set(asked)) == len(asked), "a repeated question would be answered from the store"
    return found


@pytest.mark.parametrize(
    ("bad", "problem"),
    [
        (answer("  \n"), "empty"),
        (answer("no", "refused"), "declined"),
        (answer(GOOD, "length"), "cut off at max_tokens"),
        (answer("Ein roter Fuchs läuft durch den Schnee und die Sonne ist auf dem Weg."), r"another language \(de"),
        (answer("一只红色的狐狸在雪地里行走"), r"another language \(zh"),
        (answer(GOOD * 12), "tokens, and the text encoder takes 512"),
    ],
)
def test_an_unusable_answer_is_reported_and_asked_again(bad: AnswerRecord, problem: str) -> None:
    found = settled([bad, answer(GOOD)])
    assert found.text == GOOD
    assert not found.failed
    assert re.search(problem, found.problems[0])


def test_after_the_last_retry_the_original_stays() -> None:
    found = settled([answer("")] * 3)
    assert (found.text, found.failed, len(found.problems)) == ("a fox", True, 3)


def test_same_takes_the_language_of_the_original() -> None:
    german = "Ein Fuchs läuft durch den Schnee und die Sonne scheint."
    assert (
        settled([answer(german)], prompt="Ein Fuchs ist im Schnee und die Nacht kommt", language="same").text == german
    )
    assert settled([answer(german)], language="any").text == german


def test_a_template_with_a_place_for_the_prompt_is_one_message() -> None:
    refiner = Refiner(RefineSection(backend="openai", model="m"), "Say more: {prompt}!", [])
    question = refiner.settle("a {fox}", lambda _: None)
    assert isinstance(question, Question)
    assert [message.parts for message in question.messages] == [("Say more: a {fox}!",)]


@pytest.mark.parametrize(
    ("said", "kept"),
    [('"A fox."\n', "A fox."), ("A\nfox\x1b[2J", "A fox [2J"), ("- =A fox", "A fox"), ("“A” and “B”", "“A” and “B”")],
)
def test_an_answer_becomes_one_plain_line(said: str, kept: str) -> None:
    assert cleaned(said) == kept


@pytest.mark.parametrize(
    ("said", "kept"),
    [
        (f"<think>\nThey want a fox. <b>Fine</b>.\n</think>\n\n{GOOD}", GOOD),
        (f"They want a fox.</think>{GOOD}", GOOD),  # the template wrote the beginning
        (f"<THINK></THINK>{GOOD}", GOOD),
    ],
)
def test_the_reasoning_of_a_model_is_no_part_of_the_prompt(said: str, kept: str) -> None:
    assert settled([answer(said)]).text == kept
    unended = settled([answer("<think>They want a fox and", "length"), answer(GOOD)])
    assert unended.problems == ["the answer is empty"]


@pytest.mark.parametrize(
    ("text", "language"),
    [
        (GOOD, "en"),
        ("Le renard marche dans la neige avec les enfants.", "fr"),
        ("El zorro corre por la nieve y los niños miran.", "es"),
        ("Лиса бежит по снегу", "cyrillic"),
        ("キツネが雪の中を歩いている", "ja"),
        ("Tokyo, 8K", ""),
        ("Stříbrná liška běží přes zasněženou louku a za ní padají vločky sněhu", "cs"),
        ("Kettu juoksee lumen läpi ja järvi on hiljainen", "fi"),
        ("Rauður refur hleypur í gegnum snjóinn við sólsetur", "other"),
        ("José and Señorita Martínez dance flamenco in Sevilla", "en"),
        ("Dancers under moonlight", "en"),
        ("A sign that says 狐 in the snow, seen from the street", "en"),
    ],
)
def test_language(text: str, language: str) -> None:
    assert language_of(text) == language


def stage(run: Path, url: str, **section: Any) -> RefineStage:
    values: dict[str, Any] = {"backend": "openai", "model": "m", "base_url": url, "concurrency": 2} | section
    limits = (EncoderLimit("tiny", None, 512),)
    return RefineStage(Storage(str(run)), RefineSection(**values), "Rewrite it.", limits, EngineSection())


PROMPTS = tuple(f"prompt number {i}" for i in range(12))


def test_a_worker_asks_until_every_prompt_is_settled(tmp_path: Path) -> None:
    with ChatProxy(None, lambda number, body: "text:" if number == 0 else f"text:{GOOD}") as proxy:
        worker = stage(tmp_path, proxy.url).open(LocalHost())
        assert worker.work(RefineTask(PROMPTS), "a") == Result(made=12)
        assert len(proxy.calls) == 13
        assert worker.work(RefineTask(PROMPTS), "b") == Result(made=12)
        assert len(proxy.calls) == 13


def test_a_worker_on_a_draining_node_keeps_its_answers(tmp_path: Path) -> None:
    with ChatProxy(None, lambda number, body: f"text:{GOOD}") as proxy:
        host = LocalHost(must_leave=lambda: len(proxy.calls) >= 4)
        assert isinstance(stage(tmp_path, proxy.url).open(host).work(RefineTask(PROMPTS), "a"), Yielded)
        assert stage(tmp_path, proxy.url).open(LocalHost()).work(RefineTask(PROMPTS), "b") == Result(made=12)
        assert len(proxy.calls) == 12


def test_a_rejected_prompt_is_named_and_the_others_are_kept(tmp_path: Path) -> None:
    with ChatProxy(None, lambda number, body: "400" if "number 3" in str(body) else f"text:{GOOD}") as proxy:
        outcome = stage(tmp_path, proxy.url).open(LocalHost()).work(RefineTask(PROMPTS), "a")
    assert isinstance(outcome, Refused)
    assert "prompt number 3" in outcome.reason
    assert len(list(tmp_path.rglob("answers/*/*.json"))) == 11


def test_a_killed_process_asks_again_only_what_was_under_way(tmp_path: Path) -> None:
    """Killed without warning among its calls; the second process makes the remaining ones."""

    def slowly(number: int, body: dict[str, Any]) -> str:
        time.sleep(0.15)
        return f"text:{GOOD}"

    program = f"""
from tests.stages.test_refine import *
stage(Path({str(tmp_path)!r}), sys.argv[1]).open(LocalHost()).work(RefineTask(PROMPTS), "a")
"""
    with ChatProxy(None, slowly) as proxy:
        first = subprocess.Popen([sys.executable, "-c", program, proxy.url], cwd=Path(__file__).parents[2])
        while len(list(tmp_path.rglob("answers/*/*.json"))) < 4:
            assert first.poll() is None
            time.sleep(0.01)
        os.kill(first.pid, signal.SIGKILL)
        first.wait()
        kept = {path.stem for path in tmp_path.rglob("answers/*/*.json")}
        before = len(proxy.calls)
        assert stage(tmp_path, proxy.url).open(LocalHost()).work(RefineTask(PROMPTS), "b") == Result(made=12)
        asked_again = proxy.calls[before:]
        assert len(asked_again) == 12 - len(kept)
        assert len(proxy.calls) - 12 <= 2, "at most one per thread was under way"
        spent = ChatStore(Storage(str(tmp_path))).spent()
        assert spent.calls == len(proxy.calls) or spent.calls == len(proxy.calls) + 1
        answered = {
            json.loads(path.read_text())["question"]["messages"][1]["parts"][0]
            for path in tmp_path.rglob("answers/*/*.json")
        }
        assert answered == set(PROMPTS)


def test_the_budget_ends_the_stage(tmp_path: Path) -> None:
    with ChatProxy(None, lambda number, body: f"text:{GOOD}") as proxy:
        limited = stage(tmp_path, proxy.url, max_calls=3)
        with pytest.raises(BudgetError):
            limited.open(LocalHost()).work(RefineTask(PROMPTS), "a")
        assert BudgetError in limited.fatal
        assert len(proxy.calls) == 3
