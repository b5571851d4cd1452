"""Experts: how they are named, found, read, compared and refused."""

import copy
import functools
import json
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from original_layout import write_single_file
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from test_pipeline import run as draw
from tiny import ONE_LEVEL, SDXL, scheduler, sd_unet, sdxl_pipeline
from tiny import sd_pipeline as pipeline_of

from afa import Ensemble, UserError
from afa.aggregators.registry import count_parameters
from afa.experts.compatible import mismatches
from afa.experts.expert import Expert
from afa.experts.load import load_expert
from afa.experts.single_file import CONFIGS, clip_tokenizer, detect_config
from afa.experts.spec import ExpertSpec, Lora
from afa.models.unet import UNetEnsemble

sd_pipeline = functools.partial(pipeline_of, **ONE_LEVEL)
run = functools.partial(draw, num_inference_steps=1, height=64, width=64)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two experts as diffusers folders, the first also as a single file with its configs."""
    root = tmp_path_factory.mktemp("experts")
    for seed, name in enumerate(["photo", "paint"]):
        sd_pipeline(seed).save_pretrained(root / name)
    write_single_file(sd_pipeline(0), root / "photo.safetensors")
    shutil.copytree(root / "photo", root / "configs", ignore=shutil.ignore_patterns("*.safetensors"))
    return root


def write_lora(pipe, path: Path, seed: int = 0) -> Path:
    """A LoRA of a U-Net as diffusers saves it."""
    torch.manual_seed(seed)
    unet = copy.deepcopy(pipe.unet)
    unet.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    type(pipe).save_lora_weights(path.parent, unet_lora_layers=get_peft_model_state_dict(unet), weight_name=path.name)
    return path


class TestSpecs:
    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("org/name", ExpertSpec("name", "org/name")),
            ("org/name@v1.2", ExpertSpec("name", "org/name", "v1.2")),
            ("photo=org/name@main", ExpertSpec("photo", "org/name", "main")),
            ("a=base.safetensors+style.safetensors", ExpertSpec("a", "base.safetensors", None, (Lora("style.safetensors"),))),
            (
                "b.safetensors+x.safetensors*0.8+y.safetensors*-1",
                ExpertSpec("b", "b.safetensors", None, (Lora("x.safetensors", 0.8), Lora("y.safetensors", -1.0))),
            ),
            ("./models/photo-real/", ExpertSpec("photo-real", "./models/photo-real/")),
        ],
    )
    def test_parts(self, text, expected):
        assert ExpertSpec.parse(text) == expected

    def test_a_path_that_exists_is_taken_whole(self, tmp_path):
        odd = tmp_path / "a=b+c@d"
        odd.mkdir()
        assert ExpertSpec.parse(str(odd)).source == str(odd)

    def test_a_strength_that_is_no_number(self):
        with pytest.raises(UserError, match="strength 'much'"):
            ExpertSpec.parse("a.safetensors+b.safetensors*much")


class TestLoading:
    def test_a_folder(self, folders):
        assert np.array_equal(run(Ensemble.from_experts([str(folders / "photo")], aggregator="mean").pipeline()), run(sd_pipeline(0)))

    def test_a_single_file_is_the_folder(self, folders):
        single = Ensemble.from_experts([str(folders / "photo.safetensors")], config=str(folders / "configs"), aggregator="mean")
        assert np.array_equal(run(single.pipeline()), run(sd_pipeline(0)))

    def test_a_denoiser_alone(self, folders):
        expert = load_expert(str(folders / "photo" / "unet"))
        assert torch.equal(expert.model.conv_in.weight, sd_unet(0).conv_in.weight)

    def test_half_precision(self, folders):
        expert = load_expert(str(folders / "photo"), dtype=torch.float16)
        assert expert.model.dtype == expert.text_encoders[0].dtype == expert.load_vae().dtype == torch.float16

    def test_a_lora_becomes_part_of_the_expert(self, folders, tmp_path):
        lora = write_lora(sd_pipeline(0), tmp_path / "style.safetensors")
        merged = Ensemble.from_experts([f"styled={folders / 'photo'}+{lora}*0.5"], aggregator="mean")
        pipe = sd_pipeline(0)
        pipe.load_lora_weights(str(lora))
        expected = run(pipe, cross_attention_kwargs={"scale": 0.5})
        assert merged.names == ("styled",)
        assert np.allclose(run(merged.pipeline()), expected, atol=1e-5)
        assert not np.allclose(expected, run(sd_pipeline(0)), atol=1e-3)

    def test_a_lora_in_a_pipeline_joins_with_it(self, tmp_path):
        pipe = sd_pipeline(0)
        pipe.load_lora_weights(str(write_lora(pipe, tmp_path / "style.safetensors")))
        assert np.array_equal(run(Ensemble.from_experts([pipe], aggregator="mean").pipeline()), run(pipe))

    def test_a_hub_id_from_the_hubs_cache(self, folders, tmp_path, monkeypatch):
        commit = "0123456789abcdef0123456789abcdef01234567"
        repo = tmp_path / "models--org--photo"
        shutil.copytree(folders / "photo", repo / "snapshots" / commit)
        (repo / "refs").mkdir()
        (repo / "refs" / "main").write_text(commit)
        monkeypatch.setattr("diffusers.pipelines.pipeline_utils.HF_HUB_CACHE", str(tmp_path), raising=False)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
        expert = load_expert("org/photo@main")
        assert expert.located.commit == commit
        assert torch.equal(expert.model.conv_in.weight, sd_unet(0).conv_in.weight)

    def test_names_must_differ(self, folders):
        with pytest.raises(UserError, match="two experts are called 'photo'"):
            Ensemble.from_experts([str(folders / "photo"), f"photo={folders / 'paint'}"])

    def test_a_vae_of_ones_choice(self, folders):
        by_name = Ensemble.from_experts([str(folders / "photo"), str(folders / "paint")], vae="paint", aggregator="mean")
        by_path = Ensemble.from_experts([str(folders / "photo"), str(folders / "paint")], vae=str(folders / "paint" / "vae"), aggregator="mean")
        for ensemble in (by_name, by_path):
            assert torch.equal(ensemble.pipeline().vae.decoder.conv_in.weight, sd_pipeline(1).vae.decoder.conv_in.weight)


class TestRefusals:
    @pytest.mark.parametrize(
        ("source", "message"),
        [
            ("nothing/here/at/all", "no folder or file nothing/here/at/all"),
            ("./missing", "no folder or file ./missing"),
            ("org/missing", "'org/missing' is neither a folder nor a file here, and as a hub id"),
            ("x=", "has no source"),
        ],
    )
    def test_what_is_not_there(self, source, message):
        with pytest.raises(UserError, match=message):
            load_expert(source)

    def test_a_pickle(self, tmp_path):
        (tmp_path / "model.ckpt").write_bytes(b"x")
        with pytest.raises(UserError, match=r"'\.ckpt' file"):
            load_expert(str(tmp_path / "model.ckpt"))

    def test_a_folder_of_something_else(self, tmp_path):
        with pytest.raises(UserError, match="neither model_index.json nor config.json"):
            load_expert(str(tmp_path))

    @pytest.mark.parametrize("content", [b"", b"hello", struct.pack("<Q", 10) + b"{", struct.pack("<Q", 2**60)])
    def test_a_broken_file(self, tmp_path, content):
        (tmp_path / "broken.safetensors").write_bytes(content)
        with pytest.raises(UserError, match="not a readable .safetensors file"):
            load_expert(str(tmp_path / "broken.safetensors"))

    def test_a_file_that_was_cut_off(self, folders, tmp_path):
        whole = (folders / "photo.safetensors").read_bytes()
        (tmp_path / "half.safetensors").write_bytes(whole[: len(whole) // 2])
        with pytest.raises(UserError, match="is cut off: it has"):
            load_expert(str(tmp_path / "half.safetensors"))

    def test_a_lora_where_a_checkpoint_is_expected(self, tmp_path):
        lora = write_lora(sd_pipeline(0), tmp_path / "style.safetensors")
        with pytest.raises(UserError, match="no checkpoint in original layout"):
            load_expert(str(lora))

    def test_a_single_file_of_unknown_architecture(self, folders):
        with pytest.raises(UserError, match="of no architecture known here"):
            load_expert(str(folders / "photo.safetensors"))

    def test_a_single_file_without_its_vae(self, tmp_path, folders):
        write_single_file(sd_pipeline(0), tmp_path / "bare.safetensors", vae=False)
        with pytest.raises(UserError, match="VAE"):
            Ensemble.from_experts([str(tmp_path / "bare.safetensors")], config=str(folders / "configs"), aggregator="mean").pipeline()

    def test_a_lora_of_another_model(self, folders, tmp_path):
        torch.manual_seed(0)
        unet = sd_unet(0, **ONE_LEVEL, cross_attention_dim=32)
        unet.add_adapter(LoraConfig(r=2, target_modules=["to_k"], init_lora_weights=False))
        pipe = sd_pipeline(0)
        type(pipe).save_lora_weights(tmp_path, unet_lora_layers=get_peft_model_state_dict(unet), weight_name="other.safetensors")
        with pytest.raises(UserError, match="does not fit expert 'photo'"):
            load_expert(f"photo={folders / 'photo'}+{tmp_path / 'other.safetensors'}")

    def test_weights_that_are_missing(self, folders, tmp_path):
        shutil.copytree(folders / "photo", tmp_path / "photo")
        next((tmp_path / "photo" / "unet").glob("*.safetensors")).unlink()
        with pytest.raises(UserError, match="no weights under a name that is loaded"):
            load_expert(str(tmp_path / "photo"))

    def test_a_broken_index(self, folders, tmp_path):
        shutil.copytree(folders / "photo", tmp_path / "photo")
        (tmp_path / "photo" / "model_index.json").write_text("{")
        with pytest.raises(UserError, match="cannot be read"):
            load_expert(str(tmp_path / "photo"))

    def test_another_family(self):
        with pytest.raises(UserError, match="a Linear cannot be an expert"):
            Ensemble.from_experts([sd_unet(0), torch.nn.Linear(2, 2)])

    def test_sdxl_with_sd(self):
        with pytest.raises(UserError, match="'expert_1' cannot join 'expert_0': stage"):
            Ensemble.from_experts([sd_pipeline(0), sdxl_pipeline(0, **SDXL)])

    def test_other_widths(self):
        with pytest.raises(UserError, match="stage IN04 has 24 channels, expected 16"):
            Ensemble.from_experts([sd_unet(0), sd_unet(0, block_out_channels=(16, 24, 32, 32))])

    def test_another_prediction_type(self):
        with pytest.raises(UserError, match="prediction_type is v_prediction, expected epsilon"):
            Ensemble.from_experts([sd_pipeline(0), sd_pipeline(1, prediction_type="v_prediction")])

    def test_a_placement_that_does_not_exist(self):
        with pytest.raises(UserError, match="no placement or stage 'layer'; did you mean 'layers'"):
            Ensemble.from_experts([sd_unet(0), sd_unet(1)], placement="layer")

    def test_a_placement_without_the_last_stage(self):
        with pytest.raises(UserError, match="add OUT11"):
            Ensemble.from_experts([sd_unet(0), sd_unet(1)], placement="M00,OUT01")

    def test_an_aggregator_that_does_not_exist(self):
        with pytest.raises(UserError, match="no aggregator 'sawb'; did you mean 'sabw'"):
            Ensemble.from_experts([sd_unet(0), sd_unet(1)], aggregator="sawb")

    def test_an_option_that_does_not_exist(self):
        with pytest.raises(UserError, match="'mean' has no option 'hidden'"):
            Ensemble.from_experts([sd_unet(0), sd_unet(1)], aggregator="mean", hidden=8)

    def test_weights_that_are_not_convex(self):
        with pytest.raises(UserError, match=r"sum 1\.5\) are not convex"):
            Ensemble.from_experts([sd_unet(0), sd_unet(1)], aggregator="fixed", weights=[1.0, 0.5])

    def test_a_unet_with_other_blocks(self):
        with pytest.raises(UserError, match="AttnDownBlock2D cannot be read as stages"):
            Ensemble.from_experts([sd_unet(0, down_block_types=("AttnDownBlock2D", "DownBlock2D", "DownBlock2D", "DownBlock2D"))])

    def test_a_vae_that_is_not_there(self):
        with pytest.raises(UserError, match="vae='photo' is neither an expert's name"):
            Ensemble.from_experts([sd_pipeline(0)], vae="photo")


def test_every_reason_is_given_at_once():
    one = Expert(name="a", model=sd_unet(0), scheduler=scheduler())
    other = Expert(name="b", model=sd_unet(0, cross_attention_dim=32, out_channels=4), scheduler=scheduler("v_prediction"))
    assert len(mismatches([one, other])) == 2


@functools.cache
def real_unets(config):
    with torch.device("meta"):
        settings = UNet2DConditionModel.load_config(CONFIGS / config / "unet")
        return [UNet2DConditionModel.from_config(settings) for _ in range(3)]


@pytest.mark.parametrize(("config", "stages", "unet", "aggregators"), [("sd15", 25, 859_520_964, 45_132_416), ("sdxl", 19, 2_567_463_684, 45_750_144)])
def test_real_configs_have_the_published_sizes(config, stages, unet, aggregators):
    with torch.device("meta"):
        model = UNetEnsemble(real_unets(config))
    assert len(model.stages) == stages
    assert count_parameters(model.experts[0]) == unet
    assert count_parameters(model.aggregators) == aggregators


@pytest.mark.parametrize(("depth", "millions"), [(1, 32.79), (2, 45.13), (3, 57.48)])
def test_depth_has_the_published_cost(depth, millions):
    from afa.aggregators.registry import Recipe

    with torch.device("meta"):
        model = UNetEnsemble(real_unets("sd15"), recipe=Recipe("sabw", {"depth": depth}))
    assert abs(count_parameters(model.aggregators) / 1e6 - millions) < 0.01


def test_architectures_are_told_apart_by_the_header(tmp_path):
    for (block, width), config in [((1, 768), "sd15"), ((1, 1024), "sd21"), ((4, 2048), "sdxl")]:
        attention = f"model.diffusion_model.input_blocks.{block}.1.transformer_blocks.0.attn2.to_k.weight"
        header = {
            "model.diffusion_model.input_blocks.0.0.weight": {"dtype": "F16", "shape": [0, 4, 3, 3], "data_offsets": [0, 0]},
            attention: {"dtype": "F16", "shape": [0, width], "data_offsets": [0, 0]},
        }
        text = json.dumps(header).encode()
        (tmp_path / config).write_bytes(struct.pack("<Q", len(text)) + text)
        assert detect_config(tmp_path / config) == config


def test_the_shipped_tokenizer_is_clips():
    """Token ids of CLIP's vocabulary as published with the model."""
    ids = clip_tokenizer()("a photo of a cat").input_ids
    assert ids == [49406, 320, 1125, 539, 320, 2368, 49407]


@pytest.mark.parametrize(("part", "file"), [("unet", "diffusion_pytorch_model.safetensors"), ("text_encoder", "model.safetensors")])
def test_missing_weights_are_never_made_up(tmp_path, part, file):
    sd_pipeline().save_pretrained(tmp_path / "hole")
    tensors = load_file(tmp_path / "hole" / part / file)
    first = sorted(tensors)[0]
    save_file({name: tensor for name, tensor in tensors.items() if name != first}, tmp_path / "hole" / part / file)
    with pytest.raises(UserError, match=rf"{part} lacks 1 of"):
        load_expert(str(tmp_path / "hole"))
