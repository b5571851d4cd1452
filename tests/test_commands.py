"""Commands as processes of their own: what a real Ctrl-C leaves, and what is printed beside the result."""

import json
import socket
import urllib.request

import pytest
from inspected import pipe
from launcher import Launcher

from afa.cli.main import main
from afa.demo.data import EXPERTS
from afa.demo.draw import draw

CURVES, ANGLES, _ = map(str, EXPERTS.values())


@pytest.fixture(scope="module")
def launcher(tmp_path_factory):
    launcher = Launcher(tmp_path_factory.mktemp("launched"))
    yield launcher
    launcher.close()


def test_interrupted_training_goes_on_with_the_same_command(launcher, tmp_path, capsys):
    draw(tmp_path / "data", "mixed", 20, 0)
    small = ["--hidden", "8", "--heads", "2", "--depth", "1", "--batch-size", "2", "--held-out", "4", "--lr", "1e-3", "--device", "cpu"]
    command = ["train", "--experts", CURVES, ANGLES, "--data", str(tmp_path / "data"), "--output", str(tmp_path / "out"), "--steps", "12", *small]
    with launcher.started(*command) as running:
        running.wait_for("1/12", running.err)  # the first step is made
        assert running.interrupt() == 130 and "the same command goes on from there" in running.err.read_text()
    assert (tmp_path / "out" / ".training" / "state.pt").exists() and not (tmp_path / "out" / "afa.json").exists()
    assert main([*command, "--json"]) == 0
    out, error = capsys.readouterr()
    record = json.loads(out)
    assert record["steps"] == 12 and [entry["step"] for entry in record["history"]] == [0, 12]
    assert " 0/12" not in error  # it did not begin again


def test_an_interrupted_explanation_loses_at_most_one_image(launcher, tmp_path):
    prompts = ["a star", "a ring", "a heart"]  # three, so that it cannot be through before the signal comes
    quick = ["--steps", "2", "--word-steps", "0", "--counterfactuals", "none", "--device", "cpu"]
    command = ["explain", "--prompt", *prompts, "--output", str(tmp_path / "out"), *quick]
    with launcher.started(*command) as running:
        running.wait_for("1/3", running.err)
        assert running.interrupt() == 130
    first = tmp_path / "out" / "00000.json"
    before = first.stat().st_mtime_ns
    assert not (tmp_path / "out" / "explain.json").exists() and not list((tmp_path / "out").glob(".writing-*"))
    assert main(command) == 0
    assert first.stat().st_mtime_ns == before and (tmp_path / "out" / "00002.json").exists()


def test_the_page_starts_with_the_embedded_ensemble_and_ends_with_ctrl_c(launcher, tmp_path):
    pytest.importorskip("gradio", reason="the page needs gradio: pip install 'afa[ui]'")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with launcher.started("ui", "--output", tmp_path / "gallery", "--port", port, "--device", "cpu") as running:
        said = running.wait_for("\n", running.out)
        assert said.startswith("The page is at http://127.0.0.1:")
        with urllib.request.urlopen(said.split()[4], timeout=10) as answer:
            assert answer.status == 200
        assert running.interrupt() == 0
    errors = running.err.read_text()
    assert "Traceback" not in errors and errors.rstrip().endswith("stopped")


def test_nothing_but_the_document_is_printed(launcher, tmp_path):
    for seed, name in enumerate(("photo", "paint")):
        pipe(seed, text_seed=7).save_pretrained(tmp_path / name)
    with launcher.started("inspect", tmp_path / "photo", tmp_path / "paint", "--json") as running:
        assert running.wait() == 0
    assert launcher.printed.read_text() == running.err.read_text() == ""
    json.loads(running.out.read_text())
