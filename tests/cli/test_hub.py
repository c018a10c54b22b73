"""`push` and `prompts` against a server with the routes of the Hub."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from lrag_ray.cli.app import app
from lrag_ray.config.prompts import load_prompts
from lrag_ray.config.schema import PromptsSection
from tests.report.make_run import make_run, score_all
from tests.store.hub_server import HubServer, Repository


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> str:
    uri = str(tmp_path_factory.mktemp("push") / "run")
    score_all(make_run(uri, ["a [fox](http://x)", "a bear"], horizons=(6,)))
    return uri


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    with HubServer().serve() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.endpoint)
        monkeypatch.setenv("HF_TOKEN", server.token)
        yield server


def called(*arguments: str) -> tuple[int, str]:
    found = CliRunner().invoke(app, list(arguments))
    if found.exception is not None and not isinstance(found.exception, SystemExit):
        raise found.exception
    return found.exit_code, " ".join(found.output.split())


def test_a_push_makes_a_private_repository_with_page_tables_and_chosen_videos(hub: HubServer, run: str) -> None:
    code, said = called("push", run, "hub://me/demo", "--method", "rag", "--limit", "1", "--strips", "0")
    assert code == 0, said
    assert said.startswith(f"{hub.endpoint}/datasets/me/demo (private): 1 video,")
    repository = hub.repositories["me/demo"]
    assert repository.private
    assert {"README.md", "report.html", "ranks.csv", "videos.csv", "ends.csv"} <= repository.files.keys()
    (video,) = [name for name in repository.files if name.endswith(".mp4")]
    assert video.startswith("videos/1/tiny/rag/") and video.encode() in repository.files["report.html"]
    card = repository.files["README.md"].decode()
    assert "Methods: `base`, `rag`" in card and "> `tiny, untrained`" in card
    code, _ = called("push", run, "hub://me/demo", "--strips", "0")
    assert code == 0 and sum(name.endswith(".mp4") for name in repository.files) == 4, "a second push adds to it"


def test_nothing_becomes_public_unless_it_is_asked_for(hub: HubServer, run: str) -> None:
    hub.repositories["me/open"] = Repository(private=False)
    code, said = called("push", run, "hub://me/open")
    assert (code, hub.writes) == (2, 0)
    assert "hub://me/open is public" in said and "--public" in said
    code, said = called("push", run, "hub://me/open", "--public", "--strips", "0")
    assert code == 0 and "(for everybody)" in said and "report.html" in hub.repositories["me/open"].files
    code, said = called("push", run, "hub://me/new", "--public", "--strips", "0")
    assert code == 0 and not hub.repositories["me/new"].private


def test_wrong_addresses_and_tokens_are_told_apart(hub: HubServer, run: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for address, reason in (
        ("hub://me", "'hub://me' is not an address on the Hub. Fix: hub://OWNER/NAME"),
        ("hub://me/demo/file.csv", "a run is pushed to a repository as a whole"),
        ("s3://bucket/x", "give the runs and then where to, hub://OWNER/NAME"),
    ):
        code, said = called("push", run, address)
        assert code == 2 and reason in said
    secret = "hf_" + "s" * 30
    monkeypatch.setenv("HF_TOKEN", secret)
    code, said = called("push", run, "hub://me/demo", "--strips", "0")
    assert code == 3 and "HF_TOKEN" in said and secret not in said
    monkeypatch.delenv("HF_TOKEN")
    code, said = called("push", run, "hub://me/demo")
    assert code == 2 and "cannot be written without a token" in said
    assert not hub.repositories


def test_prompts_of_a_dataset_become_a_prompt_file(hub: HubServer, tmp_path: Path) -> None:
    table = tmp_path / "t.parquet"
    pictures = pa.array([{"bytes": b"x"}] * 3)
    columns = {"caption": ["a fox", "a bear", "a wolf"], "seconds": [1.5, float("nan"), 2], "image": pictures}
    pq.write_table(pa.table(columns), table)
    hub.repositories["me/captions"] = Repository(
        private=True, files={"README.md": b"#", "data/test.parquet": table.read_bytes()}
    )
    out = tmp_path / "captions.jsonl"
    code, said = called("prompts", "hub://me/captions", str(out), "--column", "caption", "--limit", "2")
    assert code == 0 and "2 prompts of data/test.parquet" in said and "--set prompts.column=caption" in said
    assert [json.loads(line) for line in out.read_text().splitlines()] == [
        {"caption": "a fox", "seconds": 1.5},
        {"caption": "a bear", "seconds": None},
    ]
    assert [p.text for p in load_prompts(PromptsSection(path=str(out), column="caption"))] == ["a fox", "a bear"]
    hub.repositories["me/captions"].files["b.csv"] = b"prompt,id\na fox,1\n"
    for address, file, options, exit_code, reason in (
        ("hub://me/captions", "b.jsonl", (), 2, "holds several tables (b.csv, data/test.parquet)"),
        ("hub://me/captions/README.md", "b.jsonl", (), 2, "README.md: .md is not read as a table of prompts"),
        ("hub://me/captions/data/test.parquet", "b.jsonl", (), 2, "no column 'prompt' of text"),
        ("hub://me/captions/c.csv", "b.jsonl", (), 3, "hub://me/captions"),
        ("hub://me/nothing", "b.jsonl", (), 3, "hub://me/nothing is not there, or not for you"),
        ("hub://me/captions/b.csv", "captions.jsonl", (), 2, "exists. Fix: give another name"),
        ("hub://me/captions/b.csv", "b.txt", (), 2, "written as JSON Lines"),
        ("hub://me/captions/../b.csv", "b.jsonl", (), 2, "is not an address on the Hub"),
    ):
        code, said = called("prompts", address, str(tmp_path / file), *options)
        assert code == exit_code and reason in said, (address, said)
    code, said = called("prompts", "hub://me/captions/b.csv@main", str(tmp_path / "b.jsonl"), "--json")
    assert code == 0 and json.loads(said)["prompts"] == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["b.jsonl", "captions.jsonl", "t.parquet"]
