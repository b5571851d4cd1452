"""What an ensemble's manifest records of its training names neither code nor places to a comparison that trains rivals."""

import os
from dataclasses import fields
from pathlib import Path

import pytest
from hostile import downloaded, edit

from afa.errors import UserError
from afa.evaluation.recorded import OWN, taken
from afa.evaluation.settings import EvaluateSettings
from afa.evaluation.setup import Setup
from afa.training.settings import TrainSettings

NOT_TAKEN = {
    *("data", "allow_outside", "reward", "reward_weights", "log_with", "cache", "watch", "watch_weights", "vae", "frame", "text_encoder", "config"),
    *("sheet_every", "sheet_images", "sheet_steps", "sheet_guidance", "parallel"),
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = downloaded(tmp_path)
    edit(folder / "afa.json", "training", "settings", "data", value="scenes:16")
    return folder


def setup(folder: Path, **asked: object) -> Setup:
    return Setup(EvaluateSettings(ensemble=str(folder), output="out", protocol="scenes", device="cpu", **asked))


def test_every_option_of_training_is_decided_on():
    assert {field.name for field in fields(TrainSettings)} == taken() | OWN | NOT_TAKEN
    assert not taken() & NOT_TAKEN


# Every spelling with one objective, every objective with one spelling: what is said of a reward does not depend on how it is used.
SPELLINGS = ("absolute", "relative", "dotted", "link", "function", "scenes", "imagereward")
RECORDED = [("mse+reward", spelling) for spelling in SPELLINGS] + [(objective, "absolute") for objective in ("reward", "draft", "mse+draft")]


@pytest.mark.parametrize(("objective", "spelling"), RECORDED)
def test_a_recorded_reward_is_never_used(folder, tmp_path, objective, spelling):
    code = folder / "reward.py"
    code.write_text(f"open({str(tmp_path / 'MARKER')!r}, 'w')\ndef reward(images, captions):\n    return images.mean((1, 2, 3))\n")
    (tmp_path / "link.py").symlink_to(code)
    spellings = {"absolute": str(code), "relative": os.path.relpath(code), "dotted": f"./{os.path.relpath(code)}", "link": "link.py"}
    edit(folder / "afa.json", "training", "settings", "objective", value=objective)
    edit(folder / "afa.json", "training", "settings", "reward", value={**spellings, "function": "os:getcwd"}.get(spelling, spelling))
    with pytest.raises(UserError, match=r"afa\.json records training by .*--reward"):
        setup(folder).training(Path("out"), 0)
    assert setup(folder, reward="scenes").training(Path("out"), 0).reward == "scenes"
    assert not (tmp_path / "MARKER").exists()


@pytest.mark.parametrize("data", ["/etc", "../somewhere", "org/name", "pictures/{0..9}.tar", "scenes.jsonl"])
def test_recorded_data_are_not_read_unless_this_package_draws_them(folder, tmp_path, data, capsys):
    edit(folder / "afa.json", "training", "settings", "data", value=data)
    (tmp_path / "out" / "training-data").mkdir(parents=True)
    (tmp_path / "out" / "training-data" / "metadata.jsonl").touch()  # already drawn by the protocol
    asked = setup(folder)
    assert asked.training_data == str(Path("out/training-data"))  # those of the protocol
    assert setup(folder, train_data="mine").training_data == "mine"
    asked.training(Path("out"), 0)
    assert f'data "{data}"' in capsys.readouterr().err
    edit(folder / "afa.json", "training", "settings", "data", value="scenes:16")
    assert setup(folder).training_data == "scenes:16"


@pytest.mark.parametrize(
    ("name", "value"),
    [("log_with", "wandb"), ("cache", "/tmp/cache"), ("watch", "evil"), ("watch_weights", "/tmp/w"), ("output", "../../elsewhere"), ("vae", "../vae"),
     ("frame", "/tmp/frame"), ("config", "../config"), ("recipe", "../recipe.toml"), ("reward_weights", "org/evil"), ("device", "cuda")],
)  # fmt: skip
def test_recorded_places_and_loggers_are_left_out_and_named(folder, name, value, capsys):
    edit(folder / "afa.json", "training", "settings", name, value=value)
    trained = setup(folder).training(Path("out"), 1)
    assert getattr(trained, name) != value
    said = capsys.readouterr().err
    assert "rivals are trained as" in said and "steps 250" in said
    assert (f'{name} "{value}"' in said) == (name not in OWN)


def test_recorded_numbers_are_used(folder):
    edit(folder / "afa.json", "training", "settings", "lr", value=0.03)
    trained = setup(folder).training(Path("out"), 2)
    assert (trained.lr, trained.seed, trained.output) == (0.03, 2, "out")
