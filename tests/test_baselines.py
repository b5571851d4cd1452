"""The laws of the sampling-time methods, for every one of them, on tiny real experts."""

import functools
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from rival_experts import CAT, DOG, FOX, SAMPLING, UNET, differ, joined_inputs, pipelines, together
from tiny import inputs, quiet, sd_pipeline, sdxl_pipeline

from afa import Ensemble, UserError, only_expert, record_weights
from afa.experts.load import load_experts
from afa.sampling.registry import SAMPLING_METHODS, make_sampler
from afa.sampling.sample import Request, Sampling, sample

FIRST = {"single": {"expert": "expert_0"}, "single_in_ensemble": {"expert": "expert_0"}}
# Blended at every step: else two of three steps are the general expert's alone.
ALL = {**FIRST, "magicfusion": {"mode": 2, "t0": 0}, "loratorio": {"patch": 2, "temperature": 0.1}}


def made(method, ensemble, base=None, **options):
    """The sampler of a method, with a base model where it needs one: another small model, or the one given."""
    based = {"base": base or pipelines(4)[3]} if SAMPLING_METHODS[method].based else {}
    return make_sampler(method, ensemble, **based, **(options or ALL.get(method, {})))


@pytest.fixture(scope="module")
def experts():
    return load_experts(pipelines(3))


@pytest.fixture(scope="module")
def ensemble(experts):
    return together(experts)


@functools.cache
def stock(kind):
    return quiet(sdxl_pipeline() if kind == "sdxl" else sd_pipeline(prediction_type=kind, **UNET))


@functools.cache
def alike(kind, count=3):
    """That many times one expert."""
    return together([stock(kind)] * count)


@functools.cache
def alone(kind, method):
    """What that expert draws; SuperDiff's single expert is its own SDE on that expert."""
    draw = make_sampler(method, alike(kind, 1)) if method else functools.partial(sample, stock(kind))
    return draw([CAT], Sampling(2, 3.0, height=32, width=32))


@functools.cache
def half():
    """Two experts in half precision, and a base for them."""
    return together([pipe.to(torch.bfloat16) for pipe in pipelines(2)]), pipelines(4)[3].to(torch.bfloat16)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sdxl"])
@pytest.mark.parametrize("method", SAMPLING_METHODS)
def test_identical_experts_are_the_single_expert(method, kind):
    """To the bit; the mean of three features rounds."""
    images = made(method, alike(kind), base=stock(kind))([CAT], Sampling(2, 3.0, height=32, width=32))
    assert differ(images, alone(kind, method if method.startswith("superdiff") else "")) <= (1 if method == "feature_mean" else 0)


@pytest.mark.parametrize("method", ["noise_average", "timestep_experts", "single_in_ensemble", "magicfusion", "loratorio", "feature_mean"])
def test_predictions_of_identical_experts_are_that_experts_bit_for_bit(method):
    sampler = made(method, alike("epsilon"), base=stock("epsilon"))
    sampler.denoiser.guidance = 3.0
    with torch.no_grad():
        got, expected = (model(**inputs(batch=4, height=8, width=8)).sample for model in (sampler.denoiser, stock("epsilon").unet))
    assert torch.equal(got, expected) if method != "feature_mean" else torch.allclose(got, expected, atol=2e-5)


MADE_ONE = {  # options that leave only expert_1
    "single_in_ensemble": {"expert": "expert_1"},
    "random_expert": {"weights": [0, 5, 0], "frame": "ensemble"},
    "noise_average": {"weights": [0, 5, 0]},
    "timestep_experts": {"table": "1000-0:expert_1"},
    "expert_switch": {"order": ["expert_1"]},
    "magicfusion": {"general": "expert_1", "mode": 1, "t0": 0},
}


@pytest.fixture(scope="module")
def of_one(ensemble):
    """What an expert draws in the ensemble's frame."""
    with only_expert(ensemble.denoiser, "expert_1"):
        return sample(quiet(ensemble.pipeline()), [CAT, DOG], SAMPLING)


@pytest.mark.parametrize("method", MADE_ONE)
def test_a_weight_of_one_is_that_expert_in_the_ensembles_frame(method, ensemble, of_one):
    assert np.array_equal(make_sampler(method, ensemble, **MADE_ONE[method])([CAT, DOG], SAMPLING), of_one)


def test_a_prior_of_one_is_that_experts_own_sde(ensemble, experts):
    lone = sd_pipeline(1, **UNET)
    lone.vae = experts[0].load_vae()
    alone = make_sampler("superdiff_or", together([lone]))([CAT], SAMPLING)
    assert np.array_equal(make_sampler("superdiff_or", ensemble, weights=[0, 1, 0])([CAT], SAMPLING), alone)


@pytest.mark.parametrize("index", [0, 2])
def test_single_is_the_pipeline_it_came_as(index, ensemble):
    stock = quiet(sd_pipeline(index, **UNET))
    images = make_sampler("single", ensemble, expert=f"expert_{index}")([CAT, DOG], SAMPLING)
    assert np.array_equal(images, sample(stock, [CAT, DOG], SAMPLING))


@pytest.mark.parametrize("method", ["random_expert", "noise_average", "feature_mean", "magicfusion", "loratorio", "superdiff_or", "superdiff_and"])
def test_the_order_of_experts_changes_nothing_where_the_rule_is_symmetric(method, ensemble, experts):
    options = {"magicfusion": {"mode": 2, "t0": 0, "saliency_reference": "own"}}.get(method, {})
    turned = together([experts[2], experts[0], experts[1]], vae="expert_0", scheduler="expert_0", tokenizer="expert_0")
    images, others = (made(method, these, **options)([CAT, FOX], SAMPLING) for these in (ensemble, turned))
    assert differ(images, others) <= 1


@pytest.mark.parametrize("method", SAMPLING_METHODS)
def test_an_image_depends_on_its_seed_and_not_on_its_batch_and_recorded_weights_are_convex(method, ensemble):
    sampler, has_maps = made(method, ensemble), SAMPLING_METHODS[method].has_maps
    batch = sampler([CAT, DOG, Request("a dog", 8)], SAMPLING)
    with record_weights(sampler.denoiser) if has_maps else nullcontext() as maps:
        alone = sampler([DOG], SAMPLING)
    assert differ(batch[1:2], alone) <= 1  # batched float32 sums may round differently
    assert differ(batch[1:2], batch[2:]) > 1
    if has_maps:
        weights = maps.stage(sampler.pipeline.unet.fused[-1] if method == "feature_mean" else ensemble.denoiser.stages[-1].name)
        assert weights.shape == (3, 2, 3, 4, 4) and maps.experts == ensemble.names
        assert weights.min() >= 0 and torch.allclose(weights.sum(2), torch.ones(()))


@pytest.mark.parametrize("method", SAMPLING_METHODS)
def test_dtype_and_shape_are_kept(method):
    experts, base = half()
    sampler = made(method, experts, base=base)
    images = sampler([CAT, DOG], Sampling(2, 3.0, height=32, width=48))
    assert images.shape == (2, 32, 48, 3) and images.dtype == np.uint8 and images.std() > 0
    if method.startswith(("single", "random", "superdiff")):
        return
    with torch.no_grad():
        call = {name: value.bfloat16() if value.is_floating_point() else value for name, value in joined_inputs(2 + SAMPLING_METHODS[method].based).items()}
        predicted = sampler.denoiser(**call).sample
    assert (predicted.dtype, predicted.shape) == (torch.bfloat16, call["sample"].shape)


class Runs:
    """Counts how often every expert is run."""

    def __init__(self, ensemble):
        self.counts = [0] * len(ensemble.experts)
        self.hooks = [
            expert.model.conv_in.register_forward_hook(lambda *_, index=index: self.add(index)) for index, expert in enumerate(ensemble.experts)
        ]

    def add(self, index):
        self.counts[index] += 1

    def __enter__(self):
        return self

    def __exit__(self, *error):
        for hook in self.hooks:
            hook.remove()


@pytest.mark.parametrize(
    ("method", "options", "runs"),
    [
        ("single", {"expert": "expert_2"}, [0, 0, 3]),
        ("single_in_ensemble", {"expert": "expert_1"}, [0, 3, 0]),
        ("random_expert", {"weights": [0, 0, 1]}, [0, 0, 3]),
        ("noise_average", {"weights": [1, 0, 1]}, [3, 0, 3]),
        ("timestep_experts", {}, [1, 1, 1]),  # at 667, 334 and 1
        ("timestep_experts", {"table": "1000-500:expert_2,500-0:expert_0"}, [2, 0, 1]),
        ("expert_switch", {}, [1, 1, 1]),
        ("expert_switch", {"every": 2, "order": ["expert_2", "expert_0"]}, [1, 0, 2]),
        ("magicfusion", {"general": "expert_1", "t0": 400}, [2, 3, 2]),
        ("loratorio", {}, [3, 3, 3]),
        ("superdiff_or", {"weights": [1, 1, 0]}, [3, 3, 0]),
        ("superdiff_and", {}, [3, 3, 3]),
    ],
)
def test_experts_that_are_not_needed_are_not_run(method, options, runs, ensemble):
    sampler = made(method, ensemble, **options)
    with Runs(ensemble) as counted:
        sampler([CAT], SAMPLING)
    assert counted.counts == runs


def test_an_expert_is_drawn_by_the_seed_in_its_share_and_whatever_the_order(ensemble, experts):
    drawn = make_sampler("random_expert", ensemble, weights=[1, 2, 1])
    names = [drawn.draw(seed) for seed in range(2000)]
    assert [names.count(name) / 2000 for name in ensemble.names] == pytest.approx([0.25, 0.5, 0.25], abs=0.04)
    turned = make_sampler("random_expert", together(experts[::-1]), weights=[1, 2, 1])
    assert [turned.draw(seed) for seed in range(2000)] == names


def test_the_noise_average_is_a_fixed_aggregator_on_the_predictions(ensemble):
    weights, call = [0.5, 0.3, 0.2], joined_inputs()
    averaged = make_sampler("noise_average", ensemble, weights=weights).denoiser
    with torch.no_grad():
        expected = ensemble.sharing("fixed", "out", weights=weights).denoiser(**call).sample
        assert torch.allclose(averaged(**call).sample, expected, atol=1e-6)


def test_feature_mean_is_the_untrained_ensemble(ensemble, experts):
    untrained = Ensemble.from_experts(experts, hidden=8, heads=2, depth=1).denoiser
    with torch.no_grad():
        expected = untrained(**joined_inputs()).sample
        assert torch.allclose(make_sampler("feature_mean", ensemble).denoiser(**joined_inputs()).sample, expected, atol=1e-5)


def test_a_choice_of_expert_is_needed_among_several(ensemble):
    with pytest.raises(UserError, match=r"which expert\?.* one of expert_0, expert_1, expert_2"):
        make_sampler("single", ensemble)
    with pytest.raises(UserError, match="did you mean 'expert_1'"):
        make_sampler("single_in_ensemble", ensemble, expert="expert1")
    assert np.array_equal(*(make_sampler(name, together(pipelines(1)))([CAT], SAMPLING) for name in ("single", "single_in_ensemble")))
