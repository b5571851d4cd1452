"""What is made to be shared holds names and hashes, and no path of the machine that it was made on."""

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from diffusers import StableDiffusionPipeline
from hostile import ASSETS, afa, downloaded, edit
from safetensors import safe_open
from tiny import ONE_LEVEL, sd_pipeline

from afa import Ensemble
from afa.checkpoint.manifest import read_manifest
from afa.training.finetune import FILE, finetune
from afa.training.finetune_settings import LoraSettings
from afa.training.settings import TrainSettings


def texts(folder: Path) -> str:
    return "\n".join(file.read_text() for file in folder.rglob("*") if file.suffix in (".json", ".md"))


@pytest.fixture(scope="module")
def private(tmp_path_factory):
    """A folder whose path nobody else should see, with an ensemble that was trained there."""
    place = tmp_path_factory.mktemp("home") / "secret-user"
    place.mkdir()
    folder = downloaded(place, "mine")
    ensemble = Ensemble.load(folder)
    (place / "reward.py").touch()
    settings = TrainSettings(
        experts=[f"one={place / 'curves'}", str(place / "angles"), "org/name@main"],
        **{name: str(place / name) for name in ("data", "output", "cache", "frame", "vae", "config", "recipe", "watch_weights", "reward_weights")},
        reward=str(place / "reward.py"), objective="mse+reward", placement="M00,OUT11", watch=str(place / "watch.py"), sheet_every=50, lr=0.03, steps=50,
    )  # fmt: skip
    ensemble.training = {**ensemble.training, "settings": asdict(settings)}
    return place, ensemble


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    place = tmp_path_factory.mktemp("models")
    for seed in (0, 1):
        sd_pipeline(seed, **ONE_LEVEL).save_pretrained(place / f"model{seed}")
    return place


def test_a_bundle_names_no_folder_of_this_machine(private, tmp_path):
    place, ensemble = private
    before = json.dumps(ensemble.training)
    ensemble.save(tmp_path / "bundle", bundle=True)
    assert "secret-user" not in texts(tmp_path / "bundle") and str(place.parent) not in texts(tmp_path / "bundle")
    recorded = read_manifest(tmp_path / "bundle").training["settings"]
    assert recorded["experts"] == ["one=curves", "angles", "org/name@main"]
    assert (recorded["data"], recorded["output"], recorded["reward"]) == ("data", "output", "reward.py")
    assert (recorded["lr"], recorded["objective"], recorded["placement"]) == (0.03, "mse+reward", "M00,OUT11")
    assert json.dumps(ensemble.training) == before


def test_a_save_that_is_no_bundle_keeps_what_going_on_needs(private, tmp_path):
    _, ensemble = private
    ensemble.save(tmp_path / "own")
    assert read_manifest(tmp_path / "own").training["settings"] == json.loads(json.dumps(ensemble.training["settings"]))


def test_a_bundle_of_pipelines_that_remember_where_they_came_from_forgets_it(models, tmp_path):
    place = shutil.copytree(models, tmp_path / "secret-user")
    pipelines = [StableDiffusionPipeline.from_pretrained(place / f"model{seed}", safety_checker=None) for seed in (0, 1)]
    ensemble = Ensemble.from_experts(pipelines, aggregator="mean")
    ensemble.save(tmp_path / "bundle", bundle=True)
    assert "secret-user" not in texts(tmp_path / "bundle")
    assert Ensemble.load(tmp_path / "bundle").names == ensemble.names


def test_the_header_of_a_lora_names_its_expert_without_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small = {"resolution": 32, "batch_size": 2, "held_out": 2, "steps": 1, "evaluate_every": 1, "device": "cpu", "rank": 1}
    settings = LoraSettings(expert=str(ASSETS / "curves"), data="scenes:12", output=str(tmp_path / "lora"), **small)
    place = tmp_path / "secret-user"
    downloaded(place)
    finetune(replace(settings, expert=f"mine={place / 'curves'}"))
    with safe_open(tmp_path / "lora" / FILE, "pt") as file:
        assert file.metadata()["expert"] == "mine=curves" and "secret-user" not in str(file.metadata())


@pytest.mark.parametrize("noted", ["/home/secret-user/photo", "~/secret-user/photo", "C:\\secret-user\\photo", "../secret-user/photo"])
def test_copied_and_merged_folders_forget_where_their_models_were_read(models, tmp_path, noted):
    sources = []
    for seed in (0, 1):
        sources.append(shutil.copytree(models / f"model{seed}", tmp_path / f"model{seed}"))
        for file in ("unet/config.json", "text_encoder/config.json", "vae/config.json", "model_index.json"):
            edit(sources[-1] / file, "_name_or_path", value=noted)
        edit(sources[-1] / "tokenizer" / "tokenizer_config.json", "tokenizer_file", value=f"{noted}/tokenizer.json")
    Ensemble.from_experts([str(source) for source in sources], aggregator="mean").save(tmp_path / "bundle", bundle=True)
    Ensemble.load(tmp_path / "bundle")
    assert afa("merge", "--experts", *sources, "--method", "weighted", "--output", tmp_path / "merged").code == 0
    for made in ("bundle", "merged"):
        assert "secret-user" not in texts(tmp_path / made) and '"photo"' in texts(tmp_path / made)
    assert "secret-user" in texts(sources[0])
