"""What is found where, and what a manifest may say. Files need not be videos for that."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from lrag_ray.config.schema import StorageSection
from lrag_ray.errors import UsageError
from lrag_ray.pipelines.score import is_run
from lrag_ray.pipelines.video_list import Labels, ListedVideo, VideoList, list_videos
from tests.conftest import REPOSITORY

HERE = StorageSection()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("a/clip.mp4", "b/clip.mp4", "ünï code.MOV", "notes.txt", ".hidden.mp4", "[odd].mkv", "frames.gif"):
        file = tmp_path / name
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(name.encode())
    return tmp_path


def names(found: VideoList) -> list[str]:
    return [video.name for video in found.videos]


def test_a_folder_gives_what_looks_like_a_video_at_any_depth(folder: Path) -> None:
    found = list_videos(str(folder), None, HERE)
    assert set(names(found)) == {"[odd].mkv", "a/clip.mp4", "b/clip.mp4", "ünï code.MOV"}
    assert len({video.stamp for video in found.videos}) == 4
    assert found.storage is None and all(Path(video.path).is_absolute() for video in found.videos)


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ("a/clip.mp4", ["clip.mp4"]),
        ("*/clip.mp4", ["a/clip.mp4", "b/clip.mp4"]),
        ("**/*.mp4", ["a/clip.mp4", "b/clip.mp4"]),
        ("*", ["[odd].mkv", "ünï code.MOV"]),
        ("**", ["[odd].mkv", "a/clip.mp4", "b/clip.mp4", "ünï code.MOV"]),
        (".h*.mp4", [".hidden.mp4"]),
        ("*.gif", ["frames.gif"]),
        ("[odd].mkv", ["[odd].mkv"]),
    ],
)
def test_files_and_globs(folder: Path, target: str, expected: list[str]) -> None:
    assert names(list_videos(f"{folder}/{target}", None, HERE)) == expected


def test_links_are_followed_though_not_in_circles_and_those_to_nothing_are_missing_videos(
    folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (elsewhere / "far.mp4").write_bytes(b"far")
    for name in ("linked", "linked too"):
        (folder / name).symlink_to(elsewhere)
    (folder / "a" / "up").symlink_to("..")
    (folder / "b" / "up").symlink_to("..")
    (folder / "gone.mp4").symlink_to("nowhere.mp4")
    (folder / "itself.mp4").symlink_to("itself.mp4")

    found = list_videos(str(folder), None, HERE).videos
    there = ["[odd].mkv", "a/clip.mp4", "b/clip.mp4", "linked too/far.mp4", "linked/far.mp4", "ünï code.MOV"]
    assert sorted(video.name for video in found if video.stamp) == there
    assert {video.name: video.problem for video in found if not video.stamp} == {
        "gone.mp4": "it is a symbolic link to nowhere.mp4, which is not there",
        "itself.mp4": "it is a symbolic link that leads to itself",
    }
    # Below a ** the two circles would make thousands of paths of two files.
    assert names(list_videos(f"{folder}/**/clip.mp4", None, HERE)) == ["a/clip.mp4", "b/clip.mp4"]


def test_what_is_no_file_is_a_video_that_cannot_be_had_and_is_not_waited_for(tmp_path: Path) -> None:
    """Given a pipe into which nobody writes: to open it would be to wait for ever."""
    os.mkfifo(tmp_path / "pipe.mp4")
    (tmp_path / "device.mp4").symlink_to("/dev/zero")
    for target in (tmp_path, tmp_path / "*.mp4", tmp_path / "pipe.mp4"):
        for video in list_videos(str(target), None, HERE).videos:
            assert (video.stamp, video.problem) == ("", "it is not a file, but a pipe, a socket or a device")
    assert not is_run(str(tmp_path / "pipe.mp4"))


AS_NOBODY = """
import os, sys
from lrag_ray.config.schema import StorageSection
from lrag_ray.pipelines.video_list import list_videos
if os.geteuid() == 0:
    os.seteuid(65534)
found = list_videos(sys.argv[1], None, StorageSection())
print({video.name: video.problem for video in found.videos if not video.stamp}, *found.notes)
"""


def test_what_may_not_be_read_is_told() -> None:
    """Given a file, a folder, and a folder that may be listed only; permissions hold back nobody who is root."""
    with TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        for video in ("good.mp4", "locked.mp4", "locked/in.mp4", "listed/in.mp4"):
            (folder / video).parent.mkdir(exist_ok=True)
            (folder / video).write_bytes(b"x")
        for path, mode in (("locked.mp4", 0), ("locked", 0), ("listed", 0o444)):
            (folder / path).chmod(mode)
        told = subprocess.run([sys.executable, "-c", AS_NOBODY, name], capture_output=True, text=True, check=False)
        for path in ("locked", "listed"):
            (folder / path).chmod(0o700)
    denied = "it cannot be read: Permission denied"
    assert told.stdout == (
        f"{ {'listed/in.mp4': denied, 'locked.mp4': denied} } {name}/locked: not looked into: Permission denied\n"
    ), told.stderr


def test_names_that_are_no_text_can_be_shown(folder: Path) -> None:
    odd = os.fsencode(folder / "x") + b"\xff.mp4"
    try:
        Path(os.fsdecode(odd)).write_bytes(b"")
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    found = [video for video in list_videos(str(folder), None, HERE).videos if video.name.startswith("x")]
    assert [video.name for video in found] == ["x\\xff.mp4"]
    assert os.fsencode(found[0].path) == odd


def test_an_identity_is_the_relative_path_and_the_content(folder: Path) -> None:
    def stamps() -> dict[str, str]:
        return {video.name: video.stamp for video in list_videos(str(folder), None, HERE).videos}

    before = stamps()
    (folder / "a/clip.mp4").write_bytes(b"other")
    after = stamps()
    assert {name for name in before if before[name] != after[name]} == {"a/clip.mp4"}


def test_nothing_found_is_told(folder: Path) -> None:
    for target in ("nothing", "*.webm"):
        with pytest.raises(UsageError, match="no videos at"):
            list_videos(f"{folder}/{target}", None, HERE)
    with pytest.raises(UsageError, match="no videos at") as caught:
        list_videos("memory://me:hunter2@host/videos", None, HERE)
    assert "hunter2" not in str(caught.value)


def test_a_job_is_the_same_command(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "jobs.score", str(tmp_path), "--set", "scoring.weights=random"]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": str(REPOSITORY)}
    )
    assert done.returncode == 2 and "no videos at" in done.stderr


def labelled(folder: Path, text: str, name: str = "m.csv") -> VideoList:
    (folder / name).write_text(text, encoding="utf-8")
    return list_videos(str(folder), str(folder / name), HERE)


def test_a_manifest_chooses_orders_and_labels(folder: Path) -> None:
    lines = ["path,method,prompt,sample,duration_s,seed", "b/clip.mp4,rag,a fox,1,30,7", "a/clip.mp4,,,,,"]
    found = labelled(folder, "\n".join([*lines, "b/clip.mp4,rag,a fox,1,6.5,7"]))
    assert names(found) == ["b/clip.mp4", "a/clip.mp4"]
    assert found.videos[0].labels == Labels("rag", "", "a fox", 1)
    assert found.videos[0].durations_s == (6.5, 30) and found.videos[1].durations_s == ()
    assert ["not used: seed" in note for note in found.notes] == [True]
    rows = [{"path": "./frames.gif", "sample": 2}, {"path": "ünï code.MOV"}]
    as_lines = labelled(folder, "\n".join(json.dumps(row) for row in rows), "m.jsonl")
    assert names(as_lines) == ["frames.gif", "ünï code.MOV"] and as_lines.videos[0].labels.sample == 2
    assert labelled(folder, "path\ngone.mp4\n").videos == [ListedVideo("gone.mp4", "", "")]


MANIFESTS = {
    "quoted line break": 'path,prompt\na/clip.mp4,"A red boat\nin a storm"\nb/clip.mp4,A red boatin a storm\n',
    "semicolons": "path;prompt\r\na/clip.mp4;A red boat, at sea\r\nb/clip.mp4;B\r\n",
    "declared": "sep=;\r\npath;prompt\r\na/clip.mp4;A red boat, at sea\r\nb/clip.mp4;B\r\n",
    "tabs": "path\tprompt\na/clip.mp4\tA red boat, at sea\nb/clip.mp4\tB\n",
}


@pytest.mark.parametrize("kind", MANIFESTS)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_csv_is_read_as_spreadsheets_write_it(folder: Path, kind: str, encoding: str) -> None:
    (folder / "m.csv").write_bytes(MANIFESTS[kind].encode(encoding))
    found = list_videos(str(folder), str(folder / "m.csv"), HERE)
    first, second = (video.labels.prompt for video in found.videos)
    assert names(found) == ["a/clip.mp4", "b/clip.mp4"] and not found.notes
    if kind == "quoted line break":
        assert (first, second) == ("A red boat\nin a storm", "A red boatin a storm")
    else:
        assert (first, second) == ("A red boat, at sea", "B")


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c"])
def test_rows_end_at_line_ends_alone(folder: Path, separator: str) -> None:
    prompt = f"A red boat{separator}in a storm"
    rows = [{"path": f"{name}/clip.mp4", "prompt": prompt} for name in "ab"]
    escaped = separator > "\x7f"
    lines = "\n".join(json.dumps(row, ensure_ascii=not escaped) for row in rows)
    as_csv = "\n".join(["path,prompt", *(f"{row['path']},{prompt}" for row in rows)])
    for text, name in ((lines, "m.jsonl"), (as_csv, "m.csv"), (json.dumps(rows), "m.json")):
        assert [video.labels.prompt for video in labelled(folder, text, name).videos] == [prompt, prompt]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("file,method\na,b\n", r"m\.csv: no column 'path'"),
        ("path,sample\na/clip.mp4,two\n", r"m\.csv:2: .*sample is a whole number"),
        ("path,duration_s\na/clip.mp4,-1\n", r"m\.csv:2: duration_s -1 must be above 0"),
        ("path\n../secret.mp4\n", r"m\.csv:2: path '\.\./secret\.mp4' must be a path inside the folder"),
        ("path\n/etc/secret.mp4\n", r"must be a path inside the folder"),
        ("path,method\na/clip.mp4,x\na/clip.mp4,y\n", r"m\.csv:3: 'a/clip\.mp4' stands in the manifest twice"),
        ("path\na,b\n", r"m\.csv:2: more values than the head line has columns"),
        ("file;method\na;b\n", r"m\.csv: no column 'path'; the columns, separated by ';', are 'file', 'method'"),
        ("path,method\n", r"m\.csv: the manifest has no rows"),
        ('path,prompt\na/clip.mp4,"A\n', r"m\.csv:2: not CSV: unexpected end of data"),
    ],
)
def test_a_wrong_manifest_is_named_with_its_line(folder: Path, text: str, told: str) -> None:
    with pytest.raises(UsageError, match=told):
        labelled(folder, text)


def test_labels_of_json_are_text_or_numbers(folder: Path) -> None:
    for value in ("true", '["a"]', '{"a": 1}'):
        with pytest.raises(UsageError, match=r"m\.jsonl:1: prompt must be text or a number, not"):
            labelled(folder, f'{{"path": "a/clip.mp4", "prompt": {value}}}\n', "m.jsonl")
    with pytest.raises(UsageError, match=r"m\.jsonl:1: no field 'path'; the fields are 'file'"):
        labelled(folder, '{"file": "a/clip.mp4"}\n', "m.jsonl")


def test_a_bucket_is_listed_like_a_folder(s3_bucket: str, folder: Path) -> None:
    import s3fs

    store = s3fs.S3FileSystem(use_listings_cache=False)
    for name in ("a/clip.mp4", "b/clip.mp4", "notes.txt"):
        store.put_file(str(folder / name), f"{s3_bucket}/listed/{name}")
    found = list_videos(f"{s3_bucket}/listed", None, HERE)
    assert names(found) == ["a/clip.mp4", "b/clip.mp4"] and found.storage is not None
    assert all(video.stamp.startswith("10-") for video in found.videos)
    assert names(list_videos(f"{s3_bucket}/listed/b/*.mp4", None, HERE)) == ["clip.mp4"]
    assert names(list_videos(f"{s3_bucket}/listed/a/clip.mp4", None, HERE)) == ["clip.mp4"]


def test_a_folder_says_what_it_skips(folder: Path) -> None:
    (note,) = list_videos(str(folder), None, HERE).notes
    assert note.startswith(f"{folder}: skipped 2 files that are not named like videos: 1 .gif, 1 .txt.")
    assert not list_videos(str(folder / "a" / "clip.mp4"), None, HERE).notes
    assert not list_videos(f"{folder}/a/*.mp4", None, HERE).notes
    for video in list_videos(str(folder), None, HERE).videos:
        Path(video.path).unlink()
    with pytest.raises(UsageError, match=r"no videos at (.|\n)*: skipped 2 files .*: 1 \.gif, 1 \.txt\."):
        list_videos(str(folder), None, HERE)


def test_a_folder_takes_the_suffixes_of_all_containers_that_are_read(tmp_path: Path) -> None:
    taken = ["a.flv", "b.WMV", "c.asf", "d.3gp", "e.m2ts", "f.y4m", "g.qt"]
    for name in [*taken, "h.mp3", "i.ogg", "j.heic"]:
        (tmp_path / name).write_bytes(b"x")
    found = list_videos(str(tmp_path), None, HERE)
    assert names(found) == taken
    assert "skipped 3 files that are not named like videos: 1 .heic, 1 .mp3, 1 .ogg" in found.notes[0]
