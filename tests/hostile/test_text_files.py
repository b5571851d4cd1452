"""The one reader of text: encodings, line ends, JSON."""

import os

import pytest

from afa.text_files import (
    DEEPEST,
    TextError,
    decode_text,
    parse_json,
    read_bytes,
    read_json,
    read_json_lines,
    read_text,
    split_lines,
)

TEXT = "a café\u2028on white\U0001f600\n"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_text_with_a_byte_order_mark_is_the_text_without_it(tmp_path, encoding):
    (tmp_path / "a.txt").write_bytes(TEXT.encode(encoding))
    assert read_text(tmp_path / "a.txt") == TEXT


@pytest.mark.parametrize(("encoding", "mark"), [("utf-16-be", b"\xfe\xff"), ("utf-32-be", b"\0\0\xfe\xff")])
def test_big_endian_text_is_read(encoding, mark):
    assert decode_text(mark + TEXT.encode(encoding), "a.txt") == TEXT


@pytest.mark.parametrize(
    ("data", "named"),
    [
        ("ab\ncaf\u00e9 x".encode("latin-1"), "byte 6, line 2"),
        (b"\xef\xbb\xbf\xff", "byte 3"),
        ("a red ring".encode("utf-16-le"), "NUL"),  # without a mark
        (b"\xff\xfea", "byte 2"),  # half a character
        (b"a\xed\xa0\xbdb", "byte 1"),  # a surrogate, written as CESU-8
        (b"a\0b", "character 1"),
    ],
)
def test_what_is_no_text_is_refused_with_its_place(data, named):
    with pytest.raises(TextError, match=named) as raised:
        decode_text(data, "list.txt")
    assert "list.txt" in str(raised.value) and "\n" not in str(raised.value)


def test_lines_end_at_line_ends_and_nowhere_else():
    inside = "\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029"
    assert split_lines(f"a{inside}b\nc\r\nd\re\n") == [f"a{inside}b", "c", "d", "e"]
    assert split_lines("a\n\nb") == ["a", "", "b"] and split_lines("") == []


def test_pipes_devices_and_huge_files_are_not_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path, "/dev/zero"):
        with pytest.raises(TextError, match="no plain file"):
            read_bytes(type(tmp_path)(path))
    (tmp_path / "a").write_bytes(b"12345")
    with pytest.raises(TextError, match="5 bytes, and at most 4"):
        read_text(tmp_path / "a", largest=4)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("{", "not JSON"),
        ("NaN", "NaN"),
        ('{"a": [-Infinity]}', "Infinity"),
        ("[1e999]", "1e999"),
        ('{"a": 1, "b": 2, "a": 3}', "'a' twice"),
        (r'{"a": ["x", {"b": "a \ud83d cat"}]}', "U\\+D83D"),
        (r'{"a\u0000": 1}', "NUL"),
        ("[" * (DEEPEST + 2) + "]" * (DEEPEST + 2), "nested deeper"),
        ('{"a":' * 100_000, "nested deeper"),
        ("1" * 5000, "not JSON"),
    ],
)
def test_json_that_is_none_is_refused_by_name(text, named):
    with pytest.raises(TextError, match=named) as raised:
        parse_json(text, "some.json")
    assert "some.json" in str(raised.value) and len(str(raised.value)) < 400


def test_json_that_is_right_is_read_as_it_is(tmp_path):
    (tmp_path / "a.json").write_bytes(b'\xef\xbb\xbf{"a": [1, 2.5, null, "\\ud83d\\ude00 \xe2\x80\xa8"]}')
    assert read_json(tmp_path / "a.json") == {"a": [1, 2.5, None, "\U0001f600 \u2028"]}
    deep = "[" * DEEPEST + "]" * DEEPEST
    assert parse_json(deep, "deep") is not None


def test_json_lines_name_file_and_line(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"a": "x\u2028y"}\n\n[1}\n')
    lines = read_json_lines(tmp_path / "a.jsonl")
    assert next(lines) == (f"{tmp_path / 'a.jsonl'}, line 1", {"a": "x\u2028y"})
    with pytest.raises(TextError, match=r"a\.jsonl, line 3 is not JSON"):
        next(lines)
