"""Rank tables and differences as people read them, and how they look on the terminal."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from enum import IntEnum

from rich.table import Table
from rich.text import Text

from lrag_ray.printable import counted, printable
from lrag_ray.report.collect import ReportData
from lrag_ray.report.differences import BlockStatistics, Contrast
from lrag_ray.report.ends import flow_discontinuities
from lrag_ray.scoring.bootstrap import LEAST_PROMPTS, LEVEL, Interval
from lrag_ray.scoring.flow_discontinuity import FLOW_DISCONTINUITY
from lrag_ray.scoring.measure import Measure
from lrag_ray.scoring.ranks import RankBlock

AVERAGE = "average_rank"
"""Key of the average rank beside the measures' names."""

_ROUNDING = 1e-9
"""Below this, a difference of means is what rounding leaves of none."""

_COVERAGE = {10: "86%", 20: "90%"}
"""What BCa intervals of a mean cover with fewer than this many prompts, instead of 95%: simulated with normal and
exponential values. From 20 prompts on they cover 92% and more."""


class Place(IntEnum):
    """How a value is marked in its column."""

    BEST = 1
    SECOND = 2
    OTHER = 3


def places(block: RankBlock, measures: Sequence[Measure]) -> Mapping[tuple[str, str], Place]:
    """Best and second of every column, by (method, measure name or `AVERAGE`). A tie for a place shares its mark.

    Nothing is marked where there is nothing to compare, or where all are equal.
    """
    marks: dict[tuple[str, str], Place] = {}
    compared = [row for row in block.rows if row.average_rank is not None]
    if len(compared) < 2:
        return marks
    for column in [*(measure.name for measure in measures), AVERAGE]:
        values = {
            row.method: row.average_rank or math.inf if column == AVERAGE else row.ranks[column] for row in compared
        }
        distinct = sorted(set(values.values()))
        if len(distinct) < 2:
            continue
        for method, value in values.items():
            marks[method, column] = Place(min(distinct.index(value) + 1, Place.OTHER))
    return marks


def arrow(measure: Measure) -> str:
    """Direction of a measure as tables show it."""
    return "↑" if measure.higher_is_better else "↓"


def number(value: float | None, measure: Measure) -> str:
    """A mean as people read it: two decimals of percent as the paper prints, otherwise four significant digits."""
    if value is None:
        return "–"
    return f"{100 * value:.2f}" if measure.unit == "percent" else f"{value:#.4g}"


def signed(value: float | None, measure: Measure) -> str:
    """A difference, with its sign unless it is shown as zero, which what rounding leaves is."""
    if value is None:
        return "–"
    value = 0.0 if abs(value) < _ROUNDING else value
    shown = f"{100 * value:+.2f}" if measure.unit == "percent" else f"{value:+.2g}"
    return shown.replace("-", "−") if float(shown) else shown[1:]


def interval(found: Interval, measure: Measure) -> str:
    """Both ends of an interval, or nothing where there is none."""
    return "" if found.lower is None else f"[{signed(found.lower, measure)}, {signed(found.upper, measure)}]"


def against(method: float | None, reference: float | None, measure: Measure) -> str:
    """The two means behind a difference."""
    return f"{number(method, measure)} against {number(reference, measure)}"


def percent(share: float) -> str:
    """A relative change with its sign, unless it is shown as zero."""
    shown = f"{100 * share:+.1f}"
    return f"{shown.replace('-', '−') if float(shown) else shown[1:]} %"


def between(found: Interval, measure: Measure) -> str:
    """Both ends of an interval of a mean, or nothing where there is none."""
    return "" if found.lower is None else f"[{number(found.lower, measure)}, {number(found.upper, measure)}]"


def favours(found: Interval, measure: Measure) -> str:
    """Whom a difference speaks for: ``better``, ``worse``, or ``unclear`` where its interval holds zero."""
    if not found.excludes_zero:
        return "unclear"
    return "better" if (found.mean > 0) == measure.higher_is_better else "worse"


def rank_number(value: float | None) -> str:
    """An average rank as the paper prints it."""
    return "–" if value is None else f"{value:.2f}"


def comparison_note(block: RankBlock) -> str:
    """What a table is over and what is left out of its ranks, in words."""
    left_out = left_out_note(block)
    if not any(row.ranks for row in block.rows) and not left_out:
        return f"Means over the {counted(block.prompts, 'prompt')} that all methods have; not ranked."
    if not any(row.ranks for row in block.rows):
        own = " Means are over each method's own videos." if any(row.means for row in block.rows) else ""
        return f"Not ranked: {left_out}.{own}"
    note = f"Over the {counted(block.prompts, 'prompt')} that all {'ranked ' if left_out else ''}methods have"
    if block.videos != block.prompts:
        note += f" ({counted(block.videos, 'video')} per method)"
    if block.prompts_left_out:
        note += f"; {counted(block.prompts_left_out, 'prompt')} left out because some methods lack scores of them"
    return f"{note}. Left out of the ranks: {left_out}." if left_out else f"{note}."


def left_out_note(block: RankBlock) -> str:
    """Which methods are left out of the ranks, and why; empty where none is."""
    apart = [row for row in block.rows if not row.compared]
    missing = [row.method for row in apart if not row.videos_scored]
    others = [row.method for row in apart if row.videos_scored]
    reasons = [f"no scores yet for {', '.join(missing)}"] if missing else []
    if others and block.compared:
        reasons.append(f"no completely scored prompt in common with the others for {', '.join(others)}")
    elif others and not missing:
        reasons.append("no prompt has complete scores for several methods")
    return "; ".join(reasons)


def frozen_note(data: ReportData, block: RankBlock) -> str:
    """What the control beside a table is, and over how many prompts where these are not all of the table's."""
    prompts = len({prompt for prompt, _ in data.frozen_units(block)})
    some = "" if prompts == block.prompts else f" (over {prompts} of the {counted(block.prompts, 'prompt')})"
    return f"the first frame held for the whole video{some}, a control that is never ranked"


def heading(data: ReportData, block: RankBlock) -> str:
    """Backbone with its label, and the duration."""
    label = data.identity.backbones[block.backbone].label
    shown = f"{block.backbone} ({label})" if label else block.backbone
    return f"{shown}, {data.duration_s(block.backbone, block.latent_frames):g} s"


def warnings(data: ReportData) -> list[str]:
    """What must be known before any number is read, the worst first."""
    found = []
    if data.scores.untrained:
        found.append("These scores come from networks with random weights: the numbers mean nothing.")
    names = Counter(network.partition(":")[0] for network in data.scores.networks)
    if mixed := sorted(name for name, digests in names.items() if digests > 1):
        found.append(f"Scores come from different weights of {', '.join(mixed)}: they do not compare.")
    found += data.suite.warnings(data.scores)
    found += data.run_notes
    return found


def rank_tables(data: ReportData) -> Iterable[Table]:
    """One table per block: methods in columns, because terminals are narrow and methods few."""
    return (_rank_table(data, block) for block in data.blocks)


def terminal_tables(data: ReportData) -> Iterable[Table]:
    """Per block the ranks, then the differences."""
    for block, statistics in zip(data.blocks, data.statistics, strict=True):
        yield _rank_table(data, block)
        if statistics.contrasts:
            yield _difference_table(data, block, statistics)


def interval_note(prompts: int) -> str:
    """What the intervals beside differences are, or why there are none."""
    if prompts < LEAST_PROMPTS:
        return f"No intervals: {counted(prompts, 'prompt')}, and they need at least {LEAST_PROMPTS}."
    note = f"In brackets the {LEVEL:.0%} interval: BCa bootstrap over {counted(prompts, 'prompt')} with all samples"
    covers = next((share for below, share in _COVERAGE.items() if prompts < below), None)
    few = f"; from so few it holds the true mean in about {covers} of cases" if covers else ""
    return f"{note}{few}. Each stands for itself, not corrected for their number."


def _rank_table(data: ReportData, block: RankBlock) -> Table:
    warned = " ".join(warnings(data))
    caption = f"{warned} {data.suite.title}. {comparison_note(block)}"
    frozen = data.frozen_means(block)
    if frozen:
        caption += f" frozen: {frozen_note(data, block)}."
    table = Table(title=_name(heading(data, block)), caption=_name(caption.strip()))
    table.add_column("measure", overflow="fold")
    for row in block.rows:
        table.add_column(_name(row.method), justify="right", overflow="fold")
    if frozen:
        table.add_column(Text("frozen", style="italic"), justify="right", overflow="fold")
    families = data.families(row.method for row in block.rows)
    table.add_row("family", *(family for family, methods in families for _ in methods), end_section=True)
    marks = places(block, data.suite.measures)
    for measure in data.suite.measures:
        name = measure.name
        cells = [_marked(number(row.means.get(name), measure), marks.get((row.method, name))) for row in block.rows]
        control = [Text(number(frozen.get(name), measure), style="italic")] if frozen else []
        table.add_row(f"{measure.title} {arrow(measure)}", *cells, *control)
    if not data.suite.ranked:
        return table
    table.add_section()
    ranks = [_marked(rank_number(row.average_rank), marks.get((row.method, AVERAGE))) for row in block.rows]
    table.add_row("Average rank ↓", *ranks)
    if flow := flow_discontinuities(data, block):
        means = [flow[row.method].mean if row.method in flow else None for row in block.rows]
        table.add_section()
        title = f"{FLOW_DISCONTINUITY.title} {arrow(FLOW_DISCONTINUITY)}, not ranked"
        table.add_row(title, *(signed(mean, FLOW_DISCONTINUITY) for mean in means))
    return table


def _difference_table(data: ReportData, block: RankBlock, statistics: BlockStatistics) -> Table:
    table = Table(
        title=_name(f"{heading(data, block)}: differences"),
        caption=Text(
            f"{data.suite.title}. Paired per prompt and sample. {interval_note(block.prompts)}"
            + (" ▲ better, ▼ worse: it leaves out zero." if block.prompts >= LEAST_PROMPTS else "")
            + (" noise: standard deviation of one video between the samples of a prompt." if statistics.noise else "")
        ),
    )
    table.add_column("measure", overflow="fold")
    for contrast in statistics.contrasts:
        table.add_column(_name(f"{contrast.method} − {contrast.reference}"), justify="right", overflow="fold")
    if statistics.noise:
        table.add_column("noise", justify="right", overflow="fold")
    means = {row.method: row.means for row in block.rows}
    for measure in data.suite.measures:
        cells = [_difference_cell(contrast, measure, means) for contrast in statistics.contrasts]
        noise = [noise_floor(statistics, measure)] if statistics.noise else []
        table.add_row(f"{measure.title} {arrow(measure)}", *cells, *noise)
    return table


def noise_floor(statistics: BlockStatistics, measure: Measure) -> str:
    """Standard deviation between the samples of a prompt: the least and the greatest of the methods."""
    values = [value for (_, name), value in statistics.noise.items() if name == measure.name]
    if not values:
        return "–"
    low, high = (signed(value, measure).lstrip("+") for value in (min(values), max(values)))
    return low if low == high else f"{low} to {high}"


def _difference_cell(contrast: Contrast, measure: Measure, means: Mapping[str, Mapping[str, float]]) -> Text:
    found = contrast.intervals[measure.name]
    verdict = favours(found, measure)
    mark, style = {"better": ("▲", "green"), "worse": ("▼", "red"), "unclear": (" ", "")}[verdict]
    cell = Text(f"{signed(found.mean, measure)}{mark}", style=style)
    one, other = (means[method].get(measure.name) for method in (contrast.method, contrast.reference))
    cell.append(f"\n{against(one, other, measure)}", style="dim")
    if shown := interval(found, measure):
        cell.append(f"\n{shown}", style="dim")
    return cell


def _name(text: str) -> Text:
    """Text that holds names of a stranger's run: nothing in it steers a terminal."""
    return Text(printable(text))


def _marked(text: str, place: Place | None) -> Text:
    return Text(text, style={Place.BEST: "bold", Place.SECOND: "underline"}.get(place or Place.OTHER, ""))
