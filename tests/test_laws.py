"""The laws of an ensemble, for every family × aggregator × placement."""

import functools

import pytest
import torch
from family_models import FUSED, MODELS, image_of, sample_of
from tiny import inputs, sd_unet, sdxl_unet

from afa.aggregators.registry import AGGREGATORS, Recipe
from afa.denoiser.hooks import adjust_weights, only_expert, record_weights, scale_weights
from afa.denoiser.strengths import Strength, rescaled
from afa.models.unet import UNetEnsemble

SMALL = {
    "sabw": {"hidden": 32, "heads": 2, "depth": 1},
    "stitch": {"hidden": 32, "heads": 2, "depth": 1},
    "fixed": {"weights": [0.5, 0.3, 0.2]},
    "mean": {},
}


@functools.cache
def expert(make, seed, copy=0):
    """An expert that all ensembles have in common, frozen: torch may fold a product with trainable weights otherwise."""
    return make(seed).requires_grad_(False)


@functools.cache
def answer(model, seed):
    """What such an expert answers by itself, for the image: some stock models answer for the text before it, too."""
    call = model.call()
    with torch.no_grad():
        return image_of(expert(model.make, seed)(**call), call)


def ensemble(model, kind, placement, seeds=(0, 1, 2), trained=True, experts=(), **recipe):
    experts = experts or [expert(model.make, seed, copy=seeds[:place].count(seed)) for place, seed in enumerate(seeds)]
    torch.manual_seed(7)
    made = model.ensemble(experts, recipe=Recipe(kind, SMALL[kind], **recipe), placement=placement).eval()
    if trained:
        for parameter in made.aggregators.parameters():
            if parameter.ndim > 1 and not parameter.any():  # the layer that makes an untrained one the mean
                torch.nn.init.normal_(parameter, std=1.0)
    return made


@functools.lru_cache(maxsize=8)  # as many as the laws of one placement ask for; making them takes most of a law's time
def _shared(model, kind, placement):
    return ensemble(model, kind, placement)


def shared(model, kind, placement):
    """An ensemble that laws have in common. They may train and switch it, but not change its weights."""
    made = _shared(model, kind, placement).eval()
    made.disable_gradient_checkpointing()
    made.zero_grad()
    return made


@functools.lru_cache(maxsize=8)
def plain(model, kind, placement):
    """What the ensemble that laws have in common predicts, and its weight maps."""
    made = shared(model, kind, placement)
    with torch.no_grad(), record_weights(made) as maps:
        return sample_of(made(**model.call())), maps.maps[0]


def gradients(made, model):
    """Of every parameter that gets one, by name."""
    made.zero_grad()
    sample_of(made(**model.call())).square().mean().backward()
    return {name: parameter.grad.clone() for name, parameter in made.named_parameters() if parameter.grad is not None}


@functools.lru_cache(maxsize=8)
def shared_gradients(model, kind, placement):
    """Those of the ensemble that laws have in common."""
    return gradients(shared(model, kind, placement).train(), model)


def shown(fused):
    return f"{fused[0]}-{'a list' if isinstance(fused[1], tuple) else fused[1]}"


def is_finest(fused):
    return fused[1] == MODELS[fused[0]].placements[0]


@pytest.fixture(params=[fused for fused in FUSED if is_finest(fused) or fused[0] == "sd" or fused[1] == "double"], scope="module", ids=shown)
def fused(request):
    """A family's tiny model, and where it is fused."""
    name, placement = request.param
    return MODELS[name], placement


def assert_close(found, expected):
    assert torch.allclose(found, expected, atol=2e-5 * max(1, expected.abs().max()))


# At a family's finest placement all that are trained are tried, and in turns one of those that see nothing, of which the mean is the fixed
# one with equal weights. At its other placements those that are trained take turns: the family decides what a stage is and the placement
# which are fused, so that all of them meet every family and every placement.
TRAINED = [name for name, entry in AGGREGATORS.items() if entry.trained]
TURNS = {
    (name, placement): TRAINED[(row + column) % len(TRAINED)]
    for row, (name, model) in enumerate(MODELS.items())
    for column, placement in enumerate((*model.placements[1:], model.chosen))
}
AT_FINEST = {name: [each for each in AGGREGATORS if each != ("mean", "fixed")[row % 2]] for row, name in enumerate(MODELS)}
CASES = [
    pytest.param(case, aggregator, id=f"{shown(case)}-{aggregator}")
    for case in FUSED
    for aggregator in (AT_FINEST[case[0]] if is_finest(case) else [TURNS[case]])
]


# Gradients pass stages that are fused, and those between them that are not: other placements have no more of either.
WITH_GRADIENTS = [case for case in CASES if is_finest(case.values[0]) or isinstance(case.values[0][1], tuple)]


@pytest.mark.parametrize(("fused", "aggregator"), CASES, indirect=["fused"], scope="module")
class TestLaws:
    def test_copies_of_one_expert_change_nothing(self, fused, aggregator):
        model, placement = fused
        made = ensemble(model, aggregator, placement, seeds=(0, 0, 0))
        with torch.no_grad():
            assert_close(sample_of(made(**model.call())), answer(model, 0))

    def test_weights_sum_to_one(self, fused, aggregator):
        model, placement = fused
        made = shared(model, aggregator, placement)
        with torch.no_grad(), record_weights(made) as maps:
            made(**model.call(height=10, width=12))
        assert list(maps.maps[0]) == made.fused
        for weights in maps.maps[0].values():
            assert weights.shape[:2] == (2, 3)
            assert weights.min() >= 0
            assert torch.allclose(weights.sum(1), torch.ones(()), atol=1e-5)

    def test_with_the_others_turned_off_an_expert_is_itself(self, fused, aggregator):
        model, placement = fused
        made = shared(model, aggregator, placement)
        names = made.names
        with torch.no_grad(), scale_weights(made, {names[0]: 0, names[2]: 0}):
            assert_close(sample_of(made(**model.call())), answer(model, 1))

    def test_equal_strengths_change_nothing(self, fused, aggregator):
        model, placement = fused
        made = shared(model, aggregator, placement)
        expected, _ = plain(model, aggregator, placement)
        with torch.no_grad(), scale_weights(made, dict.fromkeys(made.names, 3.0)):
            assert torch.equal(sample_of(made(**model.call())), expected)

    def test_a_region_changes_weights_inside_its_mask_only_and_they_stay_convex(self, fused, aggregator):
        model, placement = fused
        made = shared(model, aggregator, placement)
        left = torch.zeros(1, 16, 16)
        left[..., :8] = 1
        expected, before = plain(model, aggregator, placement)
        nothing = [Strength(made.names[0], 1.0, left), Strength(made.names[0], 0.0, torch.zeros(1, 4, 4))]
        with torch.no_grad(), scale_weights(made, {}, nothing):
            assert torch.equal(sample_of(made(**model.call())), expected)
        with torch.no_grad(), record_weights(made) as changed, scale_weights(made, {}, [Strength(made.names[0], 0.0, left)]):
            made(**model.call())
        first = made.fused[0]  # where both see the same features
        for stage, weights in changed.maps[0].items():
            half = weights.shape[-1] // 2
            assert weights[:, 0, :, :half].abs().max() == 0
            assert weights.min() >= 0 and torch.allclose(weights.sum(1), torch.ones(()), atol=1e-5)
            if stage == first and weights.shape[-1] % 2 == 0:
                assert torch.equal(weights[..., half:], before[stage][..., half:])

    def test_one_expert_of_the_ensemble_alone_is_itself(self, fused, aggregator):
        model, placement = fused
        made = shared(model, aggregator, placement)
        stock = answer(model, 1)
        with torch.no_grad(), only_expert(made, "expert_1"):
            assert torch.equal(sample_of(made(**model.call())), stock)


@pytest.mark.parametrize(("fused", "aggregator"), WITH_GRADIENTS, indirect=["fused"], scope="module")
class TestGradients:
    def test_only_aggregators_get_gradients(self, fused, aggregator):
        model, placement = fused
        made = shared(model, aggregator, placement).train()
        trainable = [name for name, parameter in made.named_parameters() if parameter.requires_grad]
        assert all(name.startswith("aggregators.") for name in trainable)
        if not trainable:
            return
        found = shared_gradients(model, aggregator, placement)
        assert all(name.startswith("aggregators.") for name in found)
        first = f"aggregators.{next(iter(made.aggregators))}."
        assert any(grad.any() for name, grad in found.items() if name.startswith(first))  # through every later stage of the frozen experts

    def test_gradient_checkpointing_changes_nothing(self, fused, aggregator):
        model, placement = fused
        made = shared(model, aggregator, placement).train()
        if not list(made.aggregators.parameters()):
            return
        kept, tried = shared_gradients(model, aggregator, placement), set()
        for largest_maps_only in (False, True):
            made.train().enable_gradient_checkpointing(largest_maps_only=largest_maps_only)
            if made.recomputed in tried:  # transformers' maps are all of one size
                continue
            tried.add(made.recomputed)
            again = gradients(made, model)
            assert len(kept) == len(again) == len(list(made.aggregators.parameters()))
            assert all(torch.equal(grad, again[name]) for name, grad in kept.items())


def test_untrained_sabw_is_the_mean(fused):
    model, placement = fused
    untrained = ensemble(model, "sabw", placement, trained=False)
    mean = shared(model, "mean", placement)
    with torch.no_grad():
        expected = sample_of(mean(**model.call()))
        assert torch.allclose(sample_of(untrained(**model.call())), expected, atol=1e-6 * max(1, expected.abs().max()))


def test_the_order_of_experts_changes_nothing_for_the_mean(fused):
    model, placement = fused
    with torch.no_grad():
        one, other = (sample_of(made(**model.call())) for made in (shared(model, "mean", placement), ensemble(model, "mean", placement, seeds=(2, 0, 1))))
    assert torch.allclose(one, other, atol=1e-5 * max(1, one.abs().max()))


@pytest.mark.parametrize("name", ["sd3", "flux", "qwen-image", "krea2", "lumina2"])
class TestTextTokens:
    """Where blocks change text tokens, every expert keeps its own, or they are fused as image tokens are."""

    def test_copies_of_one_expert_change_nothing(self, name):
        model = MODELS[name]
        made = ensemble(model, "sabw", "layers", seeds=(0, 0, 0), text_stream="fused")
        with torch.no_grad():
            assert_close(sample_of(made(**model.call())), answer(model, 0))

    def test_fused_ones_make_a_difference(self, name):
        model = MODELS[name]
        with torch.no_grad():
            own, together = (sample_of(ensemble(model, "mean", "layers", text_stream=text)(**model.call())) for text in ("own", "fused"))
        assert not torch.allclose(own, together, atol=1e-2)

    def test_an_expert_of_all_the_weight_gives_its_own(self, name):
        model = MODELS[name]
        experts = [expert(model.make, seed) for seed in range(3)]
        recipe = Recipe("fixed", {"weights": [0, 1, 0]}, text_stream="fused")
        with torch.no_grad():
            assert torch.equal(sample_of(model.ensemble(experts, recipe=recipe)(**model.call())), sample_of(experts[1](**model.call())))

    def test_gradient_checkpointing_changes_nothing(self, name):
        model = MODELS[name]
        made = ensemble(model, "stitch", "layers", text_stream="fused").train()
        kept = gradients(made, model)
        made.enable_gradient_checkpointing()
        again = gradients(made, model)
        assert len(kept) == len(again) == len(list(made.aggregators.parameters()))
        assert all(torch.equal(grad, again[name]) for name, grad in kept.items())


def test_the_order_of_experts_permutes_the_weights():
    """SABW with its in- and output channels permuted as the experts are gives permuted weights and the same output."""
    torch.manual_seed(3)
    experts, order = [MODELS["sd"].make(seed) for seed in range(3)], [2, 0, 1]  # its own: they are cast
    model = ensemble(MODELS["sd"], "sabw", "layers", experts=experts)
    other = ensemble(MODELS["sd"], "sabw", "layers", experts=[experts[place] for place in order])
    for mine, theirs, stage in zip(model.aggregators.values(), other.aggregators.values(), model.stages, strict=True):
        theirs.load_state_dict(mine.state_dict())
        by_expert = mine.conv_in.weight.data.unflatten(1, (3, stage.channels))
        theirs.conv_in.weight.data = by_expert[:, order].flatten(1, 2)
        theirs.conv_out.weight.data = mine.conv_out.weight.data[order]
    call = {name: value.double() if value.is_floating_point() else value for name, value in inputs().items()}
    with torch.no_grad(), record_weights(model.double()) as maps, record_weights(other.double()) as permuted:
        assert torch.allclose(model(**call).sample, other(**call).sample, atol=1e-8)
    for stage in model.fused:
        assert torch.allclose(maps.stage(stage)[:, :, order], permuted.stage(stage), atol=1e-6)


def test_a_weight_of_one_is_that_expert():
    experts = [sd_unet(seed) for seed in range(3)]
    model = UNetEnsemble(experts, recipe=Recipe("fixed", {"weights": [0, 1, 0]}))
    with torch.no_grad():
        assert torch.equal(model(**inputs()).sample, experts[1](**inputs()).sample)


def test_each_expert_reads_its_own_part_of_the_joined_text():
    model = ensemble(MODELS["sd"], "mean", "out")
    call = inputs(text_width=72)
    with torch.no_grad():
        for index, expert in enumerate(model.experts):
            own = {**call, "encoder_hidden_states": call["encoder_hidden_states"][..., 24 * index : 24 * (index + 1)]}
            with only_expert(model, model.names[index]):
                assert torch.equal(model(**call).sample, expert(**own).sample)


def test_the_joined_text_of_two_encoders_is_taken_apart_encoder_by_encoder():
    experts = [sdxl_unet(seed) for seed in range(2)]
    model = UNetEnsemble(experts, text_widths=(16, 24))
    first, second = torch.randn(2, 2, 7, 16), torch.randn(2, 2, 7, 24)  # (N, B, T, D) of each encoder
    joined = torch.cat([*first, *second], dim=-1)
    for index, own in enumerate(model.split_text(joined)):
        assert torch.equal(own, torch.cat([first[index], second[index]], dim=-1))


def test_nothing_is_recorded_unless_asked():
    model = ensemble(MODELS["sd"], "sabw", "layers")
    with record_weights(model) as maps, torch.no_grad():
        model(**inputs())
    with torch.no_grad():
        model(**inputs())
    assert len(maps.maps) == len(maps.timesteps) == 1
    assert maps.timesteps == [500.0]


def test_experts_stay_in_evaluation_mode():
    model = ensemble(MODELS["sd"], "sabw", "layers").train()
    assert model.aggregators.training
    assert not any(module.training for module in model.experts.modules())


def test_a_compiled_denoiser_gives_the_same():
    one_level = {
        "block_out_channels": (16,),
        "layers_per_block": 1,
        "down_block_types": ("DownBlock2D",),
        "up_block_types": ("UpBlock2D",),
        "mid_block_type": None,
    }  # compiling takes as long as there are layers; attention is in the aggregators
    experts = [sd_unet(seed, **one_level) for seed in range(2)]
    model = UNetEnsemble(experts, recipe=Recipe("sabw", SMALL["sabw"]), placement=["IN01", "OUT01"]).eval()
    torch.nn.init.normal_(model.aggregators["IN01"].conv_out.weight)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        assert torch.allclose(compiled(**inputs()).sample, model(**inputs()).sample, atol=1e-5)


def test_attention_is_spared_on_large_maps_only():
    experts = [sd_unet(seed) for seed in range(2)]
    model = UNetEnsemble(experts, recipe=Recipe("sabw", SMALL["sabw"], attention_up_to=8))
    spared = [name for name, aggregator in model.aggregators.items() if aggregator.transformer is None]
    assert spared == ["IN00", "IN01", "IN02", "OUT08", "OUT09", "OUT10", "OUT11"]  # the 16×16 maps


def test_attention_cannot_be_spared_where_there_is_none():
    with pytest.raises(ValueError, match="aggregator 'mean' has no attention to spare; leave out attention_up_to"):
        UNetEnsemble([sd_unet(seed) for seed in range(2)], recipe=Recipe("mean", attention_up_to=8))


def test_a_stronger_expert_weighs_more_and_weights_stay_convex():
    made = ensemble(MODELS[FUSED[0][0]], "sabw", "layers")
    call = MODELS[FUSED[0][0]].call()
    with torch.no_grad(), record_weights(made) as plain:
        made(**call)
    with torch.no_grad(), record_weights(made) as changed, scale_weights(made, {made.names[0]: 4.0}):
        made(**call)
    first = made.fused[0]  # where both see the same features
    before, after = plain.maps[0][first], changed.maps[0][first]
    assert (after[:, 0] > before[:, 0]).all()
    assert torch.allclose(after[:, 0], 4 * before[:, 0] / (1 + 3 * before[:, 0]), atol=1e-5)
    assert torch.allclose(after.sum(1), torch.ones(()), atol=1e-5)


def test_adjusted_weights_are_shown_row_by_row_where_everyone_has_a_blend_of_its_own():
    seen = {}
    made = ensemble(MODELS[FUSED[0][0]], "stitch", "layers")
    with torch.no_grad(), adjust_weights(made, lambda stage, weights: seen.setdefault(stage, weights)):
        made(**MODELS[FUSED[0][0]].call())
    assert list(seen) == made.fused
    assert {tuple(weights.shape[:2]) for weights in list(seen.values())[:-1]} == {(6, 3)}  # two samples, three rows each
    assert seen[made.fused[-1]].shape[:2] == (2, 3)


def test_scaled_weights_sum_to_one_however_small_they_are():
    small = torch.tensor([1e-3, 1e-30, 1.2e-38, 1e-39, 1e-44, 0.0])  # the last four: at and below the smallest normal number
    weights = torch.stack([1 - small, small]).view(1, 2, 1, -1)
    factors = torch.tensor([0.0, 0.5]).view(1, 2, 1, 1)
    assert torch.equal(rescaled(weights, factors), torch.tensor([0.0, 1.0]).view(1, 2, 1, 1).expand(1, 2, 1, 6))


@pytest.mark.parametrize(
    ("strengths", "sentence"),
    [
        ({"expert_9": 1.0}, "expert_9"),
        ({"expert_0": -1.0}, "strength of expert 'expert_0' is -1; the least is 0"),
        ({"expert_0": float("nan")}, "expert 'expert_0'.*nan"),
        ({"expert_0": 0, "expert_1": 0, "expert_2": 0}, "all experts .* are turned off"),
    ],
)
def test_strengths_that_cannot_be_used_are_named(strengths, sentence):
    made = ensemble(MODELS[FUSED[0][0]], "mean", "layers")
    with pytest.raises(ValueError, match=sentence), scale_weights(made, strengths):
        pass
