"""Weights in 8 bits with scales beside them are read as their product, by every reader; other forms are refused by their names."""

import json
import math

import pytest
import torch
from original_layout import write_single_file
from original_transformers import originals, write_transformer
from safetensors.torch import load_file, save_file
from scaled_weights import SPELLINGS, stored
from tiny import ONE_LEVEL, sd_pipeline
from tiny_transformers import SD3_SMALL, sd3_pipeline, sd3_transformer

from afa import UserError
from afa.experts.description import describe_config, describe_expert
from afa.experts.headers import load_tensors, read_file, read_header
from afa.experts.load import load_expert
from afa.experts.lora import read_lora
from afa.experts.spec import ExpertSpec
from afa.experts.tensors import TensorReader
from afa.merging.engine import merge_files
from afa.merging.settings import MergeSettings

FP8, INT8 = torch.float8_e4m3fn, torch.int8


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Whole pipelines as folders of configs; a whole U-Net's checkpoint, the U-Net alone in two layouts, and a transformer."""
    root = tmp_path_factory.mktemp("plain")
    pipe = sd_pipeline(0, **ONE_LEVEL)
    pipe.save_pretrained(root / "sd")
    whole = load_file(write_single_file(pipe, root / "whole.safetensors"))
    prefix = "model.diffusion_model."
    save_file({name.removeprefix(prefix): tensor for name, tensor in whole.items() if name.startswith(prefix)}, root / "unet.safetensors")
    save_file({name: tensor.contiguous() for name, tensor in pipe.unet.state_dict().items()}, root / "diffusers.safetensors")
    sd3_pipeline(0, **SD3_SMALL).save_pretrained(root / "sd3")
    write_transformer("sd3", sd3_transformer(1, **SD3_SMALL).state_dict(), root / "sd3.safetensors")
    return root


FILES = {"whole": "sd", "unet": "sd", "diffusers": "sd", "sd3": "sd3"}  # file -> configs
CASES = [("unet", FP8, spelling, "scalar") for spelling in SPELLINGS]
CASES += [("unet", torch.float8_e5m2, "noted", "one"), ("unet", torch.float8_e5m2, "old", "one"), ("unet", FP8, "bare", "rows")]
CASES += [("unet", FP8, "noted", "column"), ("unet", FP8, "header", "blocks"), ("unet", INT8, "noted", "scalar"), ("unet", INT8, "header", "column")]
CASES += [(file, *case) for file in ("whole", "diffusers", "sd3") for case in ((FP8, "old", "scalar"), (FP8, "bare", "rows"), (INT8, "noted", "column"))]


def both(home, tmp_path, file, *case):
    """A file with scales, and one with the products in float32."""
    tensors, metadata, wanted = stored(load_file(home / f"{file}.safetensors"), *case)
    save_file(tensors, tmp_path / "scaled.safetensors", metadata)
    save_file(wanted, tmp_path / "plain.safetensors")
    return str(tmp_path / "scaled.safetensors"), str(tmp_path / "plain.safetensors")


def state(expert):
    """All weights, those of the text encoders among them."""
    models = [expert.model, *expert.text_encoders]
    return {f"{place}.{name}": tensor for place, model in enumerate(models) for name, tensor in model.state_dict().items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) and tensor.dtype == other[name].dtype for name, tensor in one.items())


@pytest.mark.parametrize(("file", "kind", "spelling", "form"), CASES)
def test_an_expert_is_the_product_of_its_weights_and_scales_to_the_bit(file, kind, spelling, form, home, tmp_path):
    scaled, plain = both(home, tmp_path, file, kind, spelling, form)
    config = str(home / FILES[file])
    for dtype in (torch.float32, torch.bfloat16, torch.float16) if spelling == "bare" else (torch.float32,):
        assert same(state(load_expert(scaled, dtype, config)), state(load_expert(plain, dtype, config)))


@pytest.mark.parametrize(("kind", "config"), [("sd3", "sd35"), ("flux", "flux")])
def test_real_transformers_with_scales_are_recognised_and_complete(kind, config, tmp_path):
    """All names and shapes of a published model with old names of scales, and no content on the disk."""
    header, end = {"scaled_fp8": {"dtype": "F8_E4M3", "shape": [0], "data_offsets": [0, 0]}}, 0
    for name, tensor in originals(kind, dict(describe_config("real", config).expert.model.state_dict())):
        own = [(name, "BF16", tensor.shape)]
        if tensor.ndim == 2:
            own = [(name, "F8_E4M3", tensor.shape), (f"{name.removesuffix('weight')}scale_weight", "F32", ())]
        for one, code, shape in own:
            size = {"F8_E4M3": 1, "F32": 4, "BF16": 2}[code] * math.prod(shape)
            header[one] = {"dtype": code, "shape": list(shape), "data_offsets": [end, end + size]}
            end += size
    text = json.dumps(header).encode()
    with (tmp_path / "real.safetensors").open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        stream.truncate(8 + len(text) + end)
    found = describe_expert(ExpertSpec.parse(str(tmp_path / "real.safetensors")))
    assert (found.config, found.denoiser.dtype) == (config, "F8_E4M3")
    assert all(parameter.is_floating_point() for parameter in found.expert.model.parameters())


@pytest.mark.parametrize(("kind", "loss"), [(FP8, 2**-4), (torch.float8_e5m2, 2**-3)])
def test_it_is_the_original_within_the_rounding_of_8_bits(kind, loss, home, tmp_path):
    tensors, _, wanted = stored(load_file(home / "whole.safetensors"), kind)
    changed = [name for name, tensor in tensors.items() if tensor.dtype == kind]
    original = load_file(home / "whole.safetensors")
    assert len(changed) > 20
    for name in changed:
        difference = (wanted[name] - original[name]).abs()
        assert (difference <= loss * original[name].abs() + 1e-3 * original[name].abs().max()).all()


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize(("kind", "spelling", "form"), [(FP8, "old", "scalar"), (INT8, "noted", "column")])
def test_a_merge_reads_the_same_weights(file, kind, spelling, form, home, tmp_path):
    config = str(home / FILES[file])
    for place in both(home, tmp_path, file, kind, spelling, form):
        merge_files(MergeSettings([f"{name}={place}" for name in "xy"], place.replace(".safe", "-merged.safe"), dtype="float32", config=config))
    scaled, plain = (load_file(tmp_path / f"{name}-merged.safetensors") for name in ("scaled", "plain"))
    assert same(scaled, plain)


def test_without_a_type_a_merge_of_scaled_weights_is_in_bfloat16(home, tmp_path):
    scaled, plain = both(home, tmp_path, "unet", FP8, "old", "scalar")
    merge_files(MergeSettings([f"x={scaled}", f"y={scaled}"], str(tmp_path / "merged.safetensors"), config=str(home / "sd")))
    found, before = load_file(tmp_path / "merged.safetensors"), load_file(scaled)
    assert not any("scale" in name for name in found)
    for name, tensor in load_file(plain).items():
        kind = torch.bfloat16 if before[name].dtype == FP8 else torch.float32
        assert torch.equal(found[name], tensor.to(kind)) and found[name].dtype == kind


def test_parts_of_a_merge_that_are_not_merged_keep_their_scales_meaning(home, tmp_path):
    """The VAE of a whole checkpoint, and what else lies in it."""
    besides = {name: torch.randn(4, 4) for name in ("besides.weight", "besides.second.weight")}
    tensors, metadata, wanted = stored(load_file(home / "whole.safetensors") | besides)
    save_file(tensors, tmp_path / "x.safetensors", metadata)
    file = str(tmp_path / "x.safetensors")
    merge_files(MergeSettings([f"x={file}", f"y={file}"], str(tmp_path / "merged.safetensors"), config=str(home / "sd")))
    found = load_file(tmp_path / "merged.safetensors")
    assert all(torch.equal(found[name], tensor.to(found[name].dtype)) for name, tensor in wanted.items() if name in found)
    assert {"besides.weight", "first_stage_model.decoder.conv_in.weight"} <= set(found)


def test_two_files_with_the_same_numbers_and_other_scales_are_not_the_same(home, tmp_path):
    scaled, _ = both(home, tmp_path, "whole", FP8, "bare", "scalar")
    tensors = load_file(scaled)
    other = next(name for name in tensors if name.startswith("cond_stage") and name.endswith("weight_scale"))
    save_file(tensors | {other: tensors[other] * 2}, tmp_path / "other.safetensors")
    one, two = (describe_expert(ExpertSpec.parse(file), str(home / "sd")).components["text_encoder"] for file in (scaled, str(tmp_path / "other.safetensors")))
    assert one.same_as(one) and not one.same_as(two)


def test_scales_of_parts_that_are_not_read_stay_as_they_are(tmp_path):
    save_file({"a.weight": torch.ones(2), "text_encoders.t5xxl.a.weight_scale": torch.ones(1)}, tmp_path / "x.safetensors")
    assert set(read_file(tmp_path / "x.safetensors")) == {"a.weight", "text_encoders.t5xxl.a.weight_scale"}


def test_readers_that_take_tensors_as_they_are_refuse_scales(tmp_path):
    save_file({"a.weight": torch.ones(2, 2).to(FP8), "a.weight_scale": torch.ones(1)}, tmp_path / "x.safetensors")
    for read in (read_header, load_tensors, read_lora):
        with pytest.raises(UserError, match=r"quantised weights \(a.weight_scale"):
            read(tmp_path / "x.safetensors")


def note(**settings):
    return torch.tensor(list(json.dumps(settings).encode()), dtype=torch.uint8)


WEIGHT, SCALE = torch.ones(4, 4).to(FP8), torch.ones(())
BYTES = torch.ones(4, 4, dtype=torch.uint8)
REFUSED = {
    "nvfp4": ({"a.weight": BYTES, "a.weight_scale": WEIGHT, "a.weight_scale_2": SCALE, "a.comfy_quant": note(format="nvfp4")}, "nvfp4"),
    "nvfp4 without a note": ({"a.weight": BYTES, "a.weight_scale": WEIGHT, "a.weight_scale_2": SCALE}, "nvfp4"),
    "mxfp8": ({"a.weight": WEIGHT, "a.weight_scale": BYTES, "a.comfy_quant": note(format="mxfp8")}, "mxfp8"),
    "mxfp8 without a note": ({"a.weight": WEIGHT, "a.weight_scale": BYTES}, "mxfp8"),
    "convrot": ({"a.weight": BYTES.to(INT8), "a.weight_scale": SCALE, "a.comfy_quant": note(format="int8_tensorwise", convrot=True)}, "convrot"),
    "convrot_w4a4": ({"a.weight": BYTES.to(INT8), "a.weight_scale": SCALE, "a.comfy_quant": note(format="convrot_w4a4")}, "convrot_w4a4"),
    "int8 in blocks": ({"a.weight": BYTES.to(INT8), "a.weight_scale": torch.ones(2, 2), "a.comfy_quant": note(format="int8_tensorwise")}, "shape"),
    "int8 without a note": ({"a.weight": BYTES.to(INT8), "a.weight_scale": SCALE}, "a.weight_scale beside I8"),
    "nf4": ({"a.weight": BYTES, "a.weight.absmax": SCALE, "a.weight.quant_state.bitsandbytes__nf4": BYTES}, "nf4 or fp4 of bitsandbytes"),
    "SVDQuant": ({"a.qweight": BYTES.to(INT8), "a.wscales": SCALE}, "nunchaku"),
    "a scale without its weight": ({"a.weight_scale": SCALE}, "a.weight_scale"),
    "two scales": ({"a.weight": WEIGHT, "a.weight_scale": SCALE, "a.scale_weight": SCALE}, "a.scale_weight|a.weight_scale"),
    "a scale of another shape": ({"a.weight": WEIGHT, "a.weight_scale": torch.ones(3)}, "shape"),
    "a scale beside 16 bits": ({"a.weight": WEIGHT.half(), "a.weight_scale": SCALE}, "beside F16"),
    "a note without its scale": ({"a.weight": WEIGHT, "a.comfy_quant": note(format="float8_e4m3fn")}, "lacks the scale"),
    "a note that is no text": ({"a.weight": WEIGHT, "a.weight_scale": SCALE, "a.comfy_quant": BYTES}, "no format"),
    "a note of another kind": ({"a.weight": WEIGHT, "a.weight_scale": SCALE, "a.comfy_quant": note(form=3)}, "no format"),
    "a note without end": ({"a.weight": WEIGHT, "a.weight_scale": SCALE, "a.comfy_quant": torch.full((1 << 18,), 91, dtype=torch.uint8)}, "no format"),
}


@pytest.mark.parametrize(("tensors", "kind"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_undone_is_refused_by_its_name_in_one_sentence(tensors, kind, tmp_path):
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match=rf"x.safetensors holds quantised weights \(.*({kind})") as refused:
        read_file(tmp_path / "x.safetensors")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"layers": 3}', '{"layers": {"a": 3}}', '{"layers": {"a": {"format": "nvfp4"}}}', "[" * 5000])
def test_a_note_in_the_header_that_says_nothing_known_is_refused(text, tmp_path):
    save_file({"a.weight": WEIGHT, "a.weight_scale": SCALE}, tmp_path / "x.safetensors", {"_quantization_metadata": text})
    with pytest.raises(UserError, match="quantised weights"):
        read_file(tmp_path / "x.safetensors")


def test_an_old_file_may_have_scales_beside_weights_that_are_not_in_8_bits(tmp_path):
    weight = torch.randn(4, 4)
    save_file({"p.a.weight": weight, "p.a.scale_weight": torch.tensor(3.0), "p.scaled_fp8": torch.zeros(0, dtype=FP8)}, tmp_path / "x.safetensors")
    with TensorReader() as reader:
        assert torch.equal(reader.tensor(read_file(tmp_path / "x.safetensors")["p.a.weight"]), weight * 3)
