"""One expert walked by stages is the stock forward, bit for bit, whatever a pipeline may pass."""

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from family_models import SMALL_SABW, in_turns
from tiny import inputs, sd_unet, sdxl_inputs, sdxl_unet

from afa.aggregators.registry import Recipe
from afa.models.unet import UNetEnsemble


def alone(unet, placement="layers", recipe=SMALL_SABW):
    """An ensemble of one, with small aggregators."""
    return UNetEnsemble([unet], recipe=recipe, placement=placement)


def control(unet, call) -> dict[str, Any]:
    """ControlNet residuals: one per saved skip and one for the middle."""
    saved = [stage for stage in alone(unet, "out").stages if stage.saves_skip]
    batch, _, height, width = call["sample"].shape
    size = lambda level: (-(-height // 2**level), -(-width // 2**level))  # noqa: E731
    down = tuple(torch.randn(batch, stage.channels, *size(stage.level)) for stage in saved)
    return {"down_block_additional_residuals": down, "mid_block_additional_residual": torch.randn_like(down[-1])}


def adapter(unet, call) -> dict[str, Any]:
    """T2I-Adapter residuals: one per down block, at the size of its last attention (or of its end)."""
    model = alone(unet, "out")
    stages = {stage.name: stage for stage in model.stages}
    batch, _, height, width = call["sample"].shape
    names = model._adapter_stages[: len(unet.down_blocks)]
    sizes = [(-(-height // 2 ** stages[name].level), -(-width // 2 ** stages[name].level)) for name in names]
    return {"down_intrablock_additional_residuals": [torch.randn(batch, stages[n].channels, *s) for n, s in zip(names, sizes, strict=True)]}


def mask(unet, call) -> dict[str, Any]:
    keep = torch.ones(call["sample"].shape[0], call["encoder_hidden_states"].shape[1])
    keep[:, 4:] = 0
    return {"encoder_attention_mask": keep}


CALLS: dict[str, tuple[Callable, Callable, Callable]] = {
    "sd": (sd_unet, inputs, lambda unet, call: {}),
    "one image": (sd_unet, lambda: inputs(batch=1), lambda unet, call: {}),
    "odd batch": (sd_unet, lambda: inputs(batch=3), lambda unet, call: {}),
    "not divisible by 8": (sd_unet, lambda: inputs(height=20, width=12), lambda unet, call: {}),
    "odd sides": (sd_unet, lambda: inputs(height=19, width=13), lambda unet, call: {}),
    "sdxl": (sdxl_unet, sdxl_inputs, lambda unet, call: {}),
    "sdxl odd sides": (sdxl_unet, lambda: sdxl_inputs(height=18, width=14, batch=1), lambda unet, call: {}),
    "timestep_cond": (lambda: sd_unet(time_cond_proj_dim=8), inputs, lambda unet, call: {"timestep_cond": torch.randn(2, 8)}),
    "encoder_attention_mask": (sd_unet, inputs, mask),
    "class labels": (lambda: sd_unet(num_class_embeds=5), inputs, lambda unet, call: {"class_labels": torch.tensor([1, 4])}),
    "concatenated class labels": (
        lambda: sd_unet(class_embed_type="projection", projection_class_embeddings_input_dim=6, class_embeddings_concat=True),
        inputs,
        lambda unet, call: {"class_labels": torch.randn(2, 6)},
    ),
    "controlnet": (sd_unet, inputs, control),
    "controlnet sdxl": (sdxl_unet, sdxl_inputs, control),
    "controlnet odd sides": (sd_unet, lambda: inputs(height=18, width=20), control),
    "t2i adapter": (sd_unet, inputs, adapter),
    "t2i adapter sdxl": (sdxl_unet, sdxl_inputs, adapter),
    "t2i adapter and controlnet": (sd_unet, inputs, lambda unet, call: {**control(unet, call), **adapter(unet, call)}),
    "linear projection, no middle": (lambda: sd_unet(use_linear_projection=True, mid_block_type=None), inputs, lambda unet, call: {}),
    "text projection": (lambda: sd_unet(encoder_hid_dim=10, encoder_hid_dim_type="text_proj"), lambda: inputs(text_width=10), lambda unet, call: {}),
    "one layer per block": (lambda: sd_unet(layers_per_block=1), inputs, lambda unet, call: {}),
    "centred input": (lambda: sd_unet(center_input_sample=True), inputs, lambda unet, call: {}),
    "a timestep per image": (sd_unet, inputs, lambda unet, call: {"timestep": torch.tensor([3, 900])}),
    "a fractional timestep": (sd_unet, inputs, lambda unet, call: {"timestep": 12.5}),
}


@functools.cache
def stock(name):
    """A U-Net, a call, and its own answer."""
    make_unet, make_call, extra = CALLS[name]
    unet, call = make_unet(), make_call()
    call = {**call, **extra(unet, call)}
    with torch.no_grad():
        return unet, call, unet(**copy.deepcopy(call)).sample


@pytest.mark.parametrize(("name", "placement"), in_turns(CALLS, ["layers", "blocks", "out"]))
def test_one_expert_is_itself(name, placement):
    unet, call, expected = stock(name)
    with torch.no_grad():
        recipe = Recipe("mean") if placement == "layers" and name != "sd" else SMALL_SABW  # there are 25 to make
        got = alone(unet, placement, recipe)(**copy.deepcopy(call)).sample
    assert torch.equal(got, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("aggregators", ["cast", "float32"])
def test_one_expert_is_itself_in_half_precision(dtype, aggregators):
    unet = sd_unet().to(dtype)
    call = {name: value.to(dtype) if value.is_floating_point() else value for name, value in inputs().items()}
    model = alone(unet)
    if aggregators == "cast":
        model = model.to(dtype)
    with torch.no_grad():
        assert torch.equal(model(**call).sample, unet(**call).sample)


def test_older_t2i_adapter_pipelines_pass_theirs_in_the_controlnets_place():
    unet, call = sd_unet(), inputs()
    call["down_block_additional_residuals"] = adapter(unet, call)["down_intrablock_additional_residuals"]
    with torch.no_grad():
        expected = unet(**copy.deepcopy(call)).sample
        assert torch.equal(alone(unet)(**copy.deepcopy(call)).sample, expected)


def test_the_caller_keeps_its_residuals():
    unet, call = sd_unet(), inputs()
    given = adapter(unet, call)["down_intrablock_additional_residuals"]
    before = [tensor.clone() for tensor in given]
    with torch.no_grad():
        alone(unet)(**call, down_intrablock_additional_residuals=given)
    assert all(torch.equal(now, then) for now, then in zip(given, before, strict=True))
