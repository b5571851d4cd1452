"""Saving and loading: the same bits come back, changed files are named, nothing half-written stays."""

import functools
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from original_layout import write_single_file
from safetensors.torch import load_file, save_file
from test_experts import write_lora
from test_pipeline import run as draw
from tiny import ONE_LEVEL
from tiny import sd_pipeline as pipeline_of

from afa import Ensemble, UserError
from afa.checkpoint.manifest import AGGREGATORS, MANIFEST
from afa.files import replacing, sha256

REFERENCE = Path(__file__).parent / "reference"
SMALL = {"hidden": 32, "heads": 2, "depth": 1}
sd_pipeline = functools.partial(pipeline_of, **ONE_LEVEL)
run = functools.partial(draw, num_inference_steps=1, height=64, width=64)


def trained(ensemble, seed=5):
    """As if it had been trained: no aggregator is the mean any more."""
    torch.manual_seed(seed)
    for name, parameter in ensemble.aggregators.named_parameters():
        if name.endswith("conv_out.weight"):
            torch.nn.init.normal_(parameter)
    return ensemble


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    root = tmp_path_factory.mktemp("experts")
    for seed, name in enumerate(["photo", "paint"]):
        sd_pipeline(seed).save_pretrained(root / name)
    return root


@pytest.fixture
def folders(originals, tmp_path):
    """Copies, which tests move, change and delete."""
    return shutil.copytree(originals, tmp_path, dirs_exist_ok=True)


@pytest.fixture
def ensemble(folders):
    return trained(Ensemble.from_experts([str(folders / "photo"), str(folders / "paint")], vae="paint", **SMALL))


def files(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("how", [{"placement": "layers"}, {"placement": "out"}, {"aggregator": "stitch", "ignore": ["time"]}], ids=str)
def test_what_is_loaded_makes_the_same_picture(folders, how):
    ensemble = trained(Ensemble.from_experts([str(folders / "photo"), str(folders / "paint")], **how, **SMALL))
    ensemble.save(folders / "mine")
    assert files(folders / "mine") == ["README.md", MANIFEST, AGGREGATORS]
    loaded = Ensemble.load(folders / "mine")
    assert loaded.names == ("photo", "paint")
    assert np.array_equal(run(loaded.pipeline()), run(ensemble.pipeline()))


def test_the_choice_of_vae_is_kept(folders, ensemble):
    ensemble.save(folders / "mine")
    assert json.loads((folders / "mine" / MANIFEST).read_text())["frame"] == {"vae": "paint", "tokenizer": "photo", "scheduler": "photo"}
    assert torch.equal(Ensemble.load(folders / "mine").pipeline().vae.decoder.conv_in.weight, sd_pipeline(1).vae.decoder.conv_in.weight)


def test_the_folders_may_move_together(folders, ensemble):
    ensemble.save(folders / "mine")
    expected = run(ensemble.pipeline())
    moved = folders.with_name("moved")
    shutil.move(folders, moved)
    assert np.array_equal(run(Ensemble.load(moved / "mine").pipeline()), expected)


def test_an_expert_that_moved_alone_is_named(folders, ensemble):
    ensemble.save(folders / "mine")
    expected = run(ensemble.pipeline())
    (folders / "far").mkdir()
    shutil.move(folders / "paint", folders / "far" / "painting")
    with pytest.raises(UserError, match=r"expert 'paint' was at .*paint, which is not there"):
        Ensemble.load(folders / "mine")
    loaded = Ensemble.load(folders / "mine", experts={"paint": str(folders / "far" / "painting")})
    assert np.array_equal(run(loaded.pipeline()), expected)


def test_an_expert_that_changed_is_an_error_with_both_hashes(folders, ensemble):
    ensemble.save(folders / "mine")
    file = next((folders / "paint" / "unet").glob("*.safetensors"))
    before = sha256(file)
    tensors = load_file(file)
    tensors["conv_in.bias"] += 1
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(UserError) as raised:
        Ensemble.load(folders / "mine")
    assert before in str(raised.value)
    assert sha256(file) in str(raised.value)
    assert file.name in str(raised.value)
    Ensemble.load(folders / "mine", verify=False)


def test_aggregators_that_changed_are_an_error(folders, ensemble):
    ensemble.save(folders / "mine")
    with (folders / "mine" / AGGREGATORS).open("ab") as file:
        file.write(b"x")
    with pytest.raises(UserError, match="aggregators.safetensors has sha256"):
        Ensemble.load(folders / "mine")


def test_a_bundle_is_complete(folders, ensemble):
    expected = run(ensemble.pipeline())
    ensemble.save(folders / "bundle", bundle=True)
    moved = shutil.move(folders / "bundle", folders.with_name("elsewhere"))
    shutil.rmtree(folders)
    assert np.array_equal(run(Ensemble.load(moved).pipeline()), expected)


def test_experts_given_as_objects_need_a_bundle(tmp_path):
    ensemble = trained(Ensemble.from_experts([sd_pipeline(0), sd_pipeline(1)], **SMALL))
    with pytest.raises(UserError, match="bundle=True"):
        ensemble.save(tmp_path / "mine")
    assert not (tmp_path / "mine").exists()
    ensemble.save(tmp_path / "mine", bundle=True)
    assert np.array_equal(run(Ensemble.load(tmp_path / "mine").pipeline()), run(ensemble.pipeline()))


def test_a_bundle_of_single_file_lora_and_own_vae(folders, tmp_path):
    write_single_file(sd_pipeline(2), folders / "styled.safetensors")
    shutil.copytree(folders / "photo", folders / "configs", ignore=shutil.ignore_patterns("*.safetensors"))
    lora = write_lora(sd_pipeline(0), folders / "lora.safetensors")
    sources = [f"styled={folders / 'styled.safetensors'}+{lora}*0.7", str(folders / "paint")]
    ensemble = trained(Ensemble.from_experts(sources, config=str(folders / "configs"), vae=str(folders / "photo" / "vae"), **SMALL))
    expected = run(ensemble.pipeline())
    ensemble.save(folders / "reference")
    assert np.array_equal(run(Ensemble.load(folders / "reference").pipeline()), expected)
    ensemble.save(folders / "bundle", bundle=True)
    moved = shutil.move(folders / "bundle", folders.with_name("elsewhere-too"))
    shutil.rmtree(folders)
    assert np.array_equal(run(Ensemble.load(moved).pipeline()), expected)


def test_trained_aggregators_join_other_copies_of_the_experts(folders, ensemble):
    ensemble.save(folders / "mine")
    again = Ensemble.from_experts([str(folders / "photo"), str(folders / "paint")], aggregators=folders / "mine", vae="paint")
    assert np.array_equal(run(again.pipeline()), run(ensemble.pipeline()))


def test_ensembles_that_share_experts_are_as_if_each_had_its_own(folders, ensemble):
    ensemble.save(folders / "mine")
    router = ensemble.sharing("mean", "out")
    again = router.sharing(aggregators=folders / "mine")
    assert all(mine is other for mine, other in zip(ensemble.denoiser.experts, again.denoiser.experts, strict=True))
    assert np.array_equal(run(again.pipeline()), run(ensemble.pipeline()))
    alone = Ensemble.from_experts([str(folders / "photo"), str(folders / "paint")], aggregator="mean", placement="out", vae="paint")
    assert np.array_equal(run(router.pipeline()), run(alone.pipeline()))


def test_aggregators_for_another_number_of_experts(folders, ensemble):
    ensemble.save(folders / "mine")
    with pytest.raises(UserError, match="for 2 experts, 1 are given"):
        Ensemble.from_experts([str(folders / "photo")], aggregators=folders / "mine")


def test_the_reference_releases_folders_load_and_export_the_same(tmp_path):
    experts = [str(REFERENCE / f"unet_{index}") for index in range(2)]
    ensemble = Ensemble.from_experts(experts, aggregators=REFERENCE)
    assert dict(ensemble.denoiser.recipe.options) == {"hidden": 32, "heads": 2, "depth": 2}
    ensemble.export_release(tmp_path / "release")
    for index in range(25):
        theirs, ours = (folder / f"aggregator_{index}" for folder in (REFERENCE, tmp_path / "release"))
        assert json.loads((ours / "config.json").read_text()) == json.loads((theirs / "config.json").read_text())
        expected, got = load_file(theirs / "aggregator.safetensors"), load_file(ours / "aggregator.safetensors")
        assert expected.keys() == got.keys()
        assert all(torch.equal(expected[name].float(), got[name]) for name in got)


def test_the_releases_depth_is_that_of_its_tensors(tmp_path):
    """Its num_layers is ignored by the release itself."""
    shutil.copytree(REFERENCE, tmp_path / "release")
    for file in (tmp_path / "release").glob("aggregator_*/config.json"):
        file.write_text(json.dumps(json.loads(file.read_text()) | {"num_layers": 7}))
    experts = [str(REFERENCE / f"unet_{index}") for index in range(2)]
    assert Ensemble.from_experts(experts, aggregators=tmp_path / "release").denoiser.recipe.options["depth"] == 2
    with pytest.raises(UserError, match="always builds aggregators of depth 2"):
        Ensemble.from_experts(experts, hidden=8, heads=2, depth=1).export_release(tmp_path / "shallow")
    assert not (tmp_path / "shallow").exists()


def test_the_release_knows_only_its_own_kind(folders, tmp_path):
    router = Ensemble.from_experts([str(folders / "photo"), str(folders / "paint")], placement="out", **SMALL)
    with pytest.raises(UserError, match="knows only sabw with attention at every stage"):
        router.export_release(tmp_path / "release")
    assert not (tmp_path / "release").exists()


def test_a_failed_save_leaves_the_earlier_one(folders, ensemble, monkeypatch):
    ensemble.save(folders / "mine")
    before = {path.name: path.read_bytes() for path in (folders / "mine").iterdir()}
    trained(ensemble, seed=6)

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("afa.checkpoint.folder.model_card", full)
    with pytest.raises(OSError, match="No space left"):
        ensemble.save(folders / "mine")
    assert {path.name: path.read_bytes() for path in (folders / "mine").iterdir()} == before
    with pytest.raises(OSError, match="No space left"):
        ensemble.save(folders / "new")
    assert not (folders / "new").exists()


def test_an_ensemble_is_not_saved_over_a_model(folders, ensemble):
    with pytest.raises(UserError, match="holds a model"):
        ensemble.save(folders / "photo")


@pytest.mark.parametrize("content", ["{", "[]", '{"format": 99}', '{"format": 1}'])
def test_a_broken_manifest(tmp_path, content):
    (tmp_path / MANIFEST).write_text(content)
    with pytest.raises(UserError, match=r"afa\.json.*(format 99|is not JSON|expected an object|is missing)"):
        Ensemble.load(tmp_path)


def test_a_folder_that_is_no_ensemble(tmp_path):
    with pytest.raises(UserError, match="is no ensemble"):
        Ensemble.load(tmp_path)


def test_the_model_card_names_the_experts(folders, ensemble):
    ensemble.training = {"steps": 100, "loss": 0.5}
    ensemble.save(folders / "mine")
    card = (folders / "mine" / "README.md").read_text()
    assert "| photo | photo | epsilon |" in card  # no folder of this machine
    assert "* steps: 100" in card


@pytest.mark.parametrize("words", ["Error while serializing: I/O error: No space left on device (os error 28)", "[enforce fail at inline_container.cc:672]"])
def test_a_full_disk_is_said_plainly_and_leaves_what_was_there(tmp_path, words):
    (tmp_path / "a.bin").write_bytes(b"old")
    with pytest.raises(OSError, match="No space left on the disk"), replacing(tmp_path / "a.bin") as temporary:
        temporary.write_bytes(b"half")
        raise RuntimeError(words)
    assert [path.name for path in tmp_path.iterdir()] == ["a.bin"] and (tmp_path / "a.bin").read_bytes() == b"old"
