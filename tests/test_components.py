"""A component that afa fills with weights is the one that its library loads, to the bit."""

import functools
import json
import shutil

import diffusers
import pytest
import torch
import transformers
from merging_models import saved, sdxl
from safetensors.torch import load_file, save_file
from tiny import SDXL_SMALL, sd_pipeline, sdxl_pipeline
from tiny_krea2 import KREA2_SMALL, krea2_pipeline
from tiny_lumina2 import LUMINA2_SMALL, lumina2_pipeline
from tiny_transformers import (
    FLUX_SMALL,
    QWEN_IMAGE_SMALL,
    SD3_SMALL,
    flux_pipeline,
    qwen_image_pipeline,
    sd3_pipeline,
)

from afa.experts.description import describe
from afa.experts.expert import TEXT_ENCODERS
from afa.experts.load import load_expert
from afa.experts.locate import locate
from afa.experts.spec import ExpertSpec
from afa.merging.engine import merge_files
from afa.merging.settings import MergeSettings

PIPELINES = {
    "sdxl": sdxl_pipeline,
    "sd3": functools.partial(sd3_pipeline, **SD3_SMALL),
    "flux": functools.partial(flux_pipeline, **FLUX_SMALL),
    "qwen_image": functools.partial(qwen_image_pipeline, **QWEN_IMAGE_SMALL),
    "krea2": functools.partial(krea2_pipeline, **KREA2_SMALL),
    "lumina2": functools.partial(lumina2_pipeline, **LUMINA2_SMALL),
}


@pytest.fixture(scope="module", params=PIPELINES)
def folder(request, tmp_path_factory):
    place = tmp_path_factory.mktemp("components") / request.param
    PIPELINES[request.param](0).save_pretrained(place)
    return place


@pytest.fixture(scope="module")
def components(folder):
    return describe(locate(ExpertSpec("x", str(folder)))).components


def same(mine, theirs):
    assert mine.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert mine[name].dtype == tensor.dtype, name
        assert torch.equal(mine[name], tensor), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_it_is_what_its_library_loads(folder, components, dtype):
    index = json.loads((folder / "model_index.json").read_text())
    for name, component in components.items():
        library, kind = index[name]
        options = {"torch_dtype" if library == "diffusers" else "dtype": dtype, "local_files_only": True}
        module = {"diffusers": diffusers, "transformers": transformers}[library]
        theirs = getattr(module, kind).from_pretrained(folder, subfolder=name, **options)
        mine = component.load(dtype)
        assert type(mine) is type(theirs) and not mine.training
        same(dict(mine.named_parameters()), dict(theirs.named_parameters()))  # what is tied is one parameter
        same(dict(mine.named_buffers()), dict(theirs.named_buffers()))


def test_what_is_described_is_what_is_loaded(folder, components):
    loaded = load_expert(str(folder))
    modules = {"vae": loaded.load_vae(), **dict(zip(TEXT_ENCODERS, loaded.text_encoders, strict=False))}
    for name, component in components.items():
        module = modules.get(name, loaded.model)
        assert type(component.model) is type(module)
        described, filled = component.model.state_dict(), module.state_dict()
        assert {key: tensor.shape for key, tensor in described.items()} == {key: tensor.shape for key, tensor in filled.items()}
        assert all(tensor.is_meta for tensor in component.model.state_dict().values())


def test_loading_leaves_random_numbers_alone(components):
    before = torch.get_rng_state()
    for component in components.values():
        component.load(torch.float32)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_single_file_is_what_diffusers_makes_of_it(tmp_path):
    """SDXL's has every kind of name: U-Net and VAE in LDM's layout, a text encoder of CLIP's and one of OpenCLIP's."""
    folders = [saved(sdxl(seed, **SDXL_SMALL), tmp_path / str(seed)) for seed in (0, 1)]
    file = tmp_path / "merged.safetensors"
    merge_files(MergeSettings(experts=[f"x={folders[0]}", f"y={folders[1]}"], output=str(file)))
    theirs = diffusers.StableDiffusionXLPipeline.from_single_file(str(file), config=str(folders[0]), local_files_only=True, dtype=torch.float16)
    mine = load_expert(str(file), torch.float16, str(folders[0]))
    expected = [theirs.unet, theirs.text_encoder, theirs.text_encoder_2, theirs.vae]
    for one, other in zip([mine.model, *mine.text_encoders, mine.load_vae()], expected, strict=True):
        assert type(one) is type(other)
        same(one.state_dict(), other.state_dict())


def old_names(name):
    """As the first diffusers folders of Stable Diffusion 1.x call a VAE's attention."""
    for now, then in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
        name = name.replace(f"attentions.0.{now}.", f"attentions.0.{then}.")
    return name


def test_a_folder_of_the_first_diffusers_is_the_same_expert(tmp_path):
    sd_pipeline(0).save_pretrained(tmp_path / "now")
    shutil.copytree(tmp_path / "now", tmp_path / "then")
    vae, text = tmp_path / "then/vae/diffusion_pytorch_model.safetensors", tmp_path / "then/text_encoder/model.safetensors"
    renamed = {old_names(name): tensor for name, tensor in load_file(vae).items()}
    assert sum("query" in name for name in renamed) == 4  # weight and bias, in encoder and decoder
    save_file(renamed, vae)
    prefixed = {f"text_model.{name.removeprefix('text_model.')}": tensor for name, tensor in load_file(text).items()}
    save_file(prefixed | {"text_model.embeddings.position_ids": torch.arange(8)[None]}, text)
    now, then = (load_expert(str(tmp_path / name)) for name in ("now", "then"))  # each alone, so that nothing is shared
    same(then.load_vae().state_dict(), now.load_vae().state_dict())
    same(then.text_encoders[0].state_dict(), now.text_encoders[0].state_dict())
