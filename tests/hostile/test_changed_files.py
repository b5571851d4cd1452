"""What a run is made from changes between stop and resume: every kind of file is noticed, and named with its expert."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from afa.checkpoint.manifest import AGGREGATORS
from afa.cli.main import main
from afa.demo.data import ENSEMBLE, EXPERTS
from afa.errors import UserError
from afa.files import sha256
from afa.fingerprint import (
    FILES,
    changed,
    check_claim,
    check_same,
    claim,
    fingerprint,
    saved_fingerprint,
    summed,
)
from afa.training.finetune_settings import LoraSettings
from afa.training.settings import TrainSettings
from afa.training.state import belongings, check_finished, load_state, save_state

UNET = "unet/diffusion_pytorch_model.safetensors"
COMPUTING = [UNET, "unet/config.json", "text_encoder/model.safetensors", "vae/diffusion_pytorch_model.safetensors", "vae/config.json",
             "scheduler/scheduler_config.json", "tokenizer/tokenizer.json", "model_index.json"]  # fmt: skip


@pytest.fixture
def expert(tmp_path):
    return Path(shutil.copytree(EXPERTS["curves"], tmp_path / "curves"))


def swap(file):
    """Other content of the same size, with the time of change kept."""
    facts, data = file.stat(), bytearray(file.read_bytes())
    data[-2] ^= 1
    file.write_bytes(data)
    os.utime(file, ns=(facts.st_atime_ns, facts.st_mtime_ns))


@pytest.mark.parametrize("name", COMPUTING)
def test_any_file_of_an_expert_that_is_swapped_at_the_same_size_and_time_is_named(expert, name):
    before = fingerprint([str(expert)])
    swap(expert / name)
    (clause,) = changed(before, fingerprint([str(expert)]))
    assert clause.startswith(f"expert 'curves', {name} has sha256")


def test_files_that_come_and_go_are_named(expert):
    before = fingerprint([str(expert)])
    (expert / "unet" / "more.safetensors").write_bytes(b"x")
    (expert / "vae" / "config.json").unlink()
    clauses = changed(before, fingerprint([str(expert)]))
    assert ["unet/more.safetensors" in clauses[0], "vae/config.json has no file" in clauses[1], len(clauses)] == [True, True, 2]


def test_what_nobody_computes_with_may_change(expert):
    before = fingerprint([str(expert)])
    (expert / "README.md").write_text("new")
    (expert / "v1-pruned.safetensors").write_bytes(b"beside the parts")
    (expert / "safety_checker").mkdir()
    (expert / "safety_checker" / "config.json").write_text("{}")
    assert fingerprint([str(expert)]) == before


def test_loras_single_files_vaes_frames_and_bases_belong_to_it(expert, tmp_path):
    lora, single = tmp_path / "style.safetensors", tmp_path / "one.safetensors"
    lora.write_bytes(b"lora")
    single.write_bytes(b"single")
    places = {"vae": expert / "vae", "frame": expert, "base": single, "config": "sd15"}
    found = fingerprint([f"a={single}+{lora}*0.5+{lora}", f"b={expert}"], **places)
    assert {"expert 'a', one.safetensors", "expert 'a', LoRA 1 style.safetensors", "expert 'a', LoRA 2 style.safetensors"} <= set(found)
    assert {"the vae, config.json", f"the frame, {UNET}", "the base, one.safetensors"} <= set(found)
    assert not any(name.startswith("the config") for name in found)
    assert set(summed(found)) == {"expert 'a'", "expert 'b'", "the vae", "the frame", "the base"}


def test_experts_names_are_not_taken_for_places(expert):
    assert fingerprint([str(expert)], vae="curves") == fingerprint([str(expert)])


def test_a_saved_ensemble_is_its_manifest_aggregators_experts_and_frame(tmp_path):
    for name in ("ensemble", "curves", "angles", "patterns"):
        shutil.copytree((EXPERTS["curves"]).parent / name, tmp_path / name)
    before = saved_fingerprint(tmp_path / "ensemble")
    assert before == saved_fingerprint(ENSEMBLE)  # the place does not matter
    for file in ("ensemble/aggregators.safetensors", f"angles/{UNET}", "curves/vae/config.json"):
        swap(tmp_path / file)
    with pytest.raises(UserError, match=r"aggregators.safetensors has sha256 \w+, afa.json expects"):
        saved_fingerprint(tmp_path / "ensemble")
    manifest, sums = tmp_path / "ensemble" / "afa.json", [sha256(one / "ensemble" / AGGREGATORS) for one in (EXPERTS["curves"].parent, tmp_path)]
    manifest.write_text(manifest.read_text().replace(*sums))
    clauses = changed(before, saved_fingerprint(tmp_path / "ensemble"))
    assert [clause.partition(" has ")[0] for clause in clauses] == [
        f"expert 'angles', {UNET}", "expert 'curves', vae/config.json", "the ensemble, afa.json", "the ensemble, aggregators.safetensors",
    ]  # fmt: skip


def test_pipes_and_devices_are_not_read(tmp_path):
    os.mkfifo(tmp_path / "pipe.safetensors")
    assert fingerprint(vae=tmp_path / "pipe.safetensors", base="/dev/zero", frame=tmp_path) == {}


def test_a_folder_that_was_begun_with_other_files_is_refused_with_expert_file_and_both_hashes(expert, tmp_path):
    claim(tmp_path / "out", {"steps": 3}, "the search", fingerprint([str(expert)]))
    (tmp_path / "out" / "made").touch()
    check_claim(tmp_path / "out", {"steps": 3}, "the search", fingerprint([str(expert)]))
    swap(expert / UNET)
    with pytest.raises(UserError, match=rf"the search in .* other files: expert 'curves', {UNET} has sha256 \w+… \(then sha256 \w+…\)"):
        check_claim(tmp_path / "out", {"steps": 3}, "the search", fingerprint([str(expert)]))


def test_what_older_versions_began_without_hashes_goes_on():
    check_same({"steps": 3}, {"steps": 3, FILES: {"a": "b"}}, "it")


def training(expert, output, **more):
    return TrainSettings(experts=[str(expert), str(EXPERTS["angles"])], data="scenes:8", output=str(output), **more)


def tuning(expert, output, **more):
    return LoraSettings(expert=str(expert), rank=2, data="scenes:8", output=str(output), **more)


@pytest.mark.parametrize("make", [training, tuning])
def test_a_saved_state_is_not_gone_on_with_once_an_expert_has_changed(expert, tmp_path, make):
    settings = make(expert, tmp_path / "out")
    save_state(settings, belongings(settings, True), {"data": "x"})
    assert load_state(settings, belongings(settings, True), torch.device("cpu")) == {"data": "x"}
    swap(expert / UNET)
    with pytest.raises(UserError, match=f"expert 'curves', {UNET}"):
        load_state(settings, belongings(settings, True), torch.device("cpu"))


@pytest.mark.parametrize("make", [training, tuning])
def test_a_complete_run_of_other_weights_is_not_taken_for_this_one(expert, tmp_path, make):
    settings = make(expert, tmp_path / "out")
    files = settings.files()
    check_finished(settings, settings, files, "the run")
    swap(expert / UNET)
    with pytest.raises(UserError, match=f"expert 'curves', {UNET}"):
        check_finished(settings, settings, files, "the run")
    shutil.rmtree(expert)
    check_finished(settings, settings, files, "the run")  # what is gone has not changed
    check_finished(settings, settings, None, "the run")  # of an older version


@pytest.mark.parametrize("make", [training, tuning])
def test_a_rewards_file_and_a_vae_belong_to_a_training(expert, tmp_path, make):
    reward = tmp_path / "judge.py"
    reward.write_text("def reward(images, captions): ...")
    settings = make(expert, tmp_path / "out", vae=str(expert / "vae"), objective="mse+reward", reward=str(reward))
    before = settings.files()
    reward.write_text("def reward(images, captions): pass")
    swap(expert / "vae" / "config.json")
    assert [clause.partition(" has ")[0] for clause in changed(before, settings.files())] == [
        "expert 'curves', vae/config.json", "the reward, judge.py", "the vae, config.json",
    ]  # fmt: skip


def test_pictures_of_changed_weights_are_not_mixed(expert, tmp_path, capsys):
    command = ["generate", str(expert), "--prompt", "a ring", "a star", "--steps", "1", "--device", "cpu", "--output", str(tmp_path / "out")]
    assert main(command[:4] + command[5:]) == 0
    swap(expert / UNET)
    assert main(command) == 2
    assert "expert 'curves'" in capsys.readouterr().err


def test_steps_beyond_those_of_a_complete_run_name_the_way_to_go_on(tmp_path, capsys):
    """Its state is gone, so the same folder cannot; --start can."""
    folder = shutil.copytree(ENSEMBLE, tmp_path / "out")
    manifest = json.loads((folder / "afa.json").read_text())
    recorded = manifest["training"]["settings"]
    data = ["train", "--experts", *map(str, EXPERTS.values()), "--data", str(recorded["data"]), "--output", str(folder)]
    assert main([*data, "--steps", str(recorded["steps"] + 1)]) == 2
    assert f"--start {folder}" in capsys.readouterr().err
