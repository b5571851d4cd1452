"""One Z-Image transformer walked by stages is the stock forward, bit for bit; padding is nowhere on the map; variants are refused by name."""

import copy

import pytest
import torch
from diffusers import ZImageTransformer2DModel
from family_models import MODELS, SMALL_SABW, in_turns, sample_of
from test_laws import ensemble
from tiny_z_image import z_image_inputs, z_image_transformer

from afa.aggregators.registry import count_parameters
from afa.cost import call_of, count_flops
from afa.models.registry import FAMILIES
from afa.models.z_image import ZImageEnsemble
from afa.stages.tokens import fold, unfold


def alone(model, placement="layers"):
    """An ensemble of one, with small aggregators."""
    return ZImageEnsemble([model], recipe=SMALL_SABW, placement=placement)


def control(*layers):
    """What a ControlNet adds after these layers: to image tokens, their padding and caption tokens. 64 of the image, 32 of the caption."""
    return {"controlnet_block_samples": {layer: torch.randn(2, 96, 32) for layer in layers}}


CALLS = {
    "as it is": {},
    "without padding of the image": {"height": 16},
    "not square": {"height": 20, "width": 12},
    "one image": {"batch": 1},
    "one image, not square": {"batch": 1, "height": 6, "width": 26},
    "captions of different lengths": {"lengths": (7, 40)},
    "captions without padding": {"lengths": (32,)},
    "captions, one without padding": {"lengths": (64, 3)},
    "controlnet": control(0, 2),
    "attention_kwargs": {"joint_attention_kwargs": {"scale": 1.0}},
    "a time of each image": {"t": torch.tensor([0.02, 0.93])},
    "both predictions of guidance": {"batch": 4, "lengths": (9, 40, 8, 8)},
}
MADE = ("batch", "height", "width", "lengths")


def call_named(name):
    changes = CALLS[name]
    return z_image_inputs(**{key: changes[key] for key in MADE if key in changes}) | {key: changes[key] for key in changes if key not in MADE}


def same(found, expected):
    """The same lists of tensors, bit for bit."""
    return isinstance(found, list) and len(found) == len(expected) and all(map(torch.equal, found, expected))


@pytest.mark.parametrize(("name", "placement"), in_turns(CALLS, ["layers", "every-2", "out"]))
def test_one_expert_is_itself(name, placement):
    model, call = z_image_transformer(), call_named(name)
    with torch.no_grad():
        expected = model(**copy.deepcopy(call)).sample
        made = alone(model, placement)
        assert same(made(**copy.deepcopy(call)).sample, expected)
        if placement == "layers":
            assert same(made(**call, return_dict=False)[0], expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("lengths", [(7,), (7, 40)])
def test_one_expert_is_itself_in_half_precision(dtype, lengths):
    model, call = z_image_transformer().to(dtype), z_image_inputs(lengths=lengths, dtype=dtype)
    with torch.no_grad():
        expected = model(**call).sample
        assert expected[0].dtype == dtype and expected[0].isfinite().all()
        assert same(alone(model)(**call).sample, expected)
        assert same(alone(model).to(dtype)(**call).sample, expected)


def test_models_without_the_norm_of_queries_or_with_one_refiner_are_themselves():
    for changes in ({"qk_norm": False}, {"n_refiner_layers": 1}, {"t_scale": 500.0}):
        model, call = z_image_transformer(**changes), z_image_inputs(lengths=(7, 40))
        with torch.no_grad():
            assert same(alone(model)(**call).sample, model(**call).sample)


def test_padding_of_the_image_takes_part_in_every_block_but_is_on_no_map():
    """48 image tokens are padded to 64. Aggregators see 6 times 8 places; experts attend to the padding."""
    model, call, seen = z_image_transformer(), z_image_inputs(), []
    made, stages = alone(model), [*model.noise_refiner, *model.layers]
    hooks = [stage.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1])) for stage in stages]
    maps = []
    for aggregator in made.aggregators.values():
        hooks.append(aggregator.register_forward_pre_hook(lambda _, args: maps.append(args[0][0].shape[2:])))
    with torch.no_grad():
        before = sample_of(made(**call))
        assert seen == [64, 64, 96, 96, 96] and set(maps) == {(6, 8)} and len(maps) == 6
        model.x_pad_token += 1.0
        assert not torch.allclose(sample_of(made(**call)), before, atol=1e-2)
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize("kind", ["sabw", "stitch"])
@pytest.mark.parametrize("text_stream", ["own", "fused"])
def test_an_image_does_not_depend_on_the_captions_beside_it(kind, text_stream):
    made = ensemble(MODELS["z-image"], kind, "layers", text_stream=text_stream)
    call = z_image_inputs(lengths=(40, 4))
    with torch.no_grad():
        together = sample_of(made(**call))
        own = sample_of(made(call["x"][1:], call["t"][1:], call["cap_feats"][1:]))
        assert torch.allclose(own, together[1:], atol=1e-4 * together.abs().max())
        call["cap_feats"][0] += 5.0
        assert torch.allclose(sample_of(made(**call))[1:], together[1:], atol=1e-4 * together.abs().max())
        call["cap_feats"][1] += 5.0
        assert not torch.allclose(sample_of(made(**call))[1:], together[1:], atol=1e-1)


def test_aggregators_see_the_captions_tokens_and_not_their_padding():
    masks, made = [], ensemble(MODELS["z-image"], "sabw", "out")
    made.aggregators["OUT"].register_forward_pre_hook(lambda _, args: masks.append(args[3]))
    with torch.no_grad():
        for lengths in ((40, 4), (32,)):
            made(**z_image_inputs(lengths=lengths))
    assert masks[0].shape == (2, 64) and masks[0].sum(1).tolist() == [40, 4] and masks[1] is None


def test_z_image_itself_has_thirty_three_stages_and_six_billion_parameters():
    with torch.device("meta"):
        model = ZImageTransformer2DModel()
    stages = FAMILIES["z-image"].stages(model)
    assert [stage.name for stage in stages] == ["N00", "N01", *(f"Z{index:02}" for index in range(30)), "OUT"]
    assert {stage.channels for stage in stages[:-1]} == {3840} and stages[-1].channels == 64
    assert count_parameters(model) == 6_154_908_736
    made = ZImageEnsemble([model] * 3)
    assert made.fused == [*(f"Z{index:02}" for index in range(1, 30, 4)), "OUT"]
    assert made.side == 128 and made.widths == (256, 3840)
    assert count_flops(model, 16, 16).total > 2 * 64 * count_parameters(model)
    assert count_parameters(made.aggregators) == 38_124_672  # at all 33 stages: 144 million


def test_the_call_is_the_pipelines():
    """Time rises in the model and falls in the scheduler; the model predicts image minus noise, the scheduler steps by noise minus image."""
    call = call_of(z_image_transformer(), 8, 12, batch=2)
    assert [image.shape for image in call["x"]] == [(4, 1, 8, 12)] * 2 and [caption.shape for caption in call["cap_feats"]] == [(512, 24)] * 2
    interface, config = FAMILIES["z-image"].interface, z_image_transformer().config
    noisy, states = torch.randn(2, 4, 8, 12), torch.randn(2, 5, 24)
    mask = torch.tensor([[1] * 5, [1, 1, 1, 0, 0]])
    found = interface.denoiser_kwargs(config, noisy, torch.tensor([1000, 250]), interface.conditions(config, [states, mask], torch.zeros(2, 6)))
    assert found["t"].tolist() == [0.0, 0.75] and interface.timestep_from_model(found["t"]).tolist() == [1000, 250]
    assert torch.equal(interface.latents(found), noisy) and same(found["cap_feats"], [states[0], states[1, :3]])
    assert torch.equal(interface.to_latents([image * 2 for image in found["x"]], (8, 12)), -2 * noisy)
    assert same(interface.from_latents(-noisy), found["x"])
    assert torch.equal(interface.stepped_to_latents(noisy, (8, 12)), noisy)


def test_what_the_head_says_of_an_image_is_where_the_image_is():
    latents = torch.randn(2, 4, 8, 12)
    assert torch.equal(unfold(fold(latents)), latents)
    model = z_image_transformer()
    patches = torch.stack([model._patchify_image(image, 2, 1)[0] for image in latents[:, :, None]])
    assert torch.equal(fold(latents).flatten(2).transpose(1, 2), patches)


SEVERAL = [[torch.zeros(4, 1, 12, 16)] * 2] * 2


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"x": SEVERAL}, "images beside the one that is drawn"),
        ({"x": [torch.zeros(4, 1, 12, 16), torch.zeros(4, 1, 8, 8)]}, "images of different sizes"),
        ({"x": [torch.zeros(4, 2, 12, 16)] * 2}, "2 frames"),
        ({"siglip_feats": [None, None]}, "siglip_feats .* is not supported"),
        ({"image_noise_mask": [[1], [1]]}, "image_noise_mask .* is not supported"),
        ({"patch_size": 4}, "patch_size 4"),
        ({"f_patch_size": 2}, "f_patch_size 2"),
        ({"joint_attention_kwargs": {"ip_hidden_states": []}}, "IP-Adapter"),
        ({"joint_attention_kwargs": {"scale": 0.5, "mask": None}}, "attention options mask"),
    ],
)
def test_what_is_not_supported_names_itself(changes, sentence):
    with pytest.raises(NotImplementedError, match=sentence):
        alone(z_image_transformer())(**z_image_inputs() | changes)


@pytest.mark.parametrize(
    ("captions", "sentence"),
    [
        ([torch.zeros(7, 48)] * 2, r"\(7, 48\).*shape \(T, 24\)"),
        ([torch.zeros(7, 24)], "expected 2 captions"),
        ([torch.zeros(24)] * 2, r"\(24,\)"),
    ],
)
def test_what_does_not_fit_is_said(captions, sentence):
    with pytest.raises(ValueError, match=sentence):
        alone(z_image_transformer())(**z_image_inputs() | {"cap_feats": captions})


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"siglip_feat_dim": 16}, "siglip_feat_dim .* is not supported"),
        ({"all_patch_size": (4,)}, r"all_patch_size \[4\]"),
        ({"all_patch_size": (2, 4), "all_f_patch_size": (1, 1)}, r"all_patch_size \[2, 4\]"),
        ({"all_f_patch_size": (2,)}, r"all_f_patch_size \[2\]"),
    ],
)
def test_a_variant_is_refused_by_the_name_of_its_setting(changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        alone(z_image_transformer(**changes))
