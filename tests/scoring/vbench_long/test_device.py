"""What networks on a device ask of the host between a clip's bytes and its values: nothing.

A tensor of the device `meta` has no values. Whoever needs one on the host raises, and a tensor that is made on the host
and sent is seen here, as it would hold up a GPU: a copy from ordinary memory waits for all that the device does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from lrag_ray.scoring.vbench_long import (
    aesthetic_quality,
    background_consistency,
    dynamic_degree,
    imaging_quality,
    motion_smoothness,
    subject_consistency,
)
from lrag_ray.scoring.vbench_long import networks as networks_module
from lrag_ray.scoring.vbench_long.networks import BatchSizes, Networks
from lrag_ray.scoring.vbench_long.official import NetworkName
from lrag_ray.scoring.vbench_long.preprocess import ClipFrames, pad_to_multiple
from lrag_ray.scoring.vbench_long.weights import Weights

META = torch.device("meta")


class _NoValues:
    """Weights of which only the shapes matter: one zero, seen everywhere."""

    def read(self, name: NetworkName, expected: Mapping[str, Tensor]) -> Weights:
        zeros = {key: torch.zeros((), dtype=value.dtype).expand(value.shape) for key, value in expected.items()}
        return Weights(zeros, "nothing")


class _HostWork(TorchFunctionMode):
    """Notes every tensor of the host that a computation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        made = result if isinstance(result, (tuple, list)) else [result]
        if any(isinstance(item, Tensor) and item.device.type == "cpu" for item in made) or func in (
            Tensor.new_tensor,
            torch.tensor,
            torch.as_tensor,
        ):
            self.seen.append(getattr(func, "__name__", str(func)))
        return result


@contextmanager
def host_work() -> Iterator[list[str]]:
    with torch.inference_mode(), _HostWork() as mode:
        yield mode.seen


@pytest.fixture(scope="module")
def networks() -> Iterator[Networks]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(networks_module, "state_dict_digest", lambda tensors: "")
        yield Networks(_NoValues(), META, batch=BatchSizes(2, 2))


@pytest.fixture(scope="module")
def frames() -> ClipFrames:
    return ClipFrames([np.zeros((128, 192, 3), dtype=np.uint8)] * 3, 8, META)


def _flows(frames: ClipFrames, networks: Networks) -> list[Tensor]:
    padded, _ = pad_to_multiple(frames.uint8.float(), 8)
    return list(networks.raft.flows(padded, networks.batch.pairs))


@pytest.mark.parametrize(
    "compute",
    [
        subject_consistency.features,
        background_consistency.features,
        aesthetic_quality.features,
        motion_smoothness.middle_frames,
        _flows,
        imaging_quality.ratings,
        lambda frames, networks: subject_consistency.slow_features(frames.uint8, networks),
        lambda frames, networks: background_consistency.slow_features(frames.uint8, networks),
    ],
    ids=["subject", "background", "aesthetic", "motion", "dynamic", "imaging", "subject slow", "background slow"],
)
def test_nothing_is_made_on_the_host(
    compute: Callable[[ClipFrames, Networks], Any], frames: ClipFrames, networks: Networks
) -> None:
    compute(ClipFrames([np.zeros((128, 192, 3), dtype=np.uint8)] * 3, 8, META), networks)  # constants are sent once
    with host_work() as seen:
        compute(frames, networks)
    assert seen == []


def test_the_packages_own_loops_wait_for_the_host(networks: Networks) -> None:
    """Which is why ours are not theirs; and the check above can see it."""
    image = torch.empty(1, 3, 128, 192, device=META)
    with host_work() as seen:
        networks.amt.network(image, image, image.new_full((1, 1, 1, 1), 0.5), scale_factor=1.0, eval=True)
    assert "linspace" in seen
    with host_work() as seen:
        networks.musiq.network(image)
    assert seen


@pytest.mark.parametrize("dimension", ["motion", "dynamic"])
def test_no_lookup_has_more_images_than_cudnn_takes(
    dimension: str, networks: Networks, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It refuses 65,536 and more, which eight pairs of 1088x1920 would be."""
    counts: list[int] = []
    sample = F.grid_sample

    def counted(images: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        counts.append(len(images))
        return sample(images, *args, **kwargs)

    monkeypatch.setattr(F, "grid_sample", counted)
    monkeypatch.setattr(networks, "batch", BatchSizes(8, 8))
    frames = ClipFrames([np.zeros((1088, 1920, 3), dtype=np.uint8)] * 9, 8, META)
    with torch.inference_mode():
        if dimension == "motion":
            motion_smoothness.middle_frames(frames, networks)
        else:
            with pytest.raises(NotImplementedError):  # behind the lookups the radii have no values
                next(dynamic_degree.radii(frames, networks))
    assert 32_640 < max(counts) < 65_536


def test_frames_are_sent_as_bytes(frames: ClipFrames) -> None:
    assert (frames.uint8.device, frames.uint8.dtype, tuple(frames.uint8.shape)) == (META, torch.uint8, (3, 3, 128, 192))


@pytest.mark.parametrize(
    ("device", "given", "expected"),
    [
        ("cpu", (None, None), BatchSizes(8, 1)),
        ("cuda", (None, None), BatchSizes(32, 4)),
        ("cpu", (32, 4), BatchSizes(32, 4)),
        ("cuda", (None, 1), BatchSizes(32, 1)),
    ],
)
def test_batches_suit_the_device_unless_they_are_given(
    device: str, given: tuple[int | None, int | None], expected: BatchSizes
) -> None:
    assert BatchSizes.for_device(torch.device(device), *given) == expected
