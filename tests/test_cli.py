"""The command line as people and scripts meet it: help, sentences, exit codes, interruption."""

import argparse
import importlib
import json
import subprocess
import sys
from dataclasses import make_dataclass
from pathlib import Path

import pytest

from afa.cli.main import COMMANDS, main
from afa.demo.data import EXPERTS
from afa.demo.draw import draw
from afa.places import ASSETS
from afa.settings import option

CURVES, ANGLES, PATTERNS = (str(path) for path in EXPERTS.values())
SMALL = ["--hidden", "8", "--heads", "2", "--depth", "1", "--batch-size", "2", "--held-out", "4", "--lr", "1e-3", "--device", "cpu"]


def test_help_needs_no_torch():
    """Measured by what is imported, not by a clock."""
    script = """if True:
        import sys
        from afa.cli.main import COMMANDS, main
        for verb in ("", *COMMANDS):
            try: main([verb, "--help"] if verb else ["--help"])
            except SystemExit: print(end="\\0")
            assert not {"torch", "diffusers", "transformers"} & set(sys.modules), (verb, sorted(sys.modules))
    """
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    own, *helps, _ = done.stdout.split("\0")
    assert all(name in own for name in COMMANDS)
    for verb, text in zip(COMMANDS, helps, strict=True):
        assert all(example in text for example in importlib.import_module(COMMANDS[verb]).EXAMPLES)


def test_the_default_of_a_list_of_numbers_is_shown():
    from afa.cli.flags import add_flags

    numbers = option([2, 3], help="how many")
    options = make_dataclass("Options", [("counts", list[int], numbers)])
    parser = argparse.ArgumentParser()
    add_flags(parser, options)
    assert "how many (default: 2 3)" in parser.format_help()
    assert parser.parse_args(["--counts", "4"]).counts == [4]


def test_the_module_is_the_command():
    done = subprocess.run([sys.executable, "-m", "afa", "ui", "--port", "0"], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("afa: --port 0 is too small")


@pytest.mark.parametrize("verb", list(COMMANDS))
def test_examples_of_the_help_can_be_parsed(verb):
    import shlex

    from afa.cli.flags import read_flags
    from afa.cli.main import build_parser

    module = importlib.import_module(COMMANDS[verb])
    assert module.EXAMPLES
    for example in module.EXAMPLES:
        words = shlex.split(example)
        assert words[0] == "afa" and (words[1] == verb or verb == "report")  # a report is of what another example leaves
        read_flags(importlib.import_module(COMMANDS[words[1]]).Options, build_parser(words[1:]).parse_args(words[1:]))


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scenes")
    draw(folder / "data", "mixed", 10, 0)
    return folder / "data"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["generate", "nowhere", "--prompt", "a", "--output", "OUT"], "there is no folder or file nowhere"),
        (["generate", CURVES, "--output", "OUT"], "either --prompt"),
        (["generate", CURVES, "--prompt", "a", "--output", "OUT", "--scheduler", "eulr"], "did you mean 'euler'"),
        (["generate", CURVES, "--prompt", "a", "--output", "OUT", "--steps", "0"], "--steps 0 is too small"),
        (["generate", CURVES, "--prompt", "a", "--output", "OUT", "--device", "fpga"], "--device fpga cannot be used here"),
        (["train", "--experts", CURVES, ANGLES, "--data", "nowhere", "--output", "OUT"], "--data nowhere is not there; give a folder with metadata.jsonl"),
        (["train", "--experts", CURVES, "nowhere", "--data", "DATA", "--output", "OUT"], "there is no folder or file nowhere"),
        (["train", "--experts", CURVES, CURVES, "--data", "DATA", "--output", "OUT"], "two experts are called 'curves'"),
        (["train", "--experts", CURVES, ANGLES, "--data", "DATA", "--output", "OUT", "--resolution", "30"], "not a multiple of 4"),
        (["train", "--experts", CURVES, ANGLES, "--data", "DATA", "--output", "OUT", "--placement", "layer"], "did you mean 'layers'"),
        (["train", "--experts", CURVES, ANGLES, "--data", "DATA", "--output", "OUT", "--hidden", "30", "--heads", "8"], "not a multiple of heads 8"),
        (["train", "--experts", CURVES, ANGLES, "--data", "DATA", "--output", CURVES], "holds other files"),
        (["inspect", "nowhere"], "there is no folder or file nowhere"),
    ],
)
def test_bad_input_is_one_sentence_and_leaves_nothing(arguments, sentence, scenes, tmp_path, capsys):
    places = {"OUT": str(tmp_path / "out"), "DATA": str(scenes)}
    assert main([places.get(word, word) for word in arguments]) == 2
    said = capsys.readouterr()
    assert sentence in said.err.splitlines()[-1] and said.err.splitlines()[-1].startswith("afa: ") and said.out == ""
    assert not (tmp_path / "out").exists() or not any((tmp_path / "out").iterdir())


@pytest.mark.parametrize(
    "command",
    [
        "inspect mine=demo:curves demo:angles",
        "inspect demo:curves demo:angles --json",
        "inspect demo:ensemble",
        "inspect demo:ensemble --json",
        "merge --experts demo:curves demo:angles --output out --dry-run",
        "merge --method ties --experts demo:curves --base demo:base --output out --dry-run --json",
        "extract demo:curves --base demo:base --output lora.safetensors --dry-run",
        "evaluate --ensemble demo:ensemble --protocol scenes --prompts 2 --methods single --output out --dry-run",
        "screen demo:curves demo:angles --data scenes:8 --output out --dry-run",
    ],
)
def test_an_embedded_model_is_shown_as_it_is_typed(command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(command.split()) == 0
    shown = "".join(capsys.readouterr())
    assert str(ASSETS) not in shown and "/../" not in shown
    assert "demo:curves" in shown or "demo:ensemble" in shown or command.startswith("screen")


def test_the_whole_path_through_the_command_line(tmp_path, capsys):
    draw(tmp_path / "data", "mixed", 12, 0)
    trained = ["train", "--experts", CURVES, f"a={ANGLES}", PATTERNS, "--data", str(tmp_path / "data"), "--output", str(tmp_path / "e"), *SMALL]
    assert main([*trained, "--steps", "2"]) == 0
    assert "held-out loss" in capsys.readouterr().out
    prompt = "a red star left of a blue ring on a dotted mint background"
    made = ["generate", str(tmp_path / "e"), "--prompt", prompt, "--output", str(tmp_path / "out"), "--steps", "2", "--weights", "--json"]
    assert main(made) == 0
    images = json.loads(capsys.readouterr().out)["images"]
    assert [Path(image).name for image in images] == ["00000-00.png"] and Path(images[0]).exists()
    assert main(["inspect", str(tmp_path / "e"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)
