"""Similarity maps, similarity by temporal distance and retrieval under several descriptors: page and data."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray
from torch import Tensor

from lrag_ray.report.chart import Curve, line_chart, line_class
from lrag_ray.report.environment import page_environment, style_sheet
from lrag_ray.retrieval.measures import Retrieval, bend, mean_by_distance, similarity_map
from lrag_ray.store.address import Storage

PAGE = "embeddings.html"
LEVELS = 5
"""Colour steps of a map; CSS classes v0 (least) .. v4."""
_MOST_CELLS = 120
"""Rows of a drawn map; longer rollouts are drawn by means of neighbours."""


@dataclass(frozen=True)
class EmbeddingMeasures:
    """One rollout under one descriptor."""

    rollout: str
    descriptor: str
    similarity: NDArray[np.float64]
    """Cosine similarity [T, T]."""
    by_distance: NDArray[np.float64]
    """Mean similarity [T] by temporal distance."""
    bend: float
    """See `lrag_ray.retrieval.measures.bend`."""
    retrieval: Retrieval

    @classmethod
    def of(cls, rollout: str, descriptor: str, embeddings: Tensor, retrieval: Retrieval) -> EmbeddingMeasures:
        """Measures of embeddings [T, D], un-normalised."""
        similarity = similarity_map(embeddings)
        return cls(
            rollout, descriptor, similarity.numpy(), mean_by_distance(similarity).numpy(), bend(embeddings), retrieval
        )


def write_embeddings(found: Sequence[EmbeddingMeasures], folder: Storage, source: str) -> list[str]:
    """Write page, pictures and data of `found` into `folder`; returns the names, the page first."""
    contents: dict[str, bytes] = {
        PAGE: _page(found, source).encode(),
        "measures.csv": _measures_csv(found).encode(),
        "by_distance.csv": _distance_csv(found).encode(),
        "similarity.npz": _arrays(found),
        "similarity.png": _png(found),
    }
    for name, content in contents.items():
        folder.write(name, content)
    return list(contents)


def mean_curves(found: Sequence[EmbeddingMeasures]) -> Mapping[str, NDArray[np.float64]]:
    """Mean similarity by temporal distance over the rollouts, by descriptor, up to the shortest rollout."""
    curves: dict[str, list[NDArray[np.float64]]] = {}
    for each in found:
        curves.setdefault(each.descriptor, []).append(each.by_distance)
    return {
        name: np.stack([curve[: min(map(len, kept))] for curve in kept]).mean(axis=0) for name, kept in curves.items()
    }


def short_names(descriptors: Iterable[str]) -> dict[str, str]:
    """What pictures call each descriptor: of a path the last three parts, or more where these are the same."""
    distinct, parts = list(dict.fromkeys(descriptors)), 3
    while True:
        names = {name: "/".join(name.split("/")[-parts:]) for name in distinct}
        if len(set(names.values())) == len(distinct):
            return names
        parts += 1


def _page(found: Sequence[EmbeddingMeasures], source: str) -> str:
    names = short_names(each.descriptor for each in found)
    curves = [Curve(names[name], np.arange(len(y), dtype=float), y) for name, y in mean_curves(found).items()]
    maps = [
        (each, names[each.descriptor], map_svg(each.similarity, f"{each.descriptor}, {each.rollout}")) for each in found
    ]
    return (
        page_environment()
        .get_template("embeddings.html.j2")
        .render(
            source=source,
            curves=line_chart(curves, "latent frames apart", "Mean cosine similarity"),
            names=[(line_class(number), curve.name) for number, curve in enumerate(curves)],
            rollouts=[(name, list(kept)) for name, kept in groupby(maps, lambda item: item[0].rollout)],
            style=Markup(style_sheet()),
        )
    )


def map_svg(similarity: NDArray[np.float64], title: str) -> Markup:
    """A map [T, T] in colour steps; time to the right and upwards."""
    size = min(len(similarity), _MOST_CELLS)
    bins = np.array_split(np.arange(len(similarity)), size)
    cells = np.array([[similarity[np.ix_(a, b)].mean() for b in bins] for a in bins])
    low, span = float(cells.min()), max(float(cells.max() - cells.min()), 1e-12)
    steps = np.minimum((cells - low) / span * LEVELS, LEVELS - 1).astype(int)
    paths = []
    for level in range(LEVELS):
        runs = []
        for row in range(size):
            edges = np.flatnonzero(np.diff(np.concatenate([[0], (steps[row] == level).astype(np.int8), [0]])))
            runs += [f"M{a} {size - 1 - row}h{b - a}v1h-{b - a}z" for a, b in edges.reshape(-1, 2)]
        paths.append(Markup('<path class="v{}" d="{}"/>').format(level, "".join(runs)))
    label = f"Similarity map of {title}: cosine similarity {low:.2f} to {low + span:.2f}."
    return Markup('<svg class="map square" viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>').format(
        size, size, label, Markup().join(paths)
    )


def _png(found: Sequence[EmbeddingMeasures]) -> bytes:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import ScalarFormatter

    shown = [each for each in found if each.rollout == found[0].rollout]
    names = short_names(each.descriptor for each in found)
    figure = Figure(figsize=(4 * len(shown) + 4, 4), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(shown) + 1)
    for axis, each in zip(axes, shown, strict=False):
        image = axis.imshow(each.similarity, origin="lower", cmap="viridis", interpolation="none")
        axis.set(xlabel="latent frame", ylabel="latent frame")
        axis.set_title(names[each.descriptor], fontsize="medium")
        figure.colorbar(image, ax=axis, shrink=0.8, format=ScalarFormatter(useOffset=False))
    for name, curve in mean_curves(found).items():
        axes[-1].plot(curve, label=names[name])
    axes[-1].set(title="mean over all rollouts", xlabel="latent frames apart", ylabel="cosine similarity")
    axes[-1].legend(fontsize="small")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _measures_csv(found: Sequence[EmbeddingMeasures]) -> str:
    rows = [
        [each.rollout, each.descriptor, len(each.similarity), each.by_distance[1] if len(each.by_distance) > 1 else "",
         each.bend, *each.retrieval]
        for each in found
    ]  # fmt: skip
    return _csv(["rollout", "descriptor", "frames", "neighbours", "bend", *Retrieval._fields], rows)


def _distance_csv(found: Sequence[EmbeddingMeasures]) -> str:
    rows = [[each.rollout, each.descriptor, at, value] for each in found for at, value in enumerate(each.by_distance)]
    return _csv(["rollout", "descriptor", "frames_apart", "similarity"], rows)


def _csv(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(head)
    writer.writerows(rows)
    return text.getvalue()


def _arrays(found: Sequence[EmbeddingMeasures]) -> bytes:
    buffer = io.BytesIO()
    np.savez_compressed(
        buffer,
        rollouts=np.array([each.rollout for each in found]),
        descriptors=np.array([each.descriptor for each in found]),
        **{f"map_{number}": each.similarity for number, each in enumerate(found)},  # type: ignore[arg-type]
    )
    return buffer.getvalue()
