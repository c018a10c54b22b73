from __future__ import annotations

from typing import Any

import pytest

from lrag_ray.store.identity import (
    BackboneIdentity,
    Horizon,
    MethodIdentity,
    PromptIdentity,
    RunIdentity,
    differences,
    grown,
)
from tests.store.make import make_identity, rollout_id


def test_the_key_depends_on_what_determines_the_latents_only() -> None:
    identity = make_identity()
    backbone = identity.backbones["tiny"]
    key = identity.rollout_key(rollout_id(), 6)
    same = [
        make_identity(video={"fps": 24}),
        make_identity(samples=4),
        make_identity(backbones={"tiny": backbone.model_copy(update={"pixels": {"vae": "v1"}, "label": "x"})}),
        make_identity(prompts={"00000-aa": PromptIdentity(index=7, text="a")}),
    ]
    other = [
        make_identity(seed=1),
        make_identity(numerics_version=2),
        make_identity(backbones={"tiny": backbone.model_copy(update={"latents": {"weights": "w1"}})}),
        make_identity(methods={"base": MethodIdentity(method="base", settings={"window": 9}, nested=True)}),
        make_identity(prompts={"00000-aa": PromptIdentity(index=0, text="A")}),
    ]
    assert {one.rollout_key(rollout_id(), 6) for one in same} == {key}
    assert len({one.rollout_key(rollout_id(), 6) for one in other} | {key}) == 1 + len(other)
    assert identity.rollout_key(rollout_id().model_copy(update={"sample": 1}), 6) != key


def test_the_horizon_is_in_the_key_only_where_durations_are_not_nested() -> None:
    nested = make_identity()
    assert nested.rollout_key(rollout_id(), 6) == nested.rollout_key(rollout_id(), 12)
    alone = make_identity(methods={"base": MethodIdentity(method="base", settings={}, nested=False)})
    assert alone.rollout_key(rollout_id(), 6) != alone.rollout_key(rollout_id(), 12)


def test_a_run_keeps_the_noise_that_it_was_begun_with() -> None:
    """Given a run.json without a version, its keys are what they were, and a start of a newer program continues it."""
    stored, wanted = make_identity(), make_identity(noise=2)
    assert "noise" not in stored.model_dump() and RunIdentity(**stored.model_dump()).noise == 1
    assert differences(stored, wanted) == [] and grown(stored, wanted).noise == 1
    assert grown(wanted, stored).noise == 2
    assert stored.rollout_key(rollout_id(), 6) != wanted.rollout_key(rollout_id(), 6)


def test_what_a_plug_in_says_of_itself_may_change() -> None:
    one, other = (MethodIdentity(method="my:Own", settings={}, nested=True, summary=text) for text in ("", "Keeps."))
    stored, wanted = make_identity(methods={"own": one}), make_identity(methods={"own": other})
    assert differences(stored, wanted) == [] and grown(stored, wanted).methods["own"].summary == "Keeps."
    assert "summary" not in one.model_dump(), "earlier versions can read a run without one"


def test_growth_is_no_difference() -> None:
    stored = make_identity()
    backbone = stored.backbones["tiny"]
    wanted = make_identity(
        samples=2,
        backbones={
            "tiny": backbone.model_copy(update={"horizons": [Horizon(duration_s=6, latent_frames=24)]}),
            "second": backbone,
        },
        methods={"rag": MethodIdentity(method="rag", settings={}, nested=True)},
        prompts={"00002-cc": PromptIdentity(index=2, text="c")},
    )
    assert differences(stored, wanted) == []
    union = grown(stored, wanted)
    assert union.samples == 2
    assert [h.latent_frames for h in union.backbones["tiny"].horizons] == [6, 12, 24]
    assert set(union.backbones) == {"tiny", "second"} and set(union.methods) == {"base", "rag"}
    assert list(union.prompts) == ["00000-aa", "00001-bb", "00002-cc"]
    assert grown(union, stored) == union


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"seed": 1}, "run.seed: 0 in the run, 1 in the configuration"),
        ({"video": {"fps": 24}}, "video.fps"),
        (
            {"methods": {"base": MethodIdentity(method="base", settings={"window": 9}, nested=True)}},
            "methods.base.settings.window: 12 in the run, 9 in the configuration",
        ),
        ({"prompts": {"00001-cc": PromptIdentity(index=1, text="c")}}, "prompts, line 2: 'b' in the run, 'c'"),
    ],
)
def test_any_other_change_is_named(change: dict[str, Any], named: str) -> None:
    found = differences(make_identity(), make_identity(**change))
    assert len(found) == 1 and named in found[0]


def with_lora(rank: int, alpha: float) -> BackboneIdentity:
    lora = {"sha256": "aa", "rank": rank, "alpha": alpha}
    return make_identity().backbones["tiny"].model_copy(update={"latents": {"weights": {"lora": lora}}})


def test_a_run_of_the_former_default_strength_does_not_go_on_at_another() -> None:
    """An absent lora.alpha meant 256 whatever the rank; stored identities hold the number."""
    stored = make_identity(backbones={"tiny": with_lora(4, 256.0)})
    compared, explained = differences(stored, make_identity(backbones={"tiny": with_lora(4, 4.0)}))
    assert compared == "backbones.tiny.weights.lora.alpha: 256.0 in the run, 4.0 in the configuration"
    assert "an absent alpha used to mean 256" in explained and "`lora.alpha: 256` continues this run" in explained
    assert differences(stored, make_identity(backbones={"tiny": with_lora(4, 256.0)})) == []


def test_how_history_is_stored_is_part_of_the_key_unless_it_is_exact() -> None:
    """Runs that were begun before there was a choice keep their keys."""
    method = MethodIdentity(method="rag", settings={}, nested=True)
    packed = method.model_copy(update={"history": "int4"})
    exact, int4 = (make_identity(methods={"rag": each}) for each in (method, packed))
    assert "history" not in exact.model_dump()["methods"]["rag"]
    assert RunIdentity.model_validate_json(exact.model_dump_json()).methods["rag"].history == "exact"
    assert int4.model_dump()["methods"]["rag"]["history"] == "int4"
    rollout = next(exact.rollouts())
    assert exact.rollout_key(rollout, 3) != int4.rollout_key(rollout, 3)
    (line,) = differences(exact, int4)
    assert line.startswith("methods.rag.history: None in the run, 'int4' in the configuration")
