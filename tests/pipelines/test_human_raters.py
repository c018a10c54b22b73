"""Human raters: the page that is sent away, in a real browser, and what comes back."""

from __future__ import annotations

import base64
import io
import json
import re
from pathlib import Path

import av
import pytest

from lrag_ray.errors import UsageError
from lrag_ray.pipelines.human_raters import choices, export_page, import_answers
from lrag_ray.report.collect import collect
from lrag_ray.scoring.judge.human import ExportKey
from lrag_ray.scoring.judge.questions import QuestionSet, Scale, load_questions
from lrag_ray.scoring.judge.settings import JudgeSettings
from lrag_ray.store.rollouts import RolloutRun
from tests.browser import BROWSER, opened
from tests.chat.servers import ChatProxy
from tests.report.make_run import make_run
from tests.scoring.judge.test_suite import judge, score

NASTY = 'a fox </script><script>document.title = "owned"</script>'


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RolloutRun:
    return make_run(str(tmp_path_factory.mktemp("human") / "run"), [NASTY, "a river at dawn"], horizons=(6,))


def key_of(run: RolloutRun, export: str) -> ExportKey:
    return ExportKey.opened(run.storage.read_bytes(f"scores/judge/1/human/{export}/key.json"))


def answers(export: str, rater: str, given: dict[str, str]) -> str:
    return json.dumps({"export": export, "rater": rater, "answers": {n: {"answer": a} for n, a in given.items()}})


def container_facts(video: bytes) -> str:
    """What a video file says besides its pixels."""
    with av.open(io.BytesIO(video)) as container:
        streams = [(stream.type, stream.metadata, stream.duration, stream.codec.name) for stream in container.streams]
        return str((container.metadata, streams, container.format.name))


@pytest.mark.skipif(BROWSER is None, reason="no chromium here")
def test_a_person_rates_in_a_browser_and_the_answers_come_back(run: RolloutRun, tmp_path: Path) -> None:
    page = tmp_path / "rating.html"
    made = export_page(run.uri, str(page), JudgeSettings(questions=("exposure", "preference"), max_side=64))
    assert (made.cases, made.videos) == (6, 4)  # 4 videos, and a pair for each of 2 prompts
    with opened(page, tmp_path) as tab:
        assert tab.run("document.title") == "Video rating"
        tab.run("const r = document.getElementById('rater'); r.value = 'Ann'; r.dispatchEvent(new Event('input'))")
        for number in range(made.cases):
            assert tab.until("[...document.querySelectorAll('video')].every(v => v.readyState >= 2 || v.error)")
            assert tab.run("[...document.querySelectorAll('video')].every(v => !v.error && v.videoWidth === 64)")
            assert f"Case {number + 1} of 6, {number} answered" in tab.run(
                "document.getElementById('progress').textContent"
            )
            if number == 2:
                tab.call("Page.reload")
                assert tab.until("document.getElementById('progress')?.textContent") == "Case 3 of 6, 2 answered"
            tab.run('document.querySelector(\'input[value="4"], input[value="A"]\').click()')
            tab.run("document.getElementById('next').click()")
        tab.call("Page.reload")
        assert tab.until("document.getElementById('progress')?.textContent.includes('6 answered')"), "answers are kept"
        tab.run("document.getElementById('save').click()")
        saved = tmp_path / f"answers-{made.export}.json"
        for _ in range(600):
            if saved.exists():
                break
            tab.run("new Promise(done => setTimeout(done, 50))")
    found = import_answers(run.uri, str(saved))
    assert (found.rater, found.answers, found.cases) == ("Ann", 6, 6)


def test_the_page_holds_no_trace_of_methods_and_nothing_acts(run: RolloutRun, tmp_path: Path) -> None:
    page = tmp_path / "rating.html"
    made = export_page(run.uri, str(page), JudgeSettings(questions=("exposure",), max_side=64))
    text = page.read_text()
    (data,) = re.findall(r'id="data">(.*?)</script>', text, re.DOTALL)
    plain = json.dumps({name: value for name, value in json.loads(data).items() if name != "videos"})
    for name in ("base", "rag", "rollouts", "attempt", "tiny"):
        assert not re.search(rf"\b{name}\b", plain), name
    assert "</script><script>document.title" not in text
    assert not re.search(r"(src|href)=\"(?!data:)", text)
    facts = [container_facts(base64.b64decode(video)) for video in json.loads(data)["videos"].values()]
    assert len(facts) == 4
    assert len(set(facts)) == 1, "the files differ in nothing between methods"
    assert "handler_name" in facts[0]
    for name in ("base", "rag", "rollouts", "attempt", "tiny", "fox", str(tmp_path), "shown"):
        assert name not in facts[0]
    again = export_page(run.uri, str(tmp_path / "again.html"), JudgeSettings(questions=("exposure",), max_side=64))
    orders = [
        [(key.cases[n].targets[0]["method"], key.cases[n].targets[0]["prompt_id"]) for n in key.cases]
        for key in (key_of(run, made.export), key_of(run, again.export))
    ]
    assert sorted(map(str, orders[0])) == sorted(map(str, orders[1]))
    assert not set(key_of(run, made.export).cases) & set(key_of(run, again.export).cases)
    with pytest.raises(UsageError, match="is there already"):
        export_page(run.uri, str(page), JudgeSettings())


def test_people_and_judge_are_compared_in_the_report(tmp_path: Path) -> None:
    run = make_run(str(tmp_path / "run"), ["a fox", "a river"], horizons=(6,))
    marks = iter([1, 5, 2, 4])
    with ChatProxy(None, lambda number, body: f"text:<score>{next(marks)}</score>") as proxy:
        assert score(judge(proxy, chat={"concurrency": 1}), run) == {}
    by_judge = {
        (case.targets[0]["rollout_path"]): str(int(case.scores[0])) for case in collect([run], "judge").scores.records
    }
    made = export_page(run.uri, str(tmp_path / "page.html"), JudgeSettings(max_side=64))
    key = key_of(run, made.export)
    same = {n: by_judge[str(case.targets[0]["rollout_path"])] for n, case in key.cases.items()}
    opposite = {n: str(6 - int(answer)) for n, answer in same.items()}
    for rater, given in (("Ann", same), ("Bob", same)):
        (tmp_path / "a.json").write_text(answers(made.export, rater, given))
        import_answers(run.uri, str(tmp_path / "a.json"))
    (line,) = collect([run], "judge").scores.remarks_on_all
    assert line == (
        "Exposure: 2 people rated 4 cases; Krippendorff's alpha among them 1.00; between their mean and the judge "
        "1.00, over 4 cases"
    )
    (tmp_path / "a.json").write_text(answers(made.export, "Bob", opposite))
    import_answers(run.uri, str(tmp_path / "a.json"))  # replaces Bob's
    (line,) = collect([run], "judge").scores.remarks_on_all
    assert "2 people" in line
    assert float(line.partition("among them ")[2].partition(";")[0]) < 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text[:-5], "not a file that the rating page saved"),
        (lambda text: text.replace('"export": "', '"export": "../'), "not a file that the rating page saved"),
        (lambda text: re.sub(r'"export": "\w{4}', '"export": "0000', text), "not of this run"),
        (lambda text: text.replace('"3"', '"9"'), "9 is not a whole number from 0 to 5"),
        (lambda text: text.replace('"3"', '"nan"'), "'nan' is not a whole number"),
        (lambda text: text.replace('"3"', '"0_3"'), "'0_3' is not a whole number"),
        (lambda text: text.replace('"Ann"', '" "'), "a name of printable characters at rater"),
        (lambda text: text.replace('"Ann"', '"A\\u001b[31m"'), "a name of printable characters at rater"),
        (lambda text: re.sub(r'"answers": {"\w+', '"answers": {"feedfeed00', text), "the export has no such case"),
    ],
)
def test_a_file_that_does_not_fit_is_refused(run: RolloutRun, tmp_path: Path, change: object, message: str) -> None:
    made = export_page(run.uri, str(tmp_path / "page.html"), JudgeSettings(max_side=64))
    text = answers(made.export, "Ann", {next(iter(key_of(run, made.export).cases)): "3"})
    (tmp_path / "a.json").write_text(change(text))  # type: ignore[operator]
    before = run.storage.list_files("scores/judge/1/human")
    with pytest.raises(UsageError, match=message):
        import_answers(run.uri, str(tmp_path / "a.json"))
    assert run.storage.list_files("scores/judge/1/human") == before


def test_choices_cover_the_scale() -> None:
    assert choices(load_questions("exposure")) == ["0", "1", "2", "3", "4", "5"]
    assert choices(load_questions("preference")) == ["A", "B", "tie"]
    assert choices(QuestionSet(name="x", question="?", scale=Scale(lower=0, upper=100))) == [
        str(5 * i) for i in range(21)
    ]
    odd = choices(QuestionSet(name="x", question="?", scale=Scale(lower=1, upper=24)))
    assert (len(odd), odd[0], odd[-1]) == (21, "1", "24")
    assert all(answer.isdecimal() for answer in odd)
