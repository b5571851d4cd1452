"""One Qwen-Image transformer walked by stages is the stock forward, bit for bit; padding changes nothing; variants are refused by name."""

import copy

import pytest
import torch
from diffusers import QwenImageTransformer2DModel
from family_models import MODELS, SMALL_SABW, in_turns
from test_laws import ensemble
from tiny_transformers import qwen_image_inputs, qwen_image_transformer

from afa.aggregators.registry import count_parameters
from afa.cost import call_of, count_flops
from afa.models.qwen_image import QwenImageEnsemble
from afa.models.registry import FAMILIES


def alone(model, placement="layers"):
    """An ensemble of one, with small aggregators."""
    return QwenImageEnsemble([model], recipe=SMALL_SABW, placement=placement)


def control(count):
    return lambda model, call: {"controlnet_block_samples": [torch.randn(2, call["hidden_states"].shape[1], model.inner_dim) for _ in range(count)]}


def plain(model, call):
    return {}


CALLS = {
    "as it is": (qwen_image_inputs, plain),
    "not square": (lambda: qwen_image_inputs(height=12, width=20), plain),
    "one image": (lambda: qwen_image_inputs(batch=1), plain),
    "masked text": (lambda: qwen_image_inputs(lengths=(7, 3)), plain),
    "a mask of numbers, with holes": (qwen_image_inputs, lambda model, call: {"encoder_hidden_states_mask": torch.tensor([[1, 0, 1, 1, 0, 1, 0], [1] * 7])}),
    "controlnet": (qwen_image_inputs, control(2)),
    "controlnet of three for four blocks": (qwen_image_inputs, control(3)),
    "a shape an image": (qwen_image_inputs, lambda model, call: {"img_shapes": [(1, 8, 8)] * 2}),
    "shapes of fewer images than there are": (qwen_image_inputs, lambda model, call: {"img_shapes": [[(1, 8, 8)]]}),
    "attention_kwargs": (qwen_image_inputs, lambda model, call: {"attention_kwargs": {}}),
    "a time of each image": (qwen_image_inputs, lambda model, call: {"timestep": torch.tensor([0.02, 0.93])}),
}


@pytest.mark.parametrize(("name", "placement"), in_turns(CALLS, ["layers", "every-2", "out"]))
def test_one_expert_is_itself(name, placement):
    make_call, extra = CALLS[name]
    model, call = qwen_image_transformer(), make_call()
    call = {**call, **extra(model, call)}
    with torch.no_grad():
        expected = model(**copy.deepcopy(call)).sample
        made = alone(model, placement)
        assert torch.equal(made(**copy.deepcopy(call)).sample, expected)
        if placement == "layers":
            assert torch.equal(made(**call, return_dict=False)[0], expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("lengths", [(), (7, 3)])
def test_one_expert_is_itself_in_half_precision(dtype, lengths):
    model = qwen_image_transformer().to(dtype)
    call = qwen_image_inputs(lengths=lengths)
    call = {key: value.to(dtype) if torch.is_tensor(value) and value.is_floating_point() else value for key, value in call.items()}
    with torch.no_grad():
        expected = model(**call).sample
        assert torch.equal(alone(model)(**call).sample, expected)
        assert torch.equal(alone(model).to(dtype)(**call).sample, expected)


@pytest.mark.parametrize("kind", ["sabw", "stitch"])
@pytest.mark.parametrize("text_stream", ["own", "fused"])
def test_a_prompt_padded_further_draws_the_same(kind, text_stream):
    """Neither experts nor aggregators look at padding, whatever stands there: an image does not depend on its batch."""
    made = ensemble(MODELS["qwen-image"], kind, "layers", text_stream=text_stream)
    call = qwen_image_inputs(lengths=(7, 4))
    alone = {name: value[1:] if torch.is_tensor(value) else value[1:] if isinstance(value, list) else value for name, value in call.items()}
    alone |= {"encoder_hidden_states": alone["encoder_hidden_states"][:, :4], "encoder_hidden_states_mask": None}
    with torch.no_grad():
        together = made(**call).sample
        assert torch.allclose(made(**alone).sample, together[1:], atol=1e-4 * together.abs().max())
        call["encoder_hidden_states"][1, 4:] = 50.0
        assert torch.allclose(made(**call).sample, together, atol=1e-4 * together.abs().max())
        call["encoder_hidden_states"][1, :4] = 50.0
        assert not torch.allclose(made(**call).sample[1], together[1], atol=1e-1)


def test_qwen_image_itself_has_sixty_blocks_and_twenty_billion_parameters():
    with torch.device("meta"):
        model = QwenImageTransformer2DModel()
    stages = FAMILIES["qwen-image"].stages(model)
    assert [stage.name for stage in stages] == [f"Q{index:02}" for index in range(60)] + ["OUT"]
    assert {stage.channels for stage in stages[:-1]} == {3072} and stages[-1].channels == 64
    assert count_parameters(model) == 20_430_401_088
    made = QwenImageEnsemble([model] * 3)
    assert made.fused == [*(f"Q{index:02}" for index in range(3, 60, 4)), "OUT"]
    assert made.side == 128 and made.widths == (3072, 3072)
    assert count_flops(model, 16, 16).total > 2 * 16 * 16 / 4 * count_parameters(model) / 2  # image tokens times half of the weights, at least
    assert count_parameters(made.aggregators) == 63_956_992  # at all 61 stages: 247 million


def test_the_call_is_the_pipelines():
    call = call_of(qwen_image_transformer(), 8, 12, batch=2)
    assert call["hidden_states"].shape == (2, 24, 16) and call["img_shapes"] == [[(1, 4, 6)]] * 2
    assert call["encoder_hidden_states_mask"] is None
    interface, config = FAMILIES["qwen-image"].interface, qwen_image_transformer().config
    noisy, states = torch.randn(2, 4, 8, 12), torch.randn(2, 5, 24)
    for mask, kept in ((torch.ones(2, 5), None), (torch.tensor([[1] * 5, [1, 1, 1, 0, 0]]), True)):
        conditions = interface.conditions(config, [states, mask], torch.zeros(2, 6))
        found = interface.denoiser_kwargs(config, noisy, torch.tensor([500, 250]), conditions)
        assert (found["encoder_hidden_states_mask"] is not None) == (kept is not None)
    assert found["timestep"].tolist() == [0.5, 0.25]
    assert torch.equal(interface.to_latents(found["hidden_states"], (8, 12)), noisy)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"img_shapes": [[(1, 8, 8), (1, 8, 8)]] * 2}, "tokens of several images"),
        ({"img_shapes": [[(2, 8, 4)]] * 2}, "tokens of several images"),
        ({"img_shapes": [[(1, 8, 8)], [(1, 4, 16)]]}, "images of different sizes"),
        ({"guidance": torch.ones(2)}, "guidance is not supported"),
        ({"additional_t_cond": torch.zeros(2, dtype=torch.long)}, "additional_t_cond is not supported"),
        ({"attention_kwargs": {"ip_hidden_states": []}}, "IP-Adapter"),
    ],
)
def test_what_is_not_supported_names_itself(changes, sentence):
    with pytest.raises(NotImplementedError, match=sentence):
        QwenImageEnsemble([qwen_image_transformer()])(**qwen_image_inputs() | changes)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"encoder_hidden_states": torch.zeros(2, 7, 48)}, "48 wide; expected 24"),
        ({"encoder_hidden_states_mask": torch.ones(2, 6)}, r"\(2, 6\); expected \(2, 7\)"),
        ({"timestep": None}, "timestep and img_shapes are needed"),
    ],
)
def test_what_does_not_fit_is_said(changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        QwenImageEnsemble([qwen_image_transformer()])(**qwen_image_inputs() | changes)


@pytest.mark.parametrize("switch", ["zero_cond_t", "use_additional_t_cond", "use_layer3d_rope", "guidance_embeds"])
def test_a_variant_is_refused_by_the_name_of_its_switch(switch):
    with pytest.raises(ValueError, match=f"{switch} .* is not supported"):
        QwenImageEnsemble([qwen_image_transformer(**{switch: True})])


def test_a_strange_patch_size_is_refused():
    made = qwen_image_transformer()
    made.register_to_config(patch_size=4)
    with pytest.raises(ValueError, match="patch_size 4"):
        QwenImageEnsemble.read_stages(made)
