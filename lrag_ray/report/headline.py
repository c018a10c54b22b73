"""The result in words: which method leads in which table, and how sure that is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from lrag_ray.printable import counted, listed
from lrag_ray.report.collect import ReportData
from lrag_ray.report.differences import Lead
from lrag_ray.report.tables import against, favours
from lrag_ray.scoring.bootstrap import LEAST_PROMPTS
from lrag_ray.scoring.ranks import RankBlock

_SURE, _LIKELY = 0.95, 0.75
"""Shares of the draws from which a lead is called firm and likely."""


class Finding(NamedTuple):
    """One rank table in a sentence."""

    where: str
    """Backbone and duration."""
    who: str
    how_sure: str
    plainly: str
    """The figures in the suite's words; '' where it has none."""


class Headline(NamedTuple):
    """The page's first words."""

    text: str
    """One sentence over all tables."""
    findings: Sequence[Finding]
    """One per table."""


def headline(data: ReportData) -> Headline | None:
    """None where no table has ranks."""
    found = [
        (block, statistics.lead)
        for block, statistics in zip(data.blocks, data.statistics, strict=True)
        if statistics.lead is not None
    ]
    if not found:
        return None
    findings = [
        Finding(
            f"{block.backbone}, {data.duration_s(block.backbone, block.latent_frames):g} s",
            _who(lead),
            _how_sure(data, block, lead),
            data.suite.in_words({row.method: row.means for row in block.rows}),
        )
        for block, lead in found
    ]
    return Headline(_overall([lead for _, lead in found]), findings)


def _overall(leads: Sequence[Lead]) -> str:
    alone = Counter(lead.methods[0] for lead in leads if len(lead.methods) == 1)
    firm = sum((lead.share or 0) >= _SURE for lead in leads)
    if not alone:
        return "No method leads alone."
    tables = f"{len(leads)} tables" if len(leads) > 1 else "the only table"
    wins = [f"{method} in {number}" for method, number in alone.most_common()]
    if len(leads) == 1:
        said = f"{next(iter(alone))} has the lowest average rank"
    elif len(alone) == 1 and sum(alone.values()) == len(leads):
        said = f"{next(iter(alone))} has the lowest average rank in all {tables}"
    else:
        said = f"Lowest average rank: {listed(wins)} of {tables}"
    if all(lead.share is None for lead in leads):
        return f"{said}; nothing says yet how sure that is."
    if len(leads) == 1:
        return f"{said}: {_word(leads[0].share)}."
    return f"{said}; {firm or 'none'} of these leads {'is' if firm < 2 else 'are'} firm."


def _who(lead: Lead) -> str:
    if len(lead.methods) > 1:
        return f"{listed(lead.methods)} share the lowest average rank, {lead.average_rank:.2f}"
    return f"{lead.methods[0]} leads with an average rank of {lead.average_rank:.2f}"


def _how_sure(data: ReportData, block: RankBlock, lead: Lead) -> str:
    if lead.over is None:
        return "none leads alone"
    if lead.share is None:
        return f"{counted(block.prompts, 'prompt')} cannot say how sure that is: it takes {LEAST_PROMPTS} and more"
    verdicts: dict[str, list[str]] = {"better": [], "worse": [], "unclear": []}
    means = {row.method: row.means for row in block.rows}
    for measure in data.suite.measures:
        one, other = (means[method].get(measure.name) for method in (lead.over.method, lead.over.reference))
        title = measure.title if measure.title.isupper() else measure.title.lower()
        verdict = favours(lead.over.intervals[measure.name], measure)
        verdicts[verdict].append(f"{title} ({against(one, other, measure)})")
    parts = [f"{word} in {listed(names)}" for word, names in verdicts.items() if names and word != "unclear"]
    if unclear := len(verdicts["unclear"]):
        parts.append(f"undecided in {counted(unclear, 'measure')}")
    place = f"which shares the next place with {listed(lead.tied)}" if lead.tied else "the next"
    return (
        f"{_word(lead.share)}: it leads in {100 * lead.share:.0f} of 100 draws of the "
        f"{counted(block.prompts, 'prompt')}. Against "
        f"{lead.over.reference}, {place}, it is {'; '.join(parts)}"
    )


def _word(share: float | None) -> str:
    if share is None:
        return "unknown"
    return "a firm lead" if share >= _SURE else "a likely lead" if share >= _LIKELY else "an open race"
