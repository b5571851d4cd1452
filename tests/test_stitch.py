"""What cross-stitched aggregators can be, and what an aggregator's weights depend on."""

import copy

import pytest
import torch
from tiny import SMALL as NINE_STAGES
from tiny import inputs, sd_unet

from afa.aggregators.registry import Recipe
from afa.aggregators.sabw import SABW, SEEN, in_parts
from afa.aggregators.stitch import Stitch
from afa.models.unet import UNetEnsemble

SHAPE = {"experts": 3, "channels": 8, "time_width": 16, "text_width": 24}
SMALL = {"hidden": 32, "heads": 2, "depth": 1}


def stage_inputs(seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = {"features": (2, 3, 8, 6, 5), "temb": (2, 16), "text": (2, 7, 24)}
    made = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return made | {"features": made["features"].unbind(1)}


def trained(aggregator, seed=1):
    torch.manual_seed(seed)
    torch.nn.init.normal_(aggregator.conv_out.weight, std=1.0)
    return aggregator.eval()


def ensemble(kind, placement="layers", seeds=(0, 1, 2)):
    torch.manual_seed(7)
    return UNetEnsemble([sd_unet(seed, **NINE_STAGES) for seed in seeds], recipe=Recipe(kind, {} if kind == "mean" else SMALL), placement=placement).eval()


def test_every_expert_is_handed_a_convex_blend_of_its_own():
    call = stage_inputs()
    stitch = trained(Stitch(**SHAPE, **SMALL))
    with torch.no_grad():
        fused, weights = stitch(**call)
        matrix = stitch.matrix(**call)
    fused = torch.stack(fused, dim=1)
    features = torch.stack(call["features"], dim=1)
    assert fused.shape == features.shape
    assert torch.allclose(matrix.sum(2), torch.ones(()), atol=1e-6)
    by_hand = torch.stack([(matrix[:, j, :, None] * features).sum(1) for j in range(3)], dim=1)
    assert torch.allclose(fused, by_hand, atol=1e-6)
    assert torch.equal(weights, matrix.mean(1))


def test_with_the_identity_it_is_a_router_on_the_predictions():
    model, router = ensemble("stitch"), ensemble("mean", "out")
    for aggregator in model.aggregators.values():
        if isinstance(aggregator, Stitch):
            aggregator.kept.data.fill_(200.0)
    with torch.no_grad():
        assert torch.allclose(model(**inputs()).sample, router(**inputs()).sample, atol=1e-6)


def test_with_equal_rows_it_is_sabw():
    sabw, stitch = ensemble("sabw"), ensemble("stitch")
    for mine, other in zip(sabw.aggregators.values(), stitch.aggregators.values(), strict=True):
        trained(mine)
        state = mine.state_dict()
        if isinstance(other, Stitch):
            state["conv_out.weight"], state["kept"] = mine.conv_out.weight.repeat(3, 1, 1, 1), torch.zeros(())
        other.load_state_dict(state)
    call = {name: value.double() if value.is_floating_point() else value for name, value in inputs().items()}
    with torch.no_grad():
        assert torch.allclose(stitch.double()(**call).sample, sabw.double()(**call).sample, atol=1e-8)


def test_the_last_stage_makes_one_prediction():
    model = ensemble("stitch")
    kinds = [type(aggregator) for aggregator in model.aggregators.values()]
    assert kinds == [Stitch] * 8 + [SABW]
    assert [type(aggregator) for aggregator in ensemble("stitch", "out").aggregators.values()] == [SABW]


def test_an_untrained_one_is_nearer_to_the_mean_of_predictions_than_to_that_of_features():
    with torch.no_grad():
        untrained, predictions, features = (ensemble(*how)(**inputs()).sample for how in (("stitch",), ("mean", "out"), ("mean",)))
    assert (untrained - predictions).norm() < (untrained - features).norm()


@pytest.mark.parametrize("kind", [SABW, Stitch])
@pytest.mark.parametrize("ignored", SEEN)
def test_weights_do_not_depend_on_what_is_ignored(kind, ignored):
    call, other = stage_inputs(0), stage_inputs(1)
    changed = {"text": {"text": other["text"]}, "time": {"temb": other["temb"]}}
    torch.manual_seed(0)
    seeing, ignoring = (trained(kind(**SHAPE, **SMALL, ignore=ignore)) for ignore in ((), (ignored,)))
    with torch.no_grad():
        if ignored == "place":
            weights = ignoring.weigh(**call)
            assert torch.equal(weights, weights[..., :1, :1].expand_as(weights))
            assert seeing.weigh(**call).std((2, 3)).max() > 0
            return
        assert torch.equal(ignoring.weigh(**call), ignoring.weigh(**{**call, **changed[ignored]}))
        assert not torch.equal(seeing.weigh(**call), seeing.weigh(**{**call, **changed[ignored]}))


def test_what_cannot_be_ignored_is_named():
    with pytest.raises(ValueError, match="did you mean 'text'"):
        SABW(**SHAPE, **SMALL, ignore=["txt"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", [SABW, Stitch])
def test_aggregators_compute_in_the_features_dtype_and_weigh_in_float32(kind, dtype):
    call = stage_inputs()
    half = call | {"features": [own.to(dtype) for own in call["features"]]}
    kept = trained(kind(**SHAPE, **SMALL))
    cast = copy.deepcopy(kept).to(dtype)
    seen = []
    kept.transformer.register_forward_hook(lambda module, args, output: seen.append(output[0].dtype))
    with torch.no_grad():
        fused, weights = kept(**half)
        of_cast_weights, _ = cast(**half)
        exact = kept.weigh(**call)
    fused, of_cast_weights = (found if isinstance(found, list) else [found] for found in (fused, of_cast_weights))
    assert seen == [dtype, torch.float32]
    assert weights.dtype == torch.float32 and {own.dtype for own in fused} == {dtype}
    assert all(map(torch.equal, fused, of_cast_weights)) or kind is Stitch  # whose scalar is not rounded in the softmax
    assert torch.allclose(torch.stack(fused), torch.stack(of_cast_weights), atol=0.05)
    assert torch.allclose(weights, exact, atol=0.05) and not torch.equal(weights, exact)


def test_float32_weights_beside_half_precision_get_their_gradients_in_float32():
    call = stage_inputs()
    exact = trained(Stitch(**SHAPE, **SMALL)).train()
    mixed = copy.deepcopy(exact)
    grads = []
    for aggregator, dtype in ((exact, torch.float32), (mixed, torch.bfloat16)):
        fused, _ = aggregator(**call | {"features": [own.to(dtype) for own in call["features"]]})
        sum(own.float().square().mean() for own in fused).backward()
        grads.append(torch.cat([parameter.grad.flatten() for parameter in aggregator.parameters()]))
    assert grads[1].dtype == torch.float32
    assert torch.nn.functional.cosine_similarity(*grads, dim=0) > 0.99


def test_features_are_not_laid_side_by_side():
    call = stage_inputs()
    stitch = trained(Stitch(**SHAPE, **SMALL))
    together = torch.cat(call["features"], dim=1)
    with torch.no_grad():
        assert torch.allclose(in_parts(stitch.conv_in, call["features"]), stitch.conv_in(together), atol=1e-6)
