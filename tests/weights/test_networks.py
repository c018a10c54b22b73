"""Networks of a scoring suite: pulled from a real HTTP server into a folder, archives unpacked, verified."""

from __future__ import annotations

import hashlib
import io
import json
import stat
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import typer
from huggingface_hub import constants
from typer.testing import CliRunner

from lrag_ray.cli import weights as cli
from lrag_ray.errors import WeightsError
from lrag_ray.scoring.vbench_long.official import NETWORKS, OFFICIAL
from lrag_ray.scoring.vbench_long.settings import VbenchSettings
from lrag_ray.scoring.vbench_long.suite import VbenchLong
from lrag_ray.scoring.vbench_long.weights import WeightFiles
from lrag_ray.weights import networks
from lrag_ray.weights.local import record_at
from lrag_ray.weights.networks import Source, pull_source, sources, verify_networks
from tests.weights.hub import Hub


def archive(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as made:
        made.mkdir("ensemble_lora")
        for name, content in members.items():
            made.writestr(name, content)
    return buffer.getvalue()


LORA = {"ensemble_lora/adapter_config.json": b"{}", "ensemble_lora/adapter_model.safetensors": b"lora"}
DREAMSIM = {"clip_vitb16_pretrain.pth.tar": b"clip", "open_clip_vitb16_pretrain.pth.tar": b"open clip", **LORA}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """Every network is published on it, as a few bytes."""
    monkeypatch.setenv("LRAG_WEIGHTS_CACHE", str(tmp_path / "node-cache"))
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)
    with Hub().serve() as serving:
        for name, official in list(OFFICIAL.items()):
            place, content = f"files/{name}", name.encode() * 500
            digest: str | None = hashlib.sha256(content).hexdigest()
            if official.member:
                place = f"files/{official.url.rpartition('/')[2]}"
                members = DREAMSIM if "dreamsim" in name else {official.member: content, "models/other.pth": b"x"}
                digest = None if "dreamsim" in name else digest
                content = archive({**members, "ensemble_lora/../../escaped": b"x"})
            serving.files[place] = content
            published = official._replace(url=f"{serving.endpoint}/{place}", sha256=digest)
            monkeypatch.setitem(OFFICIAL, name, published)
        yield serving


def suite_in(folder: Path) -> VbenchLong:
    return VbenchLong(VbenchSettings(weights=str(folder)))


def sources_in(folder: Path) -> list[Source]:
    return sources(suite_in(folder).weight_files())


def source_of(name: str, folder: Path) -> Source:
    return next(source for source in sources_in(folder) if name in source.names)


def test_the_suite_is_laid_out_as_vbench_does_it_with_one_download_per_address(hub: Hub, tmp_path: Path) -> None:
    files = WeightFiles(tmp_path / "w")
    pulled = [network for source in sources_in(tmp_path / "w") for network in pull_source(source)]
    assert {network.name for network in pulled if network.pulled} == set(NETWORKS)
    assert len(hub.ranges) == len(sources_in(tmp_path / "w")) == 9
    assert not list(files.missing())
    for name in NETWORKS:
        record = record_at(str(files.find(name)))
        assert record is not None
        assert (record.repository, record.licence) == (OFFICIAL[name].url, OFFICIAL[name].licence)
        for inside, file in record.files.items():
            path = files.find(name) / inside if files.find(name).is_dir() else files.find(name)
            assert file.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert (tmp_path / "w/raft_model/models/raft-things.pth").read_bytes() == b"raft_things" * 500
    lora = tmp_path / "w/dreamsim_model/ensemble_lora"
    assert {file.name: file.read_bytes() for file in lora.iterdir()} == {Path(k).name: v for k, v in LORA.items()}
    # Neither the archives nor what is not asked for stays, and nothing lands outside its folder.
    kept = [path.name for path in tmp_path.rglob("*") if path.is_file() and "node-cache" not in path.parts]
    assert not [name for name in kept if name.endswith((".zip", ".part")) or name in ("other.pth", "escaped")]

    assert not any(network.pulled for source in sources_in(tmp_path / "w") for network in pull_source(source))
    assert len(hub.ranges) == 9, "what is there is not fetched again"


def test_a_pull_goes_on_where_it_was_cut_off_and_follows_redirects(hub: Hub, tmp_path: Path) -> None:
    source, content = source_of("amt_s", tmp_path), hub.files["files/amt_s"]
    hub.files["elsewhere"] = hub.files.pop("files/amt_s")
    hub.moved["files/amt_s"] = "elsewhere"
    hub.cut_after["elsewhere"] = 1500
    pull_source(source)
    assert (tmp_path / "amt_model/amt-s.pth").read_bytes() == content
    assert hub.ranges == [None, "bytes=1000-"]


def test_a_pull_that_died_after_the_last_byte_is_done_again(hub: Hub, tmp_path: Path) -> None:
    """Given a whole download that was never put in its place, the server has nothing more to send."""
    source, place = source_of("dinov2_vitb14", tmp_path), tmp_path / OFFICIAL["dinov2_vitb14"].path
    place.parent.mkdir(parents=True)
    networks._download(source.url, place, {source.files[0]: place})
    assert [network.pulled for network in pull_source(source)] == [True]
    assert hub.ranges == [None, "bytes=6500-", None]
    assert place.read_bytes() == hub.files["files/dinov2_vitb14"]


def test_an_archive_without_the_member_is_told_and_not_kept(hub: Hub, tmp_path: Path) -> None:
    hub.files["files/models.zip"] = archive({"models/raft-small.pth": b"x"})
    with pytest.raises(WeightsError, match=r"holds no models/raft-things\.pth. Fix: put the published file at"):
        pull_source(source_of("raft_things", tmp_path))
    assert not list(tmp_path.rglob("*.part"))


def _entry(name: str, mode: int = 0) -> zipfile.ZipInfo:
    entry = zipfile.ZipInfo(name)
    entry.external_attr = mode << 16
    return entry


@pytest.mark.parametrize("attack", ["bomb", "many", "link", "path"])
def test_archives_that_would_fill_the_disk_or_leave_the_folder_write_nothing(
    attack: str, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(networks, "_MOST_UNPACKED", 1 << 20)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as made:
        if attack == "bomb":
            made.writestr("ensemble_lora/adapter_model.safetensors", bytes(8 << 20))
        elif attack == "many":
            for number in range(1001):
                made.writestr(f"ensemble_lora/{number}", b"")
        elif attack == "link":
            made.writestr(_entry("ensemble_lora/adapter_config.json", stat.S_IFLNK | 0o777), "/etc/passwd")
        else:
            for name in ("ensemble_lora//tmp/escaped", "ensemble_lora/../escaped", "ensemble_lora/..\\escaped"):
                made.writestr(_entry(name), b"x")
    (place,) = {place for place in hub.files if "dreamsim" in place}
    hub.files[place] = buffer.getvalue()
    lora = next(name for name in NETWORKS if OFFICIAL[name].member == "ensemble_lora/")
    source = source_of(lora, tmp_path / "w")
    source = Source(source.url, tuple(file for file in source.files if file.name == lora))
    with pytest.raises(WeightsError, match="thrown away" if attack != "path" else "holds no ensemble_lora/"):
        pull_source(source)
    kept = [path for path in tmp_path.rglob("*") if path.is_file() and "node-cache" not in path.parts]
    assert [path for path in kept if path.suffix != ".lock"] == []


def test_another_file_than_the_published_one_is_thrown_away(hub: Hub, tmp_path: Path) -> None:
    hub.files["files/clip_vitb32"] = b"not CLIP"
    hub.files["files/models.zip"] = hub.files["files/models.zip"][:-40]
    with pytest.raises(WeightsError, match="clip_vitb32, expected"):
        pull_source(source_of("clip_vitb32", tmp_path))
    with pytest.raises(WeightsError, match="arrived damaged"):
        pull_source(source_of("raft_things", tmp_path))
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and "node-cache" not in path.parts]


def test_without_network_the_error_says_which_file_to_put_where(hub: Hub, tmp_path: Path) -> None:
    hub.closed = True
    with pytest.raises(WeightsError) as refused:
        pull_source(source_of("dreamsim_ensemble_lora", tmp_path))
    message = str(refused.value)
    for name in ("dreamsim_clip_vitb16", "dreamsim_open_clip_vitb16", "dreamsim_ensemble_lora"):
        official = OFFICIAL[name]
        assert f"its member {official.member} at {tmp_path / official.path}" in message
    assert official.url in message and "the same command continues from there" in message


def test_verify_tells_what_loads_from_what_is_damaged_or_missing(hub: Hub, tmp_path: Path) -> None:
    path = tmp_path / OFFICIAL["laion_linear"].path
    buffer = io.BytesIO()
    torch.save({"weight": torch.ones(1, 768), "bias": torch.zeros(1)}, buffer)
    hub.files["files/laion_linear"] = buffer.getvalue()
    digest = hashlib.sha256(buffer.getvalue()).hexdigest()
    OFFICIAL["laion_linear"] = OFFICIAL["laion_linear"]._replace(sha256=digest)  # type: ignore[index]
    pull_source(source_of("laion_linear", tmp_path))

    verdicts = {verdict.name: verdict for verdict in verify_networks(suite_in(tmp_path))}
    assert set(verdicts) == set(NETWORKS)
    assert {name for name, verdict in verdicts.items() if verdict.ok} == {"laion_linear"}
    assert verdicts["laion_linear"].detail == "0.0 MB, sha256 as recorded at the pull, loads"
    assert f"nothing at {tmp_path / OFFICIAL['amt_s'].path}" in verdicts["amt_s"].detail

    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    verdicts = {verdict.name: verdict for verdict in verify_networks(suite_in(tmp_path))}
    assert "is another file" in verdicts["laion_linear"].detail
    assert digest in verdicts["laion_linear"].detail


def test_commands(hub: Hub, tmp_path: Path) -> None:
    app = typer.Typer()
    cli.register(app)
    runner, folder = CliRunner(), str(tmp_path / "w")
    suite = ["--suite", "vbench_long", "--folder", folder, "--json"]

    listed = json.loads(runner.invoke(app, ["weights", "list", *suite]).stdout)["needs"]
    assert [row["kind"] for row in listed] == list(NETWORKS)
    assert {row["present_bytes"] for row in listed} == {None}
    assert all(row["licence"] and row["source"].startswith("http") for row in listed)
    del hub.files["files/musiq_spaq"]
    pulled = runner.invoke(app, ["weights", "pull", *suite])
    assert pulled.exit_code == 3
    rows = {row["kind"]: row for row in json.loads(pulled.stdout)["pulled"]}
    assert [kind for kind, row in rows.items() if row["error"]] == ["musiq_spaq"]
    assert rows["amt_s"]["pulled"] and rows["amt_s"]["address"] == f"{folder}/amt_model/amt-s.pth"
    verified = runner.invoke(app, ["weights", "verify", *suite])
    assert verified.exit_code == 3, "these are no networks"
    assert len(json.loads(verified.stdout)["verified"]) == len(NETWORKS)
    refused = runner.invoke(app, ["weights", "list"])
    assert refused.exit_code == 2 and "--suite vbench_long" in refused.stderr
