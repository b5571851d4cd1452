"""The rows of merges and of trained controls where experts are transformers, from end to end on tiny real ones."""

import json
from pathlib import Path

import numpy as np
import pytest
from merging_models import PIPELINES, saved
from PIL import Image
from safetensors.torch import load_file
from tiny_transformers import FLUX_SMALL, SD3_SMALL

from afa.evaluation.run import evaluate
from afa.evaluation.settings import EvaluateSettings
from afa.evaluation.setup import Setup
from afa.evaluation.untrained import merge_rows
from afa.merging.block_weights import RAMPS, ramp
from afa.training.finetune import RECORD
from afa.training.run import train
from afa.training.settings import TrainSettings

SMALL = {"sd3": SD3_SMALL, "flux": FLUX_SMALL}
METHODS = ["mbw", "auto_mbw", "slerp", "finetune_best", "finetune_merge_compute", "merge_and_continue"]


def test_a_ramp_is_straight_along_the_stages():
    assert ramp(["J00", "J01", "OUT"], 0.25, 0.75) == {"J00": 0.25, "J01": 0.5, "OUT": 0.75}
    assert ramp(["OUT"], 0.25, 0.75) == {"OUT": 0.25}
    for first, last in RAMPS:
        assert all(0 <= share <= 1 for share in ramp(["D00", "D01", "S00", "OUT"], first, last).values())


@pytest.fixture(scope="module", params=["sd3", "flux"])
def settings(request, tmp_path_factory):
    """A comparison of an ensemble of two transformers, trained for two steps."""
    folder = tmp_path_factory.mktemp(request.param)
    experts = [str(saved(PIPELINES[request.param](seed, **SMALL[request.param]), folder / name)) for seed, name in enumerate(("photo", "paint"))]
    (folder / "data").mkdir()
    for index in range(6):
        picture = np.random.default_rng(index).integers(0, 255, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(picture).save(folder / "data" / f"{index}.png")
    captions = [json.dumps({"file_name": f"{index}.png", "text": "a cat"}) for index in range(6)]
    (folder / "data" / "metadata.jsonl").write_text("\n".join(captions))
    small = {"hidden": 8, "heads": 2, "depth": 1, "resolution": 32, "batch_size": 2, "held_out": 2, "steps": 2, "lr": 1e-2}
    train(TrainSettings(experts=experts, data=str(folder / "data"), output=str(folder / "afa"), device="cpu", **small))
    (folder / "prompts.txt").write_text("a cat\na dog\n")
    (folder / "scorer.py").write_text("def score(images, captions):\n    return {'light': images.mean((1, 2, 3)) / 255}\n")
    return EvaluateSettings(
        ensemble=str(folder / "afa"), output=str(folder / "out"), protocol=str(folder / "prompts.txt"), scorer=str(folder / "scorer.py"),
        train_data=str(folder / "data"), methods=METHODS, steps=1, width=32, height=32, tuning=2, search_trials=4, seeds=1, device="cpu",
    )  # fmt: skip


def test_merges_and_controls_of_transformers_are_made_and_judged(settings):
    results = evaluate(settings)
    assert results.errors == []
    rows = {method.name: method for method in results.methods}
    assert set(METHODS) <= set(rows)
    assert rows["mbw"].title == "MBW, ramps"
    scores = {name: tuple(row.runs[0].scores["light"]) for name, row in rows.items()}
    assert len(set(scores.values())) > len(METHODS) / 2  # other models draw other images
    for name in ("finetune_best", "finetune_merge_compute"):
        (folder,) = {file.parent for file in (Path(settings.output) / "trained" / name).rglob(RECORD) if "lr-1" in str(file)}
        record = json.loads((folder / RECORD).read_text())
        assert record["parameters"] >= json.loads((Path(settings.ensemble) / "afa.json").read_text())["aggregator"]["parameters"]
        assert all(key.startswith("transformer.") for key in load_file(folder / "pytorch_lora_weights.safetensors"))


def test_block_weights_of_transformers_are_ramps_by_their_own_stages(settings):
    (row,) = (row for row in merge_rows(Setup(settings)) if row.name == "mbw")
    assert [(options["first"], options["last"]) for options in row.candidates[::2]] == list(RAMPS)
    assert {options["order"] for options in row.candidates} == {"best first", "second first"}
    assert not any("preset" in options for options in row.candidates)
