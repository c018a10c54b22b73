from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lrag_ray.config.prompts import duplicate_warnings, load_prompts, make_prompt, plan_prompts
from lrag_ray.config.schema import PromptsSection
from lrag_ray.errors import PromptError

REPOSITORY = Path(__file__).resolve().parents[2]


def section(folder: Path, content: bytes | str, **fields: Any) -> PromptsSection:
    path = folder / "prompts.txt"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return PromptsSection(path=str(path), **fields)


def refused(folder: Path, content: bytes | str) -> str:
    with pytest.raises(PromptError) as caught:
        load_prompts(section(folder, content))
    return str(caught.value).replace(f"{folder}/", "")


def test_a_file_of_more_lines_than_anybody_reads_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lrag_ray.text_file.MOST_LINES", 1000)
    for name in ("prompts.txt", "prompts.csv", "prompts.jsonl"):
        path = tmp_path / name
        path.write_text("prompt\n" * 1001)
        with pytest.raises(PromptError, match=rf"{name}: the prompt file has 1,001 lines, and at most 1,000 .* Fix"):
            load_prompts(PromptsSection(path=str(path)))


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
    assert duplicate_warnings(prompts) == ["lines 1, 3 and 5 hold the same prompt, which makes the same video: 'a'"]
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


@given(
    # Without brackets, which may make it JSON or a timed prompt.
    st.lists(
        st.text(st.characters(exclude_categories=("Cc", "Cs", "Zl", "Zp"), exclude_characters="[{", codec="utf-8"))
    )
)
def test_every_text_line_is_kept_as_it_is(tmp_path_factory: pytest.TempPathFactory, lines: list[str]) -> None:
    folder = tmp_path_factory.mktemp("prompts")
    # A mark at the very start belongs to the file, not to its first prompt.
    expected = [(i, line.strip(" \t")) for i, line in enumerate(lines) if line.strip(" \t")]
    content = b"\xef\xbb\xbf" + "\n".join(lines).encode()
    if not expected:
        assert "no prompt in it" in refused(folder, content)
        return
    prompts = load_prompts(section(folder, content))
    assert [(p.index, p.text) for p in prompts] == expected
    assert prompts == [make_prompt(*pair) for pair in expected]


def table(folder: Path, name: str, content: str | bytes, **fields: Any) -> PromptsSection:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return PromptsSection(path=str(path), **fields)


COLUMNS = {"id": "a-7", "reference": "a.png"}
TABLES: dict[str, str | bytes] = {
    "a.csv": "id,prompt,reference\na-7,A fox,a.png\n",
    "excel.csv": "\ufeffid;prompt;reference\r\na-7;A fox;a.png\r\n;;\r\n",
    "declared.csv": "sep=|\nid|prompt|reference\na-7|A fox|a.png\n",
    "tabs.csv": "id\tprompt\treference\na-7\tA fox\ta.png\n",
    "a.tsv": "id\tprompt\treference\na-7\tA fox\ta.png\n",
    "utf16.csv": "id\tprompt\treference\r\na-7\tA fox\ta.png\r\n".encode("utf-16"),
    "a.jsonl": '{"id": "a-7", "prompt": "A fox", "reference": "a.png"}\n',
    "a.ndjson": '{"id": "a-7", "prompt": " A fox\\n", "reference": "a.png"}\r\n\r\n',
    "a.json": '[\n  {"id": "a-7", "prompt": "A fox", "reference": "a.png"}\n]\n',
    "named.json": '{"version": 2, "prompts": [{"id": "a-7", "prompt": "A fox", "reference": "a.png"}]}',
    "lines.json": '{"id": "a-7", "prompt": "A fox", "reference": "a.png"}\n{"id": "b", "prompt": "A bear"}\n',
}


@pytest.mark.parametrize("name", TABLES)
def test_tables_give_their_column_of_prompts_and_keep_the_others(tmp_path: Path, name: str) -> None:
    prompt = load_prompts(table(tmp_path, name, TABLES[name], limit=1))[0]
    assert (prompt.index, prompt.text, dict(prompt.columns)) == (0, "A fox", COLUMNS)
    assert prompt.prompt_id == make_prompt(0, "A fox").prompt_id


def test_another_column_is_named_by_the_configuration(tmp_path: Path) -> None:
    content = json.dumps([{"prompt_en": "A fox", "dimension": ["color"], "auxiliary_info": {"color": "red"}}])
    with pytest.raises(PromptError) as caught:
        load_prompts(table(tmp_path, "info.json", content))
    assert str(caught.value).endswith(
        "info.json: no field 'prompt'; the fields are 'prompt_en', 'dimension', 'auxiliary_info'; did you mean "
        "'prompt_en'?; prompts.column names another column"
    )
    (prompt,) = load_prompts(table(tmp_path, "info.json", content, column="prompt_en"))
    assert prompt.text == "A fox"
    assert prompt.columns == {"dimension": ["color"], "auxiliary_info": {"color": "red"}}
    with pytest.raises(PromptError, match=r"prompts\.column is 'text', but the file is text"):
        load_prompts(table(tmp_path, "a.txt", "A fox\n", column="text"))


def test_a_cell_may_hold_line_breaks_and_separators_and_messages_name_its_first_line(tmp_path: Path) -> None:
    content = 'id,prompt\n1,"A red boat\nin a storm, at night"\n\n2,A fox\n3,A fox\n'
    prompts = load_prompts(table(tmp_path, "a.csv", content))
    assert [(p.index, p.line, p.text) for p in prompts] == [
        (0, 2, "A red boat\nin a storm, at night"),
        (2, 5, "A fox"),
        (3, 6, "A fox"),
    ]
    assert duplicate_warnings(prompts) == ["lines 5 and 6 hold the same prompt, which makes the same video: 'A fox'"]
    lines = load_prompts(table(tmp_path, "a.jsonl", '{"prompt": "one\u2028two"}\n\n{"prompt": "three"}'))
    assert [(p.index, p.text) for p in lines] == [(0, "one\u2028two"), (2, "three")]


WRONG_TABLES = [
    ("a.csv", "text,id\nA fox,1\n", "a.csv: no column 'prompt'; the columns, separated by ',', are 'text', 'id'"),
    ("a.csv", "Text;ID\nA fox;1\n", "a.csv: no column 'prompt'; the columns, separated by ';', are 'Text', 'ID'"),
    ("a.csv", "Prompt,id\nA fox,1\n", "are 'Prompt', 'id'; did you mean 'Prompt'?; prompts.column names another"),
    ("a.csv", "A fox\nA bear\n", "a.csv: no column 'prompt'; the columns, separated by ',', are 'A fox'"),
    ("a.csv", "", "a.csv: no head line"),
    ("a.csv", "prompt\nA fox, running\n", "a.csv:2: more values than the head line has columns (2 instead of 1)"),
    ("a.csv", 'prompt\n"A fox\n', "a.csv:2: not CSV: unexpected end of data"),
    ("a.csv", 'prompt\n"A" fox\n', "a.csv:2: not CSV"),
    ("a.csv", "id,prompt\n1\n", "a.csv:2: ends before column 'prompt' (1 of 2 values)"),
    ("a.csv", "id,prompt\n1,\n", "a.csv:2: 'prompt' is empty; expected the text of one prompt"),
    ("a.csv", "prompt,prompt\na,b\n", "a.csv:1: the head line names column 'prompt' twice"),
    ("a.csv", "prompt,\na,b\n", "a.csv:2: a value without a name of its column in the head line: 'b'"),
    ("a.csv", f"prompt\n{'x' * 200_000}\n", "a.csv:2: not CSV: field larger than field limit (131072)"),
    ("a.csv", "prompt\nA\x1bfox\n", "a.csv:2: control character U+001B at column 2"),
    ("a.csv", b"prompt\nein B\xe4r\n", "a.csv:2: byte 0xe4 at offset 12 is not UTF-8"),
    ("a.csv", "prompt\na\n".encode("utf-16-le"), "looks like UTF-16 without a byte order mark"),
    ("a.json", '["A fox", "A bear"]', "a.json: JSON with a list of texts; expected a list of objects"),
    ("a.json", "[]", "a.json: JSON with an empty list"),
    (
        "a.json",
        '{"prompts": ["a", "b"]}',
        "a.json: no field 'prompt'; the fields are 'prompts'. 'prompts' is a list: one",
    ),
    (
        "a.json",
        '{"a": [{"prompt": "x"}], "b": [{"prompt": "y"}]}',
        "a.json: no field 'prompt'; the fields are 'a', 'b'",
    ),
    (
        "a.json",
        '{"prompts": [{"prompt": "a"}, {"text": "b"}]}',
        "a.json: object 2: no field 'prompt'; the fields are 'text'",
    ),
    ("a.json", "[1]", "a.json: JSON with no objects"),
    ("a.json", '[{"prompt": "a"}', "a.json: not JSON: Expecting ',' delimiter at line 1, column 17"),
    ("a.json", '{"prompt": ["a", "b"]}', "'prompt' is a list of 2 (several prompts for one video"),
    ("a.jsonl", '{"prompts": ["a", "b"]}\n', "a.jsonl:1: no field 'prompt'; the fields are 'prompts'. 'prompts' is a"),
    ("a.jsonl", '{"prompt": "a"}\n{"prompt": 3}\n', "a.jsonl:2: 'prompt' is not text"),
    ("a.jsonl", '"A fox"\n', 'a.jsonl:1: not a JSON object; expected {"prompt": "…"}'),
    ("a.jsonl", '{"prompt": "a", "prompt": "b"}\n', "a.jsonl:1: not JSON: key 'prompt' is given twice"),
    ("a.jsonl", '{"prompt": "a", "x": NaN}\n', "a.jsonl:1: not JSON: NaN is not a JSON number"),
    ("a.jsonl", '{"prompt": "a\\ud800"}\n', "a.jsonl:1: text with half a character, U+D800"),
    ("a.jsonl", '{"prompt": "a", "x": ["\\u0000"]}\n', "a.jsonl:1: text with a NUL"),
    ("a.jsonl", f'{{"prompt": "a", "x": {"9" * 5000}}}\n', "a.jsonl:1: not JSON: Exceeds the limit"),
    ("a.jsonl", f"{'[' * 100_000}\n", "a.jsonl:1: not read: JSON that is nested too deeply"),
    ("a.jsonl", f'{{"prompt": "a", "x": {"[" * 70}{"]" * 70}}}\n', "a.jsonl:1: not read: JSON that is nested too"),
    ("a.jsonl", '{"prompt": "a", "x": 1e400}\n', "a.jsonl:1: a number beyond 64 bits. Fix: put quotes around it"),
    ("a.jsonl", f'{{"prompt": "a", "x": [{10**3000}]}}\n', "a.jsonl:1: a number beyond 64 bits"),
    ("a.csv", "id|prompt\n1|A fox\n", "a.csv:1: columns separated by '|', not by ',', ';' or tab"),
    (
        "a.txt",
        '[\n  "A fox",\n  "A bear"\n]\n',
        "a.txt: the file is JSON, not one prompt a line. Fix: write the prompts",
    ),
    ("a.txt", '{"prompt": "a"}\n{"prompt": "b"}\n', "a.txt: the file is JSON, not one prompt a line"),
    ("a.txt", '["A fox"]', "a.txt: the file is JSON, not one prompt a line"),
    ("a.txt", 'id,"prompt"\n1,A fox\n', "a.txt: the first line is a CSV head line, not one prompt a line"),
    ("a.txt", "prompt_en,dimension\nA fox,motion\n", "a.txt: the first line is a CSV head line"),
    ("a.txt", "Prompt\nA fox\n", "a.txt: the first line is a CSV head line"),
    ("a.txt", "- prompt: A fox\n- prompt: A bear\n", "a.txt: the file is YAML, not one prompt a line"),
    ("a.jsonl", '{"prompt": "A\x0bfox"}\n', "a.jsonl:1: not JSON: Invalid control character at column 14"),
    (
        "a.txt",
        "version https://git-lfs.github.com/spec/v1\noid sha256:7c\nsize 5\n",
        "a.txt: the prompt file is a Git LFS",
    ),
    ("a.txt", "\n<!DOCTYPE HTML>\n<p>Sign in</p>\n", "a.txt: the prompt file is a web page"),
    ("a.csv", "<html><p>Sign in</p></html>\n", "a.csv: the prompt file is a web page"),
    ("a.yaml", "- A fox\n", "a.yaml: .yaml is not read as a prompt file. Fix: write one prompt a line"),
    ("a.xlsx", b"PK\x03\x04", "a.xlsx: .xlsx is not read as a prompt file"),
]


@pytest.mark.parametrize(("name", "content", "message"), WRONG_TABLES, ids=[str(n) for n in range(len(WRONG_TABLES))])
def test_what_does_not_parse_is_refused_with_its_place(
    tmp_path: Path, name: str, content: str | bytes, message: str
) -> None:
    with pytest.raises(PromptError) as caught:
        load_prompts(table(tmp_path, name, content))
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.txt", "A fox\n[0s#] A fox sleeps | [10s#] A fox runs\n"),
        ("a.txt", "A fox\nA fox sleeps [10 S #] A fox runs\n"),
        ("a.txt", "A fox\n[500ms#] A fox sleeps | [1min#] A fox runs\n"),
        ("a.txt", "A fox\n[0f#] A fox sleeps | [81 frames#] A fox runs\n"),
        ("a.csv", "prompt\n[0-5s#] A fox sleeps | [5-10s#] it runs\n"),
    ],
)
def test_several_prompts_for_one_video_are_refused(tmp_path: Path, name: str, content: str) -> None:
    with pytest.raises(PromptError, match=rf"{name}:2: '\[.*#\]' begins one of several prompts for one video"):
        load_prompts(table(tmp_path, name, content))


@pytest.mark.parametrize(
    "line",
    ["[wide shot] A fox", "{A fox}", "A fox, prompt to run", "A prompt, quick fox", "[take #2] A fox", "[10s] A"],
)
def test_text_in_brackets_is_a_prompt(tmp_path: Path, line: str) -> None:
    assert [prompt.text for prompt in load_prompts(section(tmp_path, f"{line}\n"))] == [line]
