"""Laws of sample sheets: drawn while training, the same noise every time, and a metric that watches."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from metric_models import clip_folder
from PIL import Image
from test_training import aggregators, experts, images, settings  # noqa: F401 (fixtures)

from afa import UserError
from afa.training.log import LOG
from afa.training.run import plan, train
from afa.training.sheets import FOLDER, Sheets

DRAWN = {"sheet_every": 2, "sheet_images": 2, "sheet_steps": 2, "steps": 4}


def sheets(run):
    """Every sheet of a run, by step."""
    return {int(file.stem.split("-")[1]): np.asarray(Image.open(file)) for file in sorted((Path(run.output) / FOLDER).glob("*.png"))}


def test_sheets_change_no_bit_of_what_is_trained(settings, tmp_path):  # noqa: F811
    runs = [replace(settings, steps=4, output=str(tmp_path / "plain")), replace(settings, **DRAWN, output=str(tmp_path / "drawn"))]
    histories = [train(run)["history"] for run in runs]
    assert histories[0] == histories[1]
    plain, drawn = (aggregators(run) for run in runs)
    assert all((tensor == drawn[name]).all() for name, tensor in plain.items())
    shown = sheets(runs[1])
    assert list(shown) == [0, 2, 4]
    assert not np.array_equal(shown[0], shown[4])  # what is trained changes the pictures
    assert Path(runs[1].output, "afa.json").exists()


def test_a_sheet_can_be_drawn_when_text_encoders_have_left(settings, tmp_path):  # noqa: F811
    runs = [replace(settings, **DRAWN, output=str(tmp_path / name), cache=cache) for name, cache in (("a", None), ("b", str(tmp_path / "cache")))]
    for run in runs:
        train(run)
    with_encoders, without = (sheets(run) for run in runs)
    assert np.array_equal(with_encoders[0], without[0])
    for step in with_encoders:  # captions are encoded in other batches for the cache, so later ones differ in the last bits
        assert np.abs(with_encoders[step].astype(float) - without[step]).mean() < 1


def test_a_watching_metric_is_logged_and_warns_when_it_falls(settings, tmp_path, capsys, monkeypatch):  # noqa: F811
    run = replace(settings, **DRAWN, watch="clip_t", watch_weights=str(clip_folder(tmp_path / "clip")))
    history = train(run)["history"]
    assert all(-1 <= entry["watched"]["clip_t"] <= 1 for entry in history)
    lines = [json.loads(line) for line in (Path(run.output) / LOG).read_text().splitlines()]
    assert [line["watched"] for line in lines] == [entry["watched"] for entry in history]
    watching = object.__new__(Sheets)
    watching.captions, watching._first, watching._warned = ["a", "b", "c"], {}, False
    scores = iter([[0.5, 0.6, 0.7], [0.1, 0.15, 0.25], [0.0, 0.1, 0.1]])
    watching.watch = type("Falling", (), {"names": ("worth",), "higher_is_better": True, "score": lambda self, pictures: {"worth": np.array(next(scores))}})()
    capsys.readouterr()
    for _ in range(3):
        watching._watched(np.zeros((3, 8, 8, 3), np.uint8))
    assert capsys.readouterr().err.count("worth of the sheet has become worse") == 1


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"watch": "fid", "watch_weights": "nowhere"}, "nowhere"),
        ({"watch": "clip_t", "objective": "reward", "reward": "clip_t"}, "is the reward itself"),
        ({"watch": "clipt"}, "did you mean 'clip_t'"),
    ],
)
def test_a_watch_that_cannot_watch_is_refused_before_anything_is_encoded(settings, changes, sentence, tmp_path):  # noqa: F811
    weights = str(clip_folder(tmp_path / "clip"))
    places = {"reward_weights": weights} if "reward" in changes else {}
    with pytest.raises(UserError, match=sentence):
        plan(replace(settings, **DRAWN, **changes, **places))
