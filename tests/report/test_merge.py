"""Several runs as one: union, refusal, addresses between them."""

from __future__ import annotations

from pathlib import Path

import pytest

from lrag_ray.errors import IdentityError, UsageError
from lrag_ray.report import collect, report
from lrag_ray.report.tables import warnings
from lrag_ray.store.identity import RunIdentity
from lrag_ray.store.rollouts import RolloutRun
from tests.report.make_run import make_identity, make_run, score_all

PROMPTS = ["a red fox", "a river at dawn"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[RolloutRun]:
    """base of both prompts in one run, rag of the first in another."""
    folder = tmp_path_factory.mktemp("merge")
    first = score_all(make_run(str(folder / "one run"), PROMPTS, ["base"]))
    return [first, score_all(make_run(str(folder / "other"), PROMPTS[:1], ["rag"]))]


def identity_run(uri: Path, identity: RunIdentity) -> RolloutRun:
    run = RolloutRun(str(uri))
    run.ensure(identity)
    return run


def test_two_runs_make_one_table_over_their_common_prompts(runs: list[RolloutRun]) -> None:
    data = collect(runs)
    for block in data.blocks:
        assert [row.method for row in block.rows] == ["base", "rag"]
        assert (block.prompts, block.prompts_left_out) == (1, 1)
    assert data.statistics[0].contrasts[0].reference == "base"
    assert data.uris == [run.uri for run in runs]


def test_methods_of_a_family_stand_together(tmp_path: Path) -> None:
    """Given methods in any order, and one of a stranger's that is not imported, families come in their order."""
    names = ["rag", "memflow", "mine", "infinity_rope", "ema_sink", "memrope", "base"]
    identity = make_identity(PROMPTS, names)
    methods = dict(identity.methods)
    methods["mine"] = methods["mine"].model_copy(update={"method": "no_such_module:Mine"})
    run = RolloutRun(str(tmp_path / "run"))
    run.ensure(identity.model_copy(update={"methods": methods}))
    data = collect([run])
    assert data.families(data.methods["tiny"]) == [
        ("sink", ["ema_sink", "base"]),
        ("positions", ["infinity_rope"]),
        ("memory", ["memflow", "memrope"]),
        ("retrieval", ["rag"]),
        ("other", ["mine"]),
    ]
    assert list(data.identity.methods) == list(data.methods["tiny"])


def test_the_page_of_two_runs_plays_from_both(runs: list[RolloutRun], tmp_path: Path) -> None:
    written = report(runs, to=str(tmp_path / "both"), strips=1)
    page = (tmp_path / "both" / "report.html").read_text()
    assert written.folder == str(tmp_path / "both")
    for name in ("one%20run", "other"):
        assert f"/{name}/rollouts/tiny/" in page
    assert len(list((tmp_path / "both" / "strips").iterdir())) == 4, "a strip and a context per method"
    assert not (Path(runs[0].uri) / "summary").exists()


def test_several_runs_without_a_place_write_nothing(runs: list[RolloutRun]) -> None:
    made = report(runs)
    assert (made.folder, list(made.files)) == (None, [])
    assert len(made.blocks) == 2
    assert not (Path(runs[0].uri) / "summary").exists()


def test_a_rollout_of_both_runs_counts_once(runs: list[RolloutRun], tmp_path: Path) -> None:
    copy = score_all(make_run(str(tmp_path / "copy"), PROMPTS, ["base"]))
    data = collect([*runs, copy])
    assert len(data.scores.videos) == 6
    assert {shown.run_dir.uri for shown in data.rollouts.values()} == {run.uri for run in runs}


@pytest.mark.parametrize(
    ("path", "change"),
    [
        ("methods.base.settings.window", {"methods": {"base": {"method": "base", "settings": {"window": 7}}}}),
        ("methods.base.method", {"methods": {"base": {"method": "infinity_rope", "settings": {"window": 6}}}}),
        ("backbones.tiny.weights", {"backbones": {"tiny": {"latents": {"weights": "x" * 64}}}}),
        ("run.seed", {"seed": 8}),
    ],
)
def test_equal_names_with_different_meanings_are_refused(tmp_path: Path, path: str, change: dict[str, object]) -> None:
    def merged(into: dict[str, object], values: dict[str, object]) -> dict[str, object]:
        both = {
            key: merged(into[key], value) if isinstance(value, dict) else value  # type: ignore[arg-type]
            for key, value in values.items()
        }
        return {**into, **both}

    one = make_identity(PROMPTS, ["base"])
    other = RunIdentity.model_validate(merged(one.model_dump(), change))
    runs = [identity_run(tmp_path / "one", one), identity_run(tmp_path / "two", other)]
    with pytest.raises(IdentityError, match=path) as told:
        collect(runs)
    assert runs[0].uri in str(told.value) and runs[1].uri in str(told.value)


def test_other_names_may_differ_and_are_compared_where_they_are(tmp_path: Path) -> None:
    one = make_identity(PROMPTS, ["base"])
    tiny = one.backbones["tiny"]
    other = make_identity(PROMPTS, ["rag"]).model_copy(
        update={"backbones": {"big": tiny.model_copy(update={"latents": {"weights": "b" * 64}})}}
    )
    data = collect([identity_run(tmp_path / "one", one), identity_run(tmp_path / "two", other)])
    assert {name: list(methods) for name, methods in data.methods.items()} == {"tiny": ["base"], "big": ["rag"]}


def test_a_run_is_named_once(runs: list[RolloutRun]) -> None:
    with pytest.raises(UsageError, match="given twice"):
        collect([runs[0], RolloutRun(runs[0].uri)])


def test_labels_tell_methods_of_one_name_apart(tmp_path: Path) -> None:
    """Given two runs with base, of which one has another seed, labels give both a row, a player and a strip."""
    one = score_all(make_run(str(tmp_path / "one"), PROMPTS, ["base", "rag"], horizons=(6,)))
    other = score_all(make_run(str(tmp_path / "two"), PROMPTS, ["base"], horizons=(6,)))
    identity = other.require().model_copy(update={"seed": 8})
    other.storage.write("run.json", identity.model_dump_json().encode())
    with pytest.raises(IdentityError, match=r"run.seed: 7 in the first, 8 in the second\n.*`A="):
        collect([one, other])
    # The commits of another seed do not count, so the second run keeps its own here.
    other.storage.write("run.json", identity.model_copy(update={"seed": 7}).model_dump_json().encode())
    made = report([one, RolloutRun(other.uri)], labels=["A", "B"], to=str(tmp_path / "both"), strips=1)
    data = made.data
    assert list(data.methods["tiny"]) == ["base (A)", "base (B)", "rag"]
    (block,) = data.blocks
    means = {row.method: row.means for row in block.rows}
    assert means["base (A)"] == means["base (B)"] and block.prompts == 2
    page = (tmp_path / "both" / "report.html").read_text()
    assert page.count('data-method="base (B)"') == 2 and page.count("base (B)</span><img") == 1
    assert {row.target.method for row in data.scores.rows} == {"base (A)", "base (B)", "rag"}


def test_labelled_runs_may_differ_in_anything_and_the_page_says_in_what(tmp_path: Path) -> None:
    one = make_identity(PROMPTS, ["base"])
    tiny = one.backbones["tiny"]
    blocks = tiny.model_copy(update={"frames_per_block": 1})
    other = one.model_copy(update={"seed": 8, "backbones": {"tiny": blocks}})
    runs = [identity_run(tmp_path / "one", one), identity_run(tmp_path / "two", other)]
    data = collect(runs, labels=["A", "B"])
    assert {name: list(methods) for name, methods in data.methods.items()} == {
        "tiny (A)": ["base (A)"],
        "tiny (B)": ["base (B)"],
    }
    assert list(data.run_notes) == ["A and B differ in run.seed."]
    assert warnings(data)[-1] == data.run_notes[0]
