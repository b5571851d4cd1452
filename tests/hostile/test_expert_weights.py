"""Weights that are no numbers: every way to load an expert refuses them, with the tensor's and the expert's name."""

import os
import shutil
from pathlib import Path

import pytest
import torch
from hostile import afa
from safetensors.torch import load_file, save_file
from tiny import sd_pipeline, sd_unet

import afa as package
from afa import Ensemble, UserError
from afa.experts.donor import DonorSpec
from afa.experts.headers import first_not_finite, is_finite
from afa.experts.lending import load_donor
from afa.experts.load import load_expert, load_experts

ASSETS = Path(package.__file__).parent / "demo" / "assets"
FILES = {
    "unet": ("unet/diffusion_pytorch_model.safetensors", "mid_block.resnets.1.conv1.weight"),
    "text_encoder": ("text_encoder/model.safetensors", "final_layer_norm.weight"),
    "vae": ("vae/diffusion_pytorch_model.safetensors", "decoder.conv_in.weight"),
}
SMALL = {"block_out_channels": (8, 8), "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "layers_per_block": 1}
SMALL |= {"up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D")}


def broken(tmp_path: Path, part: str, value: float, name: str = "broken") -> Path:
    """A copy of an expert with one number of a part replaced, late in its tensor."""
    folder = Path(shutil.copytree(ASSETS / "curves", tmp_path / name, copy_function=os.link))
    file, key = FILES[part]
    tensors = load_file(folder / file)
    tensors[key] = tensors[key].clone()
    tensors[key].view(-1)[-1] = value
    (folder / file).unlink()
    save_file(tensors, folder / file, metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("kind", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2])
def test_nan_and_infinity_are_found_wherever_they_are(kind):
    good = torch.linspace(-3, 3, 5000).to(kind)
    assert is_finite(good)
    for value in (float("nan"), float("inf"), float("-inf")):
        for place in (0, 2500, 4999):
            bad = torch.linspace(-3, 3, 5000)
            bad[place] = value
            bad = bad.to(kind)
            assert bool(bad.float().isfinite().all()) == is_finite(bad)
            assert not is_finite(bad.reshape(50, 100).T) or kind == torch.float8_e4m3fn


def test_the_largest_numbers_of_a_type_are_finite():
    for kind in (torch.float16, torch.bfloat16, torch.float32):
        assert is_finite(torch.full((5000,), torch.finfo(kind).max, dtype=kind))


def test_what_holds_no_numbers_is_finite():
    tensors = {"empty": torch.zeros(0), "whole": torch.arange(3), "flag": torch.ones(2).bool(), "meta": torch.ones(3, device="meta")}
    assert first_not_finite(tensors.items()) is None


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("part", ["unet", "text_encoder"])
def test_an_expert_with_such_weights_is_refused_by_its_name_and_the_tensors(tmp_path, part, value):
    folder = broken(tmp_path, part, value)
    for load in (lambda: load_expert(f"one={folder}"), lambda: load_experts([f"one={folder}", str(ASSETS / "angles")])):
        with pytest.raises(UserError, match=rf"expert 'one' \(.*broken\).*{FILES[part][1]} is not finite"):
            load()


DEEPER = [("unet", "down_blocks.0.resnets.0.", "down_blocks.0.resnets.7."), ("text_encoder", "layers.0.", "layers.9.")]


@pytest.mark.parametrize(("part", "layer", "more"), DEEPER)
def test_a_layer_more_than_the_config_makes_is_refused(tmp_path, part, layer, more):
    """Else a deeper model would be read without its last layers."""
    folder = broken(tmp_path, part, 0.5)
    file = folder / FILES[part][0]
    tensors = load_file(file)
    file.unlink()  # a link to the one that ships
    save_file(tensors | {name.replace(layer, more): value.clone() for name, value in tensors.items() if layer in name}, file)
    with pytest.raises(UserError, match=f"{more}.*a layer that its config does not make"):
        load_expert(f"one={folder}")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_finds_them_too(tmp_path, dtype):
    with pytest.raises(UserError, match=FILES["unet"][1]):
        load_expert(str(broken(tmp_path, "unet", float("nan"))), dtype)


def test_numbers_beyond_half_precision_are_named_as_such(tmp_path):
    file, key = FILES["unet"]
    folder = broken(tmp_path, "unet", 0.0)
    tensors = load_file(folder / file)
    save_file(tensors | {key: tensors[key].float() + 1e6}, folder / file, metadata={"format": "pt"})
    assert load_expert(str(folder)).model is not None
    with pytest.raises(UserError, match=f"{key} is not finite.* does not fit float16"):
        load_expert(str(folder), torch.float16)


def test_a_vae_and_a_donor_with_such_weights_are_refused(tmp_path):
    folder = broken(tmp_path, "vae", float("nan"))
    with pytest.raises(UserError, match=r"VAE of .*broken/vae: decoder.conv_in.weight is not finite"):
        load_expert(str(folder)).load_vae()
    with pytest.raises(UserError, match=r"donor.*final_layer_norm.weight is not finite"):
        load_donor(DonorSpec(str(broken(tmp_path, "text_encoder", float("nan"), "donor"))), None, None)


def test_experts_given_as_objects_are_refused_too():
    pipe = sd_pipeline(0, **SMALL)
    with torch.no_grad():
        pipe.unet.conv_in.bias[3] = float("nan")
    for source, name in ((pipe, "StableDiffusionPipeline"), (pipe.unet, "UNet2DConditionModel")):
        with pytest.raises(UserError, match=rf"given as a {name}.*conv_in.bias is not finite"):
            Ensemble.from_experts([sd_unet(1, **SMALL), source])


@pytest.mark.parametrize("kind", [torch.float32, torch.float16])
def test_a_lora_with_such_weights_is_refused_by_its_file_and_its_tensor(tmp_path, kind):
    key = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.lora_A.weight"
    save_file({key: torch.tensor([[1, float("nan")]], dtype=kind)}, tmp_path / "style.safetensors")
    with pytest.raises(UserError, match=rf"style.safetensors: {key} is not finite"):
        load_expert(f"one={ASSETS / 'curves'}+{tmp_path / 'style.safetensors'}")


def test_words_of_textual_inversion_in_a_broken_file_are_refused_by_its_name(tmp_path):
    pipe = Ensemble.from_experts([str(ASSETS / "curves")]).pipeline()
    (tmp_path / "cut.safetensors").write_bytes(b"\0" * 20)
    save_file({"emb_params": torch.full((1, 64), float("nan"))}, tmp_path / "nan.safetensors")
    for name, match in (("cut", "not a readable"), ("nan", "emb_params is not finite")):
        with pytest.raises(UserError, match=rf"{name}.safetensors.*{match}"):
            pipe.load_textual_inversion(str(tmp_path / f"{name}.safetensors"), token="<x>")


def test_every_command_that_loads_an_expert_refuses(tmp_path):
    folder, angles, out = broken(tmp_path, "unet", float("nan")), ASSETS / "angles", tmp_path / "out"
    train = ("--steps", 1, "--hidden", 8, "--heads", 2, "--batch-size", 2, "--held-out", 4, "--device", "cpu", "--placement", "out")
    commands = (
        ("generate", folder, "--prompt", "a red ring", "--steps", 1, "--device", "cpu", "--output", out / "g"),
        ("train", "--experts", folder, angles, "--data", "scenes:12", "--output", out / "t", *train),
        ("finetune", folder, "--rank", 2, "--data", "scenes:12", "--output", out / "f", "--steps", 1, "--device", "cpu"),
        ("screen", folder, angles, "--data", "scenes:8", "--draws", 2, "--device", "cpu", "--output", out / "s"),
    )
    for command in commands:
        run = afa(*command)
        assert run.refused, (command[0], run)
        assert "broken" in run.err and FILES["unet"][1] in run.err
        assert "nan %" not in run.out
