"""The command line when something goes wrong that nobody foresaw, and when it is called for the first time."""

import os
import subprocess
import sys

import pytest

from afa.cli import inspect
from afa.cli.main import main


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
