# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headkv_mm.batch.ids import check_id, same_file
from headkv_mm.batch.prompts import BadLine, Prompt, parse_prompts, read_prompts


def parse(text: str) -> tuple[Prompt | BadLine, ...]:
    return parse_prompts(text.encode(), objects=True, source="list.jsonl").lines


def error_of(line: str) -> str:
    """What is said about a line beside a good one."""
    good, bad = parse(f'{{"prompt": "a"}}\n{line}')
    assert good == Prompt(1, "00001", prompt="a")
    assert isinstance(bad, BadLine)
    assert bad.line == 2
    return bad.error


def test_text_lists_name_images_by_their_line() -> None:
    found = parse_prompts("\ufeffa cat\n\n  \n b dog \r\n".encode(), objects=False, source="list.txt")
    assert found.lines == (Prompt(1, "00001", prompt="a cat"), Prompt(4, "00004", prompt="b dog"))


def test_objects() -> None:
    found = parse('{"id": 7, "prompt": " a ", "seed": 3}\n\n{"class": 207}\n{"id": "x y", "prompt": "é", "seed": null}')
    assert found == (
        Prompt(1, "7", prompt="a", seed=3),
        Prompt(3, "00003", label=207),
        Prompt(4, "x y", prompt="é"),
    )


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "is no JSON"),
        ("[" * 100_000, "is no JSON"),
        ('["a"]', "must be a JSON object"),
        ('{"prompt": "a", "sede": 1}', "unknown key 'sede'"),
        ("{}", "either prompt or class"),
        ('{"prompt": "a", "class": 1}', "either prompt or class"),
        ('{"prompt": " "}', "prompt is empty"),
        ('{"prompt": 5}', "prompt must be text, got int"),
        ('{"prompt": "\\ud800"}', "half a character"),
        ('{"class": -1}', "class must be at least 0"),
        ('{"class": "cat"}', "class must be an integer"),
        ('{"class": true}', "class must be an integer"),
        ('{"prompt": "a", "seed": 1.5}', "seed must be an integer"),
        (f'{{"prompt": "a", "seed": {2**63}}}', "seed must be in 0..2"),
        ('{"prompt": "a", "id": true}', "id must be text or an integer"),
        ('{"prompt": "a", "id": ""}', "id is empty"),
        ('{"prompt": "a", "id": "../a"}', "begins or ends with a dot"),
        ('{"prompt": "a", "id": "/etc/a"}', "has '/'"),
        ('{"prompt": "a", "id": "a/../../b"}', "has '/'"),
        ('{"prompt": "a", "id": "a\\\\b"}', "file name inside the folder"),
        ('{"prompt": "a", "id": "a\\u0000b"}', "file name inside the folder"),
        ('{"prompt": "a", "id": "\\udcff"}', "file name inside the folder"),
        (json.dumps({"prompt": "a", "id": "x" * 300}), "300 bytes, at most 200"),
    ],
    ids=lambda text: text[:40],
)
def test_bad_lines_are_named_and_the_rest_is_read(line: str, message: str) -> None:
    assert message in error_of(line)


def test_text_that_is_no_utf8() -> None:
    good, bad = parse_prompts(b"a\n\xff\xfe\n", objects=False, source="list.txt").lines
    assert good == Prompt(1, "00001", prompt="a")
    assert bad == BadLine(2, "is no UTF-8 text")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"id": "a", "prompt": "x"}\n\n{"id": "a", "prompt": "y"}', "lines 1 and 3 have the same id 'a'"),
        ('{"id": "a", "prompt": "x"}\n{"id": "A", "prompt": "y"}', "lines 1 and 2 .* differ in case only"),
        ('{"id": "00002", "prompt": "x"}\n{"prompt": "y"}', "lines 1 and 2 have the same id '00002'"),
        ("", "no prompt that can be used: write one per line"),
        ("{", "no prompt that can be used: line 1: is no JSON"),
    ],
)
def test_lists_that_are_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse(text)


def test_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text('{"prompt": "a"}\n')
    assert read_prompts(str(tmp_path / "a.txt")).prompts[0].prompt == '{"prompt": "a"}'
    (tmp_path / "a.jsonl").write_text('{"prompt": "a"}\n')
    assert read_prompts(str(tmp_path / "a.jsonl")).prompts[0].prompt == "a"
    with pytest.raises(ValueError, match=r"\.txt \(one per line\) or \.jsonl"):
        read_prompts(str(tmp_path / "a.csv"))
    with pytest.raises(FileNotFoundError):
        read_prompts(str(tmp_path / "none.txt"))
    for data, prompt in ((b'\n {"prompt": "a"}', "a"), (b"a {b}", "a {b}")):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
        found = read_prompts("-")
        assert (found.source, found.prompts[0].prompt) == ("standard input", prompt)


@given(st.text())
def test_an_accepted_id_is_one_file_in_the_folder(text: str) -> None:
    try:
        check_id(text)
    except ValueError:
        return
    file = Path("/folder") / f"{text}.png"
    assert file.parent == Path("/folder")
    assert file.name == f"{text}.png"
    assert not file.name.startswith(".")
    assert len(file.name.encode()) < 255


@given(st.lists(st.text(alphabet="aAbB\u0130\u0131é./", min_size=1, max_size=3), min_size=1, max_size=8))
def test_two_lines_never_write_one_file(ids: list[str]) -> None:
    text = "\n".join(json.dumps({"id": name, "prompt": "x"}) for name in ids)
    try:
        prompts = [line for line in parse(text) if isinstance(line, Prompt)]
    except ValueError:
        usable = [name for name in ids if _usable(name)]
        assert not usable or len({same_file(name) for name in usable}) < len(usable)
        return
    assert len({same_file(prompt.id) for prompt in prompts}) == len(prompts)
    assert [prompt.id for prompt in prompts] == [name for name in ids if _usable(name)]


@given(st.binary())
def test_any_bytes_are_read_line_by_line(data: bytes) -> None:
    for objects in (True, False):
        try:
            found = parse_prompts(data, objects=objects, source="x")
        except ValueError:
            continue  # nothing usable in it, or one id twice
        numbers = [line.line for line in found.lines]
        assert numbers == sorted(set(numbers))
        assert len(numbers) <= data.count(b"\n") + 1


@given(
    st.lists(
        st.fixed_dictionaries(
            {},
            optional={
                "id": st.one_of(st.text(max_size=3), st.integers(), st.none(), st.booleans()),
                "prompt": st.one_of(st.text(max_size=3), st.none(), st.integers()),
                "class": st.one_of(st.integers(-1, 5), st.none(), st.text(max_size=2)),
                "seed": st.one_of(st.integers(-1, 2**64), st.none(), st.floats()),
            },
        ),
        max_size=5,
    )
)
def test_every_line_is_a_prompt_or_named(items: list[dict[str, Any]]) -> None:
    text = "\n".join(['{"id": "first", "prompt": "a"}', *map(json.dumps, items)])
    try:
        lines = parse(text)
    except ValueError:
        names = [str(item["id"]) for item in items if item.get("id") is not None]
        assert len({same_file(name) for name in names}) < len(names) or "first" in names or _like_a_line(names)
        return
    assert [line.line for line in lines] == list(range(1, len(items) + 2))
    for line in lines:
        if isinstance(line, Prompt):
            assert (line.prompt is None) != (line.label is None)
            assert line.seed is None or 0 <= line.seed < 2**63


def _usable(name: str) -> bool:
    try:
        check_id(name)
    except ValueError:
        return False
    return True


def _like_a_line(names: list[str]) -> bool:
    """Whether an id may be the default one of another line."""
    return any(name.isdigit() for name in names)
