"""One Chroma transformer walked by stages is the stock forward, bit for bit; every stage takes its own part of the modulation."""

import copy

import pytest
import torch
from diffusers import ChromaTransformer2DModel
from family_models import MODELS, SMALL_SABW, in_turns
from test_laws import ensemble
from tiny_chroma import chroma_inputs, chroma_transformer

from afa.aggregators.registry import count_parameters
from afa.cost import call_of, count_flops
from afa.denoiser.hooks import only_expert
from afa.models.chroma import ChromaEnsemble
from afa.models.registry import FAMILIES


def alone(model, placement="layers"):
    """An ensemble of one, with small aggregators."""
    return ChromaEnsemble([model], recipe=SMALL_SABW, placement=placement)


def control(double, single, **options):
    def residuals(model, call):
        shape = (2, call["hidden_states"].shape[1], model.inner_dim)
        counts = {"controlnet_block_samples": double, "controlnet_single_block_samples": single}
        return {name: [torch.randn(shape) for _ in range(count)] for name, count in counts.items() if count} | options

    return residuals


def plain(model, call):
    return {}


def masked():
    return chroma_inputs(lengths=(7, 3))


CALLS = {
    "as it is": (chroma_inputs, plain),
    "not square": (lambda: chroma_inputs(height=12, width=20), plain),
    "one image": (lambda: chroma_inputs(batch=1, lengths=(4,)), plain),
    "captions of different lengths": (masked, plain),
    "a mask of bools": (masked, lambda model, call: {"attention_mask": call["attention_mask"].bool()}),
    "without a mask": (chroma_inputs, lambda model, call: {"attention_mask": None}),
    "controlnet": (masked, control(1, 2)),
    "controlnet of double blocks only": (masked, control(2, 0)),
    "controlnet repeated": (masked, control(2, 0, controlnet_blocks_repeat=True)),
    "ids with a batch": (chroma_inputs, lambda model, call: {name: call[name][None] for name in ("img_ids", "txt_ids")}),
    "joint_attention_kwargs": (chroma_inputs, lambda model, call: {"joint_attention_kwargs": {}}),
    "a time of each image": (chroma_inputs, lambda model, call: {"timestep": torch.tensor([0.02, 0.93])}),
}


@pytest.mark.parametrize(("name", "placement"), in_turns(CALLS, ["layers", "every-2", "out"]))
def test_one_expert_is_itself(name, placement):
    make_call, extra = CALLS[name]
    model, call = chroma_transformer(), make_call()
    call = {**call, **extra(model, call)}
    with torch.no_grad():
        expected = model(**copy.deepcopy(call)).sample
        made = alone(model, placement)
        assert torch.equal(made(**copy.deepcopy(call)).sample, expected)
        if placement == "layers":
            assert torch.equal(made(**call, return_dict=False)[0], expected)


@pytest.mark.parametrize(("double", "single"), [(1, 1), (3, 2), (4, 3)])
def test_one_expert_is_itself_whatever_the_number_of_its_blocks(double, single):
    """Where a block's modulation begins depends on the numbers of both kinds."""
    model, call = chroma_transformer(num_layers=double, num_single_layers=single), masked()
    with torch.no_grad():
        call |= control(double, single)(model, call)
        assert torch.equal(alone(model)(**call).sample, model(**call).sample)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("lengths", [(), (7, 3)])
def test_one_expert_is_itself_in_half_precision(dtype, lengths):
    model = chroma_transformer().to(dtype)
    call = {name: value.to(dtype) for name, value in chroma_inputs(lengths=lengths).items()}
    with torch.no_grad():
        expected = model(**call).sample
        assert torch.equal(alone(model)(**call).sample, expected)
        assert torch.equal(alone(model).to(dtype)(**call).sample, expected)


def test_the_tests_here_can_see_a_mask_a_modulation_and_the_places():
    """Each of them changes what the stock model predicts; else leaving one out would go unnoticed."""
    model, call = chroma_transformer(), masked()
    changes = {
        "attention_mask": None,
        "img_ids": call["img_ids"] * 2,
        "timestep": call["timestep"] / 2,
        "encoder_hidden_states": call["encoder_hidden_states"].flip(1),
    }
    with torch.no_grad():
        expected = model(**call).sample
        for name, value in changes.items():
            assert not torch.allclose(model(**call | {name: value}).sample, expected, atol=1e-3), name


def test_every_stage_has_a_part_of_the_modulation_that_changes_the_prediction():
    """Of each row of the network's output, one part of one block: all rows are used, each of them by one stage."""
    made, call = alone(chroma_transformer()), masked()
    rows = []
    handle = made.experts[0].distilled_guidance_layer.register_forward_hook(lambda module, args, output: rows.append(output) or output.requires_grad_())
    made(**call).sample.square().sum().backward()
    handle.remove()
    last = slice(6 * 2 + 3 * 3 + 6, None)  # what the last double block does to text tokens is read by single blocks, too
    used = rows[0].grad.abs().sum((0, 2)) > 0
    assert len(used) == 2 * 6 * 2 + 3 * 3 + 2 and used.all() and used[last].all()


@pytest.mark.parametrize("kind", ["sabw", "stitch"])
@pytest.mark.parametrize("text_stream", ["own", "fused"])
def test_nothing_looks_at_what_is_masked(kind, text_stream):
    """Neither experts, where the mask is of bools, nor aggregators; numbers are added to the logits, as in the stock model."""
    made, call = ensemble(MODELS["chroma"], kind, "layers", text_stream=text_stream), chroma_inputs(lengths=(7, 4))
    call["attention_mask"] = call["attention_mask"].bool()
    with torch.no_grad():
        expected = made(**call).sample
        call["encoder_hidden_states"][1, 4:] = 50.0
        assert torch.allclose(made(**call).sample, expected, atol=1e-4 * expected.abs().max())
        call["encoder_hidden_states"][1, :4] = 50.0
        assert not torch.allclose(made(**call).sample[1], expected[1], atol=1e-2)


def test_aggregators_look_at_the_prompt_and_one_token_of_padding_and_are_told_the_time():
    made, call = ensemble(MODELS["chroma"], "sabw", "layers"), chroma_inputs(lengths=(7, 4))
    call["timestep"] = torch.tensor([0.25, 0.75])
    seen = []
    made.aggregators["D00"].register_forward_pre_hook(lambda module, args: seen.append(args))
    with torch.no_grad():
        made(**call)
    _, temb, text, text_mask, *_ = seen[0]
    assert text_mask.tolist() == [[True] * 7, [True] * 4 + [False] * 3] and text.shape == (2, 7, 32)
    assert torch.allclose(temb, made.experts[0].time_text_embed.time_proj(call["timestep"] * 1000)) and not torch.allclose(temb[0], temb[1], atol=0.1)
    assert made.widths == (temb.shape[1], text.shape[2])


def test_each_expert_reads_its_own_part_of_joined_text():
    made = ChromaEnsemble([chroma_transformer(seed) for seed in range(2)], placement="out")
    one, other = masked(), chroma_inputs(lengths=(7, 3), seed=1)
    joined = torch.cat([one["encoder_hidden_states"], other["encoder_hidden_states"]], dim=-1)
    for index, own in enumerate((one, other)):
        call = one | {"encoder_hidden_states": own["encoder_hidden_states"]}
        with torch.no_grad(), only_expert(made, made.names[index]):
            assert torch.equal(made(**one | {"encoder_hidden_states": joined}).sample, made.experts[index](**call).sample)


def test_chroma_itself_has_the_stages_of_flux_and_nine_billion_parameters():
    with torch.device("meta"):
        model = ChromaTransformer2DModel()
    stages = FAMILIES["chroma"].stages(model)
    assert [stage.name for stage in stages] == [*(f"D{index:02}" for index in range(19)), *(f"S{index:02}" for index in range(38)), "OUT"]
    assert {stage.channels for stage in stages[:-1]} == {3072} and stages[-1].channels == 64
    assert count_parameters(model) == 8_899_983_424
    made = ChromaEnsemble([model] * 3)
    assert made.fused[0] == "D03" and made.fused[-1] == "OUT" and len(made.fused) == 15
    assert made.side == 128 and made.widths == (16, 3072)
    assert count_flops(model, 16, 16).total > 2 * 16 * 16 / 4 * count_parameters(model) / 2  # image tokens times half of the weights, at least
    assert count_parameters(made.aggregators) == 54_019_968  # at all 58 stages: 212 million


def test_the_call_is_the_pipelines():
    call = call_of(chroma_transformer(), 8, 12, batch=2, tokens=5)
    assert call["hidden_states"].shape == (2, 24, 16) and call["attention_mask"].shape == (2, 5 + 24) and call["attention_mask"].all()
    interface, config = FAMILIES["chroma"].interface, chroma_transformer().config
    noisy, states, mask = torch.randn(2, 4, 8, 12), torch.randn(2, 5, 24), torch.tensor([[1.0] * 5, [1.0, 1.0, 1.0, 0.0, 0.0]])
    found = interface.denoiser_kwargs(config, noisy, torch.tensor([500, 250]), interface.conditions(config, [states, mask], torch.zeros(2, 6)))
    assert torch.equal(found["attention_mask"], torch.cat([mask, torch.ones(2, 24)], dim=1))
    assert found["timestep"].tolist() == [0.5, 0.25] and found["txt_ids"].shape == (5, 3)
    assert torch.equal(interface.to_latents(found["hidden_states"], (8, 12)), noisy)


@pytest.mark.parametrize(
    ("changes", "error", "sentence"),
    [
        ({"img_ids": torch.cat([torch.zeros(32, 3), torch.ones(32, 3)])}, NotImplementedError, "reference images"),
        ({"joint_attention_kwargs": {"ip_adapter_image_embeds": [torch.zeros(1)]}}, NotImplementedError, "IP-Adapter"),
        ({"encoder_hidden_states": torch.zeros(2, 7, 48)}, ValueError, "48 wide; expected 24"),
        ({"attention_mask": torch.ones(2, 7)}, ValueError, r"\(2, 7\); expected \(2, 71\)"),
        ({"timestep": None}, ValueError, "timestep, img_ids and txt_ids are needed"),
    ],
)
def test_what_is_not_supported_or_does_not_fit_names_itself(changes, error, sentence):
    with pytest.raises(error, match=sentence):
        alone(chroma_transformer())(**chroma_inputs() | changes)


def test_a_strange_patch_size_is_refused():
    made = chroma_transformer()
    made.register_to_config(patch_size=2)
    with pytest.raises(ValueError, match="patch_size 2"):
        ChromaEnsemble.read_stages(made)
