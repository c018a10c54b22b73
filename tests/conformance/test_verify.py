"""What `verify` says of vectors of other sizes and settings, and of folders that hold something else."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import save_file

from lrag_ray.conformance.methods import _own_timesteps, _timesteps
from lrag_ray.conformance.verify import ROUNDING, failed, iter_results, verify_path
from lrag_ray.errors import UsageError
from lrag_ray.retrieval.bank_types import BankType
from lrag_ray.retrieval.payload import _Int4
from lrag_ray.wan.config import SamplerConfig
from tests.conformance.plain_rollout import make_case
from tests.conftest import REPOSITORY
from tests.pretend_cuda import pretend_cuda

TRAVELLING = REPOSITORY / "tests" / "golden"


class HeldBack(NamedTuple):
    """A case unlike the published ones."""

    case: dict[str, Any]
    hw: tuple[int, int] = (8, 12)
    batch: int = 1
    retrieves: bool = False


def case(
    frames: int, block: int, steps: list[int], window: int, sink: int, shift: float, **more: Any
) -> dict[str, Any]:
    kwargs = {"local_attn_size": window, "sink_size": sink, "timestep_shift": shift}
    return {
        "frames": frames,
        "num_frame_per_block": block,
        "denoising_step_list": steps,
        "model_kwargs": kwargs,
        **more,
    }


def retrieval(made: dict[str, Any], top_k: int, exclude: int) -> dict[str, Any]:
    memory = {"memory_size": top_k, "recent_exclude": exclude, "compression_method": "avg_pool"}
    return {**made, "model_kwargs": {**made["model_kwargs"], "use_latentmem": True, **memory}}


ONE_STEP = HeldBack(retrieval(case(12, 1, [1000], 5, 2, 3.0), 2, 0), retrieves=True)
HELD_BACK = {
    "all frames attended": HeldBack(case(12, 3, [1000, 400], -1, 0, 5.0)),
    "no sink, 30 tokens, batch of two": HeldBack(case(15, 3, [1000, 500], 9, 0, 8.0), hw=(10, 12), batch=2),
    "sink longer than a block": HeldBack(case(18, 3, [1000, 500], 8, 4, 5.0)),
    "unwarped, context noise": HeldBack(
        retrieval(case(18, 3, [900, 500, 100], 9, 2, 3.0, warp=False, context_noise=40), 3, 1), retrieves=True
    ),
    "retrieval for a batch of two": HeldBack(
        retrieval(case(22, 2, [1000, 600], 7, 0, 5.0), 4, 2), batch=2, retrieves=True
    ),
    "window no multiple of the block": HeldBack(
        retrieval(case(20, 4, [1000, 600], 9, 1, 5.0), 3, 0), hw=(6, 10), retrieves=True
    ),
    "retrieval model without memory": HeldBack(retrieval(case(15, 3, [1000, 600], 9, 2, 5.0), 0, 5)),
    "one step, one frame per block": ONE_STEP,
    "block wider than the local part": HeldBack(
        retrieval(case(27, 3, [1000, 600], 8, 1, 5.0), 5, 1), hw=(4, 6), batch=2, retrieves=True
    ),
    "sink and retrieved frames alone": HeldBack(
        retrieval(case(16, 2, [1000, 600], 5, 1, 5.0), 4, 0), hw=(4, 6), retrieves=True
    ),
}


@pytest.mark.parametrize("name", HELD_BACK)
def test_other_settings_agree_with_the_plain_rollout(tmp_path: Path, name: str) -> None:
    made = HELD_BACK[name]
    path = make_case(tmp_path / "held_back", name, *made[:3])
    results = verify_path(tmp_path)
    assert not failed(results)
    assert {"output", "timesteps", "descriptors", "retrieved frames"} <= {row.tensor for row in results}
    assert bool(json.loads(path.read_text())["memory_indices_log"]) == made.retrieves


@pytest.mark.parametrize(
    ("golden", "passes", "steps", "context"),
    [
        ([1000.0, 937.5, 833.3333129882812, 625.0, 0.0], 5, (1000, 750, 500, 250), 0.0),
        ([1000.0, 937.5, 833.3333129882812, 625.0], 5, (1000, 750, 500, 250), 0.0),
        ([1000.0, 833.3333129882812, 0.0], 3, (1000.0, 833.3333129882812), 0.0),
        ([1000.0, 833.3333129882812], 3, (1000.0, 833.3333129882812), 0.0),
        ([1000.0, 937.5, 833.3333129882812, 625.0, 100.0], 5, (1000.0, 937.5, 833.3333129882812, 625.0), 100.0),
    ],
)
def test_a_case_of_methods_may_have_timesteps_of_its_own(
    golden: list[float], passes: int, steps: tuple[float, ...], context: float
) -> None:
    sampler = _own_timesteps(SamplerConfig(), {"timesteps": golden}, (12, passes, 3, 16, 8, 12))
    assert (sampler.denoising_steps, sampler.context_timestep) == (steps, context)
    assert _timesteps(sampler) == pytest.approx([*golden, context][:passes])


def test_a_wrong_element_of_a_batch_fails(tmp_path: Path) -> None:
    path = make_case(tmp_path, "case", *HELD_BACK["retrieval for a batch of two"][:3])
    content = json.loads(path.read_text())
    content["memory_indices_log"][-1]["selected_global_frames"].reverse()
    path.write_text(json.dumps(content))
    assert [row.tensor for row in verify_path(tmp_path) if row.status == "fail"] == ["retrieved frames"]


def test_a_window_without_room_is_told_clearly(tmp_path: Path) -> None:
    path = make_case(tmp_path, "case", *ONE_STEP[:3])
    content = json.loads(path.read_text())
    content["case"]["model_kwargs"] |= {"sink_size": 0, "memory_size": 5}
    path.write_text(json.dumps(content))
    (row,) = verify_path(tmp_path)
    assert row.status == "fail"
    assert "window 5 without a sink leaves nothing to attend to beside top_k 5: raise window" in row.reason


def test_a_lost_half_is_a_failure(tmp_path: Path) -> None:
    make_case(tmp_path, "case", *ONE_STEP[:3]).with_suffix(".safetensors").unlink()
    (row,) = verify_path(tmp_path)
    assert (row.case, row.status) == ("case", "fail")
    assert "safetensors" in row.reason


@pytest.mark.parametrize("suffix", [".json", ".safetensors"])
def test_a_file_that_cannot_be_read_is_a_failure(tmp_path: Path, suffix: str) -> None:
    path = make_case(tmp_path, "case", *ONE_STEP[:3]).with_suffix(suffix)
    path.write_bytes(path.read_bytes()[:100])
    results = verify_path(tmp_path)
    assert any(row.case == path.name and "cannot be read" in row.reason for row in results if row.status == "fail")


def test_records_that_would_fill_the_memory_are_failures(tmp_path: Path) -> None:
    for name in ("a.json", "b.json"):
        (tmp_path / name).write_text(f"[{' ' * (9 << 20)}]")
    with (tmp_path / "c.json").open("wb") as file:
        file.truncate(1 << 40)
    rows = {row.case: row for row in verify_path(tmp_path)}
    assert {name: row.status for name, row in rows.items()} == {"b.json": "fail", "c.json": "fail"}
    assert all("the record is larger than" in row.reason for row in rows.values())


def test_missing_weights_are_a_failure_of_their_case_alone(tmp_path: Path) -> None:
    make_case(tmp_path / "good", "case", *ONE_STEP[:3])
    make_case(tmp_path / "poor", "case", *ONE_STEP[:3])
    (tmp_path / "poor" / "weights.safetensors").unlink()
    results = verify_path(tmp_path)
    assert {row.folder for row in results if row.status == "fail"} == {"poor"}
    assert any("weights.safetensors is not there" in row.reason for row in results)


def test_tensors_in_no_known_format_are_said_to_be_skipped(tmp_path: Path) -> None:
    make_case(tmp_path / "good", "case", *ONE_STEP[:3])
    (tmp_path / "strange").mkdir()
    save_file({"x": torch.zeros(1)}, tmp_path / "strange" / "x.safetensors")
    (row,) = [row for row in verify_path(tmp_path) if row.folder == "strange"]
    assert row.status == "skip"
    assert "no golden vectors" in row.reason


def test_linked_folders_are_verified_and_none_twice(tmp_path: Path) -> None:
    make_case(tmp_path / "real", "case", *ONE_STEP[:3])
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "again").symlink_to(tmp_path / "set")
    (tmp_path / "set" / "linked").symlink_to(tmp_path / "real")
    results = verify_path(tmp_path / "set")
    assert {row.folder for row in results} == {"linked"}
    assert not failed(results)


def test_a_lora_without_alpha_counts_once(golden: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(golden / "lora", tmp_path / "lora")
    path = folder / "lora_rank4.json"
    path.write_text(json.dumps({key: value for key, value in json.loads(path.read_text()).items() if key != "alpha"}))
    results = verify_path(folder)
    assert results and not failed(results)


@pytest.mark.parametrize("complete", [True, False])
def test_a_checkpoint_without_a_top_level_must_hold_all_or_be_refused(
    golden: Path, tmp_path: Path, complete: bool
) -> None:
    source = golden / "checkpoints"
    for name in ("variants.json", "expected_weights.safetensors"):
        shutil.copy(source / name, tmp_path / name)
    state = dict(torch.load(source / "ckpt_generator.pt", weights_only=True)["generator"])
    if not complete:
        state.popitem()
    torch.save(state, tmp_path / "ckpt_bare.pt")
    rows = [row for row in verify_path(tmp_path) if row.case == "ckpt_bare"]
    assert {row.status for row in rows} == {"pass"}
    assert any(row.reason.startswith("refused") for row in rows) != complete


def test_a_path_without_golden_vectors_is_wrong_use(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="it is empty"):
        verify_path(tmp_path)
    with pytest.raises(UsageError, match="does not exist"):
        verify_path(tmp_path / "absent")
    file = tmp_path / "notes.txt"
    file.write_text("nothing")
    with pytest.raises(UsageError, match="is a file"):
        verify_path(file)
    with pytest.raises(UsageError, match=r"it holds notes\.txt"):
        verify_path(tmp_path)


@pytest.mark.parametrize(("bank", "difference"), [("exact", 1e-5), ("int8", 5e-3), ("int4", 5e-2)])
def test_golden_rollouts_judge_how_history_is_stored(bank: BankType, difference: float) -> None:
    rows = list(iter_results(TRAVELLING / "methods" / "longlive_rag", bank))
    latents, changed = [row for row in rows if "history" in row.tensor]
    assert latents.tensor == f"latents, history {bank}"
    assert latents.max_abs_diff is not None and latents.max_abs_diff < difference
    assert (latents.max_abs_diff < 1e-5) == (bank == "exact"), "nothing was quantised"
    assert changed.tensor == f"changed selections, history {bank}" and " of " in changed.reason
    assert not failed(rows)


def test_a_storage_type_that_is_too_coarse_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_Int4, "_LEVELS", 1)
    rows = list(iter_results(TRAVELLING / "methods" / "longlive_rag", "int4"))
    assert failed(rows)


def test_methods_without_a_history_are_skipped_for_a_storage_type() -> None:
    *_, row = iter_results(TRAVELLING / "methods" / "infinity_rope", "int8")
    assert (row.status, row.reason) == ("skip", "infinity_rope keeps no history with these settings")
    with pytest.raises(UsageError, match="no golden rollouts are recognised"):
        list(iter_results(TRAVELLING / "scheduler", "int8"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a real device")
@pytest.mark.parametrize("folder", ["methods/infinity_rope", "methods2/per_head/dummy_forcing"])
def test_golden_rollouts_are_computed_on_another_device_with_wider_bounds(folder: str) -> None:
    """Given a device that rounds as the CPU does, all rows pass; what is compared has come back from it."""
    with pretend_cuda() as device:
        results = list(iter_results(TRAVELLING / folder, device=torch.device("cuda", 0)))
        assert len(device.attended) > 100
    assert results and all(row.status == "pass" for row in results)
    (latents,) = (row for row in results if row.tensor == "latents")
    assert latents.tolerance == pytest.approx(1e-4 + ROUNDING)


def test_rollouts_alone_are_computed_where_a_device_is_named(golden: Path) -> None:
    with pytest.raises(UsageError, match="no golden rollouts are recognised"):
        list(iter_results(golden / "scheduler", device=torch.device("cpu")))
