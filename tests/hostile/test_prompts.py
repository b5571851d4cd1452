"""Files of prompts: lines end at line ends only, text is text, what is no text is refused by name."""

import json
import os
from dataclasses import replace

import pytest

from afa.cli.main import main
from afa.errors import UserError
from afa.prompts import asked_prompts, read_prompts
from afa.sampling.sample import Request, Sampling

PROMPT = "a red ring\u2028on\x85a white\x0cbackground\x1c."


@pytest.mark.parametrize(
    ("name", "data", "expected"),
    [
        ("p.txt", f"{PROMPT}\r\na blue ring\rb\n".encode(), [PROMPT, "a blue ring", "b"]),
        ("p.txt", "a red ring\r\na blue ring".encode("utf-16"), ["a red ring", "a blue ring"]),
        ("p.txt", b"\xef\xbb\xbfa\n\xef\xbb\xbfb\n", ["a", "b"]),  # two files joined
        ("p.txt", b"{red|blue} ring\n{a}\n", ["{red|blue} ring", "{a}"]),
        ("p.txt", b'{"text": "a"}\nb\n', ['{"text": "a"}', "b"]),
        ("p.txt", b'{"text": "a"}\n{ "text": "b"}\n', ["a", "b"]),
        ("p.jsonl", b'\xef\xbb\xbf{"text": "a\\n b"}\r\n\r\n{"text": "c"}', ["a\n b", "c"]),
    ],
)
def test_a_prompt_is_what_its_line_says(tmp_path, name, data, expected):
    (tmp_path / name).write_bytes(data)
    assert read_prompts(tmp_path / name) == expected


@pytest.mark.parametrize(
    ("name", "data", "named"),
    [
        ("p.txt", "a caf\u00e9".encode("latin-1"), "p.txt is not UTF-8 text .byte 5, line 1"),
        ("p.txt", b"a\0b", "p.txt holds a NUL"),
        ("p.txt", b"\xff\xfe", "p.txt holds no prompt"),
        ("p.jsonl", b'{"text": "\\udc00"}', "p.jsonl, line 1 holds half a surrogate"),
        ("p.jsonl", b"{red|blue}", "p.jsonl, line 1 is not JSON"),
        ("p.jsonl", b"[" * 10_000, "p.jsonl, line 1 is nested"),
        ("p.jsonl", b'{"text": "a"}\n["b"]', 'p.jsonl, line 2 has no "text"'),
        ("p.txt", b'{"text": "a"', "line 1 is not JSON"),
    ],
)
def test_a_file_of_no_prompts_is_one_sentence(tmp_path, name, data, named):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=named):
        read_prompts(tmp_path / name)


def test_pipes_and_devices_are_no_files_of_prompts(tmp_path):
    os.mkfifo(tmp_path / "pipe.txt")
    for path in (tmp_path / "pipe.txt", "/dev/zero", tmp_path):
        with pytest.raises(UserError, match="is no file"):
            asked_prompts(None, str(path))


def test_text_that_is_none_is_refused_wherever_it_comes_from():
    bad = os.fsdecode(b"a caf\xe9")  # as the command line gives Latin-1
    for ask in (lambda: asked_prompts(["a", bad], None), lambda: Request(bad, 0), lambda: Sampling(2, negative_prompt=bad)):
        with pytest.raises(UserError, match="surrogate"):
            ask()
    with pytest.raises(UserError, match="NUL"):
        replace(Request("a", 0), prompt="a\0b")


def test_a_bad_prompt_on_the_command_line_is_one_sentence(tmp_path, capsys):
    assert main(["generate", str(tmp_path), "--prompt", os.fsdecode(b"caf\xe9"), "--output", str(tmp_path / "out")]) == 2
    assert "--prompt 1 holds half a surrogate pair" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_what_generate_lists_can_be_read_back(tmp_path):
    prompts = [PROMPT, "\ufeffa", '{"text": "a"}', "a\nb", "\U0001f600"]
    lines = [json.dumps({"file_name": "a.png", "text": prompt, "seed": 0}, ensure_ascii=False) for prompt in prompts]
    (tmp_path / "images.jsonl").write_text("\n".join(lines) + "\n")  # as afa/generation/run.py writes it
    assert read_prompts(tmp_path / "images.jsonl") == prompts
