"""One Lumina 2 transformer walked by stages is the stock forward, bit for bit; an image follows its own caption; what is not supported names itself."""

import pytest
import torch
from diffusers import Lumina2Transformer2DModel
from family_models import MODELS, SMALL_SABW, in_turns
from test_laws import ensemble
from tiny_lumina2 import lumina2_inputs, lumina2_transformer
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from afa.aggregators.registry import count_parameters
from afa.cost import call_of, count_flops, count_stage_flops
from afa.models.lumina2 import Lumina2Ensemble, position_ids, stock_order
from afa.models.registry import FAMILIES
from afa.stages.tokens import as_tokens, fold


def alone(model, placement="layers"):
    """An ensemble of one, with small aggregators."""
    return Lumina2Ensemble([model], recipe=SMALL_SABW, placement=placement)


CALLS = {
    "as it is": {},
    "not square": {"height": 20, "width": 6},
    "one image": {"batch": 1},
    "one image, not square": {"batch": 1, "height": 6, "width": 26},
    "captions without padding": {"lengths": (12,)},
    "captions of different lengths": {"lengths": (3, 9)},
    "captions, one without padding": {"lengths": (12, 1)},
    "captions of four lengths": {"batch": 4, "lengths": (9, 12, 3, 4)},
    "a caption longer than the image": {"height": 4, "width": 2, "lengths": (11, 2)},
    "attention_kwargs": {"attention_kwargs": {"scale": 1.0}},
    "a time of each image": {"timestep": torch.tensor([0.02, 0.93])},
    "a mask of bools": {"encoder_attention_mask": torch.arange(12)[None] < torch.tensor([[8], [5]])},
}
MADE = ("batch", "height", "width", "lengths")


def call_named(name):
    changes = CALLS[name]
    return lumina2_inputs(**{key: changes[key] for key in MADE if key in changes}) | {key: changes[key] for key in changes if key not in MADE}


@pytest.mark.parametrize(("name", "placement"), in_turns(CALLS, ["layers", "every-2", "out"]))
def test_one_expert_is_itself(name, placement):
    model, call = lumina2_transformer(), call_named(name)
    with torch.no_grad():
        expected = model(**call).sample
        made = alone(model, placement)
        assert torch.equal(made(**call).sample, expected)
        if placement == "layers":
            assert torch.equal(made(**call, return_dict=False)[0], expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("lengths", [(7,), (3, 9)])
def test_one_expert_is_itself_in_half_precision(dtype, lengths):
    model, call = lumina2_transformer().to(dtype), lumina2_inputs(lengths=lengths, dtype=dtype)
    with torch.no_grad():
        expected = model(**call).sample
        assert expected.dtype == dtype and expected.isfinite().all()
        assert torch.equal(alone(model)(**call).sample, expected)
        assert torch.equal(alone(model).to(dtype)(**call).sample, expected)


def test_models_of_other_shapes_are_themselves():
    for changes in ({"num_refiner_layers": 1}, {"num_kv_heads": 4}, {"axes_dim_rope": (2, 2, 4)}, {"ffn_dim_multiplier": 0.5}):
        model, call = lumina2_transformer(**changes), lumina2_inputs(lengths=(3, 9))
        with torch.no_grad():
            assert torch.equal(alone(model)(**call).sample, model(**call).sample)


def test_positions_and_patches_are_the_stock_models():
    """Of text and image tokens; padding has other ones, which nothing attends to."""
    model, call, lengths = lumina2_transformer(), lumina2_inputs(), [3, 9]
    mask = torch.arange(12)[None] < torch.tensor(lengths)[:, None]
    patches, words, pixels, whole, *_ = model.rope_embedder(call["hidden_states"], mask)
    found = model.rope_embedder._get_freqs_cis(position_ids(lengths, 12, (6, 8), torch.device("cpu")))
    assert torch.equal(as_tokens(fold(call["hidden_states"])), patches)
    assert torch.equal(found[:, :12][mask], words[mask]) and torch.equal(found[:, 12:], pixels)
    order = stock_order(lengths, 48, torch.device("cpu"))
    arranged = torch.cat([found[:, :9], found[:, 12:]], dim=1).take_along_dim(order[..., None], dim=1)
    for row, length in enumerate(lengths):
        assert torch.equal(arranged[row, : length + 48], whole[row, : length + 48])
        assert sorted(order[row].tolist()) == list(range(9 + 48))


@pytest.mark.parametrize("kind", ["sabw", "stitch"])
@pytest.mark.parametrize("text_stream", ["own", "fused"])
def test_an_image_does_not_depend_on_the_captions_beside_it(kind, text_stream):
    made = ensemble(MODELS["lumina2"], kind, "layers", text_stream=text_stream)
    call = lumina2_inputs(lengths=(12, 4))
    second = {name: part[1:] for name, part in call.items()}
    with torch.no_grad():
        together = made(**call).sample
        assert torch.allclose(made(**second).sample, together[1:], atol=1e-4 * together.abs().max())
        for row, words, moved in ((0, slice(None), False), (1, slice(4, None), False), (1, slice(4), True)):
            other = {**call, "encoder_hidden_states": call["encoder_hidden_states"].clone()}
            other["encoder_hidden_states"][row, words] *= -3.0
            near = torch.allclose(made(**other).sample[1:], together[1:], atol=1e-4 * together.abs().max())
            assert near != moved


def test_aggregators_see_the_captions_tokens_and_not_their_padding():
    masks, made = [], ensemble(MODELS["lumina2"], "sabw", "out")
    made.aggregators["OUT"].register_forward_pre_hook(lambda _, args: masks.append((args[2].shape[-2], args[3])))
    with torch.no_grad():
        for lengths in ((9, 4), (7,)):
            made(**lumina2_inputs(lengths=lengths))
    assert masks[0][0] == 9 and masks[0][1].sum(1).tolist() == [9, 4] and masks[1] == (7, None)


def test_lumina_2_itself_has_twenty_nine_stages_and_two_point_six_billion_parameters():
    with torch.device("meta"):
        model = Lumina2Transformer2DModel(cap_feat_dim=2304)
    stages = FAMILIES["lumina2"].stages(model)
    assert [stage.name for stage in stages] == ["N00", "N01", *(f"L{index:02}" for index in range(26)), "OUT"]
    assert {stage.channels for stage in stages[:-1]} == {2304} and stages[-1].channels == 64
    assert count_parameters(model) == 2_609_769_152
    made = Lumina2Ensemble([model] * 3)
    assert made.fused == [*(f"L{index:02}" for index in range(1, 26, 4)), "OUT"]
    assert made.side == 128 and made.widths == (1024, 2304)
    assert count_flops(model, 16, 16).total > 2 * 64 * count_parameters(model)
    assert count_parameters(made.aggregators) == 24_093_696  # at all 29 stages: 90 million


def test_operations_are_those_of_the_stock_forward():
    """Counted without values on the meta device, where the stock forward does not run, and with captions of full length on the CPU.

    There, fused attention would not be counted.
    """
    model = lumina2_transformer()
    with torch.device("meta"):
        empty = Lumina2Transformer2DModel.from_config(dict(model.config))
    found = count_flops(empty, 12, 16, batch=2, tokens=12).total
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        model(**lumina2_inputs(lengths=(12,)))
    assert found == counter.get_total_flops()
    assert all(count > 0 for count in count_stage_flops(model, 12, 16).values())


def test_the_call_is_the_pipelines():
    """Time rises in the model and falls in the scheduler; the model predicts image minus noise, the scheduler steps by noise minus image."""
    call = call_of(lumina2_transformer(), 8, 12, batch=2)
    assert call["hidden_states"].shape == (2, 4, 8, 12) and call["encoder_hidden_states"].shape == (2, 256, 24)
    assert call["encoder_attention_mask"].shape == (2, 256) and call["encoder_attention_mask"].all()
    interface, config = FAMILIES["lumina2"].interface, lumina2_transformer().config
    noisy, states, mask = torch.randn(2, 4, 8, 12), torch.randn(2, 5, 24), torch.tensor([[1] * 5, [1, 1, 1, 0, 0]])
    found = interface.denoiser_kwargs(config, noisy.half(), torch.tensor([1000, 250]), interface.conditions(config, [states, mask], torch.zeros(2, 6)))
    assert found["timestep"].tolist() == [0.0, 0.75] and interface.timestep_from_model(found["timestep"]).tolist() == [1000, 250]
    assert torch.equal(interface.to_latents(2 * noisy, (8, 12)), -2 * noisy) and torch.equal(interface.from_latents(-noisy), noisy)
    assert torch.equal(interface.stepped_to_latents(noisy, (8, 12)), noisy)


@pytest.mark.parametrize(
    ("changes", "error", "sentence"),
    [
        ({"attention_kwargs": {"ip_hidden_states": []}}, NotImplementedError, "IP-Adapter"),
        ({"attention_kwargs": {"scale": 0.5, "mask": None}}, NotImplementedError, "attention options mask change nothing in Lumina 2"),
        ({"encoder_attention_mask": torch.ones(2, 9)}, ValueError, r"encoder_attention_mask is \(2, 9\); expected \(2, 12\)"),
        ({"encoder_hidden_states": torch.zeros(2, 12, 25)}, ValueError, "encoder_hidden_states"),
    ],
)
def test_what_is_not_supported_or_does_not_fit_names_itself(changes, error, sentence):
    with pytest.raises(error, match=sentence):
        alone(lumina2_transformer())(**lumina2_inputs() | changes)


def test_another_patch_size_is_refused_by_its_name():
    with pytest.raises(ValueError, match="patch_size 4 is not supported"):
        alone(lumina2_transformer(patch_size=4))
