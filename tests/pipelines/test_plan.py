from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from lrag_ray.cli.app import app
from lrag_ray.config.horizons import latent_frames
from lrag_ray.config.latents import LatentsConfig
from lrag_ray.config.load import load_config, load_job
from lrag_ray.config.prompts import plan_prompts
from lrag_ray.context.registry import registered
from lrag_ray.errors import ConfigError
from lrag_ray.pipelines.history_choice import Machine
from lrag_ray.pipelines.plan import MethodPlan, Plan, make_plan
from lrag_ray.scoring.flops import vbench_flops
from lrag_ray.wan.config import WanConfig
from lrag_ray.wan.flops import WAN_VAE_PARAMETERS, VaeSizes, clean_pass_flops, decode_bytes, pass_flops
from lrag_ray.world.scenes import HELD_OUT
from tests.config.make import write

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


def planned(path: str | Path, *overrides: str) -> Plan:
    config = load_config(path, list(overrides))
    return make_plan(config, plan_prompts(config.prompts))


def small(folder: Path, *overrides: str) -> Plan:
    (folder / "prompts.txt").write_text("a fox\na bear\n")
    return planned(write(folder), f"prompts.path={folder}/prompts.txt", *overrides)


def of(plan: Plan, method: str) -> MethodPlan:
    return next(each for each in plan.methods if each.method == method)


@pytest.mark.parametrize(
    ("duration_s", "frames_per_block", "frames"),
    [(30, 3, 120), (60, 3, 240), (120, 3, 480), (4.5, 3, 18), (5, 3, 21), (5, 1, 20), (0.1, 3, 3), (10.1, 4, 40)],
)
def test_horizons_are_whole_blocks(duration_s: float, frames_per_block: int, frames: int) -> None:
    assert latent_frames(duration_s, frames_per_block) == frames


@given(st.floats(0.01, 3600), st.integers(1, 8))
def test_rounding_adds_less_than_a_block(duration_s: float, frames_per_block: int) -> None:
    frames = latent_frames(duration_s, frames_per_block)
    assert frames % frames_per_block == 0
    assert frames == frames_per_block or -0.5 <= frames - 4 * duration_s < frames_per_block + 0.5


def test_a_corpus_is_not_scored_and_decodes_its_verification_videos_alone() -> None:
    file, count = str(CONFIGS / "latents.yaml"), "prompts.count=2480"
    config = load_job(file, [count])
    assert isinstance(config, LatentsConfig)
    plan = make_plan(config, plan_prompts(config.prompts))
    assert (plan.prompts, plan.totals.scoring_flops, [cell.videos for cell in plan.cells]) == (248, 0, [2])
    assert any("prompts.count 2480, which gives 248 prompts" in note for note in plan.notes)
    shown = CliRunner().invoke(app, ["plan", file, "--gpus", "6", "--set", count])
    assert shown.exit_code == 0 and "VBench" not in shown.output and "scores" not in shown.output


def test_table_2_comes_to_what_the_paper_ran() -> None:
    plan = planned(CONFIGS / "table2.yaml")
    assert plan.prompts == 128
    assert plan.totals.cells == 36
    assert plan.totals.rollouts == 3 * 4 * 128
    assert plan.totals.latent_frames == 1536 * 480
    assert plan.totals.passes == 1536 * 160 * 5
    assert plan.totals.video_frames == 1536 * (477 + 957 + 1917)
    assert all(each.nested and each.horizons == (120, 240, 480) for each in plan.methods)
    assert all(each.block_flops == pytest.approx(140.58e12, rel=1e-3) for each in plan.methods)
    assert of(plan, "rag").history_bytes == 468 * 287_539_200
    assert {each.history_bytes for each in plan.methods if each.method != "rag"} == {0}


def test_histories_are_counted_as_they_are_stored_and_where_they_are_kept() -> None:
    table2 = CONFIGS / "table2.yaml"
    plain, packed = planned(table2), planned(table2, "methods.rag.history=int4")
    assert of(packed, "rag").history == "int4"
    assert of(packed, "rag").history_bytes == 468 * 74_315_520
    assert of(packed, "rag").history_bytes < 36e9
    # The frames retrieved last are packed on the device too.
    assert of(packed, "rag").gpu_bytes == of(plain, "rag").gpu_bytes - 12 * (287_539_200 - 74_315_520)

    bank = ("engine.bank.device_gb=10", "engine.bank.host_gb=20", "engine.bank.disk=/fast")
    spread = planned(table2, "methods.rag.history=int4", *bank)
    device = 134 * 74_315_520
    assert of(spread, "rag").gpu_bytes - of(packed, "rag").gpu_bytes == device
    assert of(spread, "rag").history_bytes == 269 * 74_315_520
    assert of(spread, "rag").history_disk_bytes == (468 - 134 - 269) * 74_315_520
    with pytest.raises(
        ConfigError, match=r"leave 114\.7 GB of the 134\.6 GB of history of methods\.rag without a place"
    ):
        planned(table2, "engine.bank.host_gb=20")


def test_six_rollouts_of_120_s_fit_on_256_gb_at_int4() -> None:
    node = Machine(256_000_000_000, 80_000_000_000, 6)
    config = load_config(CONFIGS / "table2.yaml", ["methods.rag.history=int4"])
    notes = make_plan(config, plan_prompts(config.prompts), machine=node).notes
    expected = (
        "self_forcing/rag: 6 rollouts of 120 s with 34.8 GB of history each (int4) on a node with 256 GB and 80 GB"
    )
    assert any(
        note.startswith(expected) and note.endswith("fits, 34.8 GB in page-locked host memory each") for note in notes
    )


def test_a_pass_of_two_prompts_holds_two_of_everything_but_the_weights() -> None:
    alone, both = (planned(CONFIGS / "table2.yaml", f"engine.prompts_per_pass={rows}") for rows in (1, 2))
    for one, two in zip(alone.methods, both.methods, strict=True):
        assert (two.rollouts, two.latent_bytes) == (one.rollouts, one.latent_bytes)
        assert two.history_bytes == one.history_bytes
        assert (two.passes, two.transformer_flops) == (one.passes // 2, one.transformer_flops)
        assert (two.longest_flops, two.longest_decode_flops) == (2 * one.longest_flops, 2 * one.longest_decode_flops)
        layer = 2 * decode_bytes(VaeSizes(), 60, 104) - decode_bytes(VaeSizes(), 60, 104, videos=2)
        weights = 2 * WanConfig().parameter_count() + 4 * WAN_VAE_PARAMETERS
        assert two.gpu_bytes == 2 * one.gpu_bytes - weights - layer
    odd = planned(CONFIGS / "table2.yaml", "engine.prompts_per_pass=3")
    assert odd.methods[0].passes == 43 * 160 * 5
    assert any("the last 2 fill no pass, so it takes as long" in note for note in odd.notes)
    assert not any("prompts_per_pass" in note for note in both.notes)
    # Three actors of two rollouts need what six of one do.
    config = load_config(CONFIGS / "table2.yaml", ["engine.prompts_per_pass=2", "methods.rag.history=int4"])
    node = Machine(256_000_000_000, 80_000_000_000, 3)
    notes = make_plan(config, plan_prompts(config.prompts), machine=node).notes
    assert any(note.startswith("self_forcing/rag: 6 rollouts of 120 s with 34.8 GB") for note in notes)
    with pytest.raises(ConfigError, match=r"12 rollouts of 120 s .*: does not fit"):
        make_plan(config, plan_prompts(config.prompts), machine=node._replace(rollouts=6))


@pytest.mark.parametrize(
    ("node", "chosen"),
    [
        (Machine(256_000_000_000, 0, 6), "--set methods.rag.history=int4 ("),
        (Machine(512_000_000_000, 0, 6), "--set methods.rag.history=int8 ("),
        (
            Machine(256_000_000_000, 80_000_000_000, 6),
            "--set methods.rag.history=int8 --set engine.bank.device_gb=49.0 (",
        ),
        (Machine(64_000_000_000, 141_000_000_000, 1), "--set engine.bank.device_gb=104.0 ("),
        (Machine(32_000_000_000, 24_000_000_000, 4), "fewer actors on a node, shorter durations"),
    ],
)
def test_what_does_not_fit_is_refused_with_settings_that_do(node: Machine, chosen: str) -> None:
    config = load_config(CONFIGS / "table2.yaml")
    with pytest.raises(ConfigError) as raised:
        make_plan(config, plan_prompts(config.prompts), machine=node)
    assert f"does not fit. Fix: {chosen}" in str(raised.value)


def test_what_is_proposed_is_accepted() -> None:
    node = Machine(256_000_000_000, 80_000_000_000, 6)
    config = load_config(CONFIGS / "table2.yaml", ["methods.rag.history=int8", "engine.bank.device_gb=49.0"])
    assert make_plan(config, plan_prompts(config.prompts), machine=node).notes


@pytest.mark.parametrize("method", ["base", "dummy_forcing", "forcing_kv", "deep_forcing"])
@pytest.mark.parametrize("history", ["int8", "int4"])
def test_a_method_without_a_history_has_no_storage_type(method: str, history: str) -> None:
    with pytest.raises(ConfigError, match=r"methods\.x\.history: is int., but this method keeps no history"):
        load_config(CONFIGS / "table2.yaml", [f"methods={{x: {{method: {method}, history: {history}}}}}"])


def test_every_method_costs_what_it_declares() -> None:
    """Given all methods at one budget, each attends to 12 frames; float32 sinks and retrieved frames come on top.

    Rolling windows are another sampler: two calls per window, over up to 12 frames, and no nested durations.
    """
    config = load_config(CONFIGS / "methods_all.yaml")
    assert sorted(config.methods) == sorted(registered())
    plan = make_plan(config, plan_prompts(config.prompts))
    frame = plan.backbones[0].kv_bytes_per_frame
    block_loop = [each for each in plan.methods if each.method != "rolling_forcing"]
    assert {each.passes for each in block_loop} == {128 * 160 * 5}
    assert all(each.nested and each.block_flops == of(plan, "base").block_flops for each in block_loop)
    rolling, horizons = of(plan, "rolling_forcing"), (40, 80, 160)
    assert not rolling.nested and rolling.rollouts == 3 * 128
    assert rolling.passes == 128 * sum(2 * (blocks + 3) for blocks in horizons)
    stored = 128 * sum(3 * (blocks + 3 * blocks - (3 + 2 + 1)) for blocks in horizons)
    assert rolling.latent_bytes == stored * 16 * 60 * 104 * 2
    sizes = WanConfig()
    per_block = pass_flops(sizes, 60, 104, 12, 21) + clean_pass_flops(sizes, 60, 104, 3, 21)
    assert rolling.block_flops == per_block
    assert rolling.gpu_bytes - of(plan, "base").gpu_bytes > (2 * (21 - 12) + 3) * frame
    beside = {each.method: each.gpu_bytes - of(plan, "base").gpu_bytes for each in block_loop}
    assert beside.pop("rag") > 6 * frame
    assert beside.pop("ema_sink") == 2 * frame, "one frame in float32"
    assert beside.pop("dummy_forcing") == frame, "frame 0 beside the local frames"
    assert beside.pop("forcing_kv") == 2 * frame, "frames that patches are chosen from"
    assert set(beside.values()) == {0}


def test_a_first_block_of_more_steps_is_counted_once_per_rollout(tmp_path: Path) -> None:
    plain = small(tmp_path, "backbones.tiny.sampler.denoising_steps=[1000]", "durations_s=[3]")
    longer = [
        f"backbones.tiny.sampler.{key}"
        for key in ("denoising_steps=[1000]", "first_block_denoising_steps=[1000, 500, 250]")
    ]
    plan = small(tmp_path, *longer, "durations_s=[3]")
    assert of(plan, "base").passes - of(plain, "base").passes == 2 * of(plan, "base").rollouts
    assert of(plan, "base").transformer_flops > of(plain, "base").transformer_flops
    assert of(plan, "base").block_flops == of(plain, "base").block_flops, "of the last block"


def test_generation_decoding_and_scoring_are_counted_apart() -> None:
    plan = planned(CONFIGS / "table2.yaml")
    assert plan.totals.scoring_flops == 1536 * vbench_flops([477, 957, 1917], 16, 480, 832)
    hours, totals = plan.gpu_hours["H100"], plan.totals
    assert not plan.speeds
    for spent, flops, shares in (
        (hours.generation, totals.transformer_flops, (0.6, 0.2)),
        (hours.decoding, totals.decode_flops, (0.6, 0.2)),
        (hours.scoring, totals.scoring_flops, (0.1, 0.02)),
    ):
        assert spent is not None
        assert list(spent) == pytest.approx([flops / (989.4e12 * share * 3600) for share in shares])


def test_independent_durations_share_no_clips(tmp_path: Path) -> None:
    nested, independent = small(tmp_path), small(tmp_path, "independent_durations=true")
    assert nested.totals.scoring_flops < independent.totals.scoring_flops


def test_the_plan_works_before_the_prompts_are_there_and_says_so() -> None:
    plan = planned(CONFIGS / "table2.yaml")
    assert any("is not there yet: planned for prompts.count 128. `run` needs the file" in note for note in plan.notes)


def test_a_full_retrieval_budget_leaves_no_past_local_frame_and_the_plan_says_so() -> None:
    notes = [note for note in planned(CONFIGS / "ablation_budget.yaml").notes if "no past local frame" in note]
    assert [note.partition(":")[0] for note in notes] == ["methods.rag_top_k_8"]


def test_nested_durations_share_their_rollout_and_independent_ones_do_not(tmp_path: Path) -> None:
    nested, independent = small(tmp_path), small(tmp_path, "independent_durations=true")
    assert (nested.totals.rollouts, nested.totals.latent_frames) == (2 * 2, 2 * 2 * 36)
    assert (independent.totals.rollouts, independent.totals.latent_frames) == (2 * 2 * 2, 2 * 2 * (18 + 36))
    assert nested.totals.video_frames == independent.totals.video_frames == 2 * 2 * (69 + 141)
    assert nested.cells == independent.cells
    assert any("nested" in note for note in nested.notes)
    assert not any("nested" in note for note in independent.notes)


def test_growing_a_configuration_grows_its_plan(tmp_path: Path) -> None:
    before = small(tmp_path)
    method = small(tmp_path, "methods.more={method: infinity_rope}")
    longer = small(tmp_path, "durations_s=[4.5, 9, 12]")
    sampled = small(tmp_path, "prompts.samples=3")
    assert set(before.cells) < set(method.cells) and set(before.cells) < set(longer.cells)
    assert method.totals.rollouts == before.totals.rollouts * 3 // 2
    assert longer.totals.rollouts == before.totals.rollouts
    assert longer.totals.transformer_flops > before.totals.transformer_flops
    assert sampled.totals.rollouts == 3 * before.totals.rollouts
    assert sampled.totals.transformer_flops == 3 * before.totals.transformer_flops


def test_durations_that_are_no_whole_blocks_are_rounded_up_and_said(tmp_path: Path) -> None:
    plan = small(tmp_path, "durations_s=[4.9, 5, 9]")
    assert [cell.latent_frames for cell in plan.cells[:3]] == [21, 21, 36]
    assert of(plan, "base").horizons == (21, 36)
    assert (
        "5 s is not a number of whole blocks of 3 latent frames: made 21 latent frames (5.25 s, 81 video frames)"
        in plan.notes
    )
    assert "4.9 s and 5 s are the same 21 latent frames, so they share their results" in plan.notes
    assert not any(note.startswith("9 s") for note in plan.notes)


def test_duplicate_prompts_are_warned_of(tmp_path: Path) -> None:
    (tmp_path / "twice.txt").write_text("a fox\na fox\n")
    plan = planned(write(tmp_path), f"prompts.path={tmp_path}/twice.txt")
    assert plan.totals.rollouts == 4
    assert any(note.startswith("lines 1 and 2 hold the same prompt") for note in plan.notes)


def test_prompts_that_are_not_of_the_tiny_world_are_warned_of(tmp_path: Path) -> None:
    (tmp_path / "mixed.txt").write_text(f"{HELD_OUT[0].prompt}\na fox\n{HELD_OUT[1].prompt}\na hare\n")
    mixed = f"prompts.path={tmp_path}/mixed.txt"
    note = "backbones.tiny_world knows the tiny world alone, and 2 prompts (lines 2 and 4) are not of it"
    assert any(each.startswith(note) for each in planned(CONFIGS / "tiny_world/demo.yaml", mixed).notes)
    assert not any("tiny world" in each for each in planned(CONFIGS / "tiny_world/demo.yaml").notes)
    assert not any("tiny world" in each for each in planned(write(tmp_path), mixed).notes)


def test_without_videos_nothing_is_decoded_or_stored_for_them(tmp_path: Path) -> None:
    totals = small(tmp_path, "video.enabled=false").totals
    assert (totals.decode_flops, totals.video_frames, totals.video_bytes, totals.scoring_flops) == (0, 0, 0, 0)
    assert totals.latent_bytes == small(tmp_path).totals.latent_bytes > 0


def test_a_window_of_all_frames_costs_more_with_every_block(tmp_path: Path) -> None:
    plan = small(tmp_path, "methods.all={method: base, window: -1}")
    assert of(plan, "all").transformer_flops > of(plan, "base").transformer_flops
    assert of(plan, "all").gpu_bytes > of(plan, "base").gpu_bytes


def test_a_plan_is_plain_data(tmp_path: Path) -> None:
    plan = small(tmp_path)
    assert json.loads(json.dumps(dataclasses.asdict(plan)))["totals"]["rollouts"] == plan.totals.rollouts


def test_the_tiny_vae_is_counted_with_its_own_sizes() -> None:
    from lrag_ray.pipelines.speeds import VAE_SIZES
    from lrag_ray.wan.flops import decoder_parameter_count
    from lrag_ray.wan.vae import tiny_vae

    parameters = tiny_vae().model.named_parameters()
    convolutions = [p for n, p in parameters if n.startswith(("decoder.", "post_quant")) and "norm" not in n]
    assert decoder_parameter_count(VAE_SIZES["tiny"]) == sum(p.numel() for p in convolutions)


def test_calls_of_language_models_are_planned_with_their_cost(tmp_path: Path) -> None:
    refine = "prompts.refine={backend: openai, model: m, price_per_million_output: 10000, max_calls: 1}"
    notes = small(tmp_path, refine).notes
    (note,) = [note for note in notes if "prompts are refined by m (openai), template extend first" in note]
    assert "about 2 calls" in note and note.endswith("400 output tokens, cost 4.00, without retries")
    assert "prompts.refine.max_calls 1 is less than the 2 prompts" in notes


@pytest.mark.parametrize(
    ("question", "calls", "pictures"),
    # 2 prompts, 2 durations of 4.5 and 9 s at a picture a second; a pair of methods is shown in both orders.
    [("exposure", 2 * 2 * 2, 2 * 2 * (5 + 9)), ("preference", 2 * 2 * 2, 2 * 2 * (5 + 9) * 2)],
)
def test_a_judge_of_pairs_sees_both_videos_in_both_orders(
    tmp_path: Path, question: str, calls: int, pictures: int
) -> None:
    chat = "chat: {backend: openai, model: m, max_tokens: 16}"
    plan = small(tmp_path, f"scoring={{suite: judge, settings: {{{chat}, questions: [{question}]}}}}")
    (note,) = [note for note in plan.notes if note.startswith("the judge m is asked about 2 cases per cell")]
    assert f"about {calls} calls" in note and f"{calls * 16} output tokens" in note
    found = re.search(r"([\d,]+) input", note)
    assert found is not None
    text = int(found[1].replace(",", "")) - pictures * 258
    assert 0 < text < calls * 500, "the rest is the question"
