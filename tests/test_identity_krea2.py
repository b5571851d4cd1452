"""One Krea 2 transformer walked by stages is the stock forward, bit for bit; padding changes nothing; what is not supported is refused by name."""

import copy

import pytest
import torch
from diffusers import Krea2Transformer2DModel
from family_models import MODELS, SMALL_SABW, in_turns
from test_laws import ensemble
from tiny_krea2 import krea2_inputs, krea2_transformer

from afa.aggregators.registry import count_parameters
from afa.cost import call_of, count_flops
from afa.models.krea2 import Krea2Ensemble
from afa.models.registry import FAMILIES

INTERFACE = FAMILIES["krea2"].interface


def alone(model, placement="layers"):
    """An ensemble of one, with small aggregators."""
    return Krea2Ensemble([model], recipe=SMALL_SABW, placement=placement)


CALLS = {
    "as it is": krea2_inputs,
    "not square": lambda: krea2_inputs(height=12, width=20),
    "one image": lambda: krea2_inputs(batch=1),
    "masked text": lambda: krea2_inputs(lengths=(7, 3)),
    "padding before the end, as the pipeline has it": lambda: krea2_inputs(lengths=(7, 4), holes=True, height=8, width=12),
    "one image, masked": lambda: krea2_inputs(batch=1, lengths=(4,), holes=True),
    "attention_kwargs": lambda: krea2_inputs() | {"attention_kwargs": {}},
    "a time of each image": lambda: krea2_inputs() | {"timestep": torch.tensor([0.02, 0.93])},
    "other positions of text": lambda: moved(krea2_inputs()),
}


def moved(call):
    call["position_ids"] = call["position_ids"].clone()
    call["position_ids"][:7, 0] = torch.arange(7)
    return call


@pytest.mark.parametrize(("name", "placement"), in_turns(CALLS, ["layers", "every-2", "out"]))
def test_one_expert_is_itself(name, placement):
    model, call = krea2_transformer().requires_grad_(False), CALLS[name]()  # torch may fold a product with trainable weights otherwise
    with torch.no_grad():
        expected = model(**copy.deepcopy(call)).sample
        made = alone(model, placement)
        assert torch.equal(made(**copy.deepcopy(call)).sample, expected)
        if placement == "layers":
            assert torch.equal(made(**call, return_dict=False)[0], expected)


@pytest.mark.parametrize("norms", [torch.float32, None])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("lengths", [(), (7, 3)])
def test_one_expert_is_itself_in_half_precision(dtype, lengths, norms):
    """With norms in float32, as they are loaded, and with all weights in one dtype."""
    model = krea2_transformer().to(dtype)
    for name, module in model.named_modules():
        if norms is not None and "norm" in name:
            module.to(norms)
    call = krea2_inputs(lengths=lengths)
    call = {key: value.to(dtype) if torch.is_tensor(value) and value.is_floating_point() and key != "position_ids" else value for key, value in call.items()}
    with torch.no_grad():
        expected = model(**call).sample
        assert expected.dtype == dtype and torch.equal(alone(model)(**call).sample, expected)
        if norms is None:
            assert torch.equal(alone(model).to(dtype)(**call).sample, expected)


@pytest.mark.parametrize("kind", ["sabw", "stitch"])
@pytest.mark.parametrize("text_stream", ["own", "fused"])
def test_padding_changes_nothing(kind, text_stream):
    """Neither experts nor aggregators look at padding, whatever stands there: an image does not depend on its batch."""
    made = ensemble(MODELS["krea2"], kind, "layers", text_stream=text_stream)
    call = krea2_inputs(lengths=(7, 4))
    alone = {name: value if name == "position_ids" else value[1:] for name, value in call.items()}
    shorter = {"encoder_hidden_states": alone["encoder_hidden_states"][:, :4], "encoder_attention_mask": None}
    alone |= {**shorter, "position_ids": call["position_ids"][3:]}
    with torch.no_grad():
        together = made(**call).sample
        assert torch.allclose(made(**alone).sample, together[1:], atol=1e-4 * together.abs().max())
        call["encoder_hidden_states"] = call["encoder_hidden_states"].clone()
        call["encoder_hidden_states"][1, 4:] = 50.0
        assert torch.allclose(made(**call).sample, together, atol=1e-4 * together.abs().max())
        call["encoder_hidden_states"][1, :4] = 50.0
        assert not torch.allclose(made(**call).sample[1], together[1], atol=1e-1)


def test_krea_2_itself_has_28_blocks_and_nearly_thirteen_billion_parameters():
    with torch.device("meta"):
        model = Krea2Transformer2DModel()
    stages = FAMILIES["krea2"].stages(model)
    assert [stage.name for stage in stages] == [f"K{index:02}" for index in range(28)] + ["OUT"]
    assert {stage.channels for stage in stages[:-1]} == {6144} and stages[-1].channels == 64
    assert count_parameters(model) == 12_820_073_036
    made = Krea2Ensemble([model] * 3)
    assert made.fused == [*(f"K{index:02}" for index in range(3, 28, 4)), "OUT"]
    assert made.side == 128 and made.widths == (6144, 6144)
    assert count_flops(model, 16, 16).total > 2 * 16 * 16 / 4 * count_parameters(model) * 0.9  # image tokens times nearly all weights, at least
    assert count_parameters(made.aggregators) == 55_387_136  # at all 29 stages: 207 million


def test_the_call_is_the_pipelines():
    model = krea2_transformer()
    call = call_of(model, 8, 12, batch=2)
    assert call["hidden_states"].shape == (2, 24, 16) and call["position_ids"].shape == (512 + 24, 3)
    assert call["encoder_hidden_states"].shape == (2, 512, 3, 24) and call["encoder_attention_mask"] is None
    noisy, states = torch.randn(2, 4, 8, 12), torch.randn(2, 5, 3, 24)
    for mask, kept in ((torch.ones(2, 5, dtype=torch.bool), None), (torch.tensor([[1] * 5, [1, 1, 1, 0, 0]]).bool(), True)):
        conditions = INTERFACE.conditions(model.config, [states, mask], torch.zeros(2, 6))
        found = INTERFACE.denoiser_kwargs(model.config, noisy, torch.tensor([500, 250]), conditions)
        assert (found["encoder_attention_mask"] is not None) == (kept is not None)
    assert found["timestep"].tolist() == [0.5, 0.25] and INTERFACE.grid(found) == (4, 6)
    assert torch.equal(INTERFACE.latents(found), noisy)
    half = INTERFACE.denoiser_kwargs(model.config, noisy.bfloat16(), torch.tensor([501.5]), conditions)
    assert half["timestep"] == torch.tensor(501.5 / 1000).bfloat16() and half["position_ids"].dtype == torch.float32


def test_the_padding_of_the_pipeline_is_taken_out():
    states = torch.randn(2, 6, 3, 4)
    mask = torch.tensor([[1, 1, 0, 0, 1, 1], [1, 0, 0, 0, 1, 1]]).bool()
    found, kept = INTERFACE.select_prompt_outputs((states, mask))
    assert found.shape == (2, 4, 3, 4) and kept.tolist() == [[True] * 4, [True] * 3 + [False]]
    assert all(torch.equal(found[index][kept[index]], states[index][mask[index]]) for index in range(2))


def test_another_prompt_has_its_own_positions():
    call = krea2_inputs()
    conditions = {"encoder_hidden_states": torch.zeros(2, 3, 3, 24), "encoder_attention_mask": None}
    found = INTERFACE.with_prompt(krea2_transformer().config, call, conditions)
    assert torch.equal(found["position_ids"], call["position_ids"][4:]) and found["encoder_hidden_states"].shape[1] == 3
    assert torch.isfinite(alone(krea2_transformer())(**found).sample).all()


@pytest.mark.parametrize("is_distilled", [False, True])
def test_guidance_is_counted_as_in_all_families(is_distilled):
    """1 is no guidance; the pipeline's own scale is smaller by 1, and a distilled model has none by default."""
    config = {"is_distilled": is_distilled}
    assert INTERFACE.pipeline_guidance(config, 2, None, None, None)["guidance_scale"] == (0.0 if is_distilled else 4.5)
    assert INTERFACE.pipeline_guidance(config, 2, 3.0, "dark", None) == {"guidance_scale": 2.0, "negative_prompt": ["dark"] * 2}
    assert INTERFACE.guidance_kwargs(0.0) == {"guidance_scale": 0.0}
    uncond, cond = torch.randn(2, 1, 4, 2, 2)
    assert torch.allclose(INTERFACE.apply_guidance(uncond, cond, 3.0), cond + 2.0 * (cond - uncond))
    assert INTERFACE.default_cfg_scale(config) == (1.0 if is_distilled else 5.5)


@pytest.mark.parametrize(
    ("changes", "error", "sentence"),
    [
        ({"attention_kwargs": {"ip_hidden_states": []}}, NotImplementedError, "IP-Adapter"),
        ({"encoder_hidden_states": torch.zeros(2, 7, 3, 48)}, ValueError, "48 wide; expected 24"),
        ({"encoder_attention_mask": torch.ones(2, 6).bool()}, ValueError, r"\(2, 6\); expected \(2, 7\)"),
        ({"position_ids": torch.zeros(70, 3)}, ValueError, r"\(70, 3\); expected \(71, 3\)"),
        ({"position_ids": torch.zeros(71, 3)}, NotImplementedError, "reference images"),
    ],
)
def test_what_is_not_supported_names_itself(changes, error, sentence):
    with pytest.raises(error, match=sentence):
        alone(krea2_transformer())(**krea2_inputs() | changes)


def test_guidances_second_pass_is_known_by_its_latents():
    """The pipeline does not say which pass it makes; several experts may be asked at each."""
    made, call = alone(krea2_transformer()), krea2_inputs()
    other, found = {**call, "encoder_hidden_states": call["encoder_hidden_states"].clone()}, []
    later = {**call, "hidden_states": call["hidden_states"].clone()}
    with torch.no_grad():
        for given in (call, call, other, other, later, call):
            made(**given)
            found.append(made.in_uncond_pass)
    assert found == [False, False, True, True, False, False]
