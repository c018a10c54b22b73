"""Line charts and the curve of every step of a training."""

from __future__ import annotations

import re

import numpy as np
import pyarrow as pa
import pytest

from lrag_ray.report.chart import Curve, line_chart
from lrag_ray.report.training import _thinned


@pytest.mark.parametrize(("low", "high"), [(0.14981, 0.149965), (0.0, 2.0), (1234.5671, 1234.5679), (-3e-7, 4e-7)])
def test_no_two_labels_of_an_axis_read_the_same(low: float, high: float) -> None:
    drawn = line_chart([Curve("loss", np.array([1.0, 2.0]), np.array([low, high]))], "epoch", "Loss")
    labels = re.findall(r'<text class="y"[^>]*>([^<]*)</text>', str(drawn))
    assert len(labels) >= 2 and len(set(labels)) == len(labels)
    assert float(labels[0]) <= low and high <= float(labels[-1])


def test_a_thinned_curve_takes_means_of_equally_many_steps() -> None:
    rows = {"split": ["train"] * 625, "step": range(625), "total": [float(step % 2) for step in range(625)]}
    x, y = _thinned(pa.table({name: list(values) for name, values in rows.items()}), "total")
    assert len(x) == 313
    np.testing.assert_array_equal(np.diff(x)[:-1], 2)
    np.testing.assert_array_equal(y[:-1], 0.5)
