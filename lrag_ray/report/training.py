"""The page of an encoder training: losses of both splits as curves, the best epoch, settings, and the files beside it.

It reads storage alone and shows a training that is under way as well.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from markupsafe import Markup
from numpy.typing import NDArray

from lrag_ray.report.chart import Curve, line_chart
from lrag_ray.report.environment import page_environment, style_sheet
from lrag_ray.store.failures import read_failures
from lrag_ray.store.training_run import BEST, LAST, TrainingIdentity, TrainingRun, TrainingState

SUMMARY = "summary"
PAGE = "report.html"
TERMS = {
    "total": "Total",
    "recon": "Reconstruction",
    "delta": "Window Temporal Delta",
    "smooth": "Smoothness",
}
"""Titles of the losses, by column."""
_MOST_POINTS = 400


class EpochLosses(NamedTuple):
    """Mean losses of one epoch and split."""

    epoch: int
    split: str
    recon: float
    delta: float
    smooth: float
    total: float


@dataclass(frozen=True)
class TrainingReport:
    """What was written."""

    folder: str
    files: Sequence[str]
    """The page first."""
    epochs: Sequence[EpochLosses]


def epoch_losses(losses: pa.Table) -> list[EpochLosses]:
    """Means per epoch and split, weighted by the windows of each step, in order."""
    found = []
    frame = losses.to_pandas()
    for (epoch, split), rows in frame.groupby(["epoch", "split"], sort=True):
        weights = rows["windows"] / rows["windows"].sum()
        means = {name: float((rows[name] * weights).sum()) for name in ("recon", "delta", "smooth", "total")}
        found.append(EpochLosses(int(epoch), str(split), **means))
    return found


def write_training_report(run: TrainingRun) -> TrainingReport:
    """Write page, plot and table of a training into its summary; StorageError where there is none."""
    identity = run.require()
    state = run.state()
    losses = run.losses()
    epochs = epoch_losses(losses)
    folder = run.storage.below(SUMMARY)
    contents = {
        PAGE: _page(run, identity, state, losses, epochs).encode(),
        "losses.parquet": _parquet(losses),
        "losses.csv": _csv(epochs).encode(),
    }
    if epochs:
        contents["losses.png"] = _png(epochs)
    for name, content in contents.items():
        folder.write(name, content)
    return TrainingReport(folder.uri, list(contents), epochs)


def _page(
    run: TrainingRun,
    identity: TrainingIdentity,
    state: TrainingState | None,
    losses: pa.Table,
    epochs: Sequence[EpochLosses],
) -> str:
    failures, _ = read_failures(run.storage)
    panels = [(title, line_chart(_epoch_curves(epochs, name), "epoch", title)) for name, title in TERMS.items()]
    steps = [
        (title, line_chart([Curve(title, *_thinned(losses, name))], "step", f"{title} of every step"))
        for name, title in (("total", "Total"), ("grad_norm", "Gradient norm"))
    ]
    stored = run.storage.list_files("checkpoints")
    environment = page_environment()
    return environment.get_template("training.html.j2").render(
        uri=run.uri,
        identity=identity,
        state=state,
        epochs=[row for row in epochs if row.epoch in _shown_epochs(epochs, state)],
        all_epochs=len({row.epoch for row in epochs}),
        panels=[(title, svg) for title, svg in panels if svg],
        steps=[(title, svg) for title, svg in steps if svg],
        weights=_named_preset(identity),
        settings=json.dumps(identity.settings, indent=1, ensure_ascii=False),
        failures=[failure for failure in failures if failure.quarantined],
        checkpoints={name: path for name, path in (("best", BEST), ("last", LAST)) if path in stored},
        best_of="validation total" if any(row.split == "validation" for row in epochs) else "training total",
        style=Markup(style_sheet()),
    )


def _named_preset(identity: TrainingIdentity) -> str:
    losses = identity.settings.get("losses")
    weights = losses if isinstance(losses, Mapping) else {}
    delta, smooth = (weights.get(name) for name in ("delta_weight", "smooth_weight"))
    rows: dict[object, str] = {(0, 0): "AE only", (1, 0): "AE + SeqDelta", (1, 1): "AE + SeqDelta + Smooth"}
    named = rows.get((delta, smooth))
    if named is None and (delta, smooth) == (0, 1):
        named = "as released: no delta loss, but the smoothness that the paper's row AE lacks"
    return f"{named or 'weights of its own'} (reconstruction 1, delta {delta}, smoothness {smooth})"


def _shown_epochs(epochs: Sequence[EpochLosses], state: TrainingState | None) -> set[int]:
    """The first epoch, the last ten and the best: hundreds of rows say less than the curves."""
    numbers = sorted({row.epoch for row in epochs})
    best = {state.best_epoch} if state is not None and state.best_epoch is not None else set()
    return {*numbers[:1], *numbers[-10:], *best}


def _epoch_curves(epochs: Sequence[EpochLosses], name: str) -> list[Curve]:
    curves = []
    for split in ("train", "validation"):
        rows = [row for row in epochs if row.split == split]
        curves.append(
            Curve(split, np.array([row.epoch for row in rows], float), np.array([getattr(row, name) for row in rows]))
        )
    return [curve for curve in curves if len(curve.x)]


def _thinned(losses: pa.Table, name: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Steps and values of the training split, as means of neighbours where there are too many to draw."""
    rows = losses.filter(pa.compute.equal(losses["split"], "train"))
    x, y = (rows[column].to_numpy(zero_copy_only=False).astype(float) for column in ("step", name))
    finite = np.isfinite(y)
    x, y = x[finite], y[finite]
    if len(x) <= _MOST_POINTS:
        return x, y
    # As many steps in each but the last: means of fewer would look noisier.
    size = -(-len(x) // _MOST_POINTS)
    bins = [slice(first, first + size) for first in range(0, len(x), size)]
    return np.array([x[b].mean() for b in bins]), np.array([y[b].mean() for b in bins])


def _png(epochs: Sequence[EpochLosses]) -> bytes:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 6), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (name, title) in zip(figure.subplots(2, 2).flat, TERMS.items(), strict=True):
        for curve in _epoch_curves(epochs, name):
            axes.plot(curve.x, curve.y, label=curve.name, marker="." if len(curve.x) < 30 else None)
        axes.set(title=title, xlabel="epoch")
        axes.legend()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _csv(epochs: Sequence[EpochLosses]) -> str:
    lines = [",".join(EpochLosses._fields)]
    lines += [",".join(str(value) for value in row) for row in epochs]
    return "\n".join(lines) + "\n"


def _parquet(table: pa.Table) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    return buffer.getvalue()
