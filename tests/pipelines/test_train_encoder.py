"""What an encoder training makes of its data and its run directory, without Ray."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from lrag_ray.cli.app import app
from lrag_ray.config.load import load_config, load_job
from lrag_ray.config.training import TrainEncoderConfig
from lrag_ray.errors import ConfigError, IdentityError, LragError, StorageError, UsageError, WeightsError
from lrag_ray.events import Event, Notice
from lrag_ray.pipelines.plan_training import plan_training
from lrag_ray.pipelines.train_encoder import TrainEncoderJob
from lrag_ray.report.training import write_training_report
from lrag_ray.retrieval.encoder import EncoderConfig, LatentAutoencoder, load_encoder
from lrag_ray.retrieval.losses import LossConfig, encoder_losses
from lrag_ray.stages.training import LocalTrainingHost, TrainingWork
from lrag_ray.store.integrity import Coverage
from lrag_ray.store.rollouts import RolloutRun
from lrag_ray.store.training_integrity import find_training_damage
from lrag_ray.store.training_run import BEST, LAST, TrainingRun, holds_training
from lrag_ray.training.loop import TrainingEnd
from lrag_ray.training.peers import Alone
from lrag_ray.wan.state_dict import state_dict_digest
from tests.training.corpus import SHAPE, make_corpus, scene, training_file


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_corpus(tmp_path_factory.mktemp("corpus"))


def config_of(folder: Path, corpus: str, uri: str | None = None, **changes: Any) -> TrainEncoderConfig:
    loaded = load_job(training_file(folder / "training.yaml", corpus, uri or str(folder / "run"), **changes))
    assert isinstance(loaded, TrainEncoderConfig)
    return loaded


def job_of(config: TrainEncoderConfig) -> tuple[TrainEncoderJob, list[str]]:
    """The job, and what it said while it looked at its data."""
    notes: list[str] = []

    def listen(event: Event) -> None:
        if isinstance(event, Notice):
            notes.append(event.text)

    return TrainEncoderJob(config, listen), notes


def trained(config: TrainEncoderConfig) -> TrainingEnd:
    """One worker in this process."""
    job, _ = job_of(config)
    job.prepare()
    work = job.work()
    assert isinstance(work, TrainingWork)
    return work(LocalTrainingHost(), Alone())


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, corpus: str) -> Path:
    """A folder with `run`, the training of `config_of` at its end: copied before it is changed."""
    folder = tmp_path_factory.mktemp("finished")
    assert trained(config_of(folder, corpus)).state == "done"
    return folder


def copied(finished: Path, to: Path) -> TrainingRun:
    return TrainingRun(str(shutil.copytree(finished / "run", to / "run")))


def links(page: str) -> set[str]:
    return set(re.findall(r'<a href="([^#"]+)"', page))


def weights(run: TrainingRun, path: str = LAST) -> str:
    checkpoint = run.checkpoint(path)
    assert checkpoint is not None
    return state_dict_digest(checkpoint["model"])


def test_a_training_in_a_folder_equals_one_in_a_bucket(
    tmp_path: Path, corpus: str, finished: Path, s3_bucket: str
) -> None:
    """Data and run on an object store: the same weights, losses and page."""
    local = TrainingRun(str(finished / "run"))
    here, there = RolloutRun(corpus).storage, RolloutRun(f"{s3_bucket}/encoder/corpus").storage
    for path in here.list_files():
        there.write(path, here.read_bytes(path))
    remote = TrainingRun(f"{s3_bucket}/encoder/run")
    assert trained(config_of(tmp_path, there.address, remote.storage.address)).state == "done"
    assert weights(local) == weights(remote)
    assert weights(local, BEST) == weights(remote, BEST)
    assert local.losses().drop_columns(["seconds"]).equals(remote.losses().drop_columns(["seconds"]))
    assert write_training_report(remote).files[0] == "report.html"


def test_the_report_shows_losses_of_both_splits(tmp_path: Path, finished: Path) -> None:
    run = copied(finished, tmp_path)
    made = write_training_report(run)
    assert {(row.epoch, row.split) for row in made.epochs} == {
        (epoch, split) for epoch in (1, 2, 3, 4) for split in ("train", "validation")
    }
    page = run.storage.read_bytes("summary/report.html").decode()
    assert page.count("<svg") >= 6
    assert "AE + SeqDelta + Smooth" in page and "4 of 4 epochs" in page
    assert links(page) == {f"../{LAST}", f"../{BEST}", "losses.parquet", "losses.csv", "losses.png"}
    assert run.storage.read_bytes("summary/losses.png").startswith(b"\x89PNG")
    assert load_encoder(run.storage.full(BEST)).config.latent_dim == 16


def test_a_finished_training_may_get_more_epochs_and_nothing_else(tmp_path: Path, corpus: str, finished: Path) -> None:
    copied(finished, tmp_path)
    longer = config_of(tmp_path, corpus, training={"epochs": 6, "batch_size": 4})
    assert trained(longer).epoch == 6
    assert TrainingRun(str(tmp_path / "run")).require().epochs == 6
    for changes, line in (
        ({"optimizer": {"lr": 0.1}}, "optimizer.lr: 0.0003 in the run, 0.1 in the configuration"),
        ({"preset": "ae_only"}, "losses.delta_weight: 1.0 in the run, 0.0"),
        ({"run": {"seed": 4}}, "run.seed: 3 in the run, 4"),
        ({"encoder": {"latent_dim": 8}}, "encoder.latent_dim: 16 in the run, 8"),
    ):
        with pytest.raises(IdentityError, match="holds a training with other settings") as caught:
            job_of(config_of(tmp_path, corpus, **changes))
        assert line in str(caught.value)


def test_a_dataset_that_grows_meanwhile_changes_nothing(tmp_path: Path, corpus: str, finished: Path) -> None:
    own = shutil.copytree(corpus, tmp_path / "corpus")
    job, _ = job_of(config_of(tmp_path, str(own)))
    job.prepare()
    make_corpus(own, count=6, first=12)
    again, notes = job_of(config_of(tmp_path, str(own)))
    assert any("6 rollouts of the dataset came after this training began" in note for note in notes)
    plan = plan_training(config_of(tmp_path, str(own)))
    assert plan.rollouts == 12 and plan.notes == notes
    again.prepare()
    again.work()(LocalTrainingHost(), Alone())
    assert weights(TrainingRun(str(tmp_path / "run"))) == weights(TrainingRun(str(finished / "run")))


def test_rollouts_that_vanish_are_named(tmp_path: Path, corpus: str) -> None:
    own = shutil.copytree(corpus, tmp_path / "corpus")
    job, _ = job_of(config_of(tmp_path, str(own)))
    job.prepare()
    shutil.rmtree(sorted((own / "rollouts/tiny/base").iterdir())[0])
    with pytest.raises(IdentityError, match=r"1 of them are not in data\.uris any more"):
        job_of(config_of(tmp_path, str(own)))
    end = job.work()(LocalTrainingHost(), Alone())
    assert (end.state, "not in the dataset any more" in end.reason) == ("failed", True)


def test_short_rollouts_are_named_and_refused_or_left_out(tmp_path: Path, corpus: str) -> None:
    short = make_corpus(tmp_path / "short", count=2, frames=3, first=12)
    data = {"uris": [corpus, short], "validation_fraction": 0.25, "window_frames": 6}
    with pytest.raises(UsageError, match=r"2 of 14 rollouts are shorter than data.window_frames 6: .*\(3 frames\)"):
        job_of(config_of(tmp_path, corpus, data=data))
    job, notes = job_of(config_of(tmp_path, corpus, data={**data, "short_rollouts": "skip"}))
    assert any(note.startswith("left out: 2 of 14 rollouts") for note in notes)
    job.prepare()
    stored = TrainingRun(str(tmp_path / "run")).rollouts()
    assert stored is not None and len(stored.keys) == 12


def test_a_dataset_smaller_than_a_batch_trains_in_smaller_ones_and_says_so(tmp_path: Path, corpus: str) -> None:
    config = config_of(tmp_path, corpus, training={"epochs": 2, "batch_size": 128})
    _, notes = job_of(config)
    assert any("each epoch is one step with a batch of" in note for note in notes)
    assert trained(config).step == 2


@pytest.mark.parametrize(("fraction", "split"), [(1e-9, "validation"), (0.999999, "training")])
def test_an_empty_split_is_refused(tmp_path: Path, corpus: str, fraction: float, split: str) -> None:
    data = {"uris": [corpus], "validation_fraction": fraction, "window_frames": 6}
    with pytest.raises(UsageError, match=f"falls into the {split} split"):
        job_of(config_of(tmp_path, corpus, data=data))


def test_latents_of_different_shapes_are_refused(tmp_path: Path, corpus: str) -> None:
    other = make_corpus(tmp_path / "other", count=2, latents=lambda index, frames: scene(index, frames)[..., :6])
    with pytest.raises(UsageError, match="cannot be joined"):
        job_of(config_of(tmp_path, corpus, data={"uris": [corpus, other], "window_frames": 6}))


def test_a_truncated_part_ends_the_training(tmp_path: Path, corpus: str) -> None:
    own = shutil.copytree(corpus, tmp_path / "corpus")
    job, _ = job_of(config_of(tmp_path, str(own)))
    job.prepare()
    for part in sorted(own.glob("rollouts/tiny/base/00004-*/attempt-one/*.safetensors")):
        part.write_bytes(part.read_bytes()[:1000])
    end = job.work()(LocalTrainingHost(), Alone())
    assert end.state == "failed"
    assert "1 of 12 rollouts of this training are not in the dataset any more" in end.reason
    assert "dataset verify" in end.reason
    # The page of a training without a checkpoint names no file that is not there.
    run = TrainingRun(str(tmp_path / "run"))
    write_training_report(run)
    assert links(run.storage.read_bytes("summary/report.html").decode()) == {"losses.parquet", "losses.csv"}


def test_a_damaged_checkpoint_ends_the_training_with_its_name(tmp_path: Path, corpus: str, finished: Path) -> None:
    copied(finished, tmp_path)
    last = tmp_path / "run" / LAST
    last.write_bytes(last.read_bytes()[:2000])
    job, _ = job_of(config_of(tmp_path, corpus, training={"epochs": 5, "batch_size": 4}))
    end = job.work()(LocalTrainingHost(), Alone())
    assert end.state == "failed"
    assert "last.pt" in end.reason


def test_a_new_training_may_begin_with_a_checkpoint(tmp_path: Path, corpus: str, finished: Path) -> None:
    """It goes on from that checkpoint's epoch, with its weights and moments."""
    trained(config_of(tmp_path, corpus, training={"epochs": 2, "batch_size": 4}))
    first = str(tmp_path / "run" / LAST)
    training = {"epochs": 4, "batch_size": 4, "start_from": first}
    end = trained(config_of(tmp_path, corpus, str(tmp_path / "second"), training=training))
    assert end.epoch == 4
    assert weights(TrainingRun(str(tmp_path / "second"))) == weights(TrainingRun(str(finished / "run")))
    with pytest.raises(WeightsError):
        job_of(config_of(tmp_path, corpus, str(tmp_path / "third"), training={"start_from": "absent.pt"}))


def test_trainings_and_runs_of_rollouts_do_not_mix(tmp_path: Path, corpus: str) -> None:
    with pytest.raises(StorageError, match="not an encoder training"):
        job_of(config_of(tmp_path, corpus, corpus))
    job, _ = job_of(config_of(tmp_path, corpus))
    job.prepare()
    run = RolloutRun(str(tmp_path / "run"))
    assert holds_training(run.storage) and not holds_training(RolloutRun(corpus).storage)
    with pytest.raises(StorageError, match="holds an encoder training"):
        run.require()


def test_a_plan_counts_what_the_training_does(tmp_path: Path, corpus: str, finished: Path) -> None:
    plan = plan_training(config_of(tmp_path, corpus))
    state = TrainingRun(str(finished / "run")).state()
    assert state is not None and state.step == plan.steps
    assert (plan.rollouts, plan.frames, plan.training_rollouts + plan.validation_rollouts) == (12, 288, 12)
    encoder = load_encoder(finished / "run" / BEST)
    assert plan.parameters == sum(parameter.numel() for parameter in encoder.parameters())
    assert plan.window_bytes == 6 * SHAPE[0] * SHAPE[1] * SHAPE[2] * torch.float32.itemsize


def test_a_plan_of_activations_is_what_the_backward_pass_keeps(tmp_path: Path, corpus: str) -> None:
    """Counted on the meta device, against what a real step on the CPU saves for it."""
    plan = plan_training(config_of(tmp_path, corpus, engine={"actors": 1}))
    model = LatentAutoencoder(EncoderConfig(*SHAPE, 16, (8, 16)))
    alive: list[torch.Tensor] = []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        alive.append(tensor)
        return tensor

    batch = torch.randn(4, 6, *SHAPE)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        encoder_losses(model, batch, LossConfig())
    places = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in alive}
    weights = sum(parameter.numel() * 4 for parameter in model.parameters())
    assert plan.activation_bytes == pytest.approx(sum(places.values()), abs=weights)


def test_hours_are_bounds_until_a_training_has_measured_its_speed(tmp_path: Path, corpus: str) -> None:
    """And then windows of both splits at their own speeds; a fixed number of seconds per step makes it exact."""
    config = config_of(tmp_path, corpus)
    plan = plan_training(config)
    assert (plan.speed, plan.worker_hours, plan.gpu_hours) == (None, None, {})
    on_gpus = plan_training(config_of(tmp_path, corpus, engine={"gpus_per_actor": 1}))
    assert on_gpus.gpu_hours["A100"].most == pytest.approx(plan.flops / (312e12 * 0.008) / 3600)
    run = TrainingRun(str(tmp_path / "run"))
    trained(config_of(tmp_path, corpus, training={"epochs": 1, "batch_size": 4}))
    losses = run.losses().to_pylist()
    spent = {split: sum(row["seconds"] for row in losses if row["split"] == split) for split in ("train", "validation")}
    for each in (plan_training(config), plan_training(config, run.uri)):
        assert each.speed is not None and each.speed.steps == plan.steps_per_epoch
        assert each.worker_hours == pytest.approx(plan.epochs * sum(spent.values()) / 3600)
    begun, _ = job_of(config_of(tmp_path, corpus, str(tmp_path / "begun")))
    begun.prepare()
    assert plan_training(config_of(tmp_path, corpus, str(tmp_path / "begun"))).speed is None
    with pytest.raises(UsageError, match="has stored no step yet"):
        plan_training(config, str(tmp_path / "begun"))
    with pytest.raises(StorageError, match="not an encoder training"):
        plan_training(config, corpus)


def test_the_plan_answers_price_and_refuses_options_about_rollouts(tmp_path: Path, corpus: str) -> None:
    path = str(training_file(tmp_path / "training.yaml", corpus, str(tmp_path / "run"), engine={"gpus_per_actor": 1}))
    larger = ["--set", "training.epochs=1000000", "--set", "encoder.hidden_dims=[512,512]"]
    longer = [*larger, "--gpu", "A100", "--gpus", "4", "--price", "2"]
    shown = CliRunner().invoke(app, ["plan", path, *longer])
    assert shown.exit_code == 0 and "one A100: " in shown.output and "on 4 of them, for " in shown.output
    assert "H100" not in shown.output
    shown = CliRunner().invoke(app, ["plan", path, "--gpu", "A100", "--gpus", "4", "--price", "2"])
    assert "one A100: less than 0.1 hours\n" in shown.output
    for wrong in (["--cells"], ["--node-memory-gb", "64"], ["--gpu", "A100", "--from", "x"]):
        assert CliRunner().invoke(app, ["plan", path, *wrong]).exit_code == 2
    on_cpus = CliRunner().invoke(app, ["plan", path, "--set", "engine.gpus_per_actor=0", "--gpus", "2"])
    assert on_cpus.exit_code == 2 and "--gpus 2: engine.gpus_per_actor is 0" in on_cpus.output
    long = ["--set", "data.window_frames=30"]
    refused = CliRunner().invoke(app, ["plan", path, *long])
    assert refused.exit_code == 2 and "shorter than data.window_frames 30" in refused.output


def test_presets_are_the_rows_of_the_paper(tmp_path: Path, corpus: str) -> None:
    found = {
        preset: config_of(tmp_path, corpus, preset=preset).loss_weights
        for preset in ("full", "ae_seq_delta", "ae_only", "as_released")
    }
    assert {name: tuple(row.values()) for name, row in found.items()} == {
        "full": (1, 1), "ae_seq_delta": (1, 0), "ae_only": (0, 0), "as_released": (0, 1),
    }  # fmt: skip
    own = config_of(tmp_path, corpus, preset="ae_only", losses={"smooth_weight": 0.5})
    assert own.loss_weights == {"delta_weight": 0, "smooth_weight": 0.5}
    assert any("as_released keeps the smoothness" in note for note in plan_training(
        config_of(tmp_path, corpus, preset="as_released")).notes)  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"engine": {"gpus_per_actor": 2}}, "one whole GPU"),
        ({"data": {"uris": []}}, "data.uris"),
        ({"encoder": {"hidden_dims": [8, 0]}}, "encoder.hidden_dims"),
        ({"training": {"epoch": 3}}, "did you mean 'epochs'"),
        ({"preset": "ful"}, "did you mean 'full'"),
        ({"prompts": {"path": "x"}}, "unknown key"),
    ],
)
def test_wrong_configurations_are_refused(tmp_path: Path, corpus: str, changes: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        config_of(tmp_path, corpus, **changes)


def test_commands_that_need_generators_refuse_a_training(tmp_path: Path, corpus: str) -> None:
    path = training_file(tmp_path / "training.yaml", corpus, str(tmp_path / "run"))
    with pytest.raises(LragError, match="job train_encoder has no generators"):
        load_config(path)


def test_one_flipped_bit_in_any_file_of_a_training_is_noticed_and_named(tmp_path: Path, corpus: str) -> None:
    config = config_of(tmp_path, corpus, training={"epochs": 2, "batch_size": 4})
    trained(config)
    run = TrainingRun(str(tmp_path / "run"))
    assert list(find_training_damage(run, coverage := Coverage())) == [] and coverage.unnamed == []
    random = Random(11)
    for path in run.storage.list_files():
        whole = run.storage.read_bytes(path)
        for _ in range(3):
            at = random.randrange(8 * len(whole))
            run.storage.write(path, bytes(b ^ (1 << at % 8) if i == at // 8 else b for i, b in enumerate(whole)))
            damaged = [each.path for each in find_training_damage(run, Coverage())]
            assert damaged == [path], f"bit {at} of {path}"
        run.storage.write(path, whole)
    run.storage.write(LAST, whole[:-1])
    with pytest.raises(WeightsError, match=r"last\.pt.*trains again from the start"):
        run.checkpoint()
