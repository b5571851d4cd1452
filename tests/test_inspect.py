"""`afa inspect`: what it says is what loading would find, and it says it without reading a weight."""

import json
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from original_layout import _unet, _vae, write_single_file
from safetensors.torch import load_file, save_file
from test_experts import write_lora
from tiny import inputs, scheduler, sd_pipeline, sd_unet, sdxl_inputs, sdxl_unet
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from afa import Ensemble, UserError
from afa.cli import main as command_line
from afa.cli.inspect import EXAMPLES, Options, run
from afa.cli.tables import scaled, table
from afa.denoiser.cost import count_flops
from afa.experts.compatible import mismatches
from afa.experts.load import Expert
from afa.experts.outline import config_outline, read_outline
from afa.experts.spec import ExpertSpec

SMALL = {"hidden": 32, "heads": 2, "depth": 1}
BLOCKS = {"down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D")}
UNET = {
    **BLOCKS,
    "block_out_channels": (16, 32),
    "layers_per_block": 1,
}  # nine stages: counting FLOPs takes time by the operation
UNET_FILE = "unet/diffusion_pytorch_model.safetensors"


def pipe(seed, **changes):
    """A small pipeline."""
    return sd_pipeline(seed, **{**UNET, **changes})


@pytest.fixture(scope="module")
def experts(tmp_path_factory):
    """Two experts with one text encoder and one of its own; the first as a single file too, with its configs."""
    root = tmp_path_factory.mktemp("inspected")
    for seed, (name, text) in enumerate([("photo", 7), ("paint", 7), ("sketch", 8)]):
        pipe(seed, text_seed=text).save_pretrained(root / name)
    write_single_file(pipe(0), root / "photo.safetensors")
    shutil.copytree(root / "photo", root / "configs", ignore=shutil.ignore_patterns("*.safetensors"))
    return root


@pytest.fixture
def photo(experts, tmp_path):
    """A copy of one expert that a test may break."""
    return Path(shutil.copytree(experts / "photo", tmp_path / "photo"))


@pytest.fixture
def inspect(capsys):
    """Run the command and parse its JSON."""

    def run_json(*sources, **options):
        run(Options(experts=[str(source) for source in sources], json=True, **options))
        return json.loads(capsys.readouterr().out)

    return run_json


@pytest.fixture
def look(inspect):
    """The same with aggregators that cost nothing, where they do not matter."""
    return lambda *sources, **options: inspect(*sources, aggregator="mean", **options)


@pytest.fixture
def afa(monkeypatch, capsys):
    """The command line: -> exit code, stdout, stderr."""
    monkeypatch.setattr(command_line, "COMMANDS", {"inspect": "afa.cli.inspect"})

    def call(*arguments):
        code = command_line.main(["inspect", *(str(argument) for argument in arguments)])
        return code, *capsys.readouterr()

    return call


def meta(model):
    with torch.device("meta"):
        return UNet2DConditionModel.from_config(model.config)


def edit(file, change):
    """Change the tensors of a file."""
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def write_sparse(path, tensors):
    """A .safetensors file of real size whose tensors take no place on the disk. tensors: name -> something with a shape."""
    header, end = {}, 0
    for name, tensor in tensors.items():
        size = 2 * tensor.numel()
        header[name] = {"dtype": "F16", "shape": list(tensor.shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text)
    os.truncate(path, 8 + len(text) + end)
    return path


def original(config):
    """The tensors of a checkpoint of original layout, without content: U-Net, VAE and text encoders."""
    parts = config_outline("real", config).parts
    tensors = {f"model.diffusion_model.{name}": tensor for name, tensor in _unet(parts["unet"]).items()}
    tensors |= {f"first_stage_model.{name}": tensor for name, tensor in _vae(parts["vae"]).items()}
    added = getattr(parts["unet"], "add_embedding", None)
    for place, layer in (("0.0", "linear_1"), ("0.2", "linear_2")) if added is not None else ():
        tensors |= {
            f"model.diffusion_model.label_emb.{place}.{name}": tensor
            for name, tensor in getattr(added, layer).state_dict().items()
        }
    clip = {"sd15": "cond_stage_model.transformer", "sdxl": "conditioner.embedders.0.transformer"}.get(config)
    if clip:
        tensors |= {
            f"{clip}.text_model.{name.removeprefix('text_model.')}": t for name, t in parts["text_encoder"].state_dict().items()
        }
    open_clip = {
        "sd21": ("cond_stage_model.model", "text_encoder"),
        "sdxl": ("conditioner.embedders.1.model", "text_encoder_2"),
    }.get(config)
    return tensors | (open_clip_tensors(open_clip[0], parts[open_clip[1]].config) if open_clip else {})


def open_clip_tensors(prefix, config):
    """OpenCLIP's own names; Stable Diffusion 2 leaves out the last layer, the file has it."""
    width, layers = config.hidden_size, config.num_hidden_layers
    shapes = {
        "positional_embedding": (77, width),
        "token_embedding.weight": (49408, width),
        "ln_final.weight": (width,),
        "ln_final.bias": (width,),
    }
    shapes["text_projection"] = (width, width)
    layer = {"ln_1.weight": (width,), "ln_1.bias": (width,), "ln_2.weight": (width,), "ln_2.bias": (width,)}
    layer |= {
        "attn.in_proj_weight": (3 * width, width),
        "attn.in_proj_bias": (3 * width,),
        "attn.out_proj.weight": (width, width),
    }
    layer |= {"attn.out_proj.bias": (width,), "mlp.c_fc.weight": (4 * width, width), "mlp.c_fc.bias": (4 * width,)}
    layer |= {"mlp.c_proj.weight": (width, 4 * width), "mlp.c_proj.bias": (width,)}
    shapes |= {f"transformer.resblocks.{index}.{name}": shape for index in range(layers) for name, shape in layer.items()}
    return {f"{prefix}.{name}": torch.empty(shape, device="meta") for name, shape in shapes.items()}


class TestCounts:
    def test_sd15_has_the_published_sizes(self, inspect):
        found = inspect(config="sd15")
        assert [expert["parameters"] for expert in found["experts"]] == [859_520_964] * 3
        assert len(found["stages"]) == 25
        assert (
            found["aggregators"]["parameters"] == sum(stage["aggregator_parameters"] for stage in found["stages"]) == 45_132_416
        )
        assert found["cost"]["resolution"] == [512, 512]
        assert found["cost"]["bytes"]["float16"]["experts"] == 2 * 3 * 859_520_964

    def test_sdxl_has_the_published_sizes(self, look):
        found = look(config="sdxl", count=1)
        assert found["cost"]["parameters"]["experts"] == found["experts"][0]["parameters"] == 2_567_463_684
        assert [text["width"] for text in found["experts"][0]["text_encoders"]] == [768, 1280]
        assert len(found["stages"]) == 19
        assert found["cost"]["resolution"] == [1024, 1024]

    def test_a_folder_is_described_as_it_loads(self, inspect, experts):
        found = inspect(experts / "photo", experts / "sketch")
        ensemble = Ensemble.from_experts([str(experts / "photo"), str(experts / "sketch")])
        stock, counts = ensemble.pipeline(), lambda module: sum(tensor.numel() for tensor in module.parameters())
        assert found["cost"]["parameters"]["experts"] == counts(ensemble.denoiser.experts)
        assert found["cost"]["parameters"]["aggregators"] == counts(ensemble.aggregators)
        assert found["cost"]["parameters"]["text_encoders"] == counts(stock.text_encoder)
        assert found["cost"]["parameters"]["vae"] == counts(stock.vae)
        assert [stage["name"] for stage in found["stages"]] == [stage.name for stage in ensemble.denoiser.stages]
        assert found["cost"]["resolution"] == [stock.vae_scale_factor * 16] * 2

    def test_a_single_file_is_described_as_its_folder(self, look, experts):
        single = look(experts / "photo.safetensors", config=str(experts / "configs"))
        folder = look(experts / "photo")
        assert single["stages"] == folder["stages"]
        assert single["cost"] == folder["cost"]

    @pytest.mark.parametrize("config", ["sd15", "sd21", "sdxl"])
    def test_a_real_single_file_is_complete_to_the_last_weight(self, tmp_path, config):
        tensors = original(config)
        whole = read_outline(ExpertSpec.parse(str(write_sparse(tmp_path / "whole.safetensors", tensors))))
        assert (whole.config, whole.dtype) == (config, "float16")
        for end in (
            "diffusion_model.time_embed.0.bias",
            "diffusion_model.label_emb.0.0.weight",
            "first_stage_model.encoder.conv_in.weight",
            "final_layer_norm.bias",
            "ln_final.bias",
        ):
            for lost in (name for name in tensors if name.endswith(end)):
                write_sparse(tmp_path / "partly.safetensors", {name: tensor for name, tensor in tensors.items() if name != lost})
                with pytest.raises(UserError, match=r"partly.safetensors .* (lacks 1 of|is incomplete)"):
                    read_outline(ExpertSpec.parse(str(tmp_path / "partly.safetensors")))

    @pytest.mark.parametrize(("placement", "fused"), [("layers", 9), ("blocks", 5), ("out", 1), ("M00,OUT03", 2)])
    def test_only_placed_stages_have_aggregators(self, inspect, experts, placement, fused):
        found = inspect(experts / "photo", experts / "paint", placement=placement, **SMALL)
        assert sum(stage["fused"] for stage in found["stages"]) == found["aggregators"]["fused"] == fused
        assert all((stage["aggregator_parameters"] is not None) == stage["fused"] for stage in found["stages"])


class TestCost:
    def test_three_copies_cost_three_times_one(self, inspect, experts):
        places = [f"{name}={experts / 'photo'}" for name in "abc"]
        one, three = inspect(places[0], aggregator="mean")["cost"], inspect(*places, aggregator="mean")["cost"]
        assert three["flops"]["ensemble"] == three["flops"]["experts"] == 3 * one["flops"]["experts"] > 0
        assert three["parameters"]["experts"] == 3 * one["parameters"]["experts"]
        assert three["parameters"]["text_encoders"] == one["parameters"]["text_encoders"]

    def test_an_ensemble_is_its_experts_and_its_aggregators(self, inspect, experts):
        flops = inspect(experts / "photo", experts / "paint", **SMALL)["cost"]["flops"]
        assert flops["ensemble"] == flops["experts"] + flops["aggregators"]
        assert flops["aggregators"] > 0

    @pytest.mark.parametrize(("make", "call"), [(sd_unet, inputs), (sdxl_unet, sdxl_inputs)])
    def test_flops_are_those_of_a_real_pass(self, make, call):
        unet = make(0)
        with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
            unet(**call(batch=1, height=16, width=24))
        assert count_flops(meta(unet), 16, 24, batch=1, tokens=7).total == counter.get_total_flops()

    def test_two_images_cost_twice_one(self, inspect, experts):
        one, two = (inspect(experts / "photo", experts / "paint", batch_size=batch, **SMALL)["cost"]["flops"] for batch in (1, 2))
        assert two["ensemble"] == 2 * one["ensemble"]

    def test_larger_images_cost_more_and_hold_the_same(self, look, experts):
        small, large = (look(experts / "photo", resolution=side)["cost"] for side in (128, 256))
        assert large["flops"]["experts"] > 4 * small["flops"]["experts"]
        assert large["bytes"] == small["bytes"]

    def test_a_size_no_latent_has(self, experts):
        with pytest.raises(UserError, match="--resolution 130 is not a multiple of 8.*try 128"):
            run(Options(experts=[str(experts / "photo")], resolution=130))

    def test_no_weights_are_read(self, tmp_path):
        """Two files of 2 GB that are promised but hold nothing: neither read nor allocated."""
        io = Path("/proc/self/io")
        if not io.exists():
            pytest.skip("needs /proc/self/io")
        file = write_sparse(tmp_path / "real.safetensors", original("sd15"))
        spec = ExpertSpec.parse(str(file))
        read_outline(spec)  # what is imported is not counted
        before = int(io.read_text().split()[1])
        found = read_outline(spec)
        assert file.stat().st_size > 2e9
        assert int(io.read_text().split()[1]) - before < 20e6
        assert all(tensor.is_meta for part in found.parts.values() for tensor in part.state_dict().values())


class TestTextEncoders:
    def test_equal_ones_are_found_by_their_bytes(self, look, experts):
        found = look(experts / "photo", experts / "sketch", experts / "paint")
        assert [expert["text_encoders"][0]["same_as"] for expert in found["experts"]] == [None, None, "photo"]

    def test_equal_ones_are_found_in_single_files(self, look, experts, tmp_path):
        for name, seed in (("one", 1), ("two", 2)):
            write_single_file(pipe(seed, text_seed=3), tmp_path / f"{name}.safetensors")
        write_single_file(pipe(1, text_seed=4), tmp_path / "three.safetensors")
        found = look(*sorted(tmp_path.iterdir()), config=str(experts / "configs"))
        assert [(expert["name"], expert["text_encoders"][0]["same_as"]) for expert in found["experts"]] == [
            ("one", None),
            ("three", None),
            ("two", "one"),
        ]

    def test_other_settings_make_another_encoder(self, look, experts, photo):
        config = photo / "text_encoder" / "config.json"
        config.write_text(config.read_text().replace("quick_gelu", "gelu"))
        assert look(experts / "paint", photo)["experts"][1]["text_encoders"][0]["same_as"] is None

    @pytest.mark.parametrize(
        ("key", "same"), [("lora_te_text_model.lora_up.weight", None), ("unet.conv_in.lora_A.weight", "photo")]
    )
    def test_a_lora_on_an_encoder_makes_it_another(self, look, experts, tmp_path, key, same):
        save_file({key: torch.zeros(1)}, tmp_path / "style.safetensors")
        found = look(experts / "photo", f"styled={experts / 'paint'}+{tmp_path / 'style.safetensors'}*0.5")
        assert found["experts"][1]["text_encoders"][0]["same_as"] == same
        assert found["experts"][1]["loras"] == [f"{tmp_path / 'style.safetensors'}*0.5"]


class TestRefusals:
    def refused(self, place, message):
        with pytest.raises(UserError, match=message) as raised:
            run(Options(experts=[str(place)]))
        assert "\n" not in str(raised.value)

    @pytest.mark.parametrize("part", ["unet", "text_encoder", "vae"])
    def test_a_file_that_is_cut_off(self, photo, part):
        file = next((photo / part).glob("*.safetensors"))
        os.truncate(file, file.stat().st_size - 1)
        self.refused(photo, f"{file.name} is cut off: it has")

    def test_a_single_file_that_is_cut_off(self, experts, tmp_path):
        file = Path(shutil.copy(experts / "photo.safetensors", tmp_path))
        os.truncate(file, file.stat().st_size // 2)
        self.refused(file, "is cut off: it has")

    def test_a_weight_that_is_missing(self, photo):
        edit(photo / UNET_FILE, lambda tensors: tensors.pop("conv_in.bias"))
        self.refused(photo, r"unet lacks 1 of \d+ weights \(first: conv_in.bias\)")

    def test_a_weight_of_another_shape(self, photo):
        edit(photo / UNET_FILE, lambda tensors: tensors.update({"conv_in.weight": torch.zeros(16, 9, 3, 3)}))
        self.refused(photo, r"conv_in.weight has shape \(16, 9, 3, 3\), its config makes it \(16, 4, 3, 3\)")

    def test_weights_under_a_name_that_is_not_loaded(self, photo):
        (photo / UNET_FILE).rename(photo / UNET_FILE.replace(".safetensors", ".fp16.safetensors"))
        self.refused(photo, r"found: diffusion_pytorch_model.fp16.safetensors")

    def test_a_shard_that_is_missing(self, photo):
        shutil.rmtree(photo / "unet")
        sd_unet(0, **UNET).save_pretrained(photo / "unet", max_shard_size="200KB")
        shards = sorted((photo / "unet").glob("*-of-*"))
        assert len(shards) > 1
        run(Options(experts=[str(photo)]))
        shards[0].unlink()
        self.refused(photo, f"lacks {shards[0].name}, one of {len(shards)} files")

    @pytest.mark.parametrize(
        ("file", "content"), [("model_index.json", "{"), ("unet/config.json", "{"), ("text_encoder/config.json", "")]
    )
    def test_a_broken_config(self, photo, file, content):
        (photo / file).write_text(content)
        self.refused(photo, f"{Path(file).name} cannot be read")

    def test_a_config_that_makes_no_model(self, photo):
        config = json.loads((photo / "unet/config.json").read_text())
        (photo / "unet/config.json").write_text(json.dumps({**config, "down_block_types": ["Spiral"] * 2}))
        self.refused(photo, r"config.json makes no UNet2DConditionModel: .*Spiral")

    def test_a_model_that_is_no_denoiser(self, photo):
        self.refused(photo / "vae", "expert 'vae': .* AutoencoderKL cannot be an expert")

    def test_one_component_is_no_expert(self, photo):
        self.refused(photo / UNET_FILE, "give the folder it lies in: .*unet")

    def test_a_single_file_without_its_text_encoder(self, experts, tmp_path):
        tensors = {
            name: tensor for name, tensor in load_file(experts / "photo.safetensors").items() if not name.startswith("cond_stage")
        }
        save_file(tensors, tmp_path / "bare.safetensors")
        with pytest.raises(UserError, match=r"the text_encoder in .*bare.safetensors .* lacks \d+ of \d+ weights"):
            run(Options(experts=[str(tmp_path / "bare.safetensors")], config=str(experts / "configs")))

    def test_two_experts_of_one_name(self, experts):
        with pytest.raises(UserError, match="two experts are called 'photo'"):
            run(Options(experts=[str(experts / "photo"), f"photo={experts / 'paint'}"]))

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({}, "give EXPERT"),
            ({"experts": ["a"], "count": 3}, "--count 3 is for --config without EXPERT"),
            ({"config": "sd15", "batch_size": 0}, "--batch-size 0 must be at least 1"),
            ({"config": "sd15", "hidden": 100}, "hidden 100 is not a multiple of heads 8"),
            ({"config": "sd15", "aggregator": "sawb"}, "did you mean 'sabw'"),
            ({"config": "sd15", "placement": "IN04"}, "add OUT11"),
            ({"config": "sd14"}, "there is no config .* 'sd14'; did you mean"),
        ],
    )
    def test_what_makes_no_sense(self, options, message):
        with pytest.raises(UserError, match=message):
            run(Options(**options))


class TestAccepted:
    def test_a_vae_is_not_needed(self, look, photo, experts, tmp_path):
        shutil.rmtree(photo / "vae")
        write_single_file(pipe(0), tmp_path / "bare.safetensors", vae=False)
        for place in (photo, tmp_path / "bare.safetensors"):
            found = look(place, config=str(experts / "configs"))
            assert found["experts"][0]["vae"] is None
            assert found["cost"]["parameters"]["vae"] is None

    def test_a_denoiser_alone(self, look, photo):
        found = look(photo / "unet")
        assert found["experts"][0]["text_encoders"] == []
        assert found["cost"]["tokens"] == 77

    def test_pickled_weights_are_not_looked_into(self, look, photo):
        (photo / UNET_FILE).unlink()
        (photo / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"no pickle at all")
        assert look(photo)["experts"][0]["dtype"] is None

    def test_names_of_older_versions(self, look, photo):
        """Attention of VAEs and the inner model of text encoders were once called otherwise; loaders know it."""
        old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

        def rename_vae(tensors):
            for name in list(tensors):
                for new, before in old.items():
                    if f".{new}." in name:
                        tensors[name.replace(new, before)] = tensors.pop(name)

        edit(next((photo / "vae").glob("*.safetensors")), rename_vae)
        edit(
            photo / "text_encoder/model.safetensors",
            lambda tensors: [tensors.update({f"text_model.{name}": tensors.pop(name)}) for name in list(tensors)],
        )
        look(photo)
        Ensemble.from_experts([str(photo)]).pipeline()

    def test_a_lora_file_is_only_checked_for_being_whole(self, look, experts, tmp_path):
        lora = write_lora(sd_pipeline(0), tmp_path / "style.safetensors")
        assert (
            look(f"styled={experts / 'photo'}+{lora}")["experts"][0]["parameters"]
            == look(experts / "photo")["experts"][0]["parameters"]
        )
        os.truncate(lora, lora.stat().st_size - 4)
        with pytest.raises(UserError, match="style.safetensors is cut off"):
            look(f"styled={experts / 'photo'}+{lora}")


class TestFusion:
    def test_every_mismatch_is_named_after_the_report(self, afa, experts, tmp_path):
        wide = {"block_out_channels": (16, 24), "cross_attention_dim": 32}
        pipe(3, prediction_type="v_prediction", **wide).save_pretrained(tmp_path / "odd")
        code, out, err = afa(experts / "photo", experts / "paint", tmp_path / "odd", "--json")
        found = json.loads(out)
        expected = [
            "stage IN03 has 24 channels, expected 32 (and so M00, OUT00, OUT01)",
            "cross_attention_dim is 32, expected 24",
            "prediction_type is v_prediction, expected epsilon",
        ]
        assert code == 2
        assert found["mismatches"] == [f"'odd' cannot join 'photo': {reason}" for reason in expected]
        assert all(reason in err for reason in found["mismatches"])
        assert found["aggregators"] is found["cost"]["flops"]["ensemble"] is None
        assert len(found["cost"]["flops"]["each_expert"]) == 3

    def test_blocks_that_are_cut_differently(self):
        one, other = Expert(name="a", model=meta(sd_unet(0))), Expert(name="b", model=meta(sdxl_unet(0)))
        found = mismatches([one, other])
        assert found[0] == (
            "'b' cannot join 'a': stages IN09, IN10, IN11, OUT09, OUT10, OUT11 are missing;"
            " it has 19 stages, expected 25; the blocks are cut differently"
        )
        assert any("addition_embed_type is text_time, expected None" in reason for reason in found)
        assert any(
            "stages IN09, IN10, IN11, OUT09, OUT10, OUT11 are not expected" in reason for reason in mismatches([other, one])
        )

    def test_text_encoders_of_other_widths(self, experts):
        photo = read_outline(ExpertSpec.parse(str(experts / "photo"))).expert
        real = config_outline("real", "sd15").expert
        other = Expert(name="b", model=photo.model, text_encoders=real.text_encoders, scheduler=scheduler())
        assert mismatches([photo, other]) == ["'b' cannot join 'photo': text encoder 1 is 768 wide, expected 24"]


class TestEnsemble:
    @pytest.fixture
    def saved(self, experts, tmp_path):
        Ensemble.from_experts([str(experts / "photo"), str(experts / "paint")], placement="blocks", vae="paint", **SMALL).save(
            tmp_path / "mine"
        )
        return tmp_path / "mine"

    def test_a_saved_ensemble_is_shown_as_it_was_made(self, inspect, saved, experts):
        found = inspect(saved)
        again = inspect(experts / "photo", experts / "paint", placement="blocks", **SMALL)
        assert found["ensemble"] == str(saved)
        assert found["stages"] == again["stages"]
        assert found["cost"] == again["cost"]
        assert found["aggregators"]["options"] == SMALL

    def test_aggregators_that_are_cut_off(self, saved):
        os.truncate(saved / "aggregators.safetensors", 5000)
        with pytest.raises(UserError, match="aggregators.safetensors is"):
            run(Options(experts=[str(saved)]))

    def test_aggregators_that_lack_a_weight(self, saved):
        edit(saved / "aggregators.safetensors", lambda tensors: tensors.pop("M00.conv_out.weight"))
        with pytest.raises(UserError, match="lacks 1 of .*M00.conv_out.weight"):
            run(Options(experts=[str(saved)]))

    def test_an_expert_that_is_gone(self, saved, tmp_path):
        manifest = saved / "afa.json"
        manifest.write_text(manifest.read_text().replace('/paint"', '/painting"'))
        with pytest.raises(UserError, match="expert 'paint' of .*there is no folder or file .*painting"):
            run(Options(experts=[str(saved)]))

    def test_it_brings_its_own_recipe(self, saved, experts):
        with pytest.raises(UserError, match="leave out --hidden"):
            run(Options(experts=[str(saved)], hidden=8))
        with pytest.raises(UserError, match="inspect it alone"):
            run(Options(experts=[str(saved), str(experts / "photo")]))


class TestOutput:
    def test_text_and_json_hold_the_same_numbers(self, afa, experts):
        places = [experts / "photo", experts / "sketch", "--depth", 0]
        (_, text, _), (_, document, _) = afa(*places), afa(*places, "--json")
        found = json.loads(document)
        lines = {line.split()[0]: line for line in text.splitlines() if line.strip()}
        for stage in found["stages"]:
            assert f" {stage['channels']} " in lines[stage["name"]]
            assert f" {stage['aggregator_parameters']:,} " in lines[stage["name"]]
        for value in found["cost"]["parameters"].values():
            assert f" {value:,} " in text
        for part in ("experts", "aggregators", "total"):
            assert all(scaled(sizes[part], "B") in text for sizes in found["cost"]["bytes"].values())
        assert all(scaled(found["cost"]["flops"][part], "FLOP") in text for part in ("experts", "aggregators", "ensemble"))

    def test_experts_may_stand_before_or_after_options(self, afa, experts):
        options = ["--aggregator", "mean", "--json"]
        assert afa(*options, experts / "photo", experts / "paint") == afa(experts / "photo", experts / "paint", *options)

    def test_help_needs_no_torch_and_examples_stand_in_it(self):
        program = (
            "import sys, afa.cli.main as m\n"
            "m.COMMANDS = {'inspect': 'afa.cli.inspect'}\n"
            "try: m.main(['inspect', '--help'])\n"
            "finally: assert not {'torch', 'diffusers', 'transformers'} & set(sys.modules)\n"
        )
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
        assert all(example in done.stdout for example in EXAMPLES)

    def test_nothing_but_the_document_is_printed(self, experts):
        program = "import sys, afa.cli.main as m\nm.COMMANDS = {'inspect': 'afa.cli.inspect'}\nsys.exit(m.main(sys.argv[1:]))"
        quiet = {name: value for name, value in os.environ.items() if not name.endswith("_VERBOSITY")}
        command = [sys.executable, "-c", program, "inspect", str(experts / "photo"), str(experts / "paint"), "--json"]
        done = subprocess.run(command, capture_output=True, text=True, env=quiet, check=True)
        assert done.stderr == ""
        json.loads(done.stdout)


def test_columns_stand_under_their_headers():
    assert table(["name", ">size"], [["a", 1], ["long name", None]]) == "name       size\na             1\nlong name     -"


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (859_520_964 * 4, "3.438 GB"), (999_960, "1 MB"), (None, None)],
)
def test_numbers_carry_the_unit_that_fits(value, text):
    assert scaled(value, "B") == text
