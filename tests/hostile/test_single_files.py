"""Single files that people own: a U-Net alone, a VAE alone, merges that carry their configs; and families that are named, not mistaken."""

import functools
import json
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel
from original_layout import write_single_file
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import ONE_LEVEL
from tiny import sd_pipeline as pipeline_of

from afa import Ensemble, UserError
from afa.experts.description import describe_expert
from afa.experts.embedded import KEY, check, pack
from afa.experts.expert import Expert
from afa.experts.layouts import layout_of
from afa.experts.load import load_expert
from afa.experts.locate import locate
from afa.experts.single_file import detect_config
from afa.experts.spec import ExpertSpec
from afa.experts.vae import describe_vae, load_vae
from afa.merging.engine import merge_files
from afa.merging.settings import MergeSettings
from afa.screening.plan import plan
from afa.screening.predict import load_shared_parts
from afa.screening.settings import ScreenSettings

UNET, VAE = "model.diffusion_model.", "first_stage_model."
sd_pipeline = functools.partial(pipeline_of, **ONE_LEVEL)
LAYOUTS = ("prefix", "bare", "diffusers")
BLOCKS = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Two pipelines as folders and whole files; of the second its U-Net and its VAE alone, in every layout."""
    root = tmp_path_factory.mktemp("single")
    for seed, name in enumerate("ab"):
        pipe = sd_pipeline(seed, text_seed=0)
        pipe.save_pretrained(root / name)
        write_single_file(pipe, root / f"{name}.safetensors")
    whole = load_file(root / "b.safetensors")
    for part, prefix, model in (("unet", UNET, pipe.unet), ("vae", VAE, pipe.vae)):
        own = {name: tensor for name, tensor in whole.items() if name.startswith(prefix)}
        save_file(own, root / f"{part}-prefix.safetensors")
        save_file({name.removeprefix(prefix): tensor for name, tensor in own.items()}, root / f"{part}-bare.safetensors")
        save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, root / f"{part}-diffusers.safetensors")
    return root


def same_weights(one, other):
    mine, theirs = one.state_dict(), other.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(tensor, theirs[name]) for name, tensor in mine.items())


class TestUNetAlone:
    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_it_is_the_whole_models_and_borrows_the_rest(self, layout, home):
        ensemble = Ensemble.from_experts([str(home / f"unet-{layout}.safetensors")], config=str(home / "b"), frame=str(home / "b"), aggregator="mean")
        whole = load_expert(str(home / "b"))
        assert same_weights(ensemble.experts[0].model, whole.model)
        assert same_weights(ensemble.frame.vae, whole.load_vae())
        assert len(ensemble.pipeline().components["tokenizer"].get_vocab()) == len(whole.tokenizers[0])

    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_its_header_is_checked_as_a_whole_files_is(self, layout, home, tmp_path):
        tensors = load_file(home / f"unet-{layout}.safetensors")
        lost = next(name for name in tensors if "mid" in name)
        save_file({name: tensor for name, tensor in tensors.items() if name != lost}, tmp_path / "less.safetensors")
        with pytest.raises(UserError, match="the unet in"):
            describe_expert(ExpertSpec.parse(str(tmp_path / "less.safetensors")), str(home / "b"))

    def test_screening_lends_to_it(self, home):
        files = [str(home / "unet-bare.safetensors"), str(home / "unet-prefix.safetensors")]
        planned = plan(ScreenSettings(experts=files, data="scenes:8", output="x", config=str(home / "a"), frame=str(home / "a")))
        assert planned.donor.frame == str(home / "a") and planned.first.scheduler is not None and planned.apart == []
        with pytest.raises(UserError, match="--frame"):
            plan(ScreenSettings(experts=files, data="scenes:8", output="x", config=str(home / "a")))

    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_a_merge_of_some_is_one_of_the_same_layout(self, layout, home, tmp_path):
        files = [f"{name}={home / f'unet-{layout}.safetensors'}" for name in "xy"]
        merge_files(MergeSettings(experts=files, output=str(tmp_path / "m.safetensors"), config=str(home / "b")))
        before, merged = load_file(home / f"unet-{layout}.safetensors"), load_file(tmp_path / "m.safetensors")
        assert all(torch.equal(tensor, merged[name]) for name, tensor in before.items()) and merged.keys() == before.keys()
        merge_files(MergeSettings(experts=files, output=str(tmp_path / "folder"), config=str(home / "b")))
        assert same_weights(load_expert(str(tmp_path / "folder")).model, load_expert(str(home / "b")).model)

    def test_a_vae_is_not_written_into_it(self, home, tmp_path):
        files = [f"{name}={home / 'unet-bare.safetensors'}" for name in "xy"]
        with pytest.raises(UserError, match="--vae"):
            merge_files(MergeSettings(experts=files, output=str(tmp_path / "m.safetensors"), config=str(home / "b"), vae=str(home / "b")))


class TestVAEAlone:
    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_it_serves_an_ensemble_with_the_experts_scale_and_a_screening(self, layout, home, tmp_path):
        file, wanted = home / f"vae-{layout}.safetensors", AutoencoderKL.from_pretrained(home / "b/vae")
        for config in (None, str(home / "a")):
            ensemble = Ensemble.from_experts([str(home / "a")], vae=str(file), config=config, aggregator="mean")
            assert same_weights(ensemble.frame.vae, wanted)
            assert ensemble.frame.vae.config.scaling_factor == wanted.config.scaling_factor
        ensemble.save(tmp_path / "saved")
        assert same_weights(Ensemble.load(tmp_path / "saved").frame.vae, wanted)
        first = describe_expert(ExpertSpec.parse(str(home / "a"))).expert
        assert same_weights(load_shared_parts(first, None, str(file), None, torch.float32, torch.device("cpu")).vae, wanted)

    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_a_merge_takes_it_to_file_and_folder(self, layout, home, tmp_path):
        file, config = str(home / f"vae-{layout}.safetensors"), str(home / "a")
        singles = [f"{name}={home / 'a.safetensors'}" for name in "xy"]
        merge_files(MergeSettings(experts=singles, vae=file, output=str(tmp_path / "m.safetensors"), config=config))
        wanted, merged = load_file(home / "vae-prefix.safetensors"), load_file(tmp_path / "m.safetensors")
        assert all(torch.equal(merged[name], tensor) for name, tensor in wanted.items())
        merge_files(MergeSettings(experts=[f"{name}={home / 'a'}" for name in "xy"], vae=file, output=str(tmp_path / "m")))
        assert same_weights(AutoencoderKL.from_pretrained(tmp_path / "m/vae"), AutoencoderKL.from_pretrained(home / "b/vae"))

    def test_one_with_the_old_names_of_its_attention_is_read_and_merged(self, home, tmp_path):
        """As diffusers saved it before version 0.13: query, key, value and proj_attn."""
        old = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}
        tensors = load_file(home / "vae-diffusers.safetensors")
        for new, name in old.items():
            tensors = {key.replace(new, name): tensor for key, tensor in tensors.items()}
        save_file(tensors, tmp_path / "old.safetensors")
        wanted = AutoencoderKL.from_pretrained(home / "b/vae")
        assert same_weights(Ensemble.from_experts([str(home / "a")], vae=str(tmp_path / "old.safetensors"), aggregator="mean").frame.vae, wanted)
        merge_files(MergeSettings(experts=[f"{name}={home / 'a'}" for name in "xy"], vae=str(tmp_path / "old.safetensors"), output=str(tmp_path / "m")))
        assert same_weights(AutoencoderKL.from_pretrained(tmp_path / "m/vae"), wanted)

    def test_another_kind_is_refused_with_both_numbers_of_channels(self, home, tmp_path):
        other = AutoencoderKL(latent_channels=16, block_out_channels=(8, 8), norm_num_groups=4, **BLOCKS)
        save_file({name: tensor.contiguous() for name, tensor in other.state_dict().items()}, tmp_path / "sd3.safetensors")
        refused = pytest.raises(UserError, match=r"16 latent channels.*expected 4")
        with refused:
            assert Ensemble.from_experts([str(home / "a")], vae=str(tmp_path / "sd3.safetensors"), aggregator="mean").frame.vae
        with refused:
            both = [f"{name}={home / 'a'}" for name in "xy"]
            merge_files(MergeSettings(experts=both, vae=str(tmp_path / "sd3.safetensors"), output=str(tmp_path / "m")))

    def test_a_flux_expert_takes_a_vae_of_16_channels_without_a_config(self, tmp_path):
        """At the real layout; FLUX' VAE has no quant_conv."""
        settings = json.loads((Path(detect_config.__code__.co_filename).parent / "configs/flux/vae/config.json").read_text())
        with torch.device("meta"):
            real = AutoencoderKL.from_config(settings)
        save_file({name: torch.zeros(tensor.shape, dtype=torch.float8_e4m3fn) for name, tensor in real.state_dict().items()}, tmp_path / "ae.safetensors")
        shape = {"num_layers": 1, "num_single_layers": 1, "attention_head_dim": 8, "num_attention_heads": 1, "axes_dims_rope": (2, 2, 4)}
        expert = Expert(name="dev", model=FluxTransformer2DModel(in_channels=64, joint_attention_dim=8, pooled_projection_dim=8, **shape))
        model = describe_vae(locate(ExpertSpec("vae", str(tmp_path / "ae.safetensors"))), like=expert).model
        assert model.config.scaling_factor == settings["scaling_factor"] and model.config.latent_channels == 16

    def test_it_is_no_expert(self, home):
        with pytest.raises(UserError, match="VAE alone"):
            load_expert(str(home / "vae-bare.safetensors"))

    def test_what_holds_none_is_refused_by_name(self, home):
        with pytest.raises(UserError, match="holds no VAE"):
            load_vae(locate(ExpertSpec("vae", str(home / "unet-bare.safetensors"))), None, torch.float32, load_expert(str(home / "a")))


class TestCarriedConfigs:
    @pytest.fixture(scope="class")
    def merged(self, home, tmp_path_factory):
        path = tmp_path_factory.mktemp("merged") / "soup.safetensors"
        merge_files(MergeSettings(experts=[str(home / "a"), str(home / "b")], output=str(path)))
        return path

    def text(self, merged):
        with safe_open(merged, "pt") as file:
            return file.metadata()[KEY]

    def test_a_merge_of_another_architecture_is_read_again_without_config(self, home, merged, tmp_path):
        again, folder = load_expert(str(merged)), load_expert(str(home / "a"))
        assert all(again.model.config[name] == value for name, value in folder.model.config.items() if not name.startswith("_"))
        assert again.tokenizers[0].get_vocab() == folder.tokenizers[0].get_vocab()
        assert same_weights(again.load_vae(), folder.load_vae())
        merge_files(MergeSettings(experts=[f"{name}={merged}" for name in "xy"], output=str(tmp_path / "twice.safetensors")))
        assert self.text(tmp_path / "twice.safetensors") == self.text(merged)

    def test_it_names_no_place_of_this_machine(self, home, merged):
        assert str(home) not in self.text(merged) and "name_or_path" not in self.text(merged)

    @pytest.mark.parametrize(
        ("place", "value"),
        [
            (("unet/config.json", "layers_per_block"), 10**9),
            (("unet/config.json", "block_out_channels"), [8] * 10_000),
            (("unet/config.json", "cross_attention_dim"), 2**40),
            (("unet/config.json", "cross_attention_dim"), -(2**40)),
            (("unet/config.json", "_class_name"), "DiffusionPipeline"),
            (("unet/config.json", "act_fn"), "../../etc/passwd"),
            (("unet/config.json", "act_fn"), "/etc/passwd"),
            (("unet/config.json", "auto_map"), {"AutoModel": "evil--code.Model"}),
            (("model_index.json", "_class_name"), "LatteePipeline"),
            (("model_index.json", "unet"), ["evil", "Model"]),
            (("model_index.json", "unet"), ["diffusers", "DiffusionPipeline"]),
            (("model_index.json", "unet"), 5),
            (("model_index.json", "unet"), [["diffusers"], {"a": 1}]),
            (("model_index.json", "scheduler"), ["diffusers", "logging"]),
            (("scheduler/scheduler_config.json", "trained_betas"), [0.1] * 10**6),
            (("text_encoder/config.json", "vocab_size"), 10**12),
            (("text_encoder/config.json", "num_hidden_layers"), 5000),
            (("../outside.json",), {}),
            (("unet/config.json",), [1]),
            (("unet/modeling.py",), {"a": 1}),
        ],
    )
    def test_a_strangers_header_is_refused_in_one_sentence(self, place, value, merged, tmp_path):
        found = json.loads(self.text(merged))
        target = found
        for name in place[:-1]:
            target = target[name]
        target[place[-1]] = value
        save_file(load_file(merged), tmp_path / "evil.safetensors", metadata={KEY: json.dumps(found)})
        with pytest.raises(UserError) as refused:
            load_expert(str(tmp_path / "evil.safetensors"))
        assert "\n" not in str(refused.value) and not (tmp_path.parent / "outside.json").exists()

    @pytest.mark.parametrize("text", ["", "null", "[]", "{", "5", "{}", '{"model_index.json": {}}', "[" * 5000])
    def test_what_is_no_object_of_configs_is_refused(self, text):
        with pytest.raises(UserError):
            check(text, "the configs")

    def test_what_is_packed_passes_its_own_check(self, home):
        assert check(pack(home / "a", home / "a/vae", {}), "the configs")


FOREIGN = {
    "FLUX.3": ["double_blocks.0.img_attn.qkv.weight", "content_mode_blocks.0.mlp_in.weight", "img_in.weight"],
    "Chroma1-Radiance": ["double_blocks.0.img_attn.qkv.weight", "distilled_guidance_layer.norms.0.scale", "nerf_image_embedder.embedder.0.weight"],
    "Qwen-Image-Layered": ["transformer_blocks.0.img_mod.1.weight", "txt_norm.weight", "time_text_embed.addition_t_embedding.weight"],
    "NewBie": ["cap_embedder.1.weight", "layers.0.adaLN_modulation.1.weight", "x_embedder.weight", "clip_text_pooled_proj.0.weight"],
    "HunyuanVideo": ["double_blocks.0.img_attn.qkv.weight", "txt_in.individual_token_refiner.blocks.0.norm1.weight"],
    "LoRA": ["lora_unet_down_blocks_0.lora_down.weight"],
    "ControlNet": ["control_model.input_blocks.0.0.weight"],
    "text encoder": ["text_model.encoder.layers.0.mlp.fc1.weight"],
}


@pytest.mark.parametrize(("family", "prefix"), [(family, "") for family in FOREIGN] + [(family, UNET) for family in list(FOREIGN)[:5]])
def test_other_files_are_named_and_nobody_is_told_to_download_them_again(family, prefix):
    with pytest.raises(UserError, match=family) as refused:
        layout_of([prefix + name for name in FOREIGN[family]], "a.safetensors")
    assert "again" not in str(refused.value)
