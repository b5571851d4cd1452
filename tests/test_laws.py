"""The laws of an ensemble, for every family × aggregator × placement."""

import pytest
import torch
from tiny import inputs, sd_unet, sdxl_inputs, sdxl_unet

from afa.aggregators.table import AGGREGATORS, Recipe
from afa.denoiser.base import only_expert, record_weights
from afa.denoiser.placement import PLACEMENTS
from afa.denoiser.unet import UNetEnsemble

MODELS = {"sd": (sd_unet, inputs), "sdxl": (sdxl_unet, sdxl_inputs)}
LAST = {sd_unet: "OUT11", sdxl_unet: "OUT08"}
SMALL = {
    "sabw": {"hidden": 32, "heads": 2, "depth": 1},
    "stitch": {"hidden": 32, "heads": 2, "depth": 1},
    "fixed": {"weights": [0.5, 0.3, 0.2]},
    "mean": {},
}
FUSED = [*PLACEMENTS, "a list"]


def ensemble(make, kind, placement, seeds=(0, 1, 2), trained=True):
    experts = [make(seed) for seed in seeds]
    if placement == "a list":
        placement = ["IN00", "IN04", "M00", "OUT02", LAST[make]]
    torch.manual_seed(7)
    model = UNetEnsemble(experts, recipe=Recipe(kind, SMALL[kind]), placement=placement).eval()
    if trained:
        for name, parameter in model.aggregators.named_parameters():
            if name.endswith("conv_out.weight"):
                torch.nn.init.normal_(parameter, std=1.0)
    return model


@pytest.fixture(params=MODELS, scope="module")
def kind_of_model(request):
    return MODELS[request.param]


@pytest.mark.parametrize("placement", FUSED)
@pytest.mark.parametrize("aggregator", AGGREGATORS)
class TestLaws:
    def test_copies_of_one_expert_change_nothing(self, kind_of_model, aggregator, placement):
        make, call = kind_of_model
        model = ensemble(make, aggregator, placement, seeds=(0, 0, 0))
        with torch.no_grad():
            assert torch.allclose(model(**call()).sample, model.experts[0](**call()).sample, atol=2e-5)

    def test_weights_sum_to_one(self, kind_of_model, aggregator, placement):
        make, call = kind_of_model
        model = ensemble(make, aggregator, placement)
        with torch.no_grad(), record_weights(model) as maps:
            model(**call(height=10, width=12))
        assert list(maps.maps[0]) == model.fused
        for weights in maps.maps[0].values():
            assert weights.shape[:2] == (2, 3)
            assert weights.min() >= 0
            assert torch.allclose(weights.sum(1), torch.ones(()), atol=1e-5)

    def test_only_aggregators_get_gradients(self, kind_of_model, aggregator, placement):
        make, call = kind_of_model
        model = ensemble(make, aggregator, placement).train()
        trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        assert all(name.startswith("aggregators.") for name in trainable)
        if not trainable:
            return
        model(**call()).sample.square().mean().backward()
        assert all(parameter.grad is None for parameter in model.experts.parameters())
        first = next(iter(model.aggregators.values()))
        assert first.conv_out.weight.grad.abs().max() > 0  # through every later stage of the frozen experts

    def test_gradient_checkpointing_changes_nothing(self, kind_of_model, aggregator, placement):
        make, call = kind_of_model
        model = ensemble(make, aggregator, placement).train()
        if not list(model.aggregators.parameters()):
            return
        grads = []
        for switch in (model.disable_gradient_checkpointing, model.enable_gradient_checkpointing):
            switch()
            model.zero_grad()
            model(**call()).sample.square().mean().backward()
            grads.append([parameter.grad.clone() for parameter in model.aggregators.parameters()])
        assert all(torch.equal(kept, again) for kept, again in zip(*grads, strict=True))

    def test_one_expert_of_the_ensemble_alone_is_itself(self, kind_of_model, aggregator, placement):
        make, call = kind_of_model
        model = ensemble(make, aggregator, placement)
        with torch.no_grad(), only_expert(model, "expert_1"):
            assert torch.equal(model(**call()).sample, model.experts[1](**call()).sample)


@pytest.mark.parametrize("placement", FUSED)
def test_untrained_sabw_is_the_mean(kind_of_model, placement):
    make, call = kind_of_model
    untrained = ensemble(make, "sabw", placement, trained=False)
    mean = ensemble(make, "mean", placement)
    with torch.no_grad():
        assert torch.allclose(untrained(**call()).sample, mean(**call()).sample, atol=1e-6)


@pytest.mark.parametrize("placement", FUSED)
def test_the_order_of_experts_changes_nothing_for_the_mean(kind_of_model, placement):
    make, call = kind_of_model
    with torch.no_grad():
        outputs = [ensemble(make, "mean", placement, seeds=seeds)(**call()).sample for seeds in [(0, 1, 2), (2, 0, 1)]]
    assert torch.allclose(*outputs, atol=1e-5)


def test_the_order_of_experts_permutes_the_weights():
    """SABW with its in- and output channels permuted as the experts are gives permuted weights and the same output."""
    torch.manual_seed(3)
    model, order = ensemble(sd_unet, "sabw", "layers"), [2, 0, 1]
    other = ensemble(sd_unet, "sabw", "layers", seeds=order)
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
    model = ensemble(sd_unet, "mean", "out")
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
    model = ensemble(sd_unet, "sabw", "layers")
    with record_weights(model) as maps, torch.no_grad():
        model(**inputs())
    with torch.no_grad():
        model(**inputs())
    assert len(maps.maps) == len(maps.timesteps) == 1
    assert maps.timesteps == [500.0]


def test_experts_stay_in_evaluation_mode():
    model = ensemble(sd_unet, "sabw", "layers").train()
    assert model.aggregators.training
    assert not any(module.training for module in model.experts.modules())


def test_a_compiled_denoiser_gives_the_same():
    model = ensemble(sd_unet, "sabw", "layers")
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        assert torch.allclose(compiled(**inputs()).sample, model(**inputs()).sample, atol=1e-5)


def test_attention_is_spared_on_large_maps_only():
    experts = [sd_unet(seed) for seed in range(2)]
    model = UNetEnsemble(experts, recipe=Recipe("sabw", SMALL["sabw"], attention_up_to=8))
    spared = [name for name, aggregator in model.aggregators.items() if aggregator.transformer is None]
    assert spared == ["IN00", "IN01", "IN02", "OUT08", "OUT09", "OUT10", "OUT11"]  # the 16×16 maps
