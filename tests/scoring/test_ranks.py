"""Average ranks: the paper's table, ties, directions, and no silent ranking of unequal sets."""

from __future__ import annotations

import csv
import math
from collections import defaultdict
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lrag_ray.report.tables import number
from lrag_ray.scoring.measure import Measure
from lrag_ray.scoring.ranks import RankBlock, VideoScore, average_ranks, rank_means
from lrag_ray.scoring.vbench_long.settings import VbenchSettings
from lrag_ray.scoring.vbench_long.suite import VbenchLong

UP = Measure("up", "Up", "", 0, 1, higher_is_better=True)
DOWN = Measure("down", "Down", "", 0, 1, higher_is_better=False)
SUITE = VbenchLong(VbenchSettings(mode="compat"))


def score(method: str, prompt: str, up: float, down: float = 0.0, sample: int = 0, frames: int = 18) -> VideoScore:
    return VideoScore("tiny", method, frames, prompt, sample, {"up": up, "down": down})


def ranked(scores: list[VideoScore], methods: list[str] | None = None) -> RankBlock:
    (block,) = average_ranks(scores, methods or ["a", "b"], [UP, DOWN])
    return block


def test_the_papers_table(golden: Path) -> None:
    path = golden.parent / "data" / "table2.csv"
    if not path.is_file():
        pytest.skip(f"the paper's Table 2 is not at {path}")
    blocks: dict[tuple[str, str], list[dict[str, str]]] = defaultdict(list)
    with path.open() as file:
        for row in csv.DictReader(file):
            blocks[row["duration_s"], row["backbone"]].append(row)
    names = [measure.name for measure in SUITE.measures]
    exact, apart = 0, []
    for rows in blocks.values():
        scores = [
            VideoScore(row["backbone"], row["method"], 120, "all", 0, {n: float(row[n]) / 100 for n in names}, clips=15)
            for row in rows
        ]
        (block,) = average_ranks(scores, [row["method"] for row in rows], SUITE.measures, SUITE.pooling)
        for row, ours in zip(rows, block.rows, strict=True):
            assert ours.average_rank is not None
            assert all(number(ours.means[m.name], m) == row[m.name] for m in SUITE.measures), (
                "shown as the paper prints them"
            )
            if f"{ours.average_rank:.2f}" == row["published_avg_rank"]:
                exact += 1
            else:
                apart.append(abs(ours.average_rank - float(row["published_avg_rank"])))
    # The printed values of four rows tie where the unrounded ones did not.
    assert (exact, len(apart)) == (32, 4)
    assert max(apart) < 0.09


def test_direction_counts() -> None:
    block = ranked([score("a", "p", up=0.9, down=0.9), score("b", "p", up=0.1, down=0.1)])
    assert [row.ranks for row in block.rows] == [{"up": 1, "down": 2}, {"up": 2, "down": 1}]
    assert [row.average_rank for row in block.rows] == [1.5, 1.5]


def test_ties_share_their_places() -> None:
    means = {"a": {"up": 0.5}, "b": {"up": 0.7}, "c": {"up": 0.5}, "d": {"up": 0.1}}
    assert {method: ranks["up"] for method, ranks in rank_means(means, [UP]).items()} == {
        "a": 2.5,
        "b": 1,
        "c": 2.5,
        "d": 4,
    }


def test_unrounded_values_decide() -> None:
    block = ranked([score("a", "p", up=0.50000001), score("b", "p", up=0.5)])
    assert [row.ranks["up"] for row in block.rows] == [1, 2]


def test_only_common_prompts_count_and_are_counted() -> None:
    scores = [score("a", "p", 0.1), score("a", "q", 1.0), score("b", "p", 0.2), score("b", "r", 0.0)]
    block = ranked(scores)
    assert (block.prompts, block.prompts_left_out) == (1, 2)
    assert [row.means["up"] for row in block.rows] == [0.1, 0.2]
    assert [row.videos_scored for row in block.rows] == [2, 2]


def test_samples_are_averaged_within_their_prompt() -> None:
    scores = [score("a", "p", 0.0), score("a", "p", 0.4, sample=1), score("a", "q", 1.0)]
    scores += [score("b", "p", 0.0), score("b", "p", 0.0, sample=1), score("b", "q", 0.0)]
    block = ranked(scores)
    assert (block.prompts, block.videos) == (2, 3)
    assert block.rows[0].means["up"] == pytest.approx((0.2 + 1.0) / 2)


def test_pooled_over_clips_a_video_weighs_as_many_as_it_has() -> None:
    """The official global score is an unweighted mean over clips; the mean of per-video means stands beside it."""
    values = {("p", 0): (0.2, 15), ("p", 1): (0.4, 15), ("q", 0): (1.0, 3)}
    scores = [
        VideoScore("tiny", method, 18, *unit, {"up": up, "down": 0.0}, clips)
        for unit, (up, clips) in values.items()
        for method in "ab"
    ]
    (block,) = average_ranks(scores, ["a", "b"], [UP, DOWN], "clips")
    assert block.rows[0].means["up"] == pytest.approx((15 * 0.2 + 15 * 0.4 + 3 * 1.0) / 33)
    assert block.rows[0].video_means["up"] == pytest.approx((0.2 + 0.4 + 1.0) / 3)
    assert block.weights == {("p", 0): 15, ("p", 1): 15, ("q", 0): 3}
    (by_prompts,) = average_ranks(scores, ["a", "b"], [UP, DOWN])
    assert by_prompts.rows[0].means["up"] == pytest.approx((0.3 + 1.0) / 2)


def test_a_method_without_scores_leaves_means_and_takes_no_part() -> None:
    block = ranked([score("a", "p", 0.3)], ["a", "b"])
    assert block.prompts == 0
    assert [row.average_rank for row in block.rows] == [None, None]
    assert [row.videos_scored for row in block.rows] == [1, 0]
    assert [dict(row.means) for row in block.rows] == [{"up": 0.3, "down": 0.0}, {}]


def test_the_others_are_ranked_as_if_the_method_without_scores_were_not_there() -> None:
    scores = [score("a", "p", 0.1), score("a", "q", 0.3), score("b", "p", 0.2), score("b", "q", 0.8)]
    alone, block = ranked(scores), ranked(scores, ["a", "c", "b"])
    assert [block.rows[0], block.rows[2]] == list(alone.rows) and block.weights == alone.weights
    assert not block.rows[1].compared and block.rows[1].average_rank is None and block.rows[1].means == {}


def test_a_method_of_other_prompts_shows_its_own_means_without_a_rank() -> None:
    """Given two runs over p and q and one over r alone: the two are ranked, the third stands beside them."""
    scores = [score(method, prompt, up) for method, up in (("a", 0.1), ("b", 0.2)) for prompt in "pq"]
    block = ranked([*scores, score("c", "r", 0.9)], ["a", "b", "c"])
    assert [row.average_rank for row in block.rows] == [1.75, 1.25, None]
    assert (block.prompts, block.prompts_left_out) == (2, 0)
    assert block.rows[2].means["up"] == 0.9 and (block.rows[2].prompts, block.rows[2].videos) == (1, 1)


def test_a_method_that_lacks_a_measure_keeps_its_other_means() -> None:
    scores = [score("a", "p", 0.1), score("b", "p", 0.2), score("c", "p", 0.9, down=math.nan)]
    block = ranked(scores, ["a", "b", "c"])
    assert block.rows[2].means == {"up": 0.9} and block.rows[2].average_rank is None
    assert [row.ranks["up"] for row in block.compared] == [2, 1]


def test_methods_without_a_common_prompt_are_not_ranked_in_any_order() -> None:
    block = ranked([score("a", "p", 0.1), score("b", "q", 0.2)])
    assert [row.average_rank for row in block.rows] == [None, None]
    assert [row.means["up"] for row in block.rows] == [0.1, 0.2] and block.weights == {}


def test_values_that_are_not_numbers_are_left_out() -> None:
    block = ranked([score("a", "p", math.nan), score("a", "q", 0.1), score("b", "p", 0.9), score("b", "q", 0.2)])
    assert (block.prompts, block.prompts_left_out) == (1, 1)


def test_durations_and_backbones_are_blocks_of_their_own() -> None:
    scores = [score("a", "p", 0.1, frames=frames) for frames in (36, 18)]
    scores.append(VideoScore("big", "a", 18, "p", 0, {"up": 1, "down": 1}))
    blocks = average_ranks(scores, ["a"], [UP, DOWN])
    assert [(block.backbone, block.latent_frames) for block in blocks] == [("big", 18), ("tiny", 18), ("tiny", 36)]


@given(st.lists(st.integers(0, 5), min_size=1, max_size=7))
def test_ranks_of_a_measure_always_add_up(values: list[int]) -> None:
    means = {str(i): {"up": value / 5} for i, value in enumerate(values)}
    ranks = rank_means(means, [UP])
    count = len(values)
    assert math.isclose(sum(row["up"] for row in ranks.values()), count * (count + 1) / 2)


@given(st.permutations(range(6)))
def test_order_of_scores_does_not_matter(order: list[int]) -> None:
    scores = [score(method, prompt, 0.1 * i) for i, (method, prompt) in enumerate(_UNITS)]
    assert ranked([scores[i] for i in order]) == ranked(scores)


_UNITS = [(method, prompt) for method in "ab" for prompt in "pqr"]
