"""The command line when something goes wrong that nobody foresaw, and when it is called for the first time."""

import importlib
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from afa.checkpoint.manifest import read_manifest
from afa.cli import inspect
from afa.cli.flags import read_flags
from afa.cli.main import COMMANDS, build_parser, main
from afa.demo.data import ASSETS
from afa.ensemble import Ensemble
from afa.errors import UserError
from afa.experts.locate import locate
from afa.experts.spec import ExpertSpec
from afa.places import EMBEDDED, located


def test_afa_alone_prints_help(capsys):
    assert main([]) == 0
    assert "VERB" in capsys.readouterr().out


def broken(error):
    def run(options):
        raise error

    return run


@pytest.mark.parametrize("error", [RuntimeError("shape\nmismatch"), KeyError("unet"), ValueError(), RecursionError("too deep"), AssertionError()])
def test_what_was_not_foreseen_is_one_sentence_with_advice(error, monkeypatch, capsys):
    monkeypatch.setattr(inspect, "run", broken(error))
    assert main(["inspect", "--config", "sd15"]) == 1
    told = capsys.readouterr().err
    assert "Traceback" not in told
    (line,) = told.splitlines()
    assert line.startswith(f"afa: {type(error).__name__}: ")
    assert "--traceback" in line


def test_out_of_memory_says_so(monkeypatch, capsys):
    monkeypatch.setattr(inspect, "run", broken(RuntimeError("CUDA out of memory. Tried to allocate 2 GiB")))
    assert main(["inspect", "--config", "sd15"]) == 1
    assert capsys.readouterr().err.startswith("afa: out of memory: ")


@pytest.mark.parametrize("command", [["--traceback", "inspect", "nowhere"], ["inspect", "nowhere", "--traceback"], ["inspect", "--traceback", "nowhere"]])
def test_a_traceback_is_shown_where_it_is_asked_for(command, capsys):
    assert main(command) == 2
    told = capsys.readouterr().err
    assert "Traceback (most recent call last)" in told
    assert told.splitlines()[-1].startswith("afa: ")


def test_waiting_threads_sleep_unless_the_user_says_otherwise():
    code = "import afa, os; print(os.environ['OMP_WAIT_POLICY'])"
    for given, found in (({}, "PASSIVE"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE")):
        environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"} | given
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
        assert done.stdout.strip() == found


MODELS = ("sources", "experts", "expert", "ensemble", "base", "start", "like", "frame", "vae")
FILES = ("prompts", "scorer", "recipe", "metric_weights", "protocol_data", "train_data", "folders", "reports")


@pytest.mark.parametrize("verb", list(COMMANDS))
def test_inputs_of_the_help_s_examples_are_there_in_an_empty_folder(verb, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made = set()  # by the examples before
    for example in importlib.import_module(COMMANDS[verb]).EXAMPLES:
        words = shlex.split(example)
        options = read_flags(importlib.import_module(COMMANDS[words[1]]).Options, build_parser(words[1:]).parse_args(words[1:]))
        for name in MODELS:
            given = getattr(options, name, None) or []
            for place in [given] if isinstance(given, str) else given:
                assert Path(place).is_dir() or locate(ExpertSpec.parse(place)).path.exists(), f"{example}: {place}"
        for name in FILES:
            given = getattr(options, name, None) or []
            for file in given if isinstance(given, list) else [given] if isinstance(given, str) else []:
                assert file in made, f"{example}: {file}"
        assert getattr(options, "data", None) is None or options.data.startswith("scenes:")
        assert getattr(options, "protocol", "scenes") == "scenes"
        made.add(getattr(options, "output", None))


def test_embedded_models_have_a_spelling_everywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in EMBEDDED:
        assert Path(located(f"demo:{name}")) == ASSETS / name
    assert located("x=demo:curves+style.safetensors*0.5") == f"x={ASSETS / 'curves'}+style.safetensors*0.5"
    assert ExpertSpec.parse("demo:curves").name == "curves"
    for text in ("curves", "./demo:curves", "org/name@demo", "scenes:8", ""):
        assert located(text) == text
    with pytest.raises(UserError, match="'demo:curve'; did you mean 'demo:curves'"):
        located("demo:curve")
    for text in ("demo:", "demo:../curves", "demo:curves/unet"):
        with pytest.raises(UserError, match="embedded model"):
            located(text.replace("curves/unet", "..")) if "/unet" in text else located(text)
    Path("demo:curves").mkdir()
    assert located("demo:curves") == "demo:curves"


def test_an_error_names_embedded_models_as_they_were_typed(tmp_path, capsys):
    code = main(["train", "--experts", "demo:curves", "demo:curves", "--data", "scenes:8", "--output", str(tmp_path / "out")])
    said = capsys.readouterr().err
    assert code == 2 and "demo:curves" in said and str(ASSETS) not in said


def test_an_ensemble_of_embedded_experts_names_them_by_their_spelling(tmp_path):
    Ensemble.from_experts(["demo:curves", "x=demo:angles"], placement="out", aggregator="mean").save(tmp_path / "made")
    assert [expert.source for expert in read_manifest(tmp_path / "made").experts] == ["demo:curves", "demo:angles"]
    assert Ensemble.load(tmp_path / "made").names == ("curves", "x")
    assert Ensemble.load("demo:ensemble").names == ("curves", "angles", "patterns")


def test_steps_are_shown_on_a_terminal_and_only_there(monkeypatch, tmp_path):
    import io

    class Terminal(io.StringIO):
        watched = True

        def isatty(self):
            return self.watched

    for watched in (True, False):
        terminal = Terminal()
        terminal.watched = watched
        monkeypatch.setattr(sys, "stderr", terminal)
        command = ["generate", "demo:curves", "--prompt", "a red ring", "--steps", "40", "--device", "cpu", "--output", str(tmp_path / str(watched))]
        assert main(command) == 0
        shown = terminal.getvalue()
        assert ("steps:" in shown and "/40 [" in shown) == watched
