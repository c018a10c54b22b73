"""The rank tables as LaTeX in the layout of the paper's Table 2: durations, backbones, methods in rows."""

from __future__ import annotations

from collections.abc import Sequence

from lrag_ray.report.collect import ReportData
from lrag_ray.report.tables import AVERAGE, Place, comparison_note, number, places, rank_number, warnings
from lrag_ray.scoring.ranks import RankBlock

_ESCAPES = {
    "\\": r"\textbackslash{}",
    "&": r"\&",
    "%": r"\%",
    "$": r"\$",
    "#": r"\#",
    "_": r"\_",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "–": "--",
    "−": "$-$",
    "∞": r"$\infty$",
}
_NAMES = {"base": "Base", "infinity_rope": r"$\infty$-RoPE", "deep_forcing": "Deep Forcing", "rag": "RAG"}
"""Methods as the paper calls them, where the setting is named like its policy."""


def latex_table(data: ReportData) -> str:
    """A ``table*`` for a document with the packages booktabs and multirow; nothing else is needed.

    Best values are bold, second ones underlined, per backbone and duration; the control is left out.
    """
    measures = data.suite.measures
    by_duration: dict[float, list[RankBlock]] = {}
    for block in data.blocks:
        by_duration.setdefault(data.duration_s(block.backbone, block.latent_frames), []).append(block)
    lines = [
        r"% \usepackage{booktabs,multirow}",
        r"\begin{table*}[t]",
        r"\centering",
        rf"\caption{{{escaped(_caption(data))}}}",
        rf"\begin{{tabular}}{{lll{'c' * len(measures)}c}}",
        r"\toprule",
        rf"Duration & Backbone & Method & {' & '.join(_column_head(m.title, m.higher_is_better) for m in measures)}"
        rf" & Avg. Rank $\downarrow$ \\",
    ]
    for duration_s in sorted(by_duration):
        blocks = by_duration[duration_s]
        total = sum(len(block.rows) for block in blocks)
        lines.append(r"\midrule")
        for number_of, block in enumerate(blocks):
            if number_of:
                lines.append(rf"\cmidrule(lr){{2-{len(measures) + 4}}}")
            first_cell = rf"\multirow{{{total}}}{{*}}{{{duration_s:g} s}}" if number_of == 0 else ""
            lines += _block_rows(data, block, first_cell)
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", r"\end{table*}", ""])


def escaped(text: str) -> str:
    """`text` with nothing in it that LaTeX would act on."""
    return "".join(_ESCAPES.get(character, character) for character in text if character.isprintable())


def _block_rows(data: ReportData, block: RankBlock, first_cell: str) -> Sequence[str]:
    marks = places(block, data.suite.measures)
    lines = []
    for i, row in enumerate(block.rows):
        backbone = rf"\multirow{{{len(block.rows)}}}{{*}}{{{escaped(block.backbone)}}}" if i == 0 else ""
        cells = [first_cell if i == 0 else "", backbone, _NAMES.get(row.method, escaped(row.method))]
        cells += [
            _marked(number(row.means.get(measure.name), data.suite), marks.get((row.method, measure.name)))
            for measure in data.suite.measures
        ]
        cells.append(_marked(rank_number(row.average_rank), marks.get((row.method, AVERAGE))))
        lines.append(rf"{' & '.join(cells)} \\")
    return lines


def _caption(data: ReportData) -> str:
    notes = {comparison_note(block) for block in data.blocks}
    parts = [*warnings(data), f"{data.suite.title}.", *data.labels, *(notes if len(notes) == 1 else ())]
    if len(notes) > 1:
        counts = sorted({block.prompts for block in data.blocks})
        parts.append(f"Over the prompts that all methods have: {counts[0]} to {counts[-1]} per block.")
    if data.nested:
        parts.append("Durations are prefixes of one rollout, not independent samples.")
    return " ".join(part if part.endswith(".") else f"{part}." for part in parts)


def _column_head(title: str, higher_is_better: bool) -> str:
    direction = "up" if higher_is_better else "down"
    return rf"{escaped(title)} $\{direction}arrow$"


def _marked(text: str, place: Place | None) -> str:
    shown = escaped(text)
    return {Place.BEST: rf"\textbf{{{shown}}}", Place.SECOND: rf"\underline{{{shown}}}"}.get(
        place or Place.OTHER, shown
    )
