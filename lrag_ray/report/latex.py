"""The rank tables as LaTeX in the layout of the paper's Table 2: durations, backbones, methods in rows."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence

from lrag_ray.report.collect import ReportData
from lrag_ray.report.tables import (
    AVERAGE,
    Place,
    comparison_note,
    heading,
    left_out_note,
    number,
    places,
    rank_number,
    warnings,
)
from lrag_ray.scoring.measure import Measure
from lrag_ray.scoring.ranks import RankBlock

_ESCAPES = {
    "\\": r"\textbackslash{}",
    "<": "$<$",
    ">": "$>$",
    "|": "$|$",
    '"': r"{''}",
    "`": r"\textasciigrave{}",
    "&": r"\&",
    "%": r"\%",
    "$": r"\$",
    "#": r"\#",
    "_": r"\_",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "–": r"\textendash{}",
    "−": "$-$",
    "∞": r"$\infty$",
    "≤": r"$\leq$",
    "≥": r"$\geq$",
}
_LAST_OF_LATIN = "\u017f"
"""LaTeX prints letters with accents up to here without a package, and this punctuation."""
_PUNCTUATION = frozenset("‘’“”—…")
_NAMES = {
    "base": "Base",
    "rolling_sink": "Rolling Sink",
    "ema_sink": "EMA Sink",
    "infinity_rope": r"$\infty$-RoPE",
    "deep_forcing": "Deep Forcing",
    "memrope": "MemRoPE",
    "memflow": "MemFlow",
    "rag": "RAG",
    "dummy_forcing": "Dummy Forcing",
    "forcing_kv": "Forcing-KV",
    "rolling_forcing": "Rolling Forcing",
}
"""Methods as their papers call them, where the setting is named like its policy."""


def latex_table(data: ReportData) -> str:
    """A ``table*`` for a document with the packages booktabs and multirow, and graphicx to fit it to a narrow page.

    Best values are bold, second ones underlined, per backbone and duration; the control is left out. Backbones go by
    their labels where these tell them apart.
    """
    measures = data.suite.measures
    backbones = _backbone_names(data)
    by_duration: dict[float, list[RankBlock]] = {}
    for block in data.blocks:
        by_duration.setdefault(data.duration_s(block.backbone, block.latent_frames), []).append(block)
    lines = [
        r"% \usepackage{booktabs,multirow,graphicx}",
        r"\begin{table*}[t]",
        r"\centering",
        r"\setlength{\belowcaptionskip}{4pt}",
        rf"\caption{{{escaped(_caption(data, backbones))}}}",
        r"\label{tab:ranks}",
        r"\small",
        r"\setlength{\tabcolsep}{4pt}",
        r"\providecommand{\resizebox}[3]{#3}% without graphicx it keeps its width",
        r"\resizebox{\ifdim\width>\textwidth\textwidth\else\width\fi}{!}{%",
        rf"\begin{{tabular}}{{lll{'c' * len(measures)}c}}",
        r"\toprule",
        *_head(measures),
    ]
    for duration_s in sorted(by_duration):
        blocks = by_duration[duration_s]
        total = sum(len(block.rows) for block in blocks)
        lines.append(r"\midrule")
        for number_of, block in enumerate(blocks):
            if number_of:
                lines.append(rf"\cmidrule(lr){{2-{len(measures) + 4}}}")
            first_cell = rf"\multirow{{{total}}}{{*}}{{{duration_s:g} s}}" if number_of == 0 else ""
            lines += _block_rows(data, block, first_cell, backbones[block.backbone])
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}}", r"\end{table*}", ""])


def escaped(text: str) -> str:
    """`text` with nothing in it that LaTeX would act on or stop at.

    What pdfLaTeX has no letter for is printed as its number there, and as itself by XeLaTeX and LuaLaTeX.
    """
    shown = "".join(_escaped_character(character) for character in text if character.isprintable())
    # Two hyphens are a dash to TeX.
    return re.sub("-(?=-)", "-{}", shown)


def _escaped_character(character: str) -> str:
    if character in _ESCAPES or character <= _LAST_OF_LATIN or character in _PUNCTUATION:
        return _ESCAPES.get(character, character)
    return rf"\ifdefined\Umathcode {character}\else[U+{ord(character):04X}]\fi{{}}"


def _head(measures: Sequence[Measure]) -> Sequence[str]:
    """Two lines, since the names of the dimensions are wider than their values: the last word in the second one."""
    titles = [measure.title.rpartition(" ") for measure in measures]
    arrows = [r"$\uparrow$" if measure.higher_is_better else r"$\downarrow$" for measure in measures]
    upper = [escaped(first) for first, _, _ in titles]
    lower = [f"{escaped(last)} {arrow}" for (_, _, last), arrow in zip(titles, arrows, strict=True)]
    return [
        rf" &  &  & {' & '.join(upper)} & Avg. \\",
        rf"Duration & Backbone & Method & {' & '.join(lower)} & Rank $\downarrow$ \\",
    ]


def _backbone_names(data: ReportData) -> dict[str, str]:
    """Labels by name, or the names themselves where backbones share a label or have none."""
    labels = {name: backbone.label for name, backbone in data.identity.backbones.items()}
    often = Counter(labels.values())
    return {name: label if label and often[label] == 1 else name for name, label in labels.items()}


def _block_rows(data: ReportData, block: RankBlock, first_cell: str, backbone_name: str) -> Sequence[str]:
    marks = places(block, data.suite.measures)
    lines = []
    for i, row in enumerate(block.rows):
        backbone = rf"\multirow{{{len(block.rows)}}}{{*}}{{{escaped(backbone_name)}}}" if i == 0 else ""
        cells = [first_cell if i == 0 else "", backbone, _NAMES.get(row.method, escaped(row.method))]
        cells += [
            _marked(number(row.means.get(measure.name), measure), marks.get((row.method, measure.name)))
            for measure in data.suite.measures
        ]
        cells.append(_marked(rank_number(row.average_rank), marks.get((row.method, AVERAGE))))
        lines.append(rf"{' & '.join(cells)} \\")
    return lines


def _caption(data: ReportData, backbones: Mapping[str, str]) -> str:
    notes = {comparison_note(block) for block in data.blocks}
    unsaid = [label for label in data.labels if label not in backbones.values()]
    parts = [*warnings(data), f"{data.suite.title}.", *unsaid, *(notes if len(notes) == 1 else ())]
    if len(notes) > 1:
        counts = sorted({block.prompts for block in data.blocks})
        parts.append(f"Over the prompts that all ranked methods have: {counts[0]} to {counts[-1]} per block.")
        parts += [f"{heading(data, block)}: {note}." for block in data.blocks if (note := left_out_note(block))]
    if data.durations_note:
        parts.append(data.durations_note)
    if any(places(block, data.suite.measures) for block in data.blocks):
        parts.append("Best bold, second underlined.")
    return " ".join(part if part.endswith(".") else f"{part}." for part in parts)


def _marked(text: str, place: Place | None) -> str:
    shown = escaped(text)
    return {Place.BEST: rf"\textbf{{{shown}}}", Place.SECOND: rf"\underline{{{shown}}}"}.get(
        place or Place.OTHER, shown
    )
