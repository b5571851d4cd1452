"""One FLUX.2 transformer walked by stages is the stock forward, bit for bit; what is not supported is refused by name."""

import copy
import functools

import pytest
import torch
from diffusers import Flux2Transformer2DModel
from diffusers.loaders.single_file_utils import convert_flux2_transformer_checkpoint_to_diffusers
from diffusers.models.transformers.transformer_flux2 import Flux2KVCache
from family_models import SMALL_SABW, in_turns
from tiny_flux2 import (
    flux2_inputs,
    flux2_pipeline,
    flux2_transformer,
    klein_inputs,
    klein_pipeline,
    klein_transformer,
)

from afa.aggregators.registry import count_parameters
from afa.cost import call_of, count_flops
from afa.models.flux2 import Flux2Ensemble
from afa.models.registry import FAMILIES, layers_of
from afa.training.finetune import adapted

MAKERS = {"dev": (flux2_transformer, flux2_inputs), "klein": (klein_transformer, klein_inputs)}


def alone(model, placement="layers"):
    """An ensemble of one, with small aggregators."""
    return Flux2Ensemble([model], recipe=SMALL_SABW, placement=placement)


def ids(value):
    return {"img_ids": value["img_ids"][None].expand(2, -1, -1), "txt_ids": value["txt_ids"][None].expand(2, -1, -1)}


CALLS = {
    "as it is": ({}, lambda call: {}),
    "not square": ({"height": 12, "width": 20}, lambda call: {}),
    "one image": ({"batch": 1}, lambda call: {}),
    "a longer prompt": ({"tokens": 19}, lambda call: {}),
    "ids of every image, as the pipelines pass them": ({}, ids),
    "a guidance of each image": ({}, lambda call: {"guidance": torch.tensor([1.0, 6.0])}),
    "no guidance": ({}, lambda call: {"guidance": None}),
    "a time of each image": ({}, lambda call: {"timestep": torch.tensor([0.02, 0.93])}),
    "joint_attention_kwargs": ({}, lambda call: {"joint_attention_kwargs": {}}),
}


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize(("name", "placement"), in_turns(CALLS, ["layers", "every-2", "out"]))
def test_one_expert_is_itself(name, kind, placement):
    (make, make_call), (size, extra) = MAKERS[kind], CALLS[name]
    model, call = make(), make_call(**size)
    call |= extra(call)
    with torch.no_grad():
        expected = model(**copy.deepcopy(call)).sample
        made = alone(model, placement)
        assert torch.equal(made(**copy.deepcopy(call)).sample, expected)
        if placement == "layers":
            assert torch.equal(made(**call, return_dict=False)[0], expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", MAKERS)
def test_one_expert_is_itself_in_half_precision(kind, dtype):
    make, make_call = MAKERS[kind]
    model, call = make().to(dtype), make_call(tokens=300)
    call = {key: value.to(dtype) if torch.is_tensor(value) and value.is_floating_point() else value for key, value in call.items()}
    with torch.no_grad():
        expected = model(**call).sample
        assert torch.equal(alone(model)(**call).sample, expected)
        assert torch.equal(alone(model).to(dtype)(**call).sample, expected)


@pytest.mark.parametrize("name", ["guidance", "timestep", "txt_ids", "img_ids", "encoder_hidden_states"])
def test_everything_that_is_passed_changes_the_prediction(name):
    """The tiny model would otherwise prove nothing: guidance, time, both kinds of positions and the text matter in it."""
    call = flux2_inputs()
    changed = {
        "guidance": call["guidance"] + 2,
        "timestep": call["timestep"] / 2,
        "txt_ids": call["txt_ids"].flip(0),
        "img_ids": call["img_ids"].flip(0),
        "encoder_hidden_states": call["encoder_hidden_states"].flip(0),
    }
    made = alone(flux2_transformer())
    with torch.no_grad():
        assert (made(**call).sample - made(**call | {name: changed[name]}).sample).abs().max() > 1e-3


def size(double, single, heads, text):
    return {"num_layers": double, "num_single_layers": single, "num_attention_heads": heads, "joint_attention_dim": text, "guidance_embeds": False}


REAL = {
    "dev": ({}, 8, 48, 6144, 32_223_281_152, 105_918_336),
    "klein-4b": (size(5, 20, 24, 7680), 5, 20, 3072, 3_875_544_576, 27_356_032),
    "klein-9b": (size(8, 24, 32, 12288), 8, 24, 4096, 9_078_581_248, 44_539_008),
}


@pytest.mark.parametrize("name", REAL)
def test_the_real_models_have_these_stages_and_parameters(name):
    config, double, single, width, parameters, aggregators = REAL[name]
    with torch.device("meta"):
        model = Flux2Transformer2DModel(**config)
    stages = FAMILIES["flux2"].stages(model)
    assert [stage.name for stage in stages] == [f"D{index:02}" for index in range(double)] + [f"S{index:02}" for index in range(single)] + ["OUT"]
    assert {stage.channels for stage in stages[:-1]} == {width} and stages[-1].channels == 128
    assert count_parameters(model) == parameters
    made = Flux2Ensemble([model] * 3)
    assert made.side == 128 and made.widths == (width, width)
    assert count_parameters(made.aggregators) == aggregators  # at all stages about four times as many
    assert count_flops(model, 16, 16).total > 2 * 16 * 16 / 4 * count_parameters(model) / 2  # image tokens times half of the weights, at least


@pytest.mark.parametrize(("make", "kind"), [(flux2_pipeline, "dev"), (klein_pipeline, "klein")])
def test_the_call_is_the_pipelines(make, kind):
    """Everything that the stock pipeline hands to its denoiser in one step, by name, value and dtype."""
    seen, pipe = {}, make()
    pipe.set_progress_bar_config(disable=True)
    pipe.transformer.register_forward_pre_hook(lambda module, args, call: seen.update(call | seen), with_kwargs=True)
    pipe(prompt=["a cat"], height=32, width=48, num_inference_steps=1, output_type="latent", generator=torch.Generator().manual_seed(0))
    theirs = {name: value for name, value in seen.items() if name not in ("joint_attention_kwargs", "return_dict") and value is not None}
    interface, config = FAMILIES["flux2"].interface, MAKERS[kind][0]().config
    noisy = interface.to_latents(theirs["hidden_states"], (4, 6))
    conditions = interface.conditions(config, interface.select_prompt_outputs(pipe.encode_prompt("a cat")), torch.zeros(1, 6))
    ours = interface.denoiser_kwargs(config, noisy, theirs["timestep"] * 1000, conditions)
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        wanted = theirs[name][0] if name.endswith("_ids") else theirs[name]
        assert value.dtype == wanted.dtype and torch.equal(value, wanted), name
    assert torch.equal(interface.latents(ours), noisy) and torch.equal(interface.from_latents(noisy), theirs["hidden_states"])


def test_long_prompts_have_whole_numbers_as_positions_in_half_precision():
    call = call_of(flux2_transformer(), 8, 12, 1, 512, dtype=torch.bfloat16)
    assert call["txt_ids"][:, 3].tolist() == list(range(512))


def with_reference(call):
    """A second image beside the one that is drawn, as the pipelines place it: ten steps away on the first axis."""
    more = call["img_ids"][:16] + torch.tensor([10, 0, 0, 0])
    return {"img_ids": torch.cat([call["img_ids"], more]), "hidden_states": torch.cat([call["hidden_states"], call["hidden_states"][:, :16]], dim=1)}


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (with_reference, "tokens of reference images"),
        (lambda call: {"kv_cache": Flux2KVCache(2, 3), "kv_cache_mode": "cached"}, "kv_cache is for reference images"),
        (lambda call: {"kv_cache_mode": "extract", "num_ref_tokens": 4}, "kv_cache_mode is for reference images"),
        (lambda call: {"num_ref_tokens": 4}, "num_ref_tokens is for reference images"),
        (lambda call: {"ref_fixed_timestep": 0.5}, "ref_fixed_timestep is for reference images"),
        (lambda call: {"joint_attention_kwargs": {"ip_hidden_states": []}}, "IP-Adapter"),
    ],
)
def test_what_is_not_supported_names_itself(changes, sentence):
    call = flux2_inputs()
    with pytest.raises(NotImplementedError, match=sentence):
        alone(flux2_transformer())(**call | changes(call))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"encoder_hidden_states": torch.zeros(2, 7, 48)}, "48 wide; expected 24"),
        *(({name: None}, "img_ids and txt_ids are needed") for name in ("encoder_hidden_states", "timestep", "img_ids", "txt_ids")),
    ],
)
def test_what_does_not_fit_is_said(changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        alone(flux2_transformer())(**flux2_inputs() | changes)


def test_a_strange_patch_size_is_refused():
    made = flux2_transformer()
    made.register_to_config(patch_size=2)
    with pytest.raises(ValueError, match="patch_size 2"):
        Flux2Ensemble.read_stages(made)


def test_the_modulations_of_all_blocks_are_computed_once_a_pass():
    model, seen = klein_transformer(), []
    for kind in ("double_stream_modulation_img", "double_stream_modulation_txt", "single_stream_modulation"):
        model.get_submodule(kind).register_forward_hook(functools.partial(lambda kind, *_: seen.append(kind), kind))
    with torch.no_grad():
        alone(model)(**klein_inputs())
    assert seen == ["double_stream_modulation_img", "double_stream_modulation_txt", "single_stream_modulation"]


def test_the_publishers_names_are_those_that_diffusers_converts():
    """Every matrix of the model has a publisher's name, and a file of such names is converted to this very model."""
    model = flux2_transformer()
    state, file = model.state_dict(), {}
    layers = layers_of(model)
    for original, found in layers.items():
        weight = torch.cat([state[f"{name}.weight"] for name in found.names])
        file[f"{original}.weight"] = weight.roll(len(weight) // 2, 0) if found.swapped else weight
    converted = convert_flux2_transformer_checkpoint_to_diffusers(file)
    assert set(converted) == {name for name, weight in state.items() if weight.ndim == 2}
    assert all(torch.equal(weight, state[name]) for name, weight in converted.items())


def test_a_lora_is_trained_on_attention_and_feed_forward_of_both_kinds_of_blocks():
    model = flux2_transformer()
    inside = {name for name, module in model.named_modules() if "blocks." in name and isinstance(module, torch.nn.Linear)}
    assert {name for name, _ in adapted(model)} == inside
    assert [stage.attends for stage in Flux2Ensemble.read_stages(model)] == [True] * 5 + [False]
