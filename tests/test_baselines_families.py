"""The laws of the sampling-time methods on flow models of tokens, through tiny real pipelines."""

import functools
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
import torch
from rival_experts import differ, together
from tiny import quiet
from tiny_krea2 import KREA2_SMALL, krea2_pipeline
from tiny_lumina2 import LUMINA2_SMALL, lumina2_pipeline
from tiny_transformers import FLUX_SMALL, SD3_SMALL, flux_pipeline, sd3_pipeline, text_encoder

from afa import UserError, only_expert, record_weights
from afa.sampling.magicfusion import saliency, winners
from afa.sampling.registry import SAMPLING_METHODS, make_sampler
from afa.sampling.sample import Request, Sampling, sample

PIPELINES = {
    "sd3": functools.partial(sd3_pipeline, **SD3_SMALL),
    "flux": functools.partial(flux_pipeline, **FLUX_SMALL),
    "krea2": functools.partial(krea2_pipeline, **KREA2_SMALL),
    "lumina2": functools.partial(lumina2_pipeline, **LUMINA2_SMALL),
    "schnell": functools.partial(flux_pipeline, guidance_embeds=False, **FLUX_SMALL),
}
SAMPLING = Sampling(steps=2, height=32, width=48)
CAT, DOG = Request("a red cat", 1), Request("a dog", 7)
EVERYWHERE = [name for name, method in SAMPLING_METHODS.items() if not (method.own_loop or method.needs_guidance)]
CASES = [(method, family) for family in PIPELINES for method in (*EVERYWHERE, *(["magicfusion"] if family == "sd3" else []))]
SPREAD = [  # every method where one pass makes both predictions, where two do, and where guidance is built in; every family with several methods
    case
    for place, method in enumerate((*EVERYWHERE, "magicfusion"))
    for case in ((method, "sd3"), (method, ("krea2", "lumina2")[place % 2]), (method, ("flux", "schnell")[place // 2 % 2]))
    if case in CASES
]
OPTION = {
    "single": {"expert": "expert_0"},
    "single_in_ensemble": {"expert": "expert_0"},
    "magicfusion": {"mode": 2, "t0": 0},  # blended at every step
    "loratorio": {"patch": 2, "temperature": 0.1},
}
MADE_ONE = {  # options that leave only expert_1
    "single_in_ensemble": {"expert": "expert_1"},
    "random_expert": {"weights": [0, 5, 0], "frame": "ensemble"},
    "noise_average": {"weights": [0, 5, 0]},
    "timestep_experts": {"table": "1000-0:expert_1"},
    "expert_switch": {"order": ["expert_1"]},
    "magicfusion": {"general": "expert_1", "mode": 1, "t0": 0},
}


@functools.cache
def pipes(family):
    return [PIPELINES[family](seed) for seed in range(3)]


@functools.cache
def ensemble(family):
    return together(pipes(family))


@functools.cache
def alike(family):
    """Three times one expert."""
    return together([pipes(family)[0]] * 3)


@functools.cache
def turned(family):
    """The same experts in another order, in the first one's frame."""
    first, second, third = ensemble(family).experts
    return together([third, first, second], vae="expert_0", scheduler="expert_0", tokenizer="expert_0")


@functools.cache
def half(family):
    """Two experts in half precision, and a base for them."""
    *experts, base = (PIPELINES[family](seed).to(torch.bfloat16) for seed in range(3))
    return together(experts), base


@functools.cache
def of_one(family):
    """What an expert draws as the pipeline it came as."""
    return sample(quiet(pipes(family)[0]), [CAT], SAMPLING)


@functools.cache
def of_one_in_the_frame(family):
    """What an expert draws in the ensemble's frame."""
    with only_expert(ensemble(family).denoiser, "expert_1"):
        return sample(quiet(ensemble(family).pipeline()), [CAT, DOG], SAMPLING)


def made(method, family, experts=None, base=None):
    """The sampler of a method; the base model, where one is needed, is the third expert's unless one is given."""
    based = {"base": base or pipes(family)[2]} if SAMPLING_METHODS[method].based else {}
    return make_sampler(method, experts or ensemble(family), **based, **OPTION.get(method, {}))


@pytest.mark.parametrize(("method", "family"), CASES)
def test_identical_experts_are_the_single_expert(method, family):
    images = made(method, family, alike(family), base=pipes(family)[0])([CAT], SAMPLING)
    assert differ(images, of_one(family)) <= (1 if method == "feature_mean" else 0)


@pytest.mark.parametrize(("method", "family"), [case for case in SPREAD if case[0] in MADE_ONE])
def test_a_weight_of_one_is_that_expert_in_the_ensembles_frame(method, family):
    images = make_sampler(method, ensemble(family), **MADE_ONE[method])([CAT, DOG], SAMPLING)
    assert np.array_equal(images, of_one_in_the_frame(family))


def test_the_pass_without_a_prompt_has_the_weights_of_the_pass_before_and_a_part_of_the_base():
    """FLUX's pipeline makes two passes; of a third model as base, half is mixed into the second one only."""
    sampling = Sampling(steps=2, height=32, width=48, true_guidance=3.0)
    identical = make_sampler("loratorio", together([pipes("flux")[0]] * 2), base=pipes("flux")[0])
    assert np.array_equal(identical([CAT], sampling), sample(quiet(pipes("flux")[0]), [CAT], sampling))
    sampler = made("loratorio", "flux")
    found = []
    original = sampler.denoiser.combine
    sampler.denoiser.combine = lambda *given: found.append((sampler.denoiser.ensemble.in_uncond_pass, *original(*given))) or found[-1][1:]
    sampler([CAT], sampling)
    assert [uncond for uncond, _, _ in found] == [False, True] * 2
    assert all(torch.equal(found[step][2], found[step + 1][2]) for step in (0, 2))
    assert not torch.equal(found[0][2], found[2][2])


@pytest.mark.parametrize("family", PIPELINES)
def test_single_is_the_pipeline_it_came_as(family):
    images = make_sampler("single", ensemble(family), expert="expert_2")([CAT, DOG], SAMPLING)
    assert np.array_equal(images, sample(quiet(PIPELINES[family](2)), [CAT, DOG], SAMPLING))


@pytest.mark.parametrize(("method", "family"), [case for case in SPREAD if case[0] in ("random_expert", "noise_average", "feature_mean", "magicfusion")])
def test_the_order_of_experts_changes_nothing_where_the_rule_is_symmetric(method, family):
    # of pure noise, a flow's first step, all claim the same: there the general expert wins
    options = {"magicfusion": {"mode": 2, "t0": 0, "saliency_reference": "own", "general": "expert_0"}}.get(method, {})
    assert differ(*(make_sampler(method, these, **options)([CAT], SAMPLING) for these in (ensemble(family), turned(family)))) <= 1


@pytest.mark.parametrize(("method", "family"), SPREAD)
def test_an_image_depends_on_its_seed_and_not_on_its_batch_and_recorded_weights_are_convex(method, family):
    sampler, has_maps = made(method, family), SAMPLING_METHODS[method].has_maps
    batch = sampler([CAT, DOG, Request("a dog", 8)], SAMPLING)
    with record_weights(sampler.denoiser) if has_maps else nullcontext() as maps:
        alone = sampler([DOG], SAMPLING)
    assert differ(batch[1:2], alone) <= 1
    assert differ(batch[1:2], batch[2:]) > 1
    if has_maps:
        weights = maps.stage("OUT")
        assert weights.shape[:3] == (2, 2 if family == "sd3" else 1, 3)  # SD3's pipeline doubles the batch
        assert weights.min() >= 0 and torch.allclose(weights.sum(2), torch.ones(()))
        assert maps.timesteps == pytest.approx(sampler.pipeline.scheduler.timesteps.tolist(), rel=1e-6)


@pytest.mark.parametrize(("method", "family"), SPREAD)
def test_half_precision_and_sizes_are_kept(method, family):
    experts, base = half(family)
    images = made(method, family, experts, base=base)([CAT], Sampling(2, height=48, width=32))
    assert images.shape == (1, 48, 32, 3) and images.std() > 0


@pytest.mark.parametrize("family", PIPELINES)
def test_timesteps_are_counted_as_in_a_table(family):
    """Of the three steps of a flow shifted by 3, at 1000, 858 (or so) and 601, the first two belong to expert_2."""
    sampler = make_sampler("timestep_experts", ensemble(family), table="1000-700:expert_2,700-0:expert_0")
    with record_weights(sampler.denoiser) as maps:
        sampler([CAT], replace(SAMPLING, steps=3))
    assert maps.stage("OUT").mean((1, 3, 4)).argmax(-1).tolist() == [2 if time >= 700 else 0 for time in maps.timesteps]
    assert {time >= 700 for time in maps.timesteps} == {True, False}


@pytest.mark.parametrize("family", PIPELINES)
def test_experts_switch_by_the_step_whatever_the_family_counts(family):
    sampler = make_sampler("expert_switch", ensemble(family), every=2, order=["expert_2", "expert_0", "expert_2", "expert_1"])
    with record_weights(sampler.denoiser) as maps:
        sampler([CAT], Sampling(steps=9, height=32, width=48, true_guidance=2.0 if family == "flux" else None))
    assert maps.stage("OUT").mean((1, 3, 4)).argmax(-1).tolist() == [2, 2, 0, 0, 2, 2, 1, 1, 2]


@pytest.mark.parametrize("family", ["flux", "schnell"])
def test_text_encoders_of_its_own_belong_to_an_expert(family):
    own = PIPELINES[family](1)
    own.text_encoder = text_encoder(9, width=16)
    pair = together([pipes(family)[0], own], vae="expert_1")
    images = make_sampler("noise_average", pair, weights=[0, 1])([CAT], SAMPLING)
    assert np.array_equal(images, sample(quiet(own), [CAT], SAMPLING))


def test_magicfusion_on_a_flow_compares_the_noise_that_velocities_claim():
    sampler, sigma = make_sampler("magicfusion", ensemble("sd3"), mode=2, t0=0), 0.7
    denoiser = sampler.denoiser
    denoiser.guidance = strength = 4.0
    rng = torch.Generator().manual_seed(0)
    predictions, noisy = torch.randn(2, 3, 4, 4, 6, generator=rng), torch.randn(1, 4, 4, 6, generator=rng).repeat(2, 1, 1, 1)
    with torch.no_grad():
        got, weights = denoiser.combine(lambda expert: predictions[:, expert], noisy, 1000 * sigma)
    unconditional, conditional = (noisy[:, None] + (1 - sigma) * predictions).chunk(2)
    winner = winners(saliency(conditional, unconditional[:, :1], strength), torch.ones(3))[0]
    assert len(winner.unique()) > 1
    for row, column in np.ndindex(4, 6):
        assert torch.equal(got[:, :, row, column], predictions[:, winner[row, column], :, row, column])
        assert weights[:, winner[row, column], row, column].tolist() == [1, 1]


@pytest.mark.parametrize(
    ("method", "family", "reason"),
    [
        ("magicfusion", "flux", r"theirs built in \(guidance_embeds\)"),
        ("magicfusion", "schnell", "were distilled to do without"),
        ("superdiff_or", "flux", r"theirs built in \(guidance_embeds\)"),
        ("superdiff_and", "schnell", "were distilled to do without"),
        ("superdiff_or", "sd3", "a flow begins without any signal"),
        ("superdiff_and", "sd3", "a flow begins without any signal"),
    ],
)
def test_what_a_method_cannot_do_it_refuses_by_name(method, family, reason):
    with pytest.raises(UserError, match=f"{method.partition('_')[0]} .*{reason}"):
        make_sampler(method, ensemble(family))
