"""Commands that are killed at a file event and run again come to the result of the run left alone; scripts/kill_at_every_event.py tries all."""

import gc
import importlib.util
import os
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "kill_at_every_event.py"


@pytest.fixture(scope="module")
def kills():
    spec = importlib.util.spec_from_file_location("kill_at_every_event", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with pytest.MonkeyPatch.context() as patch:  # what it sets is not for other tests
        for name, value in module.QUIET.items():
            patch.setenv(name, os.environ.get(name, value))
        module.warm_up()
    gc.freeze()  # a collection that looked at what was imported would copy it, in every process that is forked
    return module


@pytest.fixture(scope="module")
def inputs(kills, tmp_path_factory):
    """What commands read."""
    kills.make_inputs(folder := tmp_path_factory.mktemp("given") / "inputs")
    return folder


@pytest.mark.parametrize(("title", "events"), [("save", 2), ("merge to file", 3), ("distill to file", 2), ("generate", 1)])
def test_a_killed_command_comes_to_the_same_result_and_leaves_nothing_unfinished(kills, inputs, title, events, tmp_path):
    trial = kills.Trial(title, kills.commands(inputs)[title], tmp_path)
    for at in kills.chosen(trial.events, 1, events + 2)[1:-1]:
        trial.kill(at)
    assert trial.faults == []
    assert trial.kills == events


def test_a_fault_is_seen(kills, tmp_path):
    """A writer without staging, killed in the middle, that takes what is there for whole."""

    def careless():
        out = Path(kills.OUT)
        if not out.exists():
            out.mkdir()
            (out / "a").write_text("a")
            (out / "b").write_text("b")
        return 0

    trial = kills.Trial("careless", careless, tmp_path)
    assert trial.events == 3
    for at in (1, 2, 3):
        trial.kill(at)
    assert [fault.partition(":")[0] for fault in trial.faults] == ["event 2", "event 3"]
