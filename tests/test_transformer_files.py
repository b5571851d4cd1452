"""Single files of transformers: the table by which they are known, the publishers' names and diffusers', with whatever stands before them."""

import json
import math

import pytest
import torch
from original_transformers import originals
from safetensors.torch import load_file, save_file
from scaled_weights import stored
from tiny_transformers import (
    flux_pipeline,
    flux_transformer,
    qwen_image_pipeline,
    qwen_image_transformer,
    sd3_pipeline,
    sd3_transformer,
)

from afa import Ensemble, UserError
from afa.experts.description import describe_config, describe_expert
from afa.experts.layouts import layout_of
from afa.experts.load import load_expert
from afa.experts.single_file import detect_config
from afa.experts.spec import ExpertSpec
from afa.experts.transformer_names import PREFIXES, TRANSFORMERS, transformer_in
from afa.merging.engine import merge_files
from afa.merging.settings import MergeSettings

TINY = {"sd3": (sd3_pipeline, sd3_transformer), "flux": (flux_pipeline, flux_transformer), "qwen-image": (qwen_image_pipeline, qwen_image_transformer)}
CONFIGS = ("sd3", "sd35", "sd35-large", "flux", "flux-schnell", "qwen-image")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("pipelines")
    for name, (pipeline, _) in TINY.items():
        pipeline(0).save_pretrained(root / name)
    return root


def same_weights(one, other):
    return all(torch.equal(tensor, other.state_dict()[name]) for name, tensor in one.state_dict().items())


def write(model, path, prefix=""):
    save_file({f"{prefix}{name}": tensor.contiguous() for name, tensor in model.state_dict().items()}, path)
    return path


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("family", TINY)
def test_under_diffusers_names_it_is_the_model_it_was_made_of_and_so_is_a_merge(family, prefix, folders, tmp_path):
    model = TINY[family][1](1)
    file, config = write(model, tmp_path / "diffusion_pytorch_model.safetensors", prefix), str(folders / family)
    for dtype in (torch.float32, torch.bfloat16):
        assert same_weights(load_expert(str(file), dtype, config).model, model.to(dtype))
    merge_files(MergeSettings([f"x={file}", f"y={file}"], str(tmp_path / "merged.safetensors"), config=config))
    before, merged = load_file(file), load_file(tmp_path / "merged.safetensors")
    assert merged.keys() == before.keys() and all(torch.equal(tensor, merged[name]) for name, tensor in before.items())


def test_one_joins_a_pipeline_that_lends_it_the_rest(folders, tmp_path):
    file = write(qwen_image_transformer(1), tmp_path / "tuned.safetensors", PREFIXES[0])
    folder = str(folders / "qwen-image")
    ensemble = Ensemble.from_experts([folder, str(file)], config=folder, aggregator="mean")
    ensemble.save(tmp_path / "saved")
    assert same_weights(Ensemble.load(tmp_path / "saved").experts[1].model, qwen_image_transformer(1))


def test_scaled_weights_under_diffusers_names_are_multiplied_out(folders, tmp_path):
    """As the files of Qwen-Image for ComfyUI."""
    tensors, metadata, wanted = stored(dict(qwen_image_transformer(1).state_dict()), spelling="old", prefix="")
    save_file(tensors, tmp_path / "fp8_scaled.safetensors", metadata)
    model = load_expert(str(tmp_path / "fp8_scaled.safetensors"), config=str(folders / "qwen-image")).model
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in wanted.items())


def real(config, diffusers):
    """The tensors of a published model under either names, without content."""
    state = dict(describe_config("real", config).expert.model.state_dict())
    return state if diffusers else dict(originals("flux" if "flux" in config else "sd3", state))


def header(tensors, path):
    """A file with names and shapes of tensors in bfloat16, and no content on the disk."""
    entries, end = {}, 0
    for name, tensor in tensors.items():
        size = 2 * math.prod(tensor.shape)
        entries[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(entries).encode()
    with path.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        stream.truncate(8 + len(text) + end)
    return path


CASES = [(config, diffusers) for config in CONFIGS for diffusers in (False, True) if diffusers or config != "qwen-image"]


@pytest.mark.parametrize(("config", "diffusers"), CASES)
def test_real_files_are_recognised_by_one_entry_and_complete(config, diffusers, tmp_path):
    tensors = real(config, diffusers)
    file = header(tensors, tmp_path / "real.safetensors")
    found = describe_expert(ExpertSpec.parse(str(file)))
    model = found.expert.model
    assert (found.config, detect_config(file)) == (config, config) and model.dtype == torch.float32
    assert sum(tensor.numel() for tensor in tensors.values()) == sum(tensor.numel() for tensor in model.state_dict().values())
    fitting = [entry for entry in TRANSFORMERS if all(mark in tensors for mark in entry.marks)]
    assert [(entry.diffusers, config in entry.configs) for entry in fitting] == [(layout_of(tensors, file).diffusers, True)]
    assert transformer_in(tensors) == (fitting[0], "")


@pytest.mark.parametrize("channels", [384, 128, 1])
def test_models_that_take_other_images_are_refused_by_their_channels(channels, tmp_path):
    for diffusers, name in ((True, "x_embedder.weight"), (False, "img_in.weight")):
        file = header(real("flux", diffusers) | {name: torch.empty(3072, channels, device="meta")}, tmp_path / "real.safetensors")
        with pytest.raises(UserError, match=rf"{channels} input channels.*the 64 of FLUX.1"):
            detect_config(file)


def test_a_transformer_of_another_size_asks_for_its_config(tmp_path):
    file = write(qwen_image_transformer(0), tmp_path / "x.safetensors")
    with pytest.raises(UserError, match="input channels|weights and config|lacks"):
        describe_expert(ExpertSpec.parse(str(file)))


@pytest.mark.parametrize(
    ("names", "sentence"),
    [
        (["transformer_blocks.0.attn1.to_q.weight"], "diffusers' names.*give its folder"),
        (["controlnet_blocks.0.weight", "transformer_blocks.0.attn.to_q.weight"], "ControlNet"),
        (["transformer_blocks.0.img_mod.1.weight", "txt_norm.weight", "time_text_embed.addition_t_embedding.weight"], "Qwen-Image-Layered"),
    ],
)
def test_others_are_named(names, sentence):
    with pytest.raises(UserError, match=sentence):
        layout_of(names, "x.safetensors")
