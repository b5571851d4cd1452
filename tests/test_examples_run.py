"""The files of examples/ run as they are, in an empty folder, on the embedded world."""

import contextlib
import io
import json
import runpy
from pathlib import Path

import pytest
from PIL import Image

import afa

EXAMPLES = Path(afa.__file__).parent.parent / "examples"
# What each leaves, and a word of what it prints.
LEAVES = {
    "ensemble.py": ({"untrained", "untrained.png", "trained.png"}, "combined curves, angles, patterns at IN00"),
    "sampling_method.py": ({"noise_average.png", "timestep_experts.png", "magicfusion.png"}, "drew magicfusion.png with StableDiffusionPipeline"),
    "train.py": ({"images", "trained", "trained-on"}, "step 3: loss"),
    "weight_maps.py": ({"image.png", "who.png", "without-curves.png"}, "without curves the image changes by"),
}


def test_every_example_is_run():
    assert {path.name for path in EXAMPLES.iterdir()} == {*LEAVES, "afa.ipynb"}


@pytest.mark.parametrize("name", LEAVES)
def test_an_example_runs_in_an_empty_folder(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", [name])
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    left, word = LEAVES[name]
    assert {path.name for path in tmp_path.iterdir()} == left
    assert word in said.getvalue()
    for picture in tmp_path.glob("*.png"):
        assert min(len(set(band.tobytes())) for band in Image.open(picture).convert("RGB").split()) > 8, f"{picture.name} is flat"
    if name == "train.py":
        losses = [float(line.rpartition(" ")[2]) for line in said.getvalue().splitlines() if line.startswith("step ")]
        assert losses == sorted(losses, reverse=True)


def test_the_notebook_runs_from_top_to_bottom_and_is_kept_without_outputs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    notebook = json.loads((EXAMPLES / "afa.ipynb").read_text())
    assert notebook["nbformat"] == 4
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert cells and all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells)
    names: dict[str, object] = {}
    for number, cell in enumerate(cells, 1):
        try:
            exec(compile("".join(cell["source"]), f"afa.ipynb, cell {number}", "exec"), names)
        except Exception as error:
            pytest.fail(f"cell {number}: {type(error).__name__}: {error}")
    assert (tmp_path / "ensemble.png").exists() and len(names["pictures"]) == 3
