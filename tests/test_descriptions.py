"""Experts without their weights: what a header tells is what loading would find, and broken files are named."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from inspected import UNET, edit, original, pipe, write_experts, write_sparse
from original_layout import write_single_file
from safetensors.torch import load_file, save_file
from test_experts import write_lora
from tiny import sd_pipeline, sd_unet

from afa import Ensemble, UserError
from afa.experts.description import describe_expert, shared_text_encoders
from afa.experts.spec import ExpertSpec

UNET_FILE = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def experts(tmp_path_factory):
    return write_experts(tmp_path_factory.mktemp("outlined"))


@pytest.fixture
def photo(experts, tmp_path):
    """A copy of one expert that a test may break."""
    return Path(shutil.copytree(experts / "photo", tmp_path / "photo"))


def description(place, config=None):
    return describe_expert(ExpertSpec.parse(str(place)), None if config is None else str(config))


def shared(*places, config=None):
    return [same for (same,) in shared_text_encoders([description(place, config) for place in places])]


def shapes(model):
    return {name: tensor.shape for name, tensor in model.state_dict().items()}


class TestOutlines:
    def test_a_folder_has_the_shapes_it_loads_with(self, experts):
        found, stock = description(experts / "photo"), pipe(0)
        assert all(shapes(part) == shapes(getattr(stock, name)) for name, part in found.parts.items())
        assert set(found.parts) == {"unet", "text_encoder", "vae"}

    def test_a_single_file_has_the_shapes_of_its_folder(self, experts):
        single, folder = description(experts / "photo.safetensors", experts / "configs"), description(experts / "photo")
        assert all(shapes(part) == shapes(single.parts[name]) for name, part in folder.parts.items())

    @pytest.mark.parametrize(
        ("config", "ends"),
        [
            ("sd15", ("time_embed.0.bias", "final_layer_norm.bias")),
            ("sd21", ("encoder.conv_in.weight", "ln_final.bias")),
            ("sdxl", ("label_emb.0.0.weight", "final_layer_norm.bias", "ln_final.bias")),
        ],
    )
    def test_a_real_single_file_is_complete_to_the_last_weight(self, tmp_path, config, ends):
        """Each part's lack is tried with one of the files that name its tensors so."""
        tensors = original(config)
        whole = description(write_sparse(tmp_path / "whole.safetensors", tensors))
        assert (whole.config, whole.denoiser.dtype) == (config, "float16")
        lacking = [next(name for name in tensors if name.endswith(end)) for end in ends]
        for lost in lacking:
            write_sparse(tmp_path / "partly.safetensors", {name: tensor for name, tensor in tensors.items() if name != lost})
            with pytest.raises(UserError, match=r"partly.safetensors .* (lacks 1 of|is incomplete)"):
                description(tmp_path / "partly.safetensors")

    def test_no_weights_are_read(self, tmp_path):
        """A file of 2 GB is neither read nor allocated."""
        io = Path("/proc/self/io")
        if not io.exists():
            pytest.skip("needs /proc/self/io")
        file = write_sparse(tmp_path / "real.safetensors", original("sd15"))
        description(file)  # what is imported is not counted
        before = int(io.read_text().split()[1])
        found = description(file)
        assert file.stat().st_size > 2e9
        assert int(io.read_text().split()[1]) - before < 20e6
        assert all(tensor.is_meta for part in found.parts.values() for tensor in part.state_dict().values())


class TestTextEncoders:
    def test_equal_ones_are_found_by_their_bytes(self, experts):
        assert shared(experts / "photo", experts / "sketch", experts / "paint") == [None, None, "photo"]

    def test_equal_ones_are_found_in_single_files(self, experts, tmp_path):
        for name, text in (("one", 3), ("two", 4), ("three", 3)):
            write_single_file(pipe(len(name), text_seed=text), tmp_path / f"{name}.safetensors")
        places = [tmp_path / f"{name}.safetensors" for name in ("one", "two", "three")]
        assert shared(*places, config=experts / "configs") == [None, None, "one"]

    def test_one_bit_makes_another(self, experts, photo):
        with (photo / "text_encoder/model.safetensors").open("r+b") as file:
            file.seek(-1, os.SEEK_END)
            last = file.read(1)
            file.seek(-1, os.SEEK_END)
            file.write(bytes([last[0] ^ 1]))
        assert shared(experts / "paint", photo) == [None, None]

    def test_other_settings_make_another(self, experts, photo):
        config = photo / "text_encoder/config.json"
        config.write_text(config.read_text().replace("quick_gelu", "gelu"))
        assert shared(experts / "paint", photo) == [None, None]

    @pytest.mark.parametrize(("key", "same"), [("lora_te_text_model.up.weight", None), ("unet.conv_in.lora_A.weight", "photo")])
    def test_a_lora_on_an_encoder_makes_another(self, experts, tmp_path, key, same):
        save_file({key: torch.zeros(1)}, tmp_path / "style.safetensors")
        assert shared(experts / "photo", f"styled={experts / 'paint'}+{tmp_path / 'style.safetensors'}*0.5") == [None, same]


class TestRefusals:
    def refused(self, place, message, config=None):
        with pytest.raises(UserError, match=message) as raised:
            description(place, config)
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

    def test_a_shard_that_is_missing(self, photo):
        shutil.rmtree(photo / "unet")
        sd_unet(0, **UNET).save_pretrained(photo / "unet", max_shard_size="200KB")
        shards = sorted((photo / "unet").glob("*-of-*"))
        assert len(shards) > 1
        assert description(photo).denoiser.dtype == "float32"
        shards[0].unlink()
        self.refused(photo, f"lacks {shards[0].name}, one of {len(shards)} files")

    @pytest.mark.parametrize(("file", "content"), [("model_index.json", "{"), ("unet/config.json", "{"), ("vae/config.json", "")])
    def test_a_broken_config(self, photo, file, content):
        (photo / file).write_text(content)
        self.refused(photo, f"{Path(file).name} cannot be read")

    def test_a_config_that_makes_no_model(self, photo):
        config = json.loads((photo / "unet/config.json").read_text())
        (photo / "unet/config.json").write_text(json.dumps({**config, "down_block_types": ["Spiral"] * 2}))
        self.refused(photo, r"config.json makes no UNet2DConditionModel: .*Spiral")

    def test_a_model_that_is_no_denoiser(self, photo):
        self.refused(photo / "vae", "vae: a AutoencoderKL cannot be an expert")

    def test_one_component_is_no_expert(self, photo):
        self.refused(photo / UNET_FILE, "give its folder: .*unet,")

    def test_a_single_file_with_half_a_text_encoder(self, experts, tmp_path):
        tensors = load_file(experts / "photo.safetensors")
        save_file({name: tensors[name] for name in tensors if "layers.1." not in name or "cond_stage" not in name}, tmp_path / "half.safetensors")
        message = r"the text_encoder in .*half.safetensors .* lacks \d+ of \d+ weights"
        self.refused(tmp_path / "half.safetensors", message, experts / "configs")

    def test_a_lora_file_that_is_cut_off(self, experts, tmp_path):
        lora = write_lora(sd_pipeline(0), tmp_path / "style.safetensors")
        description(f"styled={experts / 'photo'}+{lora}")
        os.truncate(lora, lora.stat().st_size - 4)
        self.refused(f"styled={experts / 'photo'}+{lora}", "style.safetensors is cut off")

    def test_a_lora_on_a_denoiser_alone(self, experts, tmp_path):
        lora = write_lora(sd_pipeline(0), tmp_path / "style.safetensors")
        self.refused(f"styled={experts / 'photo' / 'unet'}+{lora}", "a LoRA needs a whole pipeline to join")


class TestAccepted:
    def test_a_vae_is_not_needed(self, photo, experts, tmp_path):
        shutil.rmtree(photo / "vae")
        write_single_file(pipe(0), tmp_path / "bare.safetensors", vae=False)
        for place in (photo, tmp_path / "bare.safetensors"):
            assert description(place, experts / "configs").expert.vae is None

    def test_a_denoiser_alone(self, photo):
        assert description(photo / "unet").expert.text_encoders == []

    def test_pickled_weights_are_refused(self, photo):
        (photo / UNET_FILE).unlink()
        (photo / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"no pickle at all")
        with pytest.raises(UserError, match=r"pickled \(diffusion_pytorch_model.bin\)"):
            description(photo)

    def test_names_of_older_versions(self, photo):
        """Attention of VAEs and the inner model of text encoders once had other names; loaders know them."""
        old = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}

        def rename(tensors):
            for name in list(tensors):
                for new, before in old.items():
                    if new in name:
                        tensors[name.replace(new, before)] = tensors.pop(name)

        def wrap(tensors):
            for name in list(tensors):
                tensors[f"text_model.{name}"] = tensors.pop(name)

        edit(photo / "vae/diffusion_pytorch_model.safetensors", rename)
        edit(photo / "text_encoder/model.safetensors", wrap)
        description(photo)
        Ensemble.from_experts([str(photo)], aggregator="mean").pipeline()
