"""A component that afa fills with weights is the one that its library loads, to the bit."""

import json

import diffusers
import pytest
import torch
import transformers
from tiny import sdxl_pipeline
from tiny_transformers import flux_pipeline, qwen_image_pipeline, sd3_pipeline

from afa.experts.description import describe
from afa.experts.load import load_expert
from afa.experts.locate import locate
from afa.experts.spec import ExpertSpec

PIPELINES = {"sdxl": sdxl_pipeline, "sd3": sd3_pipeline, "flux": flux_pipeline, "qwen_image": qwen_image_pipeline}


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
        theirs = getattr({"diffusers": diffusers, "transformers": transformers}[library], kind).from_pretrained(folder, subfolder=name, **options)
        mine = component.load(dtype)
        assert type(mine) is type(theirs) and not mine.training
        same(dict(mine.named_parameters()), dict(theirs.named_parameters()))  # what is tied is one parameter
        same(dict(mine.named_buffers()), dict(theirs.named_buffers()))


def test_what_is_described_is_what_is_loaded(folder, components):
    loaded = load_expert(str(folder))
    modules = {"vae": loaded.load_vae(), **dict(zip(("text_encoder", "text_encoder_2", "text_encoder_3"), loaded.text_encoders, strict=False))}
    for name, component in components.items():
        module = modules.get(name, loaded.model)
        assert type(component.model) is type(module)
        assert {key: tensor.shape for key, tensor in component.model.state_dict().items()} == {key: tensor.shape for key, tensor in module.state_dict().items()}
        assert all(tensor.is_meta for tensor in component.model.state_dict().values())


def test_loading_leaves_random_numbers_alone(components):
    before = torch.get_rng_state()
    for component in components.values():
        component.load(torch.float32)
    assert torch.equal(torch.get_rng_state(), before)
