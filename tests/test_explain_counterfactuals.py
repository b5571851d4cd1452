"""Laws of what would have been, and of what could be left out."""

import numpy as np
import pytest
import torch
from explained import asked, ensemble, pipeline

from afa.cost import count_stage_flops
from afa.denoiser.hooks import adjust_weights, only_expert, scale_weights, watch_weights
from afa.explanation.causes import (
    CHANGES,
    Skipping,
    constant,
    counterfactuals,
    find_unused,
    permuted,
    rmse,
    without,
    without_places,
)
from afa.explanation.recording import record
from afa.explanation.settings import COUNTERFACTUALS
from afa.sampling.sample import sample

KINDS = ("sabw", "stitch")
THREE = (0, 1, 2)


def drawn(made, switch=None, **more):
    request, sampling = asked(**more)
    if switch is None:
        return sample(pipeline(made), [request], sampling)[0]
    with switch:
        return sample(pipeline(made), [request], sampling)[0]


@pytest.mark.parametrize("aggregator", KINDS)
def test_every_counterfactual_makes_another_image_and_leaves_nothing_on(aggregator):
    made = ensemble(aggregator=aggregator, seeds=THREE)
    pipe, (request, sampling) = pipeline(made), asked()
    recording = record(made, request, sampling, pipe)
    found = list(counterfactuals(pipe, made.denoiser, recording, request, sampling, list(CHANGES)))
    assert [one.kind for one in found] == ["off"] * 3 + ["swapped"] + ["pairs"] * 3 + ["frozen"] * 2 + ["equal"]
    assert all(one.rmse > 0 and one.rmse == rmse(recording.image, one.image) for one in found)
    assert np.array_equal(drawn(made), recording.image)


@pytest.mark.parametrize("aggregator", KINDS)
def test_all_but_one_off_is_that_expert(aggregator):
    made = ensemble(aggregator=aggregator, seeds=THREE)
    names = made.names
    off = drawn(made, scale_weights(made.denoiser, {names[0]: 0.0, names[2]: 0.0}))
    assert np.abs(off.astype(int) - drawn(made, only_expert(made.denoiser, names[1]))).max() <= 1


@pytest.mark.parametrize("aggregator", KINDS)
def test_swapping_equal_experts_changes_nothing(aggregator):
    made = ensemble(aggregator=aggregator, seeds=(0, 0, 0))
    swapped = drawn(made, adjust_weights(made.denoiser, permuted(made.denoiser, [2, 0, 1])))
    assert np.abs(drawn(made).astype(int) - swapped).max() <= 1


@pytest.mark.parametrize("aggregator", KINDS)
def test_swapping_twice_is_the_original_and_rotating_as_often_as_there_are_experts(aggregator):
    denoiser = ensemble(aggregator=aggregator, seeds=THREE).denoiser
    for order, times in (([1, 0, 2], 2), ([2, 0, 1], 3)):
        swap = permuted(denoiser, order)
        for stage in ("M00", "OUT03"):
            rows = 3 if denoiser.aggregators[stage].own_blends else 1
            weights = changed = torch.rand(2 * rows, 3, 4, 4).softmax(1)
            for turn in range(times):
                changed = swap(stage, changed)
                assert torch.equal(changed, weights) == (turn == times - 1)


def test_an_expert_that_plays_anothers_part_goes_on_with_what_the_other_went_on_with():
    """Row: who goes on, column: from whom. Where each keeps to itself, each still does after a swap."""
    denoiser = ensemble(aggregator="stitch", seeds=THREE).denoiser
    own = torch.eye(3).view(3, 3, 1, 1)
    assert torch.equal(permuted(denoiser, [2, 0, 1])("M00", own), own)


@pytest.mark.parametrize("aggregator", KINDS)
def test_frozen_weights_are_constant_over_places_and_convex(aggregator):
    made = ensemble(aggregator=aggregator, seeds=THREE)
    recording = record(made, *asked())
    for change in (without_places, constant(made.denoiser, recording)):
        seen = {}
        with adjust_weights(made.denoiser, change), watch_weights(made.denoiser, lambda stage, maps, seen=seen: seen.setdefault(stage, []).append(maps)):
            sample(pipeline(made), [asked()[0]], asked()[1])
        for maps in (torch.stack(passes) for passes in seen.values()):
            assert torch.allclose(maps.sum(2), torch.ones(()), atol=1e-5)
            assert torch.allclose(maps, maps[..., :1, :1].expand_as(maps), atol=1e-6)
            if change is not without_places:
                assert torch.allclose(maps, maps[:1].expand_as(maps), atol=1e-6)  # over steps, too


def test_equal_weights_are_the_mean():
    made = ensemble(seeds=THREE)
    pipe, (request, sampling) = pipeline(made), asked()
    equal = next(counterfactuals(pipe, made.denoiser, record(made, request, sampling, pipe), request, sampling, ["equal"]))
    mean = made.sharing("mean")
    assert np.abs(sample(pipeline(mean), [request], sampling)[0].astype(int) - equal.image).max() <= 1


def test_an_unknown_counterfactual_is_named():
    made = ensemble()
    with pytest.raises(ValueError, match="did you mean 'frozen'"):
        next(counterfactuals(pipeline(made), made.denoiser, record(made, *asked(steps=1)), *asked(steps=1), ["frosen"]))
    assert {*CHANGES, "skipped"} == set(COUNTERFACTUALS)


def test_an_expert_that_is_off_is_unused_everywhere_and_leaving_it_out_changes_nothing():
    made = ensemble(seeds=THREE)
    most = np.zeros((3, len(made.denoiser.fused), 3), np.float32)
    most[:, :, (0, 2)] = 0.5
    unused = find_unused(made.denoiser, [most], count_stage_flops(made.experts[0].model, 4, 4))
    assert unused.counts.tolist() == [0, 27, 0] and unused.total == 27
    assert unused.saved == pytest.approx([0, 1 / 3, 0]) and "(100%)" in unused.sentences()[1]
    skipped = drawn(made, adjust_weights(made.denoiser, Skipping(made.denoiser, unused)))
    assert np.array_equal(skipped, drawn(made, scale_weights(made.denoiser, {made.names[1]: 0.0})))


def test_a_cell_is_unused_only_if_it_is_in_every_image():
    made = ensemble()
    one = np.full((2, 9, 2), 0.5, np.float32)
    one[0, 3, 1] = 0.001
    costs = count_stage_flops(made.experts[0].model, 4, 4)
    assert find_unused(made.denoiser, [one], costs).cells.sum() == 1
    assert not find_unused(made.denoiser, [one, np.full_like(one, 0.5)], costs).cells.any()


def test_an_unfused_stage_is_saved_with_the_fused_one_after_it():
    made = ensemble(placement="out")
    costs = count_stage_flops(made.experts[0].model, 4, 4)
    unused = find_unused(made.denoiser, [np.asarray([[[0.999, 0.001]]], np.float32)], costs)
    assert unused.costs.tolist() == [sum(costs.values())] and unused.saved == pytest.approx([0, 0.5])


def test_an_expert_that_only_one_blend_takes_is_in_use():
    """`most` is over blends, where their mean would hide it."""
    made = ensemble(aggregator="stitch", seeds=THREE)
    found = record(made, *asked())
    assert (found.most[:, :-1] > found.means[:, :-1] + 0.1).any()  # each keeps mostly to itself


def test_weight_of_those_left_out_goes_to_the_others_in_proportion():
    weights = torch.tensor([0.6, 0.3, 0.1]).view(1, 3, 1, 1)
    assert torch.allclose(without(weights, torch.tensor([False, True, True])).flatten(), torch.tensor([0, 0.75, 0.25]))
    alone = torch.tensor([1.0, 0, 0]).view(1, 3, 1, 1)
    assert torch.allclose(without(alone, torch.tensor([False, True, True])).flatten(), torch.tensor([0, 0.5, 0.5]))
