"""Gemini's backend against a local server that follows the models of the official client; Google's was not asked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lrag_ray.chat.client import ChatClient
from lrag_ray.chat.messages import Media, Message, Question, text
from lrag_ray.chat.store import AnswerRecord, ChatStore
from lrag_ray.config.chat import ChatSection
from lrag_ray.errors import ChatError
from lrag_ray.store.address import Storage
from tests.chat.gemini_server import GeminiServer, blocked, failed, said

KEY = "a-key-that-must-be-nowhere-5555555555"
VIDEO = Media("video/mp4", b"not really a video", fps=2.0)
ASKED = [Question((text("system", "Be brief."), Message("user", ("Rate it.", VIDEO))), vote) for vote in range(3)]


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("G_KEY", KEY)


def client(server: GeminiServer, run: Path, **changes: Any) -> ChatClient:
    values: dict[str, Any] = {"backend": "gemini", "model": "judge-1", "base_url": server.url, "key_env": "G_KEY"}
    return ChatClient(
        ChatSection(**values | {"seed": 5, "temperature": 0.5, "attempts": 4} | changes), ChatStore(Storage(str(run)))
    )


def test_a_video_is_uploaded_once_without_a_name_and_deleted(tmp_path: Path) -> None:
    with GeminiServer(lambda number: said("<score>4</score>")) as server:
        with client(server, tmp_path) as asking:
            answers = asking.ask(ASKED)
        assert all(isinstance(answer, AnswerRecord) and answer.text == "<score>4</score>" for answer in answers)
        assert list(server.uploads.values()) == [VIDEO.data]
        (request,) = server.upload_requests
        assert set(request["body"].get("file", {})) <= {"mimeType", "sizeBytes", "size_bytes", "mime_type"}
        assert not any("filename" in name.lower() or "file-name" in name.lower() for name in request["headers"])
        assert server.deleted == list(server.uploads)
        assert server.keys == {KEY}
        call = server.calls[0]
        parts = call["contents"][0]["parts"]
        assert parts[0]["text"] == "Rate it."
        # Both spellings are JSON forms of the same field; the library writes the second.
        assert sorted(parts[1]["fileData"].values())[0].endswith("/files/f1")
        assert parts[1]["videoMetadata"]["fps"] == 2.0
        assert call["systemInstruction"]["parts"][0]["text"] == "Be brief."
        assert sorted(c["generationConfig"]["seed"] for c in server.calls) == [5, 6, 7]
        with client(server, tmp_path) as asking:
            asking.ask(ASKED)
        assert len(server.calls) == 3
    spent = ChatStore(Storage(str(tmp_path))).spent()
    assert (spent.calls, spent.input_tokens, spent.output_tokens) == (3, 900, 30)
    assert not any(KEY in path.read_text() for path in tmp_path.rglob("*.json"))


def test_a_server_that_sends_a_video_somewhere_else_does_not_get_it_there(tmp_path: Path) -> None:
    with GeminiServer(lambda number: said("<score>4</score>")) as server:
        server.uploads_to = "http://127.0.0.1:9"
        with client(server, tmp_path) as asking, pytest.raises(ChatError, match=r"127\.0\.0\.1:9/.* is not followed"):
            asking.ask(ASKED)
        assert not server.calls and not server.uploads


def test_requests_and_answers_of_the_local_server_fit_the_models_of_the_official_client(tmp_path: Path) -> None:
    from google.genai import types

    for _, body in (said("text"), said("half", "MAX_TOKENS"), said("", "SAFETY"), blocked()):
        types.GenerateContentResponse.model_validate(body)
    with GeminiServer(lambda number: said("fine")) as server:
        with client(server, tmp_path) as asking:
            asking.ask(ASKED[:1])
        (call,) = server.calls
        types.File.model_validate(server.file("files/f1"))
    assert call.keys() == {"contents", "systemInstruction", "generationConfig"}
    for content in (*call["contents"], call["systemInstruction"]):
        types.Content.model_validate(content)
    types.GenerationConfig.model_validate(call["generationConfig"])
    (upload,) = server.upload_requests
    types.File.model_validate(upload["body"].get("file", {}))
    with pytest.raises(ValueError, match="nope"):
        types.GenerateContentResponse.model_validate({"candidates": [{"nope": 1}]})


def test_limits_and_errors_are_waited_for(tmp_path: Path) -> None:
    script = [
        failed(429, "RESOURCE_EXHAUSTED", "0.2s"),
        failed(503, "UNAVAILABLE"),
        (200, {"candidates": []}),
        said("ok"),
    ]
    with GeminiServer(lambda number: script[number]) as server, client(server, tmp_path) as asking:
        (answer,) = asking.ask(ASKED[:1])
        assert isinstance(answer, AnswerRecord)
        assert answer.text == "ok"
        assert len(server.calls) == 4


@pytest.mark.parametrize("answer", [blocked(), said("", "SAFETY")])
def test_a_filter_is_a_refusal(tmp_path: Path, answer: Any) -> None:
    with GeminiServer(lambda number: answer) as server, client(server, tmp_path) as asking:
        (found,) = asking.ask(ASKED[:1])
        assert isinstance(found, AnswerRecord)
        assert found.finish == "refused"
        assert len(server.calls) == 1


def test_a_cut_answer_says_so(tmp_path: Path) -> None:
    with GeminiServer(lambda number: said("half", "MAX_TOKENS")) as server, client(server, tmp_path) as asking:
        (found,) = asking.ask(ASKED[:1])
        assert isinstance(found, AnswerRecord)
        assert found.finish == "length"


@pytest.mark.parametrize(
    ("answer", "message"),
    [(failed(403, "PERMISSION_DENIED"), "check the key in G_KEY"), (failed(404, "NOT_FOUND"), "does not have it")],
)
def test_a_refused_key_and_an_unknown_model_end_the_work(tmp_path: Path, answer: Any, message: str) -> None:
    with (
        GeminiServer(lambda number: answer) as server,
        client(server, tmp_path) as asking,
        pytest.raises(ChatError, match=message),
    ):
        asking.ask(ASKED[:1])
