"""One Qwen-Image 2.1 transformer walked by stages is the stock forward, bit for bit, with its cache of the text and without; what is refused."""

import copy

import pytest
import torch
from diffusers import QwenImage21Transformer2DModel
from diffusers.models.transformers.transformer_qwenimage21 import (
    QwenImage21FlexAttnProcessor,
    QwenImage21KVCache,
)
from family_models import MODELS, SMALL_SABW, in_turns
from test_laws import ensemble
from tiny_qwen_image_21 import qwen_image_21_inputs, qwen_image_21_transformer

from afa.aggregators.registry import count_parameters
from afa.cost import call_of, count_flops
from afa.denoiser.hooks import only_expert
from afa.models.qwen_image_21 import QwenImage21Ensemble
from afa.models.registry import FAMILIES

CALLS = {
    "as it is": (qwen_image_21_inputs, {}),
    "not square": (lambda: qwen_image_21_inputs(height=4, width=10), {}),
    "an odd number of rows": (lambda: qwen_image_21_inputs(height=3, width=8), {}),
    "one image": (lambda: qwen_image_21_inputs(batch=1), {}),
    "masked text": (lambda: qwen_image_21_inputs(lengths=(7, 3)), {}),
    "a mask of numbers, with holes": (qwen_image_21_inputs, {"encoder_hidden_states_mask": torch.tensor([[1, 0, 1, 1, 0, 1, 0], [1] * 7])}),
    "shapes of fewer images than there are": (qwen_image_21_inputs, {"img_shapes": [[(1, 8, 8)]]}),
    "attention_kwargs": (qwen_image_21_inputs, {"attention_kwargs": {}}),
    "a time of each image": (qwen_image_21_inputs, {"timestep": torch.tensor([0.02, 0.93])}),
}


def alone(model, placement="layers"):
    """An ensemble of one, with small aggregators."""
    return QwenImage21Ensemble([model], recipe=SMALL_SABW, placement=placement)


def stock(model, given):
    """What the stock model answers for the image; its pipeline cuts off the rest."""
    return model(**copy.deepcopy(given)).sample[:, -given["hidden_states"].shape[1] :]


@pytest.mark.parametrize(("name", "placement"), in_turns(CALLS, ["layers", "every-2", "out"]))
def test_one_expert_is_itself(name, placement):
    make_call, changes = CALLS[name]
    model, call = qwen_image_21_transformer(), make_call() | changes
    with torch.no_grad():
        made, expected = alone(model, placement), stock(model, call)
        assert torch.equal(made(**copy.deepcopy(call)).sample, expected)
        if placement == "layers":
            assert torch.equal(made(**call, return_dict=False)[0], expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("lengths", [(), (7, 3)])
def test_one_expert_is_itself_in_half_precision(dtype, lengths):
    model = qwen_image_21_transformer().to(dtype)
    call = qwen_image_21_inputs(lengths=lengths)
    call = {key: value.to(dtype) if torch.is_tensor(value) and value.is_floating_point() else value for key, value in call.items()}
    with torch.no_grad():
        expected = stock(model, call)
        assert torch.equal(alone(model)(**call).sample, expected)
        assert torch.equal(alone(model).to(dtype)(**call).sample, expected)


def test_one_expert_whose_text_shares_the_images_time_is_itself():
    model, call = qwen_image_21_transformer(causal_condition=False), qwen_image_21_inputs(lengths=(7, 3))
    with torch.no_grad():
        assert torch.equal(alone(model)(**call).sample, stock(model, call))


# --- the cache of the text ---------------------------------------------------------------------------------------------


def steps(denoiser, call, count=3, cached=True):
    """What a denoiser predicts at some steps, as the pipeline calls it: the first fills the cache."""
    cache, found = QwenImage21KVCache(len(denoiser.transformer_blocks)) if cached else None, []
    for step in range(count):
        latents = torch.randn(call["hidden_states"].shape, generator=torch.Generator().manual_seed(step))
        given = call | {"hidden_states": latents, "timestep": torch.full((2,), 0.9 - 0.2 * step)}
        given |= {"kv_cache": cache, "kv_cache_mode": "cached" if step else "extract"} if cached else {}
        with torch.no_grad():
            found.append(denoiser(**given).sample[:, -latents.shape[1] :])
    return torch.stack(found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lengths", [(), (7, 3)])
def test_one_expert_with_a_cache_is_itself(lengths, dtype):
    model, call = qwen_image_21_transformer().to(dtype), qwen_image_21_inputs(lengths=lengths)
    call = {key: value.to(dtype) if torch.is_tensor(value) and value.is_floating_point() else value for key, value in call.items()}
    model.requires_grad_(False)

    def run(denoiser):
        cache, found = QwenImage21KVCache(4), []
        for step in range(3):
            given = call | {"timestep": torch.full((2,), 0.9 - 0.2 * step, dtype=dtype), "kv_cache": cache}
            found.append(denoiser(**given, kv_cache_mode="cached" if step else "extract").sample[:, -64:])
        return torch.stack(found)

    assert torch.equal(run(alone(model)), run(model))


@pytest.mark.parametrize("kind", ["sabw", "stitch"])
def test_a_cache_changes_nothing_and_spares_the_text(kind):
    made, call = ensemble(MODELS["qwen-image-2.1"], kind, "layers"), qwen_image_21_inputs(lengths=(7, 4))
    assert torch.allclose(steps(made, call), steps(made, call, cached=False), atol=1e-5)
    seen = []
    for expert in made.experts:
        expert.transformer_blocks[1].register_forward_hook(lambda block, args, output: seen.append(output.shape[1]))
    steps(made, call, count=2)
    assert seen == [71] * 3 + [64] * 3


def test_each_expert_has_its_own_cache_and_fills_it_when_it_runs_first():
    made, call = ensemble(MODELS["qwen-image-2.1"], "sabw", "layers"), qwen_image_21_inputs()
    expected = steps(made, call, cached=False)[1:]
    cache, found = QwenImage21KVCache(len(made.transformer_blocks)), []
    for step in range(3):
        latents = torch.randn(call["hidden_states"].shape, generator=torch.Generator().manual_seed(step))
        given = call | {"hidden_states": latents, "timestep": torch.full((2,), 0.9 - 0.2 * step), "kv_cache": cache}
        with torch.no_grad():
            if step:
                found.append(made(**given, kv_cache_mode="cached").sample)
            else:
                with only_expert(made, "expert_1"):
                    made(**given, kv_cache_mode="extract")
    assert torch.allclose(torch.stack(found), expected, atol=1e-5)


def test_fused_text_depends_on_the_step_and_is_not_cached():
    made, call = ensemble(MODELS["qwen-image-2.1"], "sabw", "layers", text_stream="fused"), qwen_image_21_inputs()
    assert torch.equal(steps(made, call), steps(made, call, cached=False))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"kv_cache": QwenImage21KVCache(3), "kv_cache_mode": "extract"}, "kv_cache has 3 layers; expected 4"),
        ({"kv_cache": QwenImage21KVCache(4)}, "kv_cache_mode is None"),
        ({"kv_cache_mode": "cached"}, "give extract or cached together with a kv_cache"),
        ({"kv_cache": QwenImage21KVCache(4), "kv_cache_mode": "read"}, "kv_cache_mode is 'read'"),
    ],
)
def test_a_cache_that_does_not_fit_is_refused(changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        alone(qwen_image_21_transformer())(**qwen_image_21_inputs() | changes)


def test_a_cache_for_text_that_shares_the_images_time_is_refused():
    with pytest.raises(ValueError, match="causal_condition"):
        alone(qwen_image_21_transformer(causal_condition=False))(**qwen_image_21_inputs(), kv_cache=QwenImage21KVCache(4), kv_cache_mode="extract")


def test_a_call_with_another_prompt_reads_no_cache_of_the_first():
    made, call = ensemble(MODELS["qwen-image-2.1"], "sabw", "layers"), qwen_image_21_inputs(batch=1)
    cache, other = QwenImage21KVCache(len(made.transformer_blocks)), torch.randn(1, 4, 24)
    with torch.no_grad():
        made(**call, kv_cache=cache, kv_cache_mode="extract")
        conditions = made.interface.conditions(made.config, [other, torch.ones(1, 4, dtype=torch.bool)], torch.zeros(1, 6))
        changed = made.interface.with_prompt(made.config, call | {"kv_cache": cache, "kv_cache_mode": "cached"}, conditions)
        expected = made(**call | {"encoder_hidden_states": other, "img_mask": torch.arange(20)[None] >= 4}).sample
        assert torch.equal(made(**changed).sample, expected) and not torch.allclose(made(**call).sample, expected, atol=1e-2)


# --- what is read and called --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["sabw", "stitch"])
@pytest.mark.parametrize("text_stream", ["own", "fused"])
def test_what_stands_in_the_padding_changes_nothing(kind, text_stream):
    """Its length does, in the stock model too: positions of the image follow those of the text."""
    made, call = ensemble(MODELS["qwen-image-2.1"], kind, "layers", text_stream=text_stream), qwen_image_21_inputs(lengths=(7, 4))
    with torch.no_grad():
        expected = made(**call).sample
        call["encoder_hidden_states"][1, 4:] = 50.0
        assert torch.allclose(made(**call).sample, expected, atol=1e-4 * expected.abs().max())
        call["encoder_hidden_states"][1, :4] = 50.0
        assert not torch.allclose(made(**call).sample[1], expected[1], atol=1e-1)


def test_qwen_image_21_itself_has_thirty_two_blocks_and_seven_billion_parameters():
    with torch.device("meta"):
        model = QwenImage21Transformer2DModel()
    stages = FAMILIES["qwen-image-2.1"].stages(model)
    assert [stage.name for stage in stages] == [f"Q{index:02}" for index in range(32)] + ["OUT"]
    assert {stage.channels for stage in stages[:-1]} == {4096} and stages[-1].channels == 64 and {stage.level for stage in stages} == {0}
    assert count_parameters(model) == 7_115_124_736
    made = QwenImage21Ensemble([model] * 3)
    assert made.fused == [*(f"Q{index:02}" for index in range(3, 32, 4)), "OUT"]
    assert made.side == 64 and made.widths == (4096, 4096)
    assert count_flops(model, 16, 16).total > 2 * 16 * 16 * count_parameters(model) / 2  # image tokens times half of the weights, at least
    assert count_parameters(made.aggregators) == 44_514_432  # at all 33 stages: 167 million


def test_the_call_is_the_pipelines():
    call = call_of(qwen_image_21_transformer(), 8, 12, batch=2, tokens=5)
    assert call["hidden_states"].shape == (2, 96, 6) and call["img_shapes"] == [[(1, 8, 12)]] * 2
    assert call["encoder_hidden_states_mask"] is None and call["img_mask"].tolist() == [[False] * 5 + [True] * 24] * 2
    interface, config = FAMILIES["qwen-image-2.1"].interface, qwen_image_21_transformer().config
    noisy, states = torch.randn(2, 6, 8, 12), torch.randn(2, 5, 24)
    for mask, length, kept in ((torch.ones(2, 5), 5, False), ([[1] * 5, [1, 1, 1, 0, 0]], 5, True), ([[1, 1, 1, 1, 0], [1, 1, 1, 0, 0]], 4, True)):
        conditions = interface.conditions(config, [states, torch.as_tensor(mask)], torch.zeros(2, 6))
        found = interface.denoiser_kwargs(config, noisy, torch.tensor([500, 250]), conditions)
        assert (found["encoder_hidden_states_mask"] is not None) == kept and found["encoder_hidden_states"].shape[1] == length
        assert found["img_mask"].shape == (2, length + 24)
    assert found["timestep"].tolist() == [0.5, 0.25]
    assert torch.equal(interface.to_latents(found["hidden_states"], (8, 12)), noisy) and torch.equal(interface.latents(found), noisy)
    assert torch.equal(interface.to_latents(torch.cat([torch.zeros(2, 4, 6), found["hidden_states"]], dim=1), (8, 12)), noisy)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"img_shapes": [[(1, 8, 8), (1, 8, 8)]] * 2}, "tokens of several images"),
        ({"img_shapes": [[(1, 8, 8)], [(1, 4, 16)]]}, "images of different sizes"),
        ({"img_mask": torch.arange(23)[None].expand(2, -1) > 5}, "img_mask marks images inside a prompt"),
        ({"attention_kwargs": {"ip_hidden_states": []}}, "IP-Adapter"),
    ],
)
def test_what_is_not_supported_names_itself(changes, sentence):
    with pytest.raises(NotImplementedError, match=sentence):
        alone(qwen_image_21_transformer())(**qwen_image_21_inputs() | changes)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"encoder_hidden_states": torch.zeros(2, 7, 48)}, "48 wide; expected 24"),
        ({"encoder_hidden_states_mask": torch.ones(2, 6)}, r"\(2, 6\); expected \(2, 7\)"),
    ],
)
def test_what_does_not_fit_is_said(changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        alone(qwen_image_21_transformer())(**qwen_image_21_inputs() | changes)


def test_another_attention_processor_is_refused_by_name():
    made = qwen_image_21_transformer()
    made.set_attn_processor(QwenImage21FlexAttnProcessor())
    with pytest.raises(ValueError, match="QwenImage21FlexAttnProcessor is not supported"):
        alone(made)


def test_a_strange_patch_size_is_refused():
    with pytest.raises(ValueError, match="patch_size 2"):
        alone(qwen_image_21_transformer(patch_size=2))
