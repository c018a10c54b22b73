"""The judge on a run with real videos."""

from __future__ import annotations

import base64
import io
import json
import pickle
import re
from pathlib import Path
from typing import Any

import pytest

from lrag_ray.chat.store import ChatStore
from lrag_ray.config.schema import ScoringSection
from lrag_ray.errors import ChatError, ConfigError
from lrag_ray.report import build_report
from lrag_ray.report.collect import collect
from lrag_ray.scoring.judge.cases import sampled_units
from lrag_ray.scoring.judge.media import shown_frames
from lrag_ray.scoring.judge.suite import NOT_VBENCH, Judge
from lrag_ray.scoring.suite import StoppedError, UnscorableError
from lrag_ray.store.rollouts import RolloutRun
from tests.chat.servers import ChatProxy
from tests.report.make_run import make_identity, make_run, score_all
from tests.report.test_build import Page

KEY = "a-key-that-must-be-nowhere-0987654321"
SECRETIVE = ("base", "rag", "tiny", "rollouts", "attempt", "mp4", "lrag")


@pytest.fixture
def run(tmp_path: Path) -> RolloutRun:
    return make_run(str(tmp_path / "run"), ["a fox in snow", "a river at dawn"], horizons=(6,))


def judge(proxy: ChatProxy, model: str = "m", **settings: Any) -> Judge:
    chat: dict[str, Any] = {"backend": "openai", "model": model, "base_url": proxy.url, "max_tokens": 16}
    chat |= settings.pop("chat", {})
    return Judge.of(ScoringSection(suite="judge", settings={"chat": chat, "max_side": 64, **settings}))


def score(suite: Judge, run: RolloutRun, keep_going: Any = lambda: True) -> dict[str, str]:
    """Reasons by task, of those that have no score. As the stage does it, pickled suite included."""
    worker = pickle.loads(pickle.dumps(suite)).worker(run.storage, run.storage, threads=1, device="cpu")
    reasons = {}
    for task in suite.pending(run):
        try:
            worker.score(pickle.loads(pickle.dumps(task.payload)), keep_going)
        except UnscorableError as error:
            reasons[task.name] = str(error)
    return reasons


def test_a_real_vision_model_judges_every_case_once_through_faults(
    served: tuple[Path, int], run: RolloutRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, port = served
    monkeypatch.setenv("JUDGE_KEY", KEY)
    faults = {1: "429 1", 3: "500", 4: "cut", 6: "text:no tag here"}
    with ChatProxy(port, lambda number, body: faults.get(number)) as proxy:
        chat = {"temperature": 1.0, "key_env": "JUDGE_KEY"}
        suite = judge(proxy, str(folder), votes=3, chat=chat)
        suite.check_weights()
        assert score(suite, run) == {}
        made = len(proxy.calls)
        # 4 videos, 3 votes, 3 calls without an answer, 1 answer without a score.
        assert made == 12 + 3 + 1
        assert score(judge(proxy, str(folder), votes=3, chat=chat), run) == {}
        assert len(proxy.calls) == made
        # Records that are lost are made again from the stored answers.
        for path in Path(run.storage.root).rglob("cases/**/*.json"):
            path.unlink()
        assert score(judge(proxy, str(folder), votes=3, chat=chat), run) == {}
        assert len(proxy.calls) == made
        for call in proxy.calls:
            said = json.dumps([message["content"] for message in call["messages"] if message["role"] == "user"])
            hidden = re.sub(r"base64,[A-Za-z0-9+/=]*", "", said)
            assert not any(name in hidden for name in SECRETIVE), hidden[:500]
    found = collect([run], "judge")
    assert {video.values["exposure"] for video in found.scores.videos} <= {2, 8 / 3, 10 / 3, 4}
    assert {vote.score for case in found.scores.records for vote in case.votes} == {2, 4}, "votes are sampled"
    assert any("alpha between votes" in line for line in found.scores.remarks_on_all)
    everything = [path for path in Path(run.storage.root).rglob("*") if path.is_file()]
    assert not any(KEY.encode() in path.read_bytes() for path in everything)
    assert ChatStore(run.storage).spent().calls == made


def pictures(call: dict[str, Any]) -> list[Any]:
    from PIL import Image

    parts = call["messages"][0]["content"]
    urls = [part["image_url"]["url"] for part in parts if part["type"] == "image_url"]
    return [Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))) for url in urls]


def test_the_judge_sees_pictures_without_a_trace_of_their_origin(run: RolloutRun) -> None:
    with ChatProxy(None, lambda number, body: "text:<score>3</score>") as proxy:
        assert score(judge(proxy, fps=4.0), run) == {}
        for call in proxy.calls:
            found = pictures(call)
            # 21 video frames at 16 fps are 1.3 s: 5 pictures of at most 64 pixels.
            assert [picture.size for picture in found] == [(64, 64)] * 5
            assert not any(picture.getexif() or picture.info.get("comment") for picture in found)


def test_a_whole_video_is_cut_to_its_duration_and_has_no_name(run: RolloutRun, tmp_path: Path) -> None:
    from lrag_ray.video.mp4 import iterate_frames

    with ChatProxy(None, lambda number, body: "text:<score>3</score>") as proxy:
        assert score(judge(proxy, media="video"), run) == {}
        (part,) = [p for p in proxy.calls[0]["messages"][0]["content"] if p["type"] == "video_url"]
    data = base64.b64decode(part["video_url"]["url"].partition(",")[2])
    (tmp_path / "seen.mp4").write_bytes(data)
    assert len(list(iterate_frames(tmp_path / "seen.mp4"))) == 21
    assert not any(name.encode() in data for name in ("fox", "rag", "attempt"))


def test_frames_are_spread_evenly() -> None:
    assert shown_frames(477, 16, 1.0, 64) == [int(i * 477 / 30) for i in range(30)]
    assert len(shown_frames(477, 16, 4.0, 32)) == 32
    assert shown_frames(1, 16, 1.0, 32) == [0]


def test_an_answer_that_never_has_a_score_is_stored_and_reported(run: RolloutRun) -> None:
    with ChatProxy(None, lambda number, body: "text:who knows") as proxy:
        reasons = score(judge(proxy, parse_retries=1), run)
        assert len(reasons) == 4
        assert "no answer has a score: it holds no <score>" in next(iter(reasons.values()))
        assert len(proxy.calls) == 8
        assert "cannot be used" in proxy.calls[1]["messages"][2]["content"] or len(proxy.calls[1]["messages"]) == 1
        assert score(judge(proxy, parse_retries=1), run) == {}, "what has no score is not asked again"
        assert len(proxy.calls) == 8
    assert len(collect([run], "judge").scores.failures) == 4


def test_a_refusal_is_no_score(run: RolloutRun) -> None:
    with ChatProxy(None, lambda number, body: "refusal") as proxy:
        reasons = score(judge(proxy, parse_retries=0), run)
    assert "the judge declined" in next(iter(reasons.values()))


def test_a_used_up_budget_leaves_cases_to_the_next_start(run: RolloutRun) -> None:
    with ChatProxy(None, lambda number, body: "text:<score>3</score>") as proxy:
        reasons = score(judge(proxy, chat={"max_calls": 3}), run)
        assert len(reasons) == 1
        assert "budget of 3 calls" in next(iter(reasons.values()))
        assert score(judge(proxy, chat={"max_calls": 9}), run) == {}
        assert len(proxy.calls) == 4


def test_a_server_that_refuses_the_key_is_asked_once(run: RolloutRun) -> None:
    with ChatProxy(None, lambda number, body: "401") as proxy:
        assert len(score(judge(proxy, chat={"concurrency": 1}), run)) == 4
        assert len(proxy.calls) == 1


def test_a_worker_that_must_stop_keeps_its_answers(run: RolloutRun) -> None:
    with ChatProxy(None, lambda number, body: "text:<score>3</score>") as proxy:
        suite = judge(proxy, chat={"concurrency": 1, "temperature": 1}, votes=3)
        with pytest.raises(StoppedError):
            score(suite, run, keep_going=lambda: len(proxy.calls) < 2)
        assert score(suite, run) == {}
        assert len(proxy.calls) == 12


def test_cases_are_the_same_for_all_methods_and_stay_when_the_run_grows() -> None:
    small = make_identity([f"prompt {i}" for i in range(40)], ["base", "rag"])
    large = make_identity([f"prompt {i}" for i in range(44)], ["base", "rag", "other"])
    first, second = sampled_units(small, 20, 0), sampled_units(large, 20, 0)
    assert len(first) == len(second) == 20
    assert len(first & second) >= 16
    assert sampled_units(small, 20, 1) != first
    assert len(sampled_units(small, None, 0)) == 40


def test_pairs_are_asked_in_both_orders_and_a_judge_of_places_is_found_out(run: RolloutRun) -> None:
    with ChatProxy(None, lambda number, body: "text:I like it. <choice>A</choice>") as proxy:
        assert score(judge(proxy, questions=["preference"]), run) == {}
        assert len(proxy.calls) == 4  # 2 prompts, one pair, 2 orders
        orders = [[picture.tobytes() for picture in pictures(call)] for call in proxy.calls]
        assert sorted(map(sorted, orders[:2]))[0] == sorted(orders[1])
        assert orders[0] != orders[1]
    found = collect([run], "judge")
    assert {video.values["preference"] for video in found.scores.videos} == {0.5}
    (line,) = found.scores.remarks_on_all
    assert line.startswith("Preference: 0% of 2 pairs got the same answer in both orders; the first place gets 100%")


def test_a_fair_judge_prefers_the_same_method_in_both_orders(run: RolloutRun) -> None:
    with ChatProxy(None, lambda number, body: "text:<score>3</score>") as proxy:
        score(judge(proxy, fps=4.0), run)
        of_rag = {pictures(call)[1].tobytes() for call in proxy.calls[1::2]}

    def fair(number: int, body: dict[str, Any]) -> str:
        return f"text:<choice>{'A' if pictures(body)[1].tobytes() in of_rag else 'B'}</choice>"

    with ChatProxy(None, fair) as proxy:
        score(judge(proxy, questions=["preference"], fps=4.0), run)
    values = {(v.method, v.prompt_id): v.values["preference"] for v in collect([run], "judge").scores.videos}
    assert {value for (method, _), value in values.items() if method == "rag"} == {1}
    assert {value for (method, _), value in values.items() if method == "base"} == {0}


def test_an_answer_in_one_order_alone_does_not_count(run: RolloutRun) -> None:
    """The second of two votes has no answer where the second video comes first."""
    orders: dict[str, int] = {}

    def said(number: int, body: dict[str, Any]) -> str:
        shown = json.dumps(body["messages"][0])
        orders.setdefault(shown, len(orders))
        broken = orders[shown] % 2 and body["seed"] == 2
        return "text:I cannot say" if broken else "text:<choice>A</choice>"

    with ChatProxy(None, said) as proxy:
        chat = {"concurrency": 1, "temperature": 1, "seed": 1}
        assert score(judge(proxy, questions=["preference"], votes=2, parse_retries=0, chat=chat), run) == {}
    found = collect([run], "judge")
    assert [len(case.votes) for case in found.scores.records] == [4, 4]
    assert [case.scores for case in found.scores.records] == [[1, 0], [1, 0]]
    assert {video.values["preference"] for video in found.scores.videos} == {0.5}


def test_a_pair_without_an_answer_in_both_orders_has_no_score(run: RolloutRun) -> None:
    with ChatProxy(None, lambda number, body: "text:?" if number % 2 else "text:<choice>A</choice>") as proxy:
        reasons = score(judge(proxy, questions=["preference"], parse_retries=0, chat={"concurrency": 1}), run)
    assert len(reasons) == 2
    assert "no vote has a score in both orders: it holds no <choice>" in next(iter(reasons.values()))
    assert collect([run], "judge").scores.videos == []


def test_a_score_in_the_reasoning_of_a_judge_is_not_its_answer(run: RolloutRun) -> None:
    said = "text:<think>At first <score>1</score></think>\nSteady. <score>4</score>"
    with ChatProxy(None, lambda number, body: said) as proxy:
        assert score(judge(proxy), run) == {}
    (vote,) = collect([run], "judge").scores.records[0].votes
    assert (vote.score, vote.text) == (4, "Steady. <score>4</score>")
    with ChatProxy(None, lambda number, body: "text:<think>At first <score>1</score></think>\nNo idea") as proxy:
        assert len(score(judge(proxy, "other", parse_retries=0), run)) == 4


def test_questions_of_the_user_and_several_at_once(run: RolloutRun, tmp_path: Path) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text(
        "name: mood\ntitle: Mood\nquestion: 'How does \"{prompt}\" feel?'\n"
        "scale: {lower: -2, upper: 2}\nanswer: {json: mood}\n"
    )
    said = lambda number, body: 'text:{"mood": -1}' if "feel" in str(body) else "text:<score>5</score>"  # noqa: E731
    with ChatProxy(None, said) as proxy:
        assert score(judge(proxy, questions=[str(mine), "exposure"]), run) == {}
        assert any('How does "a fox in snow" feel?' in str(call) for call in proxy.calls)
    mine.unlink()  # the record holds the question
    (data,) = [collect([run], "judge")]
    assert [measure.name for measure in data.suite.measures] == ["mood", "exposure"]
    assert {(v.values["mood"], v.values["exposure"]) for v in data.scores.videos} == {(-1, 5)}


def test_the_judge_stands_beside_another_suite_and_is_not_ranked(run: RolloutRun) -> None:
    score_all(run)
    nasty = "<script>alert(1)</script> bright <score>4</score>"
    with ChatProxy(None, lambda number, body: f"text:{nasty}") as proxy:
        score(judge(proxy), run)
    made = build_report(run)
    assert made.data.suite.name == "preview"
    html = Path(run.storage.root, "summary/report.html").read_text()
    page = Page(html)
    assert NOT_VBENCH in page.text
    assert nasty in page.text
    assert "alert(1)" not in "".join(page.scripts)
    rows = Path(run.storage.root, "summary/judge.csv").read_text().splitlines()
    assert rows[0] == "suite,measure,backbone,duration_s,method,mean,lower,upper,videos"
    assert rows[1].endswith("exposure,tiny,1.5,base,4.0,,,2")
    alone = collect([run], "judge")
    assert all(row.average_rank is None for block in alone.blocks for row in block.rows)
    assert alone.suite.title == "judge m, not VBench"


def test_what_cannot_work_is_refused_before_any_call(run: RolloutRun, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"scoring\.settings\.chat is not given"):
        Judge.of(ScoringSection(suite="judge")).check_weights()
    chat = {"backend": "openai", "model": "m"}
    with pytest.raises(ConfigError, match="all votes would be the same"):
        Judge.of(ScoringSection(suite="judge", settings={"chat": chat, "votes": 3}))
    with pytest.raises(ConfigError, match="backend local, which takes pictures"):
        Judge.of(ScoringSection(suite="judge", settings={"chat": {**chat, "backend": "local"}, "media": "video"}))
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(ChatError, match="OPENAI_API_KEY"):
        Judge.of(ScoringSection(suite="judge", settings={"chat": chat})).check_weights()


def test_a_damaged_record_is_reported_and_made_again_without_a_call(run: RolloutRun) -> None:
    with ChatProxy(None, lambda number, body: "text:<score>3</score>") as proxy:
        score(judge(proxy), run)
        path = next(Path(run.storage.root).rglob("cases/**/*.json"))
        path.write_text(path.read_text()[:50])
        found = collect([run], "judge")
        assert found.scores.damaged == [str(path.relative_to(run.storage.root))]
        path.unlink()
        assert score(judge(proxy), run) == {}
        assert len(proxy.calls) == 4


def test_the_record_of_the_judge_comes_back_without_a_call(run: RolloutRun) -> None:
    with ChatProxy(None, lambda number, body: "text:<score>3</score>") as proxy:
        score(judge(proxy), run)
        (path,) = Path(run.storage.root).rglob("judge.json")
        path.rename(path.with_suffix(".json.invalid-0123"))
        assert collect([run]).scores.videos == []
        assert score(judge(proxy), run) == {}
        assert len(proxy.calls) == 4
    assert len(collect([run], "judge").scores.videos) == 4
