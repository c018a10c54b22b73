from __future__ import annotations

import gzip
import io
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save

from lrag_ray.chat.backend import Backend, RejectedError, retry_after
from lrag_ray.chat.client import ChatClient, LeftError, Outcome, UnansweredError, check_backend
from lrag_ray.chat.local_backend import folder_digest
from lrag_ray.chat.messages import Media, Message, Question, Reply, Usage, text
from lrag_ray.chat.model_folder import generation_settings
from lrag_ray.chat.store import AnswerRecord, ChatStore
from lrag_ray.config.chat import ChatSection
from lrag_ray.errors import BudgetError, ChatError
from lrag_ray.store.address import Storage
from lrag_ray.wan import tokenizer_process
from lrag_ray.wan.tokenizer_process import TokenizerError, TokenizerProcess
from tests.chat.servers import ChatProxy, Fault
from tests.chat.tiny_models import ANSWERS, chat_model

KEY = "a-key-that-must-be-nowhere-1234567890"


def questions(count: int) -> list[Question]:
    return [Question((text("system", "Be brief."), text("user", f"Question {i}"))) for i in range(count)]


def section(proxy: ChatProxy, **changes: Any) -> ChatSection:
    values: dict[str, Any] = {"backend": "openai", "model": "tiny", "base_url": proxy.url, "max_tokens": 8}
    return ChatSection(**values | changes)


def texts(outcomes: list[Outcome]) -> list[str]:
    assert all(isinstance(outcome, AnswerRecord) for outcome in outcomes)
    return [outcome.text for outcome in outcomes if isinstance(outcome, AnswerRecord)]


def only(**faults: Fault) -> Callable[[int, dict[str, Any]], Fault | None]:
    """Faults by number of the call: c0, c1, …"""
    return lambda number, body: faults.get(f"c{number}")


def picture() -> Media:
    from PIL import Image

    data = io.BytesIO()
    Image.new("RGB", (56, 56), (200, 10, 10)).save(data, "JPEG")
    return Media("image/jpeg", data.getvalue())


def test_a_real_server_is_asked_through_every_fault_and_never_twice(
    served: tuple[Path, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, port = served
    monkeypatch.setenv("MY_KEY", KEY)
    faults = only(c0="429 1", c1="500", c2="cut", c3="silence", c4="not json", c5="no message")
    asked = [*questions(5), Question((Message("user", ("Rate this.", picture(), picture())),))]
    with ChatProxy(port, faults) as proxy:
        config = section(proxy, model=str(folder), key_env="MY_KEY", concurrency=3, timeout_s=1.5, attempts=8)
        first = texts(ChatClient(config, ChatStore(Storage(str(tmp_path)))).ask(asked))
        assert first == [ANSWERS[0]] * 6
        assert len(proxy.calls) == 12
        assert set(proxy.answered.values()) == {1} or sum(proxy.answered.values()) <= 8  # a cut answer was one
        assert proxy.most_at_once <= 3
        assert all(headers["authorization"] == f"Bearer {KEY}" for headers in proxy.headers)
        assert ChatStore(Storage(str(tmp_path))).spent().calls == 12
        again = texts(ChatClient(config, ChatStore(Storage(str(tmp_path)))).ask(asked))
        assert again == first
        assert len(proxy.calls) == 12
    stored = [path.read_text() for path in tmp_path.rglob("*.json")]
    assert len(stored) == 18
    assert not any(KEY in content for content in stored)


def test_all_threads_wait_as_long_as_the_server_asks(tmp_path: Path) -> None:
    began: list[float] = []

    def fault(number: int, body: dict[str, Any]) -> Fault:
        began.append(time.monotonic())
        return "429 2" if number == 0 else "text:fine"

    with ChatProxy(None, fault) as proxy:
        texts(ChatClient(section(proxy, concurrency=1), ChatStore(Storage(str(tmp_path)))).ask(questions(2)))
    assert began[1] - began[0] >= 2


def test_a_budget_of_calls_holds_over_starts_and_threads(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    with ChatProxy(None, lambda number, body: "text:fine") as proxy:
        with pytest.raises(BudgetError, match=r"5 calls \(max_calls\) is used up"):
            ChatClient(section(proxy, max_calls=5), ChatStore(storage)).ask(questions(8))
        assert len(proxy.calls) == 5
        with pytest.raises(BudgetError):
            ChatClient(section(proxy, max_calls=5), ChatStore(storage)).ask(questions(8))
        assert len(proxy.calls) == 5
        assert texts(ChatClient(section(proxy, max_calls=8), ChatStore(storage)).ask(questions(8))) == ["fine"] * 8
        assert len(proxy.calls) == 8


def test_a_budget_of_tokens_counts_what_the_server_counts(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    prices = {"price_per_million_input": 1e5, "price_per_million_output": 2e5}
    with ChatProxy(None, lambda number, body: "text:fine") as proxy:
        limited = section(proxy, max_total_tokens=50, concurrency=1, **prices)
        with pytest.raises(BudgetError, match="max_total_tokens"):
            ChatClient(limited, ChatStore(storage)).ask(questions(8))
        # 15 tokens a call, and 8 more are set aside for the next answer: the fourth has no room.
        assert len(proxy.calls) == 3
        spent = ChatStore(storage).spent()
        assert (spent.calls, spent.input_tokens, spent.output_tokens) == (3, 30, 15)
        assert spent.cost(limited) == pytest.approx(6.0)


def test_two_processes_number_their_calls_apart(tmp_path: Path) -> None:
    stores = [ChatStore(Storage(str(tmp_path))) for _ in range(3)]
    with ChatProxy(None, lambda number, body: "text:fine") as proxy:
        config = section(proxy)
        for store in stores:
            store.spent()
        threads = [
            threading.Thread(target=ChatClient(config, store).ask, args=(questions(12)[i * 4 : i * 4 + 4],))
            for i, store in enumerate(stores)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert ChatStore(Storage(str(tmp_path))).spent().calls == 12


def test_equal_questions_of_one_call_are_asked_once_and_votes_apart(tmp_path: Path) -> None:
    (one,) = questions(1)
    with ChatProxy(None, lambda number, body: "text:fine") as proxy:
        client = ChatClient(section(proxy, seed=7), ChatStore(Storage(str(tmp_path))))
        client.ask([one, one, Question(one.messages, vote=1)])
        assert sorted(call["seed"] for call in proxy.calls) == [7, 8]


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("401", "refuses the key"),
        ("402", "no credit left"),
        ("404", "does not serve it"),
        ("307 http://127.0.0.1:9/v1", r"sends its requests on to http://127\.0\.0\.1:9/v1, which is not followed"),
        ("500", "answers none of 3 questions in a row"),
    ],
)
def test_what_every_question_would_meet_ends_the_work(tmp_path: Path, fault: Fault, message: str) -> None:
    with ChatProxy(None, lambda number, body: fault) as proxy:
        with pytest.raises(ChatError, match=message):
            ChatClient(section(proxy, attempts=2, concurrency=1), ChatStore(Storage(str(tmp_path)))).ask(questions(3))
        assert len(proxy.calls) == (6 if fault == "500" else 1)


def test_a_question_that_the_server_fails_on_leaves_the_others_and_is_asked_at_the_next_start(tmp_path: Path) -> None:
    broken = {"fault": "500"}
    fault = lambda number, body: broken["fault"] if "1" in str(body["messages"]) else "text:fine"  # noqa: E731
    storage = Storage(str(tmp_path))
    with ChatProxy(None, fault) as proxy:
        config = section(proxy, attempts=2)
        found = ChatClient(config, ChatStore(storage)).ask(questions(5))
        assert [isinstance(each, UnansweredError) for each in found] == [False, True, False, False, False]
        assert len(proxy.calls) == 6
        broken["fault"] = "text:at last"
        assert texts(ChatClient(config, ChatStore(storage)).ask(questions(5)))[1] == "at last"
        assert len(proxy.calls) == 7


@pytest.mark.parametrize(
    "body",
    [
        b'{"choices": [{"message": {"content": "a \\ud800 b"}}], "x": NaN, "y": 1e999, "z": 99999999999999999999}',
        b'{"choices": [{"message": {"content": "a \\u0000 b"}, "finish_reason": 7}], "usage": [1]}',
        b"[" * 100_000,
        b"\xff\xfe",
        b"null",
        b'{"choices": [{"message": {"content": {"a": 1}}}]}',
        b'{"choices": [{"message": {"content": "long"}}], "x": "%s"}' % (b"x" * (1 << 21)),
        gzip.compress(b'{"choices": [{"message": {"content": "packed"}}], "x": "%s"}' % bytes(1 << 26)),
    ],
)
def test_an_odd_answer_is_stored_or_asked_for_again(tmp_path: Path, body: bytes) -> None:
    storage = Storage(str(tmp_path))
    with ChatProxy(None, lambda number, asked: body if number == 0 else "text:fine") as proxy:
        (answer,) = texts(ChatClient(section(proxy), ChatStore(storage)).ask(questions(1)))
        assert answer in ("fine", "a ? b", "a \0 b")
        assert len(proxy.calls) == (2 if answer == "fine" else 1)
        assert texts(ChatClient(section(proxy), ChatStore(storage)).ask(questions(1))) == [answer]


def test_a_tight_budget_of_tokens_waits_for_calls_that_are_under_way(tmp_path: Path) -> None:
    """Each call sets 8 tokens aside and uses 15: four at a time would not fit into 60, one after the other they do."""
    with ChatProxy(None, lambda number, body: "text:fine") as proxy:
        limited = section(proxy, max_total_tokens=60, concurrency=4, max_tokens=40)
        with pytest.raises(BudgetError):
            ChatClient(limited, ChatStore(Storage(str(tmp_path)))).ask(questions(4))
        assert len(proxy.calls) == 2
        enough = section(proxy, max_total_tokens=85, concurrency=4, max_tokens=40)
        assert texts(ChatClient(enough, ChatStore(Storage(str(tmp_path)))).ask(questions(4))) == ["fine"] * 4


def test_a_rejected_question_leaves_the_others(tmp_path: Path) -> None:
    with ChatProxy(None, lambda number, body: "400" if "1" in str(body["messages"]) else "text:fine") as proxy:
        found = ChatClient(section(proxy), ChatStore(Storage(str(tmp_path)))).ask(questions(3))
    assert [isinstance(each, RejectedError) for each in found] == [False, True, False]


def test_a_refusal_is_an_answer(tmp_path: Path) -> None:
    with ChatProxy(None, only(c0="refusal")) as proxy:
        for _ in range(2):
            (answer,) = ChatClient(section(proxy), ChatStore(Storage(str(tmp_path)))).ask(questions(1))
            assert isinstance(answer, AnswerRecord)
            assert (answer.finish, answer.text) == ("refused", "I can't help with that.")
        assert len(proxy.calls) == 1


def test_a_long_wait_that_the_server_asks_for_ends_the_work_at_once(tmp_path: Path) -> None:
    with (
        ChatProxy(None, lambda number, body: "429 7200") as proxy,
        pytest.raises(ChatError, match=r"asks to wait 720[01] s"),
    ):
        ChatClient(section(proxy), ChatStore(Storage(str(tmp_path)))).ask(questions(1))


def test_a_worker_that_must_leave_makes_no_further_call(tmp_path: Path) -> None:
    with ChatProxy(None, lambda number, body: "text:fine") as proxy:
        client = ChatClient(
            section(proxy, concurrency=1),
            ChatStore(Storage(str(tmp_path))),
            keep_going=lambda: len(proxy.calls) < 2,
        )
        with pytest.raises(LeftError):
            client.ask(questions(5))
        assert len(proxy.calls) == 2


def test_after_ctrl_c_no_call_begins(tmp_path: Path) -> None:
    """Neither those in the queue nor the next attempt of one that failed."""

    def fault(number: int, body: dict[str, Any]) -> Fault:
        if number == 0:
            return "500"
        if number == 1:
            time.sleep(0.1)
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
            time.sleep(0.1)
        return "text:fine"

    with ChatProxy(None, fault) as proxy:
        with pytest.raises(KeyboardInterrupt):
            ChatClient(section(proxy, concurrency=2), ChatStore(Storage(str(tmp_path)))).ask(questions(20))
        time.sleep(0.2)
        assert len(proxy.calls) == 2


def test_a_server_that_repeats_the_key_does_not_get_it_stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", KEY)
    with ChatProxy(None, lambda number, body: f"text:you sent {KEY}") as proxy:
        (answer,) = texts(
            ChatClient(section(proxy, key_env="MY_KEY"), ChatStore(Storage(str(tmp_path)))).ask(questions(1))
        )
    assert answer == "you sent ***"
    assert KEY not in "".join(path.read_text() for path in tmp_path.rglob("*.json"))


@pytest.mark.parametrize("body", [f"{{you sent {KEY}".encode(), f'"{"x" * 150}{KEY}"'.encode()])
def test_a_malformed_answer_that_repeats_the_key_is_quoted_without_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: bytes
) -> None:
    monkeypatch.setenv("MY_KEY", KEY)
    with ChatProxy(None, lambda number, asked: body) as proxy:
        config = section(proxy, key_env="MY_KEY", attempts=1)
        (found,) = ChatClient(config, ChatStore(Storage(str(tmp_path)))).ask(questions(1))
    stored = "".join(path.read_text() for path in tmp_path.rglob("*.json"))
    assert isinstance(found, UnansweredError)
    assert "*" in stored
    assert not any(KEY[:20] in text for text in (str(found), stored))


def test_an_answer_that_the_server_breaks_off_is_asked_for_again(tmp_path: Path) -> None:
    broken = json.dumps({"choices": [{"message": {"content": "half an"}, "finish_reason": "abort"}]}).encode()
    with ChatProxy(None, lambda number, body: "text:whole" if number else broken) as proxy:
        assert texts(ChatClient(section(proxy), ChatStore(Storage(str(tmp_path)))).ask(questions(1))) == ["whole"]


def test_every_model_of_a_run_has_a_budget_and_prices_of_its_own(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    with ChatProxy(None, lambda number, body: "text:fine") as proxy:
        cheap = section(proxy, model="cheap", max_calls=3, price_per_million_input=1e5)
        dear = section(proxy, model="dear", max_calls=2, max_total_tokens=40, price_per_million_input=1e6)
        for each, count in ((cheap, 3), (dear, 2)):
            assert texts(ChatClient(each, ChatStore(storage)).ask(questions(count))) == ["fine"] * count
        for each in (cheap, dear):
            with pytest.raises(BudgetError):
                ChatClient(each, ChatStore(storage)).ask(questions(4))
    store = ChatStore(storage)
    assert [store.spent(each).calls for each in (cheap, dear, None)] == [3, 2, 5]
    assert [store.spent(each).cost(each) for each in (cheap, dear)] == pytest.approx([3.0, 20.0])


def test_a_damaged_answer_is_asked_again_and_replaced(tmp_path: Path) -> None:
    with ChatProxy(None, lambda number, body: "text:fine") as proxy:
        config, storage = section(proxy), Storage(str(tmp_path))
        ChatClient(config, ChatStore(storage)).ask(questions(1))
        (path,) = tmp_path.rglob("answers/*/*.json")
        path.write_text(path.read_text()[:40])
        for _ in range(2):
            assert texts(ChatClient(config, ChatStore(storage)).ask(questions(1))) == ["fine"]
        assert len(proxy.calls) == 2


@pytest.mark.parametrize("backend", ["openai", "gemini"])
def test_a_missing_key_is_reported_by_its_variable(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OPENAI_API_KEY", "GEMINI_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ChatError, match=f"{backend.upper()}_API_KEY holds no key"):
        check_backend(ChatSection.model_validate({"backend": backend, "model": "m"}))


def test_retry_after_is_a_number_or_a_date() -> None:
    assert retry_after("1.5") == 1.5
    assert retry_after("Thu, 01 Jan 1970 00:00:00 GMT") == 0
    soon = datetime.now(UTC) + timedelta(seconds=90)
    for zone in ("GMT", "-0000", ""):  # none is UTC
        assert retry_after(f"{soon:%a, %d %b %Y %H:%M:%S} {zone}".strip()) == pytest.approx(90, abs=3)
    assert retry_after("soon") is None


def test_a_local_folder_answers_in_batches(tmp_path: Path) -> None:
    folder = chat_model(tmp_path / "model", [ANSWERS[0]])
    config = ChatSection(backend="local", model=str(folder), max_tokens=8, concurrency=4)
    store = ChatStore(Storage(str(tmp_path / "run")))
    with ChatClient(config, store) as client:
        assert texts(client.ask(questions(6))) == [ANSWERS[0]] * 6
    with ChatClient(config, store) as client:
        client.ask(questions(6))
        assert client._backend is None, "nothing is loaded where all is answered"
    assert store.spent().calls == 6
    assert json.loads(next((tmp_path / "run").rglob("answers/*/*.json")).read_text())["finish"] == "stop"


class Picky(Backend):
    """Takes several questions in one pass, and rejects all of them for one."""

    batched = True

    def ask(self, questions: Sequence[Question]) -> list[Reply]:
        if any("Question 1" in str(question.messages) for question in questions):
            raise RejectedError("it holds the mark of a picture")
        return [Reply("yes", "stop", Usage(), None) for _ in questions]


def test_a_question_that_is_rejected_does_not_take_the_others_of_its_batch_with_it(tmp_path: Path) -> None:
    config = ChatSection(backend="local", model=str(chat_model(tmp_path / "model", [])), concurrency=3)
    with ChatClient(config, ChatStore(Storage(str(tmp_path / "run"))), Picky()) as client:
        outcomes = client.ask(questions(3))
    assert isinstance(outcomes[1], RejectedError)
    assert texts([outcomes[0], outcomes[2]]) == ["yes", "yes"]


def test_a_pipe_in_a_model_folder_is_not_opened(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    os.mkfifo(tmp_path / "generation_config.json")
    with pytest.raises(ChatError, match=r"generation_config\.json is a pipe, a socket or a device\. Fix: "):
        folder_digest(str(tmp_path))


@pytest.mark.parametrize(
    ("file", "content", "named"),
    [
        (
            "adapter_config.json",
            {"base_model_name_or_path": "evil/base"},
            "adapter_config.json leads to",
        ),
        (
            "config.json",
            {"text_config": {"attn_implementation": "evil/kernel"}},
            "its own .attn_implementation",
        ),
        ("config.json", {"_attn_implementation": {"": "kernels-community/evil:run"}}, "_attn_implementation"),
        ("config.json", {"experts_implementation": ["evil"]}, "experts_implementation"),
        (
            "model.safetensors.index.json",
            {"weight_map": {"a": "../evil.safetensors"}},
            "'../evil.safetensors' as",
        ),
        ("model.safetensors.index.json", {"weight_map": {"a": "evil.bin"}}, "'evil.bin' as a part"),
        ("model.safetensors.index.json", [], "is not an index of weights"),
        ("config.json", "[" * 100_000, "recursion"),
        ("vocab.json", "[" + "{}," * 5_000_000 + "1]", "would take gigabytes"),
    ],
)
def test_what_leads_out_of_a_model_folder_is_refused_before_a_library_opens_it(
    tmp_path: Path, file: str, content: object, named: str
) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / file).write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(ChatError, match=rf"is not read: .*{named}.*Fix: "):
        folder_digest(str(tmp_path))


def test_a_chat_template_and_a_decoder_have_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = chat_model(tmp_path / "model", [ANSWERS[0]])
    stored = json.loads((folder / "tokenizer.json").read_text())
    stored["decoder"] = {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 5_000_000}
    (folder / "tokenizer.json").write_text(json.dumps(stored))
    # With it, the library takes the decoder of the model's kind.
    (folder / "config.json").unlink()
    texts = TokenizerProcess(folder)
    messages = [{"role": "user", "content": "a"}]
    assert texts.rendered(messages, "{{ messages[0].content }}!") == "a!"
    for template, problem in (
        ("{{ messages.__class__.__mro__ }}", "unsafe"),
        ("{% include 'tokenizer.json' %}", "no loader"),
        ("{{ 'a' * 5000000 }}", "5,000,000 characters"),
        ("{{ 'a' * 200000 }}", "200,000 tokens"),
        ("{{ 1 / 0 }}", "division"),
    ):
        with pytest.raises(TokenizerError, match=problem):
            texts.rendered(messages, template)
    with pytest.raises(TokenizerError, match="5,000,000 characters"):
        texts.decoded([stored["model"]["vocab"]["a"]])
    monkeypatch.setattr(tokenizer_process, "ENCODE_S", 0.5)
    forever = "{% for a in range(99999) %}" * 3 + "{% endfor %}" * 3
    with pytest.raises(TokenizerError, match=r"more than 0\.5 s"):
        texts.rendered(messages, forever)


def test_of_the_settings_in_a_model_folder_those_count_that_cannot_take_memory() -> None:
    kept = SimpleNamespace(eos_token_id=[1, 2], num_beams=10**9, num_return_sequences=3, repetition_penalty=1.05)
    assert generation_settings(kept) == {"eos_token_id": [1, 2], "repetition_penalty": 1.05}
    for name, value in (("eos_token_id", "x"), ("eos_token_id", [[1]]), ("pad_token_id", -1), ("bos_token_id", [1])):
        with pytest.raises(ValueError, match=f"{name} is "):
            generation_settings(SimpleNamespace(**{name: value}))


@pytest.mark.parametrize(
    ("file", "content"),
    [
        # Tensors of another model: the library would answer with random ones.
        ("model.safetensors", save({"other": torch.zeros(2)}, {"format": "pt"})),
        ("model.safetensors", (1 << 30).to_bytes(8, "little") + b"{"),
        ("model.safetensors", b"\x80\x04."),
        ("tokenizer.json", b'{"version": "1.0", "mod'),
        ("config.json", b'{"model_type": "evil", "auto_map": {"AutoConfig": "evil.Config"}}'),
    ],
)
def test_a_damaged_or_strange_model_folder_ends_the_work_with_its_name(
    tmp_path: Path, file: str, content: bytes
) -> None:
    folder = chat_model(tmp_path / "model", [ANSWERS[0]])
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'acted')!r}, 'w')\n")
    (folder / file).write_bytes(content)
    config = ChatSection(backend="local", model=str(folder), max_tokens=8)
    with (
        pytest.raises(ChatError, match=r"model '.*' (?:cannot be loaded|is not read): [\s\S]*Fix: "),
        ChatClient(config, ChatStore(Storage(str(tmp_path / "run")))) as client,
    ):
        client.ask(questions(1))
    assert not (tmp_path / "acted").exists()
