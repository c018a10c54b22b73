from __future__ import annotations

from collections import Counter
from itertools import permutations
from pathlib import Path

import pytest

from lrag_ray.errors import ConfigError
from lrag_ray.scoring.judge.agreement import krippendorff_alpha, position_bias
from lrag_ray.scoring.judge.questions import SHIPPED, AnswerForm, QuestionSet, Scale, UnreadableError, load_questions

EXPOSURE = load_questions("exposure")
WORDS = QuestionSet(
    name="light",
    question="?",
    answer=AnswerForm(pattern=r"(?i)verdict:\s*(\w+)"),
    values={"Bad": 0, "fine": 3, "great": 5},
)
YES = QuestionSet(name="seen", question="?", scale=Scale(lower=0, upper=1), values={"yes": 1, "no": 0})
TENTHS = QuestionSet(name="t", question="?", scale=Scale(lower=-1, upper=1, integer=False), answer=AnswerForm(tag="R"))
FINE = QuestionSet(name="x", question="?", scale=Scale(lower=-1, upper=1, integer=False), answer=AnswerForm(json="r"))


@pytest.mark.parametrize("name", SHIPPED)
def test_the_shipped_questions_load(name: str) -> None:
    found = load_questions(name)
    assert found.name == name
    assert found.title
    assert found.about


def test_exposure_has_the_scale_of_the_paper() -> None:
    assert (EXPOSURE.scale.lower, EXPOSURE.scale.upper, EXPOSURE.scale.integer) == (0, 5, True)
    assert "<score>" in EXPOSURE.form


@pytest.mark.parametrize(
    ("questions", "answer", "score"),
    [
        (EXPOSURE, "Steady.\nScore: `<score>3</score>`", 3),
        (EXPOSURE, "On <score>1</score> second thought <SCORE> 4 </SCORE>", 4),
        (EXPOSURE, "<score>5.0</score>", 5),
        (EXPOSURE, "I end with a <score> tag: <score>4</score>", 4),
        (EXPOSURE, "<score>4</score>, where <score> is what was asked for", 4),
        (EXPOSURE, '<score>**4**</score>, or <score max="5" >3.</score >', 3),
        (YES, "<score>Yes!</score>", 1),
        (YES, "<score>\n`no`.\n</score>", 0),
        (TENTHS, "<r>-.25</r>", -0.25),
        (TENTHS, "<r>\N{MINUS SIGN}1</r>", -1),
        (WORDS, "Hm. Verdict: FINE", 3),
        (FINE, 'So {"why": {"r": 9}, "r": 0.25} it is', 0.25),
        (FINE, '{"r": "-1"}', -1),
        (load_questions("preference"), "<choice>A</choice>", 1),
        (load_questions("preference"), "<choice>Tie.</choice>", 0.5),
    ],
)
def test_a_score_is_found(questions: QuestionSet, answer: str, score: float) -> None:
    assert questions.read(answer) == score


@pytest.mark.parametrize(
    ("questions", "answer", "message"),
    [
        (EXPOSURE, "I'd say 3", "holds no <score>"),
        (EXPOSURE, "<score>7</score>", "7 is not a whole number from 0 to 5"),
        (EXPOSURE, "<score>3.5</score>", r"3\.5 is not a whole"),
        (EXPOSURE, "<score>3/5</score>", "'3/5' is not"),
        (EXPOSURE, "<score>nan</score>", "'nan' is not"),
        (EXPOSURE, "<score>1</score> no: <score></score>", "'' is not"),
        (EXPOSURE, "<score>" * 20_000, "holds no <score>"),
        (TENTHS, "<r>0,5</r>", "'0,5' is not a number from -1 to 1"),
        (YES, "<score>yes and no</score>", "none of yes, no"),
        (WORDS, "Verdict: superb", "none of Bad, fine, great"),
        (FINE, "{" * 5000, "holds no"),
        (load_questions("preference"), "<choice>C</choice>", "none of A, B or tie"),
    ],
)
def test_an_answer_without_a_score_says_why(questions: QuestionSet, answer: str, message: str) -> None:
    with pytest.raises(UnreadableError, match=message):
        questions.read(answer)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: x\nquestion: y\nanswer: {pattern: '('}", "not a regular expression"),
        ("name: x\nquestion: y\nanswer: {pattern: 'a'}", "no group"),
        ("name: x\nquestion: y\nanswer: {tag: a, json: b}", "exactly one of tag, pattern and json"),
        ("name: x\nquestion: y\nscale: {lower: 5, upper: 5}", "must be less than"),
        ("name: x\nquestion: y\nscale: {lower: 0.5, upper: 4.5}", "whole numbers, or set integer: false"),
        ("name: x\nquestion: y\nvalues: {Good: 1, good: 2}", "values.good stands there twice"),
        ("name: ../x\nquestion: y", "name: "),
        ("name: x", "question: Field required"),
        ("name: x\nquestion: y\nkind: z", "kind: "),
        ("name: x\nquestion: y\ncompare: true\nvalues: {a: 1}", "neither scale nor values"),
    ],
)
def test_a_question_file_that_does_not_fit_is_named(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message) as error:
        load_questions(str(path))
    assert str(path) in str(error.value)


def test_a_name_that_is_no_question_set_lists_those_that_are() -> None:
    with pytest.raises(ConfigError, match="'exposur' is neither a YAML file nor one of exposure, identity"):
        load_questions("exposur")


def coincidence_alpha(units: list[list[float]]) -> float:
    """Krippendorff's own way: a matrix of the pairs of values within units, each weighted by 1 / (values - 1)."""
    pairs: Counter[tuple[float, float]] = Counter()
    for values in units:
        for a, b in permutations(values, 2):
            pairs[a, b] += 1 / (len(values) - 1)  # type: ignore[assignment]
    margins: Counter[float] = Counter()
    for (a, _), weight in pairs.items():
        margins[a] += weight
    n = sum(margins.values())
    observed = sum(weight * (a - b) ** 2 for (a, b), weight in pairs.items())
    expected = sum(margins[a] * margins[b] * (a - b) ** 2 for a in margins for b in margins) / (n - 1)
    return 1 - observed / expected


def test_alpha_by_hand() -> None:
    """Values 1 1 | 1 3 | 3 3: within units the squared differences are 0, 4, 0; over all 15 pairs 9 are of 4.

    Observed: 4/3 on average over units; expected: 36/15 over pairs. Alpha is 1 - (4/3) / (36/15) = 4/9.
    """
    assert krippendorff_alpha([[1, 1], [1, 3], [3, 3]]) == pytest.approx(4 / 9)


def test_alpha_equals_that_of_the_coincidence_matrix() -> None:
    """Four raters, twelve things, raters missing anywhere; one thing has a single value and says nothing."""
    rows = [
        [1, 2, 3, 3, 2, 1, 4, 1, 2, None, None, None],
        [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, None, 3],
        [None, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, None],
        [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, None],
    ]
    units = [[float(value) for value in column if value is not None] for column in zip(*rows, strict=True)]
    assert krippendorff_alpha(units) == pytest.approx(coincidence_alpha(units), abs=1e-12)


def test_alpha_says_nothing_where_nothing_varies() -> None:
    assert krippendorff_alpha([[3, 3], [3, 3]]) is None
    assert krippendorff_alpha([[3], [4]]) is None
    assert krippendorff_alpha([[1, 1], [5, 5]]) == 1


def test_position_bias() -> None:
    assert position_bias([]) is None
    always_first = position_bias([(1, 0)] * 4)
    assert always_first is not None
    assert (always_first.consistent, always_first.first) == (0, 1)
    fair = position_bias([(1, 1), (0, 0), (0.5, 0.5)])
    assert fair is not None
    assert (fair.consistent, fair.first) == (1, 0.5)
