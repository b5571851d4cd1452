"""A dry run counts every image that the run then draws, and leaves nothing behind."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny import ONE_LEVEL, sd_pipeline

from afa.evaluation.plan import plan
from afa.evaluation.run import evaluate
from afa.evaluation.settings import EvaluateSettings
from afa.training.run import train
from afa.training.settings import TrainSettings


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    """A comparison with everything that draws: rows, options to choose, weights to search, two training seeds."""
    folder = tmp_path_factory.mktemp("world")
    for seed, name in enumerate(("photo", "paint")):
        sd_pipeline(seed, **ONE_LEVEL).save_pretrained(folder / name)
    (folder / "data").mkdir()
    rng, lines = np.random.default_rng(0), []
    for index in range(10):
        Image.fromarray(rng.integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(folder / "data" / f"{index}.png")
        lines.append(json.dumps({"file_name": f"{index}.png", "text": f"picture {index}"}))
    (folder / "data" / "metadata.jsonl").write_text("\n".join(lines))
    small = {"hidden": 8, "heads": 2, "depth": 1, "resolution": 32, "batch_size": 2, "held_out": 2, "steps": 1}
    experts = [str(folder / "photo"), str(folder / "paint")]
    train(TrainSettings(experts=experts, data=str(folder / "data"), output=str(folder / "afa"), device="cpu", **small))
    (folder / "prompts.txt").write_text("a cat\na dog\n")
    (folder / "scorer.py").write_text("def score(images, captions):\n    return {'light': images.mean((1, 2, 3)) / 255}\n")
    return EvaluateSettings(
        ensemble=str(folder / "afa"), train_data=str(folder / "data"), output=str(folder / "out"), protocol=str(folder / "prompts.txt"),
        methods=["weighted", "noise_average", "auto_mbw", "prompt_router", "prediction_router"], scorer=str(folder / "scorer.py"), seeds=2, search_trials=3,
        steps=1, guidance=2.0, width=32, height=32, tuning=2, device="cpu",
    )  # fmt: skip


def drawn(output: Path, captions: int) -> dict[str, int]:
    """What a run drew, from what it left: pictures, scores of candidates, judged merges."""
    chosen = [json.loads(file.read_text()) for file in output.glob("tuning/*/*.json")]
    judged = [line for file in output.glob("tuning/*/auto_mbw-*/journal.jsonl") for line in file.read_text().splitlines()]
    return {
        "images_to_judge": len(list(output.glob("images/**/*.png"))),
        "images_to_choose_options": captions * sum(map(len, chosen)),
        "images_to_search_weights": captions * len(judged),
    }


def test_a_dry_run_counts_what_the_run_draws(settings):
    output = Path(settings.output)
    facts = plan(settings)
    assert not output.exists() and facts["scorer"] == settings.scorer and facts["metrics"] == "light"
    assert facts["seconds_to_draw"] > 0 and facts["training_runs"] == 5 and "measured here" in facts["time"]
    evaluate(dataclasses.replace(settings, methods=["weighted"], seeds=1))  # a part of it
    before, rest = drawn(output, 2), plan(settings)
    evaluate(settings)
    found = drawn(output, 2)
    assert {name: facts[name] for name in found} == found and facts["images"] == sum(found.values())
    assert {name: rest[name] for name in found} == {name: found[name] - before[name] for name in found}
    assert plan(settings)["images"] == 0


def test_a_dry_run_names_what_will_be_left_out(settings, tmp_path):
    facts = plan(dataclasses.replace(settings, methods=["all"], output=str(tmp_path / "out")))
    assert facts["left_out"].count("--base") == 6 and not (tmp_path / "out").exists()
