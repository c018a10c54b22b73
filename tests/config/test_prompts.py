from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lrag_ray.config.prompts import duplicate_warnings, load_prompts, make_prompt, plan_prompts
from lrag_ray.config.schema import PromptsSection
from lrag_ray.errors import PromptError

REPOSITORY = Path(__file__).resolve().parents[2]


def section(folder: Path, content: bytes | str, **fields: int) -> PromptsSection:
    path = folder / "prompts.txt"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return PromptsSection(path=str(path), **fields)


def refused(folder: Path, content: bytes | str) -> str:
    with pytest.raises(PromptError) as caught:
        load_prompts(section(folder, content))
    return str(caught.value).replace(f"{folder}/", "")


def test_an_id_is_line_number_and_hash_of_the_text(tmp_path: Path) -> None:
    first, second = load_prompts(section(tmp_path, "a fox\n\n  \n  a bear \n"))
    assert (first.index, first.text) == (0, "a fox")
    assert (second.index, second.text) == (3, "a bear")
    assert second.prompt_id == f"00003-{hashlib.sha256(b'a bear').hexdigest()[:8]}"


@pytest.mark.parametrize(
    "content",
    [b"a fox\nein B\xc3\xa4r\n", b"\xef\xbb\xbfa fox\r\nein B\xc3\xa4r\r\n", b"a fox \n\tein B\xc3\xa4r"],
    ids=["unix", "windows", "no last line end"],
)
def test_byte_order_marks_line_ends_and_white_space_do_not_matter(tmp_path: Path, content: bytes) -> None:
    assert [prompt.text for prompt in load_prompts(section(tmp_path, content))] == ["a fox", "ein Bär"]


def test_limit_takes_the_first_prompts(tmp_path: Path) -> None:
    assert [p.index for p in load_prompts(section(tmp_path, "a\n\nb\nc\n", limit=2))] == [0, 2]
    assert len(load_prompts(section(tmp_path, "a\nb\n", limit=9))) == 2


def test_appending_lines_leaves_the_ids_before_them(tmp_path: Path) -> None:
    before = load_prompts(section(tmp_path, "a\n\nb\n"))
    assert load_prompts(section(tmp_path, "a\n\nb\nc\n"))[:2] == before


def test_a_missing_file_says_where_the_papers_prompts_are(tmp_path: Path) -> None:
    with pytest.raises(PromptError, match=r"nowhere\.txt: no such prompt file.*moviegenbench_128_refined\.txt"):
        load_prompts(PromptsSection(path=str(tmp_path / "nowhere.txt")))
    with pytest.raises(PromptError, match=r"prompts\.path is not given.*moviegenbench_128_refined\.txt"):
        load_prompts(PromptsSection(count=3))
    with pytest.raises(PromptError, match="cannot read the prompt file: Is a directory"):
        load_prompts(PromptsSection(path=str(tmp_path)))


@pytest.mark.parametrize("content", ["", "\n \n\t\n", "\ufeff"])
def test_a_file_without_prompts_is_refused(tmp_path: Path, content: str) -> None:
    assert refused(tmp_path, content) == "prompts.txt: no prompt in it; write one prompt a line"


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"], ids=["plain", "with a byte order mark"])
def test_bad_utf8_is_named_by_line_and_offset(tmp_path: Path, mark: bytes) -> None:
    content = mark + b"a fox\nein B\xe4r\n"
    offset = content.index(b"\xe4")
    assert refused(tmp_path, content) == (
        f"prompts.txt:2: byte 0xe4 at offset {offset} is not UTF-8; save the file as UTF-8"
    )


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        ("a\nb\x1b[31mc\n", "prompts.txt:2: control character U+001B at column 2"),
        ("a\x00b\n", "prompts.txt:1: control character U+0000 at column 2"),
        ("a\rb\r", "prompts.txt:1: control character U+000D at column 2"),
        ("a\u2028b", "prompts.txt:1: line separator U+2028 at column 2"),
    ],
)
def test_control_characters_are_refused(tmp_path: Path, content: str, fault: str) -> None:
    assert refused(tmp_path, content).startswith(fault)


def test_all_lines_with_control_characters_are_counted(tmp_path: Path) -> None:
    lines = refused(tmp_path, "\x01\n" * 8).split("\n")
    assert len(lines) == 6 and lines[-1] == "and 3 more lines"


def test_duplicates_are_allowed_and_told(tmp_path: Path) -> None:
    prompts = load_prompts(section(tmp_path, "a\nb\na\n\na\n"))
    assert len({prompt.prompt_id for prompt in prompts}) == 4
    assert duplicate_warnings(prompts) == ["lines 1, 3, 5 hold the same prompt, which makes the same video: 'a'"]
    assert duplicate_warnings(load_prompts(section(tmp_path, "a\nb\n"))) == []


def test_a_plan_needs_no_file_where_a_count_is_given(tmp_path: Path) -> None:
    missing = str(tmp_path / "later.txt")
    assert len(plan_prompts(PromptsSection(path=missing, count=128))) == 128
    assert len(plan_prompts(PromptsSection(count=128, limit=8))) == 8
    assert [p.text for p in plan_prompts(section(tmp_path, "a\n", count=128))] == ["a"]
    with pytest.raises(PromptError, match="no such prompt file"):
        plan_prompts(PromptsSection(path=missing))


def test_the_demo_has_prompts_of_its_own() -> None:
    prompts = load_prompts(PromptsSection(path=str(REPOSITORY / "configs" / "prompts" / "demo.txt")))
    assert len(prompts) >= 10 and duplicate_warnings(prompts) == []


@given(st.lists(st.text(st.characters(exclude_categories=("Cc", "Cs", "Zl", "Zp"), codec="utf-8"))))
def test_every_text_line_is_kept_as_it_is(tmp_path_factory: pytest.TempPathFactory, lines: list[str]) -> None:
    folder = tmp_path_factory.getbasetemp()
    # A mark at the very start belongs to the file, not to its first prompt.
    expected = [(i, line.strip(" \t")) for i, line in enumerate(lines) if line.strip(" \t")]
    content = b"\xef\xbb\xbf" + "\n".join(lines).encode()
    if not expected:
        assert "no prompt in it" in refused(folder, content)
        return
    prompts = load_prompts(section(folder, content))
    assert [(p.index, p.text) for p in prompts] == expected
    assert prompts == [make_prompt(*pair) for pair in expected]
