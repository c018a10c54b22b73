"""`lrag-ray inspect` on a stored rollout: the rows that were generated come back, and are drawn."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from lrag_ray.cli import inspect
from lrag_ray.context.rag import Rag, RagSettings
from lrag_ray.context.trace import TraceRow
from lrag_ray.errors import StorageError, UsageError
from lrag_ray.report.inspect import inspect_rollout
from lrag_ray.store.identity import MethodIdentity
from lrag_ray.store.parts import FinishedBlock, write_part
from lrag_ray.store.records import Commit, now_utc
from lrag_ray.store.rollouts import RolloutRun
from tests.store.make import make_identity, rollout_id
from tests.tiny import start, tiny_transformer


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[TraceRow]]:
    """Address of a rag rollout of 8 blocks in two parts, and its trace."""
    run = RolloutRun(str(tmp_path_factory.mktemp("inspect") / "run"))
    identity = make_identity(methods={"rag": MethodIdentity(method="rag", settings={}, nested=True)})
    run.ensure(identity)
    at = rollout_id(method="rag")
    results = list(start(tiny_transformer(), Rag, RagSettings(descriptor="avg_pool")).blocks(8))
    blocks = [FinishedBlock(r.block, r.latents[0], r.trace[0], r.state[0]) for r in results]
    key = identity.rollout_key(at, 24)
    parts = [
        write_part(run.storage, f"{at.path}/attempt-one", half, rollout_key=key, device_kind="cpu")
        for half in (blocks[:5], blocks[5:])
    ]
    record = Commit(
        rollout=at, rollout_key=key, latent_frames=24, attempt="one", latent_parts=[part.latents for part in parts],
        trace_parts=[part.trace for part in parts], video=None, video_frames=0, fps=16, latents_digest="",
        device_kind="cpu", versions={}, timings_s={}, created_at=now_utc(),
    )  # fmt: skip
    assert run.commit(record)
    return f"{run.uri}/{at.path}", [row for result in results for row in result.trace[0]]


def command() -> typer.Typer:
    app = typer.Typer()
    app.callback()(lambda: None)
    inspect.register(app)
    return app


def test_the_trace_comes_back(stored: tuple[str, list[TraceRow]]) -> None:
    address, rows = stored
    found = inspect_rollout(address)
    assert [row[:6] for row in found.rows] == [row[:6] for row in rows]
    similarities = [row.similarity for row in found.rows if row.kind == "retrieved"]
    assert similarities == pytest.approx([row.similarity for row in rows if row.kind == "retrieved"])
    assert found.prompt == "a"


def test_it_is_drawn_on_the_terminal_and_as_a_picture(stored: tuple[str, list[TraceRow]], tmp_path: Path) -> None:
    address, _ = stored
    done = CliRunner().invoke(command(), ["inspect", address, "--png", str(tmp_path / "map.png")])
    assert done.exit_code == 0, done.output
    lines = done.output.splitlines()
    assert lines[0] == "tiny, rag, 24 latent frames"
    assert lines[2].endswith("▓▓"), "the newest frames belong to the last block"
    assert "██" in done.output
    assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")


def test_json_holds_every_row(stored: tuple[str, list[TraceRow]]) -> None:
    address, rows = stored
    done = CliRunner().invoke(command(), ["inspect", address, "--json"])
    assert len(json.loads(done.output)["rows"]) == len(rows)


def test_other_addresses_are_refused(stored: tuple[str, list[TraceRow]]) -> None:
    address, _ = stored
    with pytest.raises(UsageError, match="is not a rollout: expected RUN/rollouts/"):
        inspect_rollout(address.rsplit("/", 1)[0])
    with pytest.raises(StorageError, match="has no commit"):
        inspect_rollout(address.replace("00000-aa", "00009-zz"))
    with pytest.raises(StorageError, match="there is no run at this address"):
        inspect_rollout("no/such/run/rollouts/tiny/rag/00000-aa-0")
