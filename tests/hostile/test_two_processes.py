"""A second process that is to write to an output that another one is writing to is refused, by every command, and changes nothing there."""

import contextlib
import importlib
import os
import shutil
import signal
from dataclasses import fields

import pytest

from afa.cli.main import COMMANDS, main
from afa.demo.data import ENSEMBLE, EXPERTS
from afa.demo.draw import draw
from afa.errors import UserError
from afa.files import locked

CURVES, ANGLES = str(EXPERTS["curves"]), str(EXPERTS["angles"])
SCORER = "def score(images, captions):\n    return {'light': images.mean((1, 2, 3))}\n"


@contextlib.contextmanager
def another_process_writing_to(place, file):
    """A forked process holds the lock: -> its pid."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        with locked(place, file=file):
            os.write(writing, b"x")
            signal.pause()
    os.read(reading, 1)
    try:
        yield child
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    draw(folder / "data", "mixed", 6, 0)
    (folder / "prompts.txt").write_text("a red ring on a plain white background\na blue star on a plain white background\n")
    (folder / "scorer.py").write_text(SCORER)
    return folder


def command(verb, inputs):
    """What a verb is given, without --output."""
    data, prompts, scorer = (str(inputs / name) for name in ("data", "prompts.txt", "scorer.py"))
    return {
        "train": ["--experts", CURVES, ANGLES, "--data", data],
        "finetune": [CURVES, "--data", data, "--rank", "1"],
        "distill": [str(ENSEMBLE), "--data", data],
        "extract": [CURVES, "--base", ANGLES],
        "generate": [CURVES, "--prompt", "a ring"],
        "evaluate": ["--ensemble", str(ENSEMBLE), "--protocol", prompts, "--scorer", scorer],
        "merge": ["--experts", CURVES, ANGLES],
        "merge to a file": ["--experts", CURVES, ANGLES],
        "search": ["--experts", CURVES, ANGLES, "--prompts", prompts, "--scorer", scorer],
        "screen": [CURVES, ANGLES, "--data", data],
        "explain": [str(ENSEMBLE), "--prompt", "a ring"],
        "demo": ["--json"],
        "push": [str(ENSEMBLE), "--bundle"],
    }[verb]


WRITERS = [
    *("train", "finetune", "distill", "extract", "generate", "evaluate", "merge", "merge to a file", "search", "screen", "explain", "demo", "push"),
]


def test_every_command_that_writes_an_output_is_tried_here():
    """The page shares its gallery, whose pictures have names of their own; a report is tried in test_files as any file is.

    A calibration writes into the ensemble that it is given, and ComfyUI's nodes into its folder, see below."""
    options = {verb: fields(importlib.import_module(module).Options.current()) for verb, module in COMMANDS.items()}
    writing = {verb for verb, own in options.items() if "output" in {field.name for field in own}}
    assert {verb.partition(" ")[0] for verb in WRITERS} == writing - {"report", "ui"}


def test_an_ensemble_is_not_calibrated_while_another_process_writes_to_it(inputs, tmp_path, capsys):
    folder = shutil.copytree(ENSEMBLE, tmp_path / "ensemble")
    scorer = ["--scorer", str(inputs / "scorer.py"), "--prompt", *"abcdefg"]
    with another_process_writing_to(folder, False) as pid:
        there = sorted(tmp_path.rglob("*"))
        assert main(["calibrate", str(folder), *scorer, "--images", "7"]) == 2
        assert f"(pid {pid}) is writing to {folder}" in capsys.readouterr().err
        assert sorted(tmp_path.rglob("*")) == there


def test_nodes_are_not_copied_where_another_process_copies_them(tmp_path, capsys):
    for name in ("comfy", "custom_nodes"):
        (tmp_path / name).mkdir()
    (tmp_path / "main.py").touch()
    target = tmp_path / "custom_nodes" / "comfyui-afa"
    with another_process_writing_to(target, False) as pid:
        there = sorted(tmp_path.rglob("*"))
        assert main(["comfyui", "--install", str(tmp_path)]) == 2
        assert f"(pid {pid}) is writing to {target}" in capsys.readouterr().err
        assert sorted(tmp_path.rglob("*")) == there


@pytest.mark.parametrize("verb", WRITERS)
def test_the_second_process_is_refused_with_folder_and_pid(verb, inputs, tmp_path, capsys):
    file = verb == "merge to a file"
    output = tmp_path / ("out.safetensors" if file else "out")
    with another_process_writing_to(output, file) as pid:
        there = sorted(tmp_path.rglob("*"))
        assert main([verb.partition(" ")[0], *command(verb, inputs), "--output", str(output)]) == 2
        assert f"(pid {pid}) is writing to {output}" in capsys.readouterr().err
        assert sorted(tmp_path.rglob("*")) == there


def test_an_ensemble_is_not_saved_where_another_process_writes(tmp_path):
    from afa import Ensemble

    ensemble = Ensemble.load(ENSEMBLE)
    with another_process_writing_to(tmp_path / "out", False) as pid, pytest.raises(UserError, match=f"pid {pid}"):
        ensemble.save(tmp_path / "out")
    ensemble.save(tmp_path / "out")  # its lock has died with it
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["README.md", "afa.json", "aggregators.safetensors"]
