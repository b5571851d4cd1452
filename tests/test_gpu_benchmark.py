"""benchmarks/gpu.py runs on a CPU as it does on a GPU: whoever is lent a GPU for minutes must not find its faults there."""

import gc
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import ONE_LEVEL, sd_pipeline
from tiny_transformers import flux_pipeline

import afa

PROGRAM = Path(afa.__file__).parent.parent / "benchmarks" / "gpu.py"


@pytest.fixture(scope="module")
def gpu():
    """The program as a module; what it imports lies beside it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(PROGRAM.parent)
        module = importlib.import_module(PROGRAM.stem)
    gc.freeze()  # it collects garbage before every row
    return module


def measure(gpu, folder: Path, output: Path, patch) -> list[dict]:
    small = ["--device", "cpu", "--repeats", "2", "--side", "8", "--image-steps", "4"]
    patch.setattr(sys, "argv", list(map(str, [PROGRAM, "--configs", folder, "nowhere", *small, "--output", output])))
    assert gpu.main() == 0
    return [json.loads(line) for line in (output / "rows.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(("make", "maps"), [(lambda: sd_pipeline(**ONE_LEVEL), True), (flux_pipeline, False)], ids=["SD", "FLUX"])
def test_every_row_is_measured_but_graphs_and_a_model_that_is_not_there(gpu, make, maps, tmp_path, monkeypatch):
    make().save_pretrained(tmp_path / "model")
    rows = measure(gpu, tmp_path / "model", tmp_path / "out", monkeypatch)
    failed = {row["what"]: row["error"] for row in rows if row["error"] and row["mode"] != "graph"}
    assert list(failed) == ["the model"] and "nowhere" in failed["the model"]
    assert {row["error"] for row in rows if row["mode"] == "graph"} == {"RuntimeError: only a GPU has graphs"}
    measured = {row["what"]: row for row in rows if not row["error"]}
    ways = {"one expert", "3 experts in turn", "default", "paper"}
    if maps:
        ways |= {"training step of 8, paper, checkpointing", "image of 4 steps", "image of 4 steps, reuse 8, one leads"}
    assert ways <= set(measured)
    assert measured["3 experts in turn"]["over_experts"]["median"] == 1 and measured["default"]["over_experts"]["n"] == 2
    assert all(row["seconds"]["low"] > 0 for row in measured.values()) and measured["default, experts cpu"]["memory_gb"] > 0
    assert len((tmp_path / "out" / "table.md").read_text().splitlines()) == len(rows) + 4


def test_without_a_gpu_it_says_so(tmp_path):
    command, hidden = [sys.executable, PROGRAM, "--output", tmp_path / "out"], os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, env=hidden)
    assert done.returncode == 2 and done.stderr.strip().endswith("--device cpu rehearses the program") and not (tmp_path / "out").exists()
