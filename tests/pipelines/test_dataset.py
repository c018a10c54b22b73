"""``lrag-ray dataset``: latents leave and come back bit for bit, and what cannot be used is named."""

from __future__ import annotations

import io
import json
import os
import tarfile
from pathlib import Path

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from lrag_ray.cli.app import app
from lrag_ray.errors import StorageError, UsageError
from lrag_ray.events import Event, Notice, TaskFinished
from lrag_ray.pipelines.dataset import dataset_info, export_dataset, verify_dataset
from lrag_ray.pipelines.dataset_import import import_dataset
from lrag_ray.pipelines.latents import index_feed
from lrag_ray.retrieval.encoder import EncoderConfig
from lrag_ray.stages.spec import Result
from lrag_ray.store import dataset_files
from lrag_ray.store.dataset_card import read_card
from lrag_ray.store.dataset_files import read_shard
from lrag_ray.store.dataset_index import MOST_SIZE, read_manifest
from lrag_ray.store.dataset_rows import RunIndex
from lrag_ray.store.datasets import LatentDataset
from lrag_ray.store.rollouts import RolloutRun
from tests.training.corpus import make_corpus

SHAPE = (4, 6, 8)


def latents_of(number: int, frames: int = 10, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    generator = torch.Generator().manual_seed(number)
    return torch.randn(frames, *SHAPE, generator=generator).to(dtype)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder as the released code writes it."""
    made = tmp_path / "latents"
    made.mkdir()
    for number in range(5):
        torch.save(latents_of(number, 8 + number), made / f"latent_{number:06d}.pt")
    return made


@pytest.fixture
def imported(folder: Path, tmp_path: Path) -> str:
    outcome = import_dataset(str(folder), str(tmp_path / "imported"))
    assert (outcome.exit_code, outcome.imported, outcome.left_out) == (0, 5, {})
    return str(tmp_path / "imported")


def test_an_imported_folder_is_read_bit_for_bit(imported: str) -> None:
    data = LatentDataset.open(imported)
    assert (len(data), data.shape, data.dtype) == (5, SHAPE, torch.bfloat16)
    for number in range(5):
        assert torch.equal(data.read(number), latents_of(number, 8 + number))
        assert torch.equal(data.read(number, 3, 4), latents_of(number, 8 + number)[3:7])
        assert data.rollouts[number].rollout == f"latent_{number:06d}.pt"


def test_prompts_that_nobody_knows_are_not_counted(imported: str) -> None:
    assert dataset_info([imported]).prompts == 0
    assert "5, of unknown prompts" in CliRunner().invoke(app, ["dataset", "info", imported]).output


def test_every_bit_pattern_survives(tmp_path: Path) -> None:
    bits = torch.arange(2**16, dtype=torch.int32).to(torch.uint16).view(torch.bfloat16)
    source = tmp_path / "latents"
    source.mkdir()
    torch.save(bits.reshape(16, 16, 16, 16), source / "latent_000000.pt")
    import_dataset(str(source), str(tmp_path / "imported"))
    export_dataset([str(tmp_path / "imported")], str(tmp_path / "exported"))
    found = torch.load(tmp_path / "exported" / "latent_000000.pt")
    assert torch.equal(found.view(torch.uint16), bits.reshape(16, 16, 16, 16).view(torch.uint16))


def test_an_exported_folder_is_what_the_released_code_reads(imported: str, folder: Path, tmp_path: Path) -> None:
    outcome = export_dataset([imported], str(tmp_path / "exported"))
    assert (outcome.exit_code, outcome.files_made, outcome.files_there, outcome.dtype) == (0, 5, 0, "bfloat16")
    assert sorted(path.name for path in (tmp_path / "exported").glob("*.pt")) == sorted(
        path.name for path in folder.glob("*.pt")
    )
    for path in folder.glob("*.pt"):
        # weights_only, as a stranger should load it; the released code loads the same file.
        found = torch.load(tmp_path / "exported" / path.name, weights_only=True)
        assert found.dtype == torch.bfloat16
        assert torch.equal(found, torch.load(path))
        assert found.untyped_storage().nbytes() == found.numel() * 2


@pytest.mark.parametrize("form", ["pt", "webdataset"])
def test_export_and_import_give_the_same_dataset(imported: str, tmp_path: Path, form: str) -> None:
    exported, back = str(tmp_path / "exported"), str(tmp_path / "back")
    export_dataset([imported], exported, form=form, shard_bytes=20_000)  # type: ignore[arg-type]
    outcome = import_dataset(exported, back)
    assert (outcome.exit_code, outcome.imported) == (0, 5)
    assert outcome.digest == LatentDataset.open(imported).digest
    first, second = LatentDataset.open(imported), LatentDataset.open(back)
    assert all(torch.equal(first.read(i), second.read(i)) for i in range(5))
    assert second.keys == first.keys


def test_prompts_and_keys_travel_with_an_export(tmp_path: Path) -> None:
    from tests.stages.make import do_all, make_config, make_prompts

    run = str(tmp_path / "run")
    do_all(RolloutRun(run), make_config(run, video={"enabled": False}), make_prompts("a red fox", "rain\u2028on tin"))
    first = LatentDataset.open(run)
    for form in ("pt", "webdataset"):
        exported, back = str(tmp_path / f"exported-{form}"), str(tmp_path / f"back-{form}")
        assert export_dataset([run], exported, form=form).dtype == "float32"
        assert import_dataset(exported, back).digest == first.digest
        second = LatentDataset.open(back)
        for mine, theirs in zip(first.rollouts, second.rollouts, strict=True):
            assert mine._replace(run="", rollout="") == theirs._replace(run="", rollout="")
    rounded = str(tmp_path / "rounded")
    assert export_dataset([run], rounded, dtype="bfloat16").dtype == "bfloat16"
    found = torch.load(f"{rounded}/latent_000000.pt")
    assert torch.equal(found, first.read(0).bfloat16())
    import_dataset(rounded, str(tmp_path / "back-rounded"))
    assert LatentDataset.open(str(tmp_path / "back-rounded")).keys == first.keys
    with pytest.raises(UsageError, match="holds a run"):
        import_dataset(rounded, run)


def test_shards_are_plain_tar_files_cut_alike(imported: str, tmp_path: Path) -> None:
    outcome = export_dataset([imported], str(tmp_path / "shards"), form="webdataset", shard_bytes=8100)
    shards = sorted((tmp_path / "shards").glob("*.tar"))
    assert outcome.files_made == len(shards) == 3
    names = []
    for shard in shards:
        with tarfile.open(shard) as opened:
            for member in opened:
                names.append(member.name)
                content = opened.extractfile(member)
                assert content is not None
                if member.name.endswith(".pth"):
                    assert torch.load(io.BytesIO(content.read())).shape[1:] == SHAPE
                else:
                    assert json.loads(content.read())["file"] == member.name.removesuffix(".json")
    assert names == [f"latent_{i:06d}{suffix}" for i in range(5) for suffix in (".pth", ".json")]
    before = [shard.read_bytes() for shard in shards]
    shards[1].unlink()
    again = export_dataset([imported], str(tmp_path / "shards"), form="webdataset", shard_bytes=8100)
    assert (again.files_made, again.files_there) == (1, 2)
    assert [shard.read_bytes() for shard in shards] == before


def test_an_export_continues_and_never_mixes(imported: str, folder: Path, tmp_path: Path) -> None:
    target = tmp_path / "exported"
    export_dataset([imported], str(target))
    (target / "latent_000003.pt").unlink()
    again = export_dataset([imported], str(target))
    assert (again.files_made, again.files_there) == (1, 4)
    for wrong in ({"dtype": "stored", "form": "webdataset"}, {"dtype": "stored", "uris": "grown"}):
        if wrong.pop("uris", None):
            torch.save(latents_of(9), folder / "latent_000009.pt")
            assert import_dataset(str(folder), imported).imported == 1
        with pytest.raises(UsageError, match="another export"):
            export_dataset([imported], str(target), **wrong)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="6 latent files that no export made"):
        export_dataset([imported], str(folder))


def test_an_import_names_what_it_cannot_use(folder: Path, tmp_path: Path) -> None:
    whole = (folder / "latent_000001.pt").read_bytes()
    for position, name in ((len(whole) // 2, "latent_000010.pt"), (len(whole) - 10, "latent_000011.pt"), (0, "l12.pt")):
        (folder / name).write_bytes(whole[:position])
    torch.save(latents_of(20, 7), folder / "latent_000020.pt")
    torch.save(latents_of(21)[:, :, :3], folder / "latent_000021.pt")
    torch.save(latents_of(22, dtype=torch.float32), folder / "latent_000022.pt")
    torch.save(latents_of(23).double(), folder / "latent_000023.pt")
    torch.save({"latents": latents_of(24)}, folder / "latent_000024.pt")
    torch.save(latents_of(25)[0], folder / "latent_000025.pt")
    (folder / "latent_000026.pt").write_text("not a tensor")
    torch.save(torch.zeros(8, 2**16 + 1, 1, 1), folder / "latent_000027.pt")
    (folder / "notes.txt").write_text("not a latent")
    outcome = import_dataset(str(folder), str(tmp_path / "imported"))
    assert (outcome.exit_code, outcome.imported) == (1, 5)
    reasons = {name: reason.split(":")[0] for name, reason in outcome.left_out.items()}
    assert len(reasons) == 11
    assert "no size of a latent is above 65536" in outcome.left_out["latent_000027.pt"]
    assert EncoderConfig(in_channels=MOST_SIZE)
    assert outcome.left_out["latent_000020.pt"] == "has 7 latent frames, fewer than a window of 8"
    assert "the others are [4, 6, 8] bfloat16" in outcome.left_out["latent_000021.pt"]
    assert "the others are [4, 6, 8] bfloat16" in outcome.left_out["latent_000022.pt"]
    assert "float64" in outcome.left_out["latent_000023.pt"]
    assert "dict" in outcome.left_out["latent_000024.pt"]
    assert all("truncated or damaged" in reasons[name] for name in ("latent_000010.pt", "latent_000011.pt"))
    assert len(LatentDataset.open(str(tmp_path / "imported"))) == 5
    # Fixed files are added by the same command; what is there is not read into the dataset again.
    torch.save(latents_of(10), folder / "latent_000010.pt")
    again = import_dataset(str(folder), str(tmp_path / "imported"))
    assert (again.imported, again.there, len(again.left_out), again.rollouts) == (1, 5, 10, 6)
    torch.save(latents_of(99), folder / "latent_000001.pt")
    changed = import_dataset(str(folder), str(tmp_path / "imported"))
    assert changed.left_out["latent_000001.pt"] == "the dataset holds other latents under this name"
    assert (
        import_dataset(str(folder), str(tmp_path / "longer"), window=9).left_out["latent_000000.pt"].startswith("has 8")
    )


def test_a_shard_that_is_cut_anywhere_is_named_and_what_is_whole_is_read(imported: str, tmp_path: Path) -> None:
    export_dataset([imported], str(tmp_path / "shards"), form="webdataset")
    (shard,) = (tmp_path / "shards").glob("*.tar")
    with tarfile.open(shard) as opened:
        end = max(member.offset_data + member.size for member in opened)
    whole, first = shard.read_bytes(), LatentDataset.open(imported)
    for cut in [*range(512, end, 512), *range(700, end, 2048)]:
        shard.write_bytes(whole[:cut])
        found = list(read_shard(shard, tmp_path))
        assert any(each.problem for each in found), cut
        read = [each.latents for each in found if each.latents is not None]
        assert len(read) <= 5
        assert all(torch.equal(latents, first.read(i)) for i, latents in enumerate(read))
    shard.write_bytes(whole[: end // 2])
    outcome = import_dataset(str(tmp_path / "shards"), str(tmp_path / "back"))
    assert outcome.exit_code == 1 and 0 < outcome.imported < 5
    cut_short, rest = outcome.left_out.items()
    name = f"latent_{outcome.imported:06d}"
    assert cut_short[0] == f"{shard.name}/{name}" and "the shard ends within its" in cut_short[1]
    assert rest[0] == shard.name and f"damaged tar archive from {name} on" in rest[1]


def test_a_header_of_a_shard_that_would_fill_the_memory_is_damage(tmp_path: Path) -> None:
    header = tarfile.TarInfo("x")
    header.type, header.size = tarfile.XHDTYPE, 1 << 36
    with (tmp_path / "a.tar").open("wb") as shard:
        shard.write(header.tobuf(tarfile.GNU_FORMAT))
        shard.truncate(1 << 37)
    (found,) = read_shard(tmp_path / "a.tar", tmp_path)
    assert "damaged tar archive (it says that one of its parts has 68,719,476,736 bytes)" in found.problem


def raw_header(name: str, at: dict[int, bytes]) -> bytes:
    """An empty member's header with bytes put where `at` says, and its checksum."""
    raw = bytearray(tarfile.TarInfo(name).tobuf(tarfile.GNU_FORMAT))
    for place, value in ({148: b" " * 8} | at).items():
        raw[place : place + len(value)] = value
    raw[148:156] = b"%06o\0 " % sum(raw)
    return bytes(raw)


SPARSE = tarfile.GNUTYPE_SPARSE
ONE_BYTE = b"%011o\0" % 1
TAR_BOMBS = {
    "a sparse file of 16 GB": (raw_header("a.pth", {156: SPARSE, 483: b"%011o\0" % (1 << 33)}), "a sparse file"),
    "a map without end": (
        raw_header("a.pth", {156: SPARSE, 482: b"\1", 483: ONE_BYTE}) + (ONE_BYTE * 42 + b"\1" + bytes(7)) * 4000,
        "one of its headers does not end",
    ),
    "a map that is cut off": (raw_header("a.pth", {156: SPARSE, 482: b"\1", 483: ONE_BYTE}), "index out of range"),
    "a size below zero": (
        raw_header("a.json", {}) + raw_header("b.json", {124: (256**12 - 512).to_bytes(12, "big")}),
        "its members overlap",
    ),
}


@pytest.mark.parametrize("kind", TAR_BOMBS)
def test_a_shard_neither_fills_memory_or_disk_nor_is_read_for_ever(tmp_path: Path, kind: str) -> None:
    content, said = TAR_BOMBS[kind]
    (tmp_path / "a.tar").write_bytes(content)
    (tmp_path / "scratch").mkdir()
    found = list(read_shard(tmp_path / "a.tar", tmp_path / "scratch"))
    assert [latent.latents for latent in found] == [None] * len(found)
    assert any(said in latent.problem for latent in found), found
    assert not list((tmp_path / "scratch").iterdir())


def test_notes_that_would_fill_the_memory_are_not_read(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    notes = folder / "latents.jsonl"
    with notes.open("wb") as file:
        file.truncate(1 << 32)
    with pytest.raises(StorageError, match=r"latents\.jsonl has 4,294,967,296 bytes, and at most .* Fix: "):
        import_dataset(str(folder), str(tmp_path / "made"))
    monkeypatch.setattr(dataset_files, "MOST_LINES", 10)
    notes.write_bytes(b"\r" * 11)
    with pytest.raises(StorageError, match=r"latents\.jsonl has 11 lines, and at most 10 are read"):
        import_dataset(str(folder), str(tmp_path / "made"))


def test_names_in_a_shard_are_never_paths(tmp_path: Path) -> None:
    source = tmp_path / "shards"
    source.mkdir()
    content = io.BytesIO()
    torch.save(latents_of(0), content)
    with tarfile.open(source / "a.tar", "w") as shard:
        for name in ("../../outside.pth", "/etc/absolute.pt", "plain.pth"):
            member = tarfile.TarInfo(name)
            member.size = len(content.getvalue())
            shard.addfile(member, io.BytesIO(content.getvalue()))
        link = tarfile.TarInfo("link.pth")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        shard.addfile(link)
    outcome = import_dataset(str(source), str(tmp_path / "imported"))
    assert (outcome.exit_code, outcome.imported) == (0, 3)
    assert not (tmp_path / "outside.pth").exists() and not (tmp_path.parent / "outside.pth").exists()
    assert verify_dataset([str(tmp_path / "imported")]).exit_code == 0


def test_a_pipe_in_place_of_a_file_is_named_and_not_waited_for(folder: Path, tmp_path: Path) -> None:
    os.mkfifo(folder / "pipe.pt")
    os.mkfifo(folder / "pipe.tar")
    made = import_dataset(str(folder), str(tmp_path / "run"))
    assert made.left_out.keys() >= {"pipe.pt", "pipe.tar"}
    assert all("not a regular file" in made.left_out[name] for name in ("pipe.pt", "pipe.tar"))


def test_sparse_latents_and_names_that_are_not_text_are_no_bug(folder: Path, tmp_path: Path) -> None:
    torch.save(torch.randn(9, 4, 2, 3).to_sparse(), folder / "sparse.pt")
    Path(os.fsdecode(os.fsencode(folder) + b"/\xff.pt")).write_bytes((folder / "latent_000000.pt").read_bytes())
    made = import_dataset(str(folder), str(tmp_path / "run"))
    assert "expected a dense one" in made.left_out["sparse.pt"]
    assert made.exit_code == 1 and "?.pt" in made.left_out


def test_of_many_broken_members_the_first_are_named_and_the_rest_counted(tmp_path: Path) -> None:
    (tmp_path / "shards").mkdir()
    with tarfile.open(tmp_path / "shards" / "one.tar", "w") as shard:
        for number in range(120):
            shard.addfile(tarfile.TarInfo(f"{number:03d}.pth"))
    events: list[Event] = []
    made = import_dataset(str(tmp_path / "shards"), str(tmp_path / "run"), listener=events.append)
    assert len(made.left_out) == 120
    texts = [event.text for event in events if isinstance(event, Notice)]
    assert len(texts) == 21 and texts[-1].startswith("100 more latents")
    shown = CliRunner().invoke(app, ["dataset", "import", str(tmp_path / "shards"), "--to", str(tmp_path / "run")])
    assert shown.exit_code == 1
    assert "and 70 more; --json names all" in shown.stdout and len(shown.output.splitlines()) < 90


@pytest.mark.parametrize("headers", [{"GNU.sparse.map": "a,b"}, {"GNU.sparse.size": "x"}, {"size": "9" * 5000}])
def test_numbers_that_are_none_in_a_shard_are_named(tmp_path: Path, headers: dict[str, str]) -> None:
    (tmp_path / "shards").mkdir()
    with tarfile.open(tmp_path / "shards" / "one.tar", "w", format=tarfile.PAX_FORMAT) as shard:
        member = tarfile.TarInfo("a.pth")
        member.pax_headers = headers
        shard.addfile(member)
    made = import_dataset(str(tmp_path / "shards"), str(tmp_path / "run"))
    assert made.exit_code == 1 and list(made.left_out) and made.imported == 0


def test_a_source_without_latents_is_wrong_use(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match=r"no \.pt file"):
        import_dataset(str(tmp_path / "empty"), str(tmp_path / "imported"))


def test_verify_finds_every_kind_of_damage(imported: str) -> None:
    assert verify_dataset([imported]).damaged == ()
    data = LatentDataset.open(imported)
    files = [Path(imported) / data.parts(i)[0].path for i in range(5)]
    files[0].unlink()
    files[1].write_bytes(files[1].read_bytes()[:-1])
    flipped = bytearray(files[2].read_bytes())
    flipped[-5] ^= 1
    files[2].write_bytes(flipped)
    found = verify_dataset([imported])
    assert found.exit_code == 1
    assert [each.problem.split("safetensors ")[-1] for each in found.damaged] == [
        "is missing",
        f"has {files[1].stat().st_size} bytes instead of {files[1].stat().st_size + 1}",
        "does not have the recorded checksum",
    ]
    # Damaged latents are named and not exported, the others are.
    made = export_dataset([imported], imported + "-exported")
    assert (made.exit_code, made.files_made, len(made.damaged)) == (1, 2, 3)


def test_what_a_run_without_an_index_cannot_give_is_named_and_nothing_else_is_missing(tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path / "corpus", count=5)
    whole = LatentDataset.open(corpus)
    files = [Path(corpus) / whole.parts(i)[0].path for i in range(5)]
    files[1].write_bytes(files[1].read_bytes()[:-1])
    files[2].unlink()
    files[3].write_bytes(b"\xff" * files[3].stat().st_size)
    commit = Path(corpus) / whole.rollouts[4].rollout / "commit-24.json"
    commit.write_bytes(commit.read_bytes()[:-9])
    data = LatentDataset.open(corpus)
    assert (len(data), len(data.left_out), data.keys) == (1, 4, whole.keys[:1])
    problems = [f"{each.rollout}: {each.problem}" for each in verify_dataset([corpus]).damaged]
    for index, problem in (
        (1, f"{files[1].name}, which has {files[1].stat().st_size} bytes instead of"),
        (2, f"{files[2].name}, which is missing"),
        (3, "is not a safetensors file"),
        (4, "not a commit record"),
    ):
        assert sum(whole.rollouts[index].rollout in each and problem in each for each in problems) == 1, problems
    assert dataset_info([corpus]).left_out == tuple(str(each) for each in data.left_out)
    made = export_dataset([corpus], str(tmp_path / "exported"))
    assert (made.exit_code, made.files_made, len(made.damaged)) == (1, 1, 4)
    files[0].unlink()
    with pytest.raises(StorageError, match=r"no latents that are whole \(5 commits left out; .*is missing"):
        LatentDataset.open(corpus)


def test_a_start_that_is_interrupted_leaves_no_finished_rollout_out_of_the_index(tmp_path: Path) -> None:
    run = RolloutRun(make_corpus(tmp_path / "corpus", count=3))
    identity, heard = run.require(), list[Event]()
    finished = [
        TaskFinished(stage="rollouts", task=each.path, result=Result()) for each in list(identity.rollouts())[:2]
    ]
    with (
        pytest.raises(KeyboardInterrupt),
        index_feed(RunIndex(run, identity), heard.append, every_s=1000) as relay,
    ):
        for event in finished:
            relay(event)
        raise KeyboardInterrupt
    manifest = read_manifest(run.storage)
    assert manifest is not None and manifest.rollouts == 2 and heard == finished


def test_a_flipped_bit_in_the_text_of_an_index_is_noticed(imported: str) -> None:
    (segment,) = Path(imported).glob("dataset/index/*.parquet")
    whole = segment.read_bytes()
    for at in range(0, 8 * len(whole), 8 * len(whole) // 40):
        segment.write_bytes(bytes(b ^ (1 << at % 8) if i == at // 8 else b for i, b in enumerate(whole)))
        try:
            assert any(segment.name in each.rollout for each in verify_dataset([imported]).damaged)
        except StorageError as error:
            assert segment.name in str(error)


def test_values_that_are_not_finite_are_named(folder: Path, tmp_path: Path) -> None:
    bad = latents_of(50)
    bad[3, 0, 0, 0] = float("nan")
    bad[7, 0, 0, 0] = float("inf")
    torch.save(bad, folder / "latent_000050.pt")
    said: list[str] = []
    import_dataset(str(folder), str(tmp_path / "imported"), listener=lambda e: said.append(getattr(e, "text", "")))
    assert any("latent_000050.pt: 2 latent frames hold NaN or infinity, the first is frame 3" in text for text in said)
    (damage,) = verify_dataset([str(tmp_path / "imported")]).damaged
    assert "NaN or infinity, the first is frame 3" in damage.problem


def test_info_counts(imported: str) -> None:
    info = dataset_info([imported])
    assert (info.rollouts, info.frames, info.windows, info.shortest, info.longest) == (5, 50, 15, 8, 12)
    assert info.size_bytes == 50 * 2 * 4 * 6 * 8
    card = read_card(LatentDataset.open(imported).storage_of(0))
    assert card is not None and (card.origin, card.digest, card.rollouts) == ("imported from latents", info.digest, 5)
    text = (Path(imported) / "dataset" / "README.md").read_text()
    assert info.digest in text and "| licence | unknown |" in text


def test_the_commands(folder: Path, tmp_path: Path) -> None:
    runner, imported, exported = CliRunner(), str(tmp_path / "i"), str(tmp_path / "e")
    torch.save(latents_of(1, 3), folder / "short.pt")

    def run(*words: str) -> tuple[int, str]:
        done = runner.invoke(app, ["dataset", *words])
        return done.exit_code, done.output

    code, text = run("import", str(folder), "--to", imported, "--licence", "CC0")
    assert code == 1 and "short.pt has 3 latent frames" in text and "Imported 5 latents" in text
    code, text = run("info", imported)
    assert code == 0 and "[4, 6, 8] bfloat16" in text and "licence CC0" in text
    code, text = run("info", imported, "--json")
    assert json.loads(text)["digest"] == LatentDataset.open(imported).digest
    assert run("verify", imported)[0] == 0
    code, text = run("export", imported, "--to", exported)
    assert code == 0 and "Wrote 5 files" in text
    assert run("export", imported, "--to", exported, "--format", "webdataset")[0] == 2
    assert run("info", str(tmp_path / "nothing"))[0] == 3
