"""The loop on one worker: exact resume, best checkpoint, what stops it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.amp.grad_scaler import GradScaler

from lrag_ray.errors import WeightsError
from lrag_ray.retrieval.encoder import EncoderConfig, LatentAutoencoder
from lrag_ray.retrieval.losses import LossConfig, encoder_losses
from lrag_ray.retrieval.training import OptimizerConfig, make_optimizer, train_step
from lrag_ray.training.checkpoint import OWN_KEY, checkpoint_bytes, load_state, on_host
from lrag_ray.training.loop import make_model
from lrag_ray.training.windows import WindowSampler
from lrag_ray.wan.state_dict import read_checkpoint, state_dict_digest
from tests.training.small import LENGTH, SIZES, Memory, latents, make_rollouts, make_trainer, reader_of


@pytest.fixture(scope="module")
def undisturbed() -> Memory:
    """Three epochs of four steps."""
    sink = Memory()
    assert make_trainer(sink).run().state == "done"
    return sink


def digest(checkpoint: dict[str, Any] | None) -> str:
    assert checkpoint is not None
    moments = {f"{i}.{k}": v for i, s in checkpoint["optimizer"]["state"].items() for k, v in s.items()}
    return state_dict_digest({**checkpoint["model"], **moments})


def rows(sink: Memory) -> list[tuple[Any, ...]]:
    """All but the seconds."""
    return [row[:-1] for row in sink.rows]


def test_the_steps_are_the_released_step_on_the_sampler_s_batches(undisturbed: Memory) -> None:
    """Given the same batches, the plain step without loop, reader and peers gives the same weights, bit for bit."""
    rollouts = make_rollouts(18)
    data, sampler = latents(rollouts), WindowSampler(rollouts, LENGTH, 4, 7)
    model = make_model(SIZES, 7)
    optimizer = make_optimizer(model, OptimizerConfig())
    for epoch in range(3):
        for position in range(sampler.batches_per_epoch):
            batch = torch.stack([data[w.rollout][w.start : w.start + LENGTH] for w in sampler.batch(epoch, position)])
            optimizer.zero_grad()
            encoder_losses(model, batch, LossConfig()).total.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
    assert undisturbed.last is not None
    assert state_dict_digest(model.state_dict()) == state_dict_digest(undisturbed.last["model"])


@pytest.mark.parametrize("step", [1, 3, 4, 7])
def test_a_stopped_training_continues_exactly(undisturbed: Memory, step: int) -> None:
    """In the middle of an epoch and at its end: weights, moments, losses, best epoch."""
    sink = Memory(stop_at=step)
    end = make_trainer(sink).run()
    assert (end.state, end.step) == ("stopped", step + 1)
    assert make_trainer(sink).run().state == "done"
    assert digest(sink.last) == digest(undisturbed.last)
    assert digest(sink.best) == digest(undisturbed.best)
    assert rows(sink) == rows(undisturbed)


@pytest.mark.parametrize("step", [1, 3, 6])
def test_a_training_that_died_continues_from_its_last_checkpoint(undisturbed: Memory, step: int) -> None:
    sink = Memory(die_at=step)
    with pytest.raises(ConnectionError):
        make_trainer(sink).run()
    assert sink.last is None or sink.last[OWN_KEY]["step"] <= step
    assert make_trainer(sink).run().step == 12
    assert digest(sink.last) == digest(undisturbed.last)


def test_more_epochs_continue_a_finished_training(undisturbed: Memory) -> None:
    sink = Memory()
    make_trainer(sink, epochs=2).run()
    assert make_trainer(sink, epochs=2).run().step == 8
    end = make_trainer(sink, epochs=3).run()
    assert (end.epoch, digest(sink.last)) == (3, digest(undisturbed.last))


def test_the_best_checkpoint_is_that_of_the_lowest_validation_total(undisturbed: Memory) -> None:
    totals = {row.epoch: row.total for row in undisturbed.rows if row.split == "validation"}
    assert undisturbed.best is not None
    assert list(totals) == [1, 2, 3]
    assert undisturbed.best["val_loss"] == min(totals.values())
    assert undisturbed.best["epoch"] + 1 == min(totals, key=totals.__getitem__)


def test_without_a_validation_split_the_training_total_decides() -> None:
    sink = Memory()
    end = make_trainer(sink, rollouts=make_rollouts(8, fraction=0.0), validation_fraction=0.0).run()
    assert {row.split for row in sink.rows} == {"train"}
    assert (end.state, end.best is not None, sink.best is not None) == ("done", True, True)


def test_nan_latents_stop_before_the_step_and_are_named() -> None:
    """The last good checkpoint stays, and a retry without the damage continues from it."""
    rollouts = make_rollouts(18)
    data = latents(rollouts)
    sampler = WindowSampler(rollouts, LENGTH, 4, 7)
    bad = sampler.batch(0, 3)[0]
    data[bad.rollout][bad.start + 1, 0, 0, 0] = torch.nan
    sink = Memory()
    end = make_trainer(sink, reader=reader_of(data)).run()
    assert (end.state, end.step) == ("failed", 3)
    assert f"step 3 (epoch 1, batch 4): rollout {bad.rollout} from {bad.start} holds NaN" in end.reason
    assert "dataset verify" in end.reason
    assert sink.last is not None and sink.last[OWN_KEY]["step"] == 2
    assert all(bool(tensor.isfinite().all()) for tensor in sink.last["model"].values())
    again = make_trainer(sink)
    assert again.run().state == "done"


def test_damaged_windows_stop_the_training_and_are_named() -> None:
    rollouts = make_rollouts(18)
    broken = WindowSampler(rollouts, LENGTH, 4, 7).batch(1, 0)[2]
    end = make_trainer(Memory(), reader=reader_of(latents(rollouts), broken)).run()
    assert (end.state, end.step) == ("failed", 4)
    assert f"rollout {broken.rollout} is damaged" in end.reason


def test_damaged_windows_of_the_validation_split_stop_it_too() -> None:
    rollouts = make_rollouts(18)
    broken = WindowSampler(rollouts, LENGTH, 4, 7).validation_batches()[0][0]
    end = make_trainer(Memory(), reader=reader_of(latents(rollouts), broken)).run()
    assert end.state == "failed"
    assert "validation after epoch 1" in end.reason


def test_a_loss_that_leaves_the_numbers_stops_the_training_and_names_the_windows() -> None:
    end = make_trainer(Memory(), optimizer=OptimizerConfig(lr=1e30, grad_clip=0)).run()
    assert (end.state, end.step) == ("failed", 1)
    assert "gives the losses" in end.reason
    assert "optimizer.lr" in end.reason


def test_checkpoints_have_the_released_form(undisturbed: Memory, tmp_path: Any) -> None:
    assert undisturbed.best is not None
    path = tmp_path / "best.pt"
    path.write_bytes(checkpoint_bytes(undisturbed.best))
    loaded = torch.load(path, weights_only=True)
    assert {"epoch", "model", "optimizer", "scaler", "config", "val_loss"} <= loaded.keys()
    assert loaded["config"]["seq_len"] == LENGTH
    assert loaded["config"]["hidden_dims"] == [8]
    assert loaded["scaler"] == {}


def test_the_fields_of_the_config_are_those_of_the_released_trainer(undisturbed: Memory, golden: Any) -> None:
    import json

    fields = json.loads((golden / "encoder" / "ae_config_fields.json").read_text())["defaults"]
    assert undisturbed.last is not None
    assert undisturbed.last["config"].keys() == fields.keys()
    assert all(type(undisturbed.last["config"][name]) is type(value) for name, value in fields.items())


def test_a_checkpoint_of_the_released_trainer_is_continued(golden: Any) -> None:
    """Weights, moments and epoch: the next step is the one that its own optimiser would take."""
    path = golden / "encoder" / "tiny_ae_checkpoint.pt"
    content = read_checkpoint(path)
    sizes = EncoderConfig.from_checkpoint(content["config"])
    theirs, ours = make_model(sizes, 0), make_model(sizes, 1)
    theirs.load_state_dict(content["model"])
    reference = make_optimizer(theirs, OptimizerConfig())
    reference.load_state_dict(on_host(content["optimizer"]))
    optimizer = make_optimizer(ours, OptimizerConfig())
    position = load_state(content, "their checkpoint", ours, optimizer, GradScaler("cpu", enabled=False))
    assert (position.epoch, position.batch) == (5, 0)
    batch = torch.randn(2, 4, 16, 8, 12, generator=torch.Generator().manual_seed(0))
    for model, each in ((theirs, reference), (ours, optimizer)):
        train_step(model, each, batch, LossConfig())
    assert state_dict_digest(ours.state_dict()) == state_dict_digest(theirs.state_dict())


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda c: c.pop("optimizer"), "lacks optimizer"),
        (lambda c: c["model"].popitem(), "missing 1"),
        (lambda c: c["config"].update(latent_dim=9), "this training has"),
        (lambda c: c["config"].update(latent_dim="x"), "config is wrong"),
        (lambda c: c["optimizer"].update(param_groups=[]), "does not fit"),
        (lambda c: c["optimizer"]["state"][0].update(exp_avg=torch.zeros(3)), "does not fit"),
        (lambda c: c["optimizer"]["state"][0]["exp_avg"].fill_(torch.nan), "NaN"),
        (lambda c: next(iter(c["model"].values())).fill_(torch.inf), "NaN or infinite"),
        (lambda c: c[OWN_KEY].update(batch=-1), "does not fit"),
        (lambda c: c[OWN_KEY].update(sums=[1.0]), "does not fit"),
        (lambda c: c[OWN_KEY].update(unknown=1), "does not fit"),
    ],
)
def test_checkpoints_that_do_not_fit_are_refused_with_a_reason(
    undisturbed: Memory, tmp_path: Any, change: Any, problem: str
) -> None:
    path = tmp_path / "last.pt"
    path.write_bytes(checkpoint_bytes(undisturbed.last or {}))
    content = torch.load(path, weights_only=True)
    change(content)
    model = LatentAutoencoder(SIZES)
    scaler = GradScaler("cpu", enabled=False)
    with pytest.raises(WeightsError, match=problem):
        load_state(content, "RUN/checkpoints/last.pt", model, make_optimizer(model, OptimizerConfig()), scaler)


def test_progress_says_where_it_is(undisturbed: Memory) -> None:
    last = undisturbed.progress[-1]
    assert (last.epoch, last.epochs, last.step, last.steps, last.workers) == (3, 3, 12, 12, 1)
    assert {state.doing for state in undisturbed.progress} == {"loading", "training", "validating"}
