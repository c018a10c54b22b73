"""Prompt files and manifests with any content: their rows, or a message with the place; never a traceback."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from lrag_ray.config import table_file
from lrag_ray.config.prompts import load_prompts
from lrag_ray.config.schema import PromptsSection, StorageSection
from lrag_ray.errors import PromptError, UsageError
from lrag_ray.pipelines import video_list
from lrag_ray.pipelines.video_list import list_videos

SUFFIXES = [".txt", ".csv", ".tsv", ".json", ".jsonl", ".ndjson"]
WHOLE = {
    ".csv": b'path,prompt,sample,duration_s\na.mp4,"A fox\nruns",0,1.5\nb.mp4,A bear,1,\n',
    ".tsv": b"path\tprompt\tsample\na.mp4\tA fox\t0\n",
    ".json": b'[{"path": "a.mp4", "prompt": "A fox", "sample": 0, "duration_s": 1.5, "x": {"y": [null]}}]',
    ".jsonl": b'{"path": "a.mp4", "prompt": "A fox", "sample": 0}\n{"path": "b.mp4", "prompt": "A bear"}\n',
    ".txt": b"A fox\n\nA bear\n",
}
WHOLE[".ndjson"] = WHOLE[".jsonl"]
PIECES = st.one_of(
    st.binary(max_size=30),
    st.text(max_size=10).map(lambda text: text.encode("utf-8", "surrogatepass")),
    st.sampled_from(
        [b"9" * 5000, b"[" * 100_000, b'{"a":' * 100_000, b'"' + b"x" * 200_000, b"\\ud800", b"NaN", b"1e999", b"\0"]
    ),
    st.sampled_from([b"\xff\xfe", b"\xfe\xff", b"\xef\xbb\xbf", b"sep=;\n", b"sep=\n\n", b'"', b";", b"\t", b"\r"]),
    st.sampled_from([b"../x", b"/etc/passwd", b"[10s#]", b"true", b'["a"]', b"-1", b"\xe2\x80\xa8", b"\x1b[2J"]),
)
FUZZ = settings(
    deadline=None,
    max_examples=300,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@FUZZ
@given(st.sampled_from(SUFFIXES), PIECES, st.floats(0, 1), st.integers(0, 40))
@example(".csv", b"sep=\0", 0, 80)
def test_any_bytes_are_rows_or_a_message(tmp_path: Path, suffix: str, piece: bytes, at: float, gone: int) -> None:
    whole = WHOLE[suffix]
    start = int(at * len(whole))
    path = tmp_path / f"table{suffix}"
    path.write_bytes(whole[:start] + piece + whole[start + gone :])
    (tmp_path / "videos").mkdir(exist_ok=True)
    (tmp_path / "videos" / "a.mp4").write_bytes(b"")
    try:
        prompts = load_prompts(PromptsSection(path=str(path)))
    except PromptError as refused:
        assert refused.exit_code == 2 and str(refused).startswith(str(path))
    else:
        # What comes out can be written, hashed and shown.
        assert all(prompt.text.encode() and "\0" not in prompt.text for prompt in prompts)
        assert len({prompt.prompt_id for prompt in prompts}) == len(prompts)
    try:
        videos = list_videos(str(tmp_path / "videos"), str(path), StorageSection()).videos
    except UsageError as refused:
        assert refused.exit_code == 2 and str(refused)
    else:
        assert all(video.labels.prompt.encode() is not None for video in videos)


def test_a_table_takes_no_more_memory_than_a_large_one_of_prompts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nested = tmp_path / "a.json"
    nested.write_text(f'[{{"prompt": "A fox", "x": [{"[]," * 10_000_000}[]]}}]')
    with pytest.raises(PromptError, match=r"a\.json: its values take more than 1024 MiB"):
        load_prompts(PromptsSection(path=str(nested)))
    wide = tmp_path / "a.csv"
    wide.write_text("prompt" + "".join(f",c{at}" for at in range(20_000)) + "\nA fox\n")
    with pytest.raises(PromptError, match=r"a\.csv:1: a head line of 20,001 columns"):
        load_prompts(PromptsSection(path=str(wide)))
    monkeypatch.setattr(table_file, "_MOST_CELLS", 1000)
    wide.write_text("prompt,a,b\n" + "A fox,,\n" * 400)
    with pytest.raises(PromptError, match=r"a\.csv:335: more than 1,000 values"):
        load_prompts(PromptsSection(path=str(wide)))


def test_links_that_lead_to_the_same_folders_along_many_ways_are_not_followed_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for at in range(12):
        folder = tmp_path / str(at)
        folder.mkdir()
        (folder / "a").symlink_to(f"../{at + 1}")
        (folder / "b").symlink_to(f"../{at + 1}")
    monkeypatch.setattr(video_list, "_MOST_PATHS", 500)
    with pytest.raises(UsageError, match="leads to more than 500 files and folders"):
        list_videos(str(tmp_path / "0"), None, StorageSection())


def test_a_folder_that_is_deeper_than_any_is_noted(tmp_path: Path) -> None:
    deep = tmp_path
    for _ in range(150):
        deep /= "d"
    deep.mkdir(parents=True)
    (deep / "a.mp4").write_bytes(b"")
    (tmp_path / "b.mp4").write_bytes(b"")
    found = list_videos(str(tmp_path), None, StorageSection())
    assert [video.name for video in found.videos] == ["b.mp4"]
    assert len(found.notes) == 1 and "not looked into: 100 folders deep" in found.notes[0]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_what_is_not_a_file_is_refused_at_once(tmp_path: Path, suffix: str) -> None:
    pipe, device = tmp_path / f"pipe{suffix}", tmp_path / f"zero{suffix}"
    os.mkfifo(pipe)
    device.symlink_to("/dev/zero")
    for path in (pipe, device):
        with pytest.raises(PromptError, match="a pipe, a socket or a device, not a file"):
            load_prompts(PromptsSection(path=str(path)))
        with pytest.raises(UsageError, match="a pipe, a socket or a device, not a file"):
            list_videos(str(tmp_path), str(path), StorageSection())
    with (tmp_path / f"large{suffix}").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(PromptError, match="the prompt file is larger than 268,435,456 bytes"):
        load_prompts(PromptsSection(path=str(tmp_path / f"large{suffix}")))
