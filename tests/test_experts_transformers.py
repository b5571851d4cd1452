"""Experts of SD3 and FLUX.1 from folders and single files, denoisers alone among them, and the pipeline that lends them the rest."""

import functools
import json

import numpy as np
import pytest
import torch
from original_transformers import originals, write_transformer
from tiny_transformers import FLUX_SMALL, SD3_SMALL, flux_transformer
from tiny_transformers import flux_pipeline as flux_pipeline_of
from tiny_transformers import sd3_pipeline as sd3_pipeline_of
from tiny_transformers import sd3_transformer as sd3_transformer_of

from afa import Ensemble, UserError
from afa.experts.description import describe_config, describe_expert
from afa.experts.load import load_experts
from afa.experts.shipped import KNOWN_CONFIGS
from afa.experts.single_file import detect_config
from afa.experts.spec import ExpertSpec
from afa.models.registry import FAMILIES

sd3_pipeline, sd3_transformer = (functools.partial(make, **SD3_SMALL) for make in (sd3_pipeline_of, sd3_transformer_of))
flux_pipeline = functools.partial(flux_pipeline_of, **FLUX_SMALL)
PIPELINES = {"sd3": (sd3_pipeline, sd3_transformer), "flux": (flux_pipeline, functools.partial(flux_transformer, **FLUX_SMALL))}
SABW = {"hidden": 16, "heads": 2, "depth": 1}
STAGES = {"sd3": 25, "sd35": 25, "sd35-large": 39, "flux": 58, "flux-schnell": 58}
PARAMETERS = {"sd3": 2_028_328_000, "sd35": 2_243_171_520, "sd35-large": 8_056_627_520, "flux": 11_901_408_320, "flux-schnell": 11_891_178_560}


@pytest.fixture(scope="module", params=PIPELINES)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def folders(family, tmp_path_factory):
    """A whole pipeline, a second one with the same text encoders, and a denoiser alone."""
    place, (pipeline, transformer) = tmp_path_factory.mktemp(family), PIPELINES[family]
    pipeline(0).save_pretrained(place / "photo")
    pipeline(1).save_pretrained(place / "paint")
    transformer(2).save_pretrained(place / "draw")
    return place


def drawn(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe("a red bicycle", num_inference_steps=1, height=64, width=64, output_type="np", generator=torch.Generator().manual_seed(0)).images


def draw(ensemble):
    return drawn(ensemble.pipeline())


@functools.cache
def described(config):
    """A published model without content."""
    return describe_config("real", config)


def same_weights(model, other):
    wanted = other.state_dict()
    return all(torch.equal(tensor, wanted[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("config", STAGES)
def test_the_real_architectures_have_their_stages_and_parameters(config):
    model = described(config).expert.model
    assert len(FAMILIES["flux" if "flux" in config else "sd3"].stages(model)) == STAGES[config]
    assert sum(parameter.numel() for parameter in model.parameters()) == PARAMETERS[config]


def test_three_experts_of_folders_draw_and_are_found_again(folders, tmp_path):
    ensemble = Ensemble.from_experts([str(folders / "photo"), str(folders / "paint"), str(folders / "draw")], **SABW)
    assert [len(encoder.encoders) for encoder in ensemble.text_encoders] == [1] * len(ensemble.text_encoders)
    for aggregator in ensemble.aggregators.values():
        torch.nn.init.normal_(aggregator.conv_out.weight)
    expected = draw(ensemble)
    ensemble.save(tmp_path / "saved")
    assert np.array_equal(draw(Ensemble.load(tmp_path / "saved")), expected)
    ensemble.save(tmp_path / "bundle", bundle=True)
    assert np.array_equal(draw(Ensemble.load(tmp_path / "bundle")), expected)


def test_pipelines_in_memory_are_bundled_as_what_they_are(family, tmp_path):
    pipeline = PIPELINES[family][0]
    ensemble = Ensemble.from_experts([pipeline(0), pipeline(1)], aggregator="mean")
    ensemble.save(tmp_path / "bundle", bundle=True)
    assert json.loads((tmp_path / "bundle/experts/expert_0/model_index.json").read_text())["_class_name"] == type(pipeline(0)).__name__
    assert np.array_equal(draw(Ensemble.load(tmp_path / "bundle")), draw(ensemble))


def test_equal_text_encoders_are_loaded_once(folders):
    one, other = load_experts([str(folders / "photo"), str(folders / "paint")])
    assert all(mine is theirs for mine, theirs in zip(one.text_encoders, other.text_encoders, strict=True))
    assert one.model is not other.model


def test_a_frame_lends_to_denoisers_alone_and_is_found_again(family, folders, tmp_path):
    PIPELINES[family][1](5).save_pretrained(tmp_path / "other")
    experts = [str(folders / "draw"), str(tmp_path / "other")]
    ensemble = Ensemble.from_experts(experts, frame=str(folders / "photo"), aggregator="mean")
    own = Ensemble.from_experts(experts[:1], frame=str(folders / "photo"), aggregator="mean", placement="out")
    pipe = PIPELINES[family][0](0, text_seed=0)
    pipe.transformer = PIPELINES[family][1](2)
    assert np.array_equal(draw(own), drawn(pipe))
    expected = draw(ensemble)
    for bundle in (False, True):
        ensemble.save(tmp_path / f"saved{bundle}", bundle=bundle)
        assert np.array_equal(draw(Ensemble.load(tmp_path / f"saved{bundle}")), expected)
    assert not list((tmp_path / "savedTrue/frame").rglob("transformer"))


def test_bare_denoisers_without_a_frame_say_what_is_missing(folders):
    with pytest.raises(UserError, match="bare denoisers"):
        Ensemble.from_experts([str(folders / "draw")]).pipeline()


@pytest.mark.parametrize(("frame", "sentence"), [("nowhere", "no pipeline's folder"), ("draw", "no pipeline's folder")])
def test_a_frame_that_is_none_is_one_sentence(folders, frame, sentence):
    with pytest.raises(UserError, match=sentence):
        Ensemble.from_experts([str(folders / "draw")], frame=str(folders / frame))


def test_a_frame_that_nobody_needs_is_one_sentence(folders):
    with pytest.raises(UserError, match="all of these bring their own"):
        Ensemble.from_experts([str(folders / "photo")], frame=str(folders / "paint"))


@pytest.mark.parametrize("prefix", ["model.diffusion_model.", ""])
def test_a_single_file_is_the_model_it_was_made_of(tmp_path, prefix):
    sd3_pipeline(0).save_pretrained(tmp_path / "whole")
    model = sd3_transformer(1)
    extra = {"first_stage_model.decoder.conv_in.weight": torch.zeros(3)} if prefix else {}  # what files of several parts hold besides
    file = write_transformer("sd3", model.state_dict(), tmp_path / "tuned.safetensors", prefix, **extra)
    ensemble = Ensemble.from_experts([str(tmp_path / "whole"), str(file)], config=str(tmp_path / "whole"), aggregator="mean")
    assert same_weights(ensemble.experts[1].model, model)
    ensemble.save(tmp_path / "saved")
    assert np.array_equal(draw(Ensemble.load(tmp_path / "saved")), draw(ensemble))
    outline = describe_expert(ExpertSpec.parse(str(file)), str(tmp_path / "whole"))
    assert outline.denoiser.dtype == "float32"
    assert outline.text_parts == []


def real_header(kind, config, path, **changes):
    """A file with all keys and shapes of a real checkpoint, and no content on the disk."""
    model = described(config).expert.model
    tensors = {name: torch.empty(shape, device="meta") for name, shape in changes.items()}
    tensors |= {name: tensor for name, tensor in originals(kind, dict(model.state_dict())) if name not in tensors}
    header, end = {}, 0
    for name, tensor in tensors.items():
        header[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [end, end + 2 * tensor.numel()]}
        end += 2 * tensor.numel()
    text = json.dumps(header).encode()
    with path.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        stream.truncate(8 + len(text) + end)
    return path


@pytest.mark.parametrize("config", STAGES)
def test_real_files_are_recognised_and_known_without_their_weights(config, tmp_path):
    file = real_header("flux" if "flux" in config else "sd3", config, tmp_path / "real.safetensors")
    assert detect_config(file) == config
    outline = describe_expert(ExpertSpec.parse(str(file)))
    assert (outline.config, outline.denoiser.dtype) == (config, "bfloat16")
    assert sum(parameter.numel() for parameter in outline.expert.model.parameters()) == PARAMETERS[config]


def test_a_file_cut_down_says_what_it_lacks(tmp_path):
    file = real_header("sd3", "sd3", tmp_path / "real.safetensors")
    with pytest.raises(UserError, match="weights and config belong to different models|lacks|incomplete"):
        describe_expert(ExpertSpec.parse(str(file)), "sd35-large")


@pytest.mark.parametrize(
    ("name", "shape", "sentence"),
    [
        ("img_in.weight", (3072, 384), "FLUX.1 Fill"),
        ("img_in.weight", (3072, 128), "FLUX.1 Depth or Canny"),
        ("double_blocks.0.img_attn.qkv.weight_scale_2", (1,), "nvfp4"),
        ("double_blocks.0.img_attn.qkv.weight_scale", (1,), "quantised"),  # beside bfloat16
    ],
)
def test_what_a_single_file_cannot_be_is_one_sentence(tmp_path, name, shape, sentence):
    file = real_header("flux", "flux", tmp_path / "real.safetensors", **{name: shape})
    with pytest.raises(UserError, match=sentence):
        detect_config(file)


def test_experts_of_two_kinds_of_flux_cannot_be_fused():
    with pytest.raises(UserError, match="guidance_embeds is False, expected True"):
        Ensemble.from_experts([flux_pipeline(0), flux_pipeline(1, guidance_embeds=False)])


def test_other_text_encoders_are_joined_or_refused():
    assert Ensemble.from_experts([flux_pipeline(0), flux_pipeline(1, text_seed=1)]).text_encoders[0].joined
    with pytest.raises(UserError, match=r"text encoders of its own \(number 1, 2, 3\)"):
        Ensemble.from_experts([sd3_pipeline(0), sd3_pipeline(1, text_seed=1)])


def test_a_denoiser_that_fills_in_needs_its_pipeline():
    ensemble = Ensemble.from_experts([flux_pipeline(0, in_channels=40, out_channels=16)])
    with pytest.raises(UserError, match="filling in or editing"):
        ensemble.pipeline()


@pytest.mark.parametrize("name", KNOWN_CONFIGS)
def test_every_known_config_is_complete(name):
    assert described(name).expert.scheduler is not None


def addresses(expert):
    modules = [expert.model, *expert.text_encoders, expert.load_vae()] if expert.text_encoders else [expert.model]
    return {tensor.data_ptr() % 64 for module in modules for tensor in (*module.parameters(), *module.buffers())}


def test_weights_of_files_lie_where_weights_in_memory_do(folders):
    """Kernels round by the address of their operands: at odd ones, equal weights predict other last bits."""
    experts = load_experts([str(folders / "photo"), str(folders / "draw")])
    assert [addresses(expert) for expert in experts] == [{0}] * 2


def test_weights_of_single_files_lie_there_too(tmp_path):
    sd3_pipeline(0).save_pretrained(tmp_path / "whole")
    file = write_transformer("sd3", sd3_transformer(1).state_dict(), tmp_path / "tuned.safetensors", prefix="")
    (expert,) = load_experts([str(file)], config=str(tmp_path / "whole"))
    assert addresses(expert) == {0}
