"""One transformer walked by stages is the stock forward, bit for bit, whatever a pipeline may pass."""

import copy
from collections.abc import Callable

import pytest
import torch
from family_models import MODELS, SMALL_SABW, in_turns
from tiny_transformers import flux_inputs, flux_transformer, sd3_inputs, sd3_transformer

from afa.models import flux
from afa.models.flux import FluxEnsemble
from afa.models.sd3 import SD3Ensemble
from afa.stages import tokens


def sd3_control(model, call):
    """ControlNet residuals, one for two blocks."""
    tokens = call["hidden_states"].shape[-2] * call["hidden_states"].shape[-1] // 4
    return {"block_controlnet_hidden_states": [torch.randn(2, tokens, model.inner_dim) for _ in range(2)]}


def flux_control(model, call):
    shape = (2, call["hidden_states"].shape[1], model.inner_dim)
    return {
        "controlnet_block_samples": [torch.randn(shape)],
        "controlnet_single_block_samples": [torch.randn(shape) for _ in range(2)],
    }


def plain(model, call):
    return {}


CALLS: dict[str, tuple[Callable, Callable, Callable]] = {
    "sd3": (sd3_transformer, sd3_inputs, plain),
    "sd3 not square": (sd3_transformer, lambda: sd3_inputs(height=12, width=20), plain),
    "sd3 one image": (sd3_transformer, lambda: sd3_inputs(batch=1), plain),
    "sd3 without dual attention": (lambda: sd3_transformer(dual_attention_layers=(), qk_norm=None), sd3_inputs, plain),
    "sd3 controlnet": (sd3_transformer, sd3_inputs, sd3_control),
    "sd3 skip-layer guidance": (sd3_transformer, sd3_inputs, lambda model, call: {"skip_layers": [1, 2]}),
    "sd3 without its last layer": (sd3_transformer, sd3_inputs, lambda model, call: {"skip_layers": [3], **sd3_control(model, call)}),
    "flux": (flux_transformer, flux_inputs, plain),
    "flux not square": (flux_transformer, lambda: flux_inputs(height=12, width=20), plain),
    "flux one image": (flux_transformer, lambda: flux_inputs(batch=1), plain),
    "flux schnell": (
        lambda: flux_transformer(guidance_embeds=False),
        lambda: {name: value for name, value in flux_inputs().items() if name != "guidance"},
        plain,
    ),
    "flux controlnet": (flux_transformer, flux_inputs, flux_control),
    "flux controlnet repeated": (
        lambda: flux_transformer(num_layers=4),
        flux_inputs,
        lambda model, call: {
            "controlnet_block_samples": [torch.randn(2, call["hidden_states"].shape[1], model.inner_dim) for _ in range(2)],
            "controlnet_blocks_repeat": True,
        },
    ),
    "flux fill": (
        lambda: flux_transformer(in_channels=40, out_channels=16),
        lambda: flux_inputs() | {"hidden_states": torch.randn(2, 64, 40)},
        plain,
    ),
    "flux ids with a batch": (
        flux_transformer,
        flux_inputs,
        lambda model, call: {name: call[name][None] for name in ("img_ids", "txt_ids")},
    ),
}


@pytest.mark.parametrize(("name", "placement"), in_turns(CALLS, ["layers", "every-2", "out"]))
def test_one_expert_is_itself(name, placement):
    make_model, make_call, extra = CALLS[name]
    model, call = make_model(), make_call()
    call = {**call, **extra(model, call)}
    kind = SD3Ensemble if name.startswith("sd3") else FluxEnsemble
    with torch.no_grad():
        expected = model(**copy.deepcopy(call)).sample
        assert torch.equal(kind([model], recipe=SMALL_SABW, placement=placement)(**copy.deepcopy(call)).sample, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_one_expert_is_itself_in_half_precision(name, dtype):
    family = MODELS[name]
    model = family.make().to(dtype)
    call = {key: value.to(dtype) if value.is_floating_point() and key != "guidance" else value for key, value in family.call().items()}
    with torch.no_grad():
        expected = model(**call).sample
        assert torch.equal(family.ensemble([model], recipe=SMALL_SABW)(**call).sample, expected)
        assert torch.equal(family.ensemble([model], recipe=SMALL_SABW).to(dtype)(**call).sample, expected)


@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_each_expert_reads_its_own_part_of_joined_text(name):
    family = MODELS[name]
    model = family.ensemble([family.make(seed) for seed in range(2)], placement="out")
    one, other = family.call(seed=0), family.call(seed=1)
    joined = {key: torch.cat([one[key], other[key]], dim=-1) for key in ("encoder_hidden_states", "pooled_projections")}
    from afa.denoiser.hooks import only_expert

    for index, own in enumerate((one, other)):
        call = one | {key: own[key] for key in joined}
        with torch.no_grad(), only_expert(model, model.names[index]):
            assert torch.equal(model(**one | joined).sample, model.experts[index](**call).sample)


def test_packing_is_the_pipelines_own():
    from diffusers import FluxPipeline

    latents = torch.randn(2, 4, 8, 12)
    packed = tokens.pack(latents)
    assert torch.equal(packed, FluxPipeline._pack_latents(latents, 2, 4, 8, 12))
    assert torch.equal(tokens.unpack(packed, (8, 12)), latents)
    ids = FluxPipeline._prepare_latent_image_ids(2, 4, 6, torch.device("cpu"), torch.float32)
    assert torch.equal(flux.image_ids((8, 12), latents), ids)
    assert flux.grid_of(ids) == (4, 6)


def test_reference_images_are_refused():
    ids = flux.image_ids((8, 8), torch.zeros(1))
    reference = ids + torch.tensor([1.0, 0, 0])
    call = flux_inputs(height=8, width=8)
    call |= {"img_ids": torch.cat([ids, reference]), "hidden_states": torch.cat([call["hidden_states"]] * 2, dim=1)}
    with pytest.raises(NotImplementedError, match="reference images"):
        FluxEnsemble([flux_transformer()])(**call)


@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_an_ip_adapter_is_refused_by_name(name):
    family = MODELS[name]
    with pytest.raises(NotImplementedError, match="IP-Adapter"):
        family.ensemble([family.make()])(**family.call(), joint_attention_kwargs={"ip_adapter_image_embeds": [torch.zeros(1)]})


@pytest.mark.parametrize(("model", "sentence"), [(sd3_transformer, "patch_size 4"), (flux_transformer, "patch_size 2")])
def test_a_strange_patch_size_is_refused(model, sentence):
    made = model()
    made.register_to_config(patch_size=int(sentence[-1]))
    with pytest.raises(ValueError, match=sentence):
        (SD3Ensemble if model is sd3_transformer else FluxEnsemble).read_stages(made)
