"""float16 with a gradient scaler, on the CPU: the same code as on a GPU, where it is switched on by itself."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.amp.grad_scaler import GradScaler

from lrag_ray.retrieval.losses import LossConfig
from lrag_ray.retrieval.training import NonFiniteStepError, OptimizerConfig, StepReport, make_optimizer, train_step
from lrag_ray.training.checkpoint import checkpoint_bytes
from lrag_ray.training.loop import Trainer, make_model
from lrag_ray.wan.state_dict import state_dict_digest
from tests.training.small import LENGTH, SHAPE, SIZES, Memory, latents, make_rollouts, make_trainer, reader_of

OVERFLOWS = 2.0**60


def batch() -> Tensor:
    return torch.randn(3, LENGTH, *SHAPE, generator=torch.Generator().manual_seed(2))


def step(scaler: GradScaler | None, values: Tensor, **changes: Any) -> tuple[StepReport, dict[str, Tensor]]:
    """One step from the same weights; the report and the weights after it."""
    model = make_model(SIZES, 3)
    optimizer = make_optimizer(model, OptimizerConfig(lr=1e-2, grad_clip=0))
    report = train_step(model, optimizer, values, LossConfig(), grad_clip=0, scaler=scaler, **changes)
    return report, {name: value.clone() for name, value in model.state_dict().items()}


def mixed(sink: Memory, scale: float = 2.0**10, **changes: Any) -> Trainer:
    """A trainer as on a GPU."""
    trainer = make_trainer(sink, **changes)
    trainer._scaler = GradScaler("cpu", init_scale=scale, growth_interval=3)
    return trainer


def test_the_model_runs_in_float16_and_gradients_are_unscaled() -> None:
    plain, _ = step(None, batch())
    half, _ = step(GradScaler("cpu", init_scale=2.0**12), batch())
    losses = torch.stack(list(half.losses))
    torch.testing.assert_close(losses, torch.stack(list(plain.losses)), rtol=5e-3, atol=1e-4)
    assert not torch.equal(losses, torch.stack(list(plain.losses)))
    assert float(half.grad_norm) == pytest.approx(float(plain.grad_norm), rel=2e-2)


def test_gradients_that_overflow_skip_the_step_and_lower_the_scale() -> None:
    scaler = GradScaler("cpu", init_scale=OVERFLOWS)
    report, weights = step(scaler, batch())
    assert not torch.isfinite(report.grad_norm) and bool(torch.isfinite(torch.stack(list(report.losses))).all())
    assert state_dict_digest(weights) == state_dict_digest(make_model(SIZES, 3).state_dict())
    assert scaler.get_scale() == OVERFLOWS / 2


def test_gradients_that_are_not_finite_unscaled_stop_the_training() -> None:
    def spoil(tensors: list[Tensor]) -> None:
        tensors[0].fill_(torch.nan)

    step(GradScaler("cpu", init_scale=2.0), batch(), combine=spoil)
    with pytest.raises(NonFiniteStepError, match="gradient norm nan"):
        step(GradScaler("cpu", init_scale=1.0), batch(), combine=spoil)


def test_nan_latents_stop_it_whatever_the_scale() -> None:
    values = batch()
    values[1, 2, 0, 0, 0] = torch.nan
    with pytest.raises(NonFiniteStepError, match="losses"):
        step(GradScaler("cpu", init_scale=2.0**16), values)


@pytest.mark.parametrize("scale", [2.0**10, OVERFLOWS])
def test_a_worker_without_windows_takes_the_step_of_the_others(scale: float) -> None:
    """From its first step on, which is when a scaler learns its scale."""
    summed: list[Tensor] = []

    def give(tensors: list[Tensor]) -> None:
        summed.extend(deepcopy(tensors))

    def take(tensors: list[Tensor]) -> None:
        for tensor, total in zip(tensors, summed, strict=True):
            tensor.copy_(total)

    busy, idle = (GradScaler("cpu", init_scale=scale) for _ in range(2))
    _, expected = step(busy, batch(), combine=give)
    _, found = step(idle, batch()[:0], share=0.0, combine=take)
    assert state_dict_digest(found) == state_dict_digest(expected)
    assert idle.get_scale() == busy.get_scale() == (scale / 2 if scale == OVERFLOWS else scale)


@pytest.mark.parametrize("scale", [2.0**10, OVERFLOWS])
def test_a_resumed_training_has_the_scale_and_the_bits_of_an_undisturbed_one(scale: float) -> None:
    quiet, stopped = Memory(), Memory(stop_at=4)
    assert mixed(quiet, scale).run().state == "done"
    assert mixed(stopped, scale).run().state == "stopped"
    assert stopped.last is not None and quiet.last is not None
    state = stopped.last["scaler"]
    assert state["scale"] != scale and state["_growth_tracker"] == (0 if scale == OVERFLOWS else 2)
    stopped.last = torch.load(checkpoint_file(stopped.last), weights_only=True)
    # The scale of the checkpoint counts, not that of a scaler at its beginning.
    assert mixed(stopped, scale=2.0**3).run().state == "done"
    assert state_dict_digest(stopped.last["model"]) == state_dict_digest(quiet.last["model"])
    assert stopped.last["scaler"] == quiet.last["scaler"]
    # As text: norms of skipped steps are not numbers.
    assert [str(row[:-1]) for row in stopped.rows] == [str(row[:-1]) for row in quiet.rows]


def test_a_window_with_nan_is_named_under_float16() -> None:
    rollouts = make_rollouts(18)
    data = latents(rollouts)
    for each in data:
        each[3] = torch.nan
    end = mixed(Memory(), rollouts=rollouts, reader=reader_of(data)).run()
    assert end.state == "failed" and "holds NaN or infinite values" in end.reason


def checkpoint_file(content: dict[str, Any]) -> Any:
    import io

    return io.BytesIO(checkpoint_bytes(content))
