"""Experts of different kinds of prediction, or of other noise: every one is asked as it was trained, and says the same as ever."""

import functools
import itertools

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
)
from family_models import MODELS, image_of, sample_of
from tiny import scheduler

from afa import UserError, only_expert
from afa.denoiser.schedule import Schedule, clean_of, conversion, kind_of, noise_of, prediction_of, tables

FLOW = FlowMatchEulerDiscreteScheduler(shift=3.0)
OTHER_NOISE = DDIMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction")
SCHEDULES = {
    **{kind: Schedule.of(scheduler(kind)) for kind in ("epsilon", "v_prediction", "sample")},
    "flow": Schedule.of(FLOW),
    "v of other noise": Schedule.of(OTHER_NOISE),
}
PAIRS = list(itertools.permutations(SCHEDULES, 2))
TIMES = torch.tensor([60.0, 400.0, 731.25, 900.0], dtype=torch.float64)  # within the reach of all schedules


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def over(levels):
    return [level.view(-1, 1, 1, 1) for level in levels]


class TestSchedule:
    @pytest.mark.parametrize("name", SCHEDULES)
    def test_when_is_the_inverse_of_at(self, name):
        times = torch.linspace(1, 998, 77, dtype=torch.float64)
        assert torch.allclose(SCHEDULES[name].when(*SCHEDULES[name].at(times)), times, atol=1e-6)

    @pytest.mark.parametrize(("name", "like"), PAIRS)
    def test_the_ratio_of_noise_to_signal_is_matched(self, name, like):
        signal, noise = SCHEDULES[name].at(SCHEDULES[name].when(*SCHEDULES[like].at(TIMES)))
        expected, of_noise = SCHEDULES[like].at(TIMES)
        assert torch.allclose(noise / signal, of_noise / expected)

    def test_a_flow_by_hand(self):
        assert [level.item() for level in SCHEDULES["flow"].at(torch.tensor(250.0))] == [0.75, 0.25]
        assert SCHEDULES["flow"].when(torch.tensor(0.6), torch.tensor(0.2)).item() == pytest.approx(250)

    @pytest.mark.parametrize("of", [scheduler(), scheduler("v_prediction"), FLOW, EulerDiscreteScheduler.from_config(scheduler().config)])
    def test_training_and_sampling_know_one_noise(self, of):
        kind, signal, noise, times = tables(of)
        assert kind == Schedule.of(of).kind
        for told, expected in zip(Schedule.of(of).at(times), (signal, noise), strict=True):
            assert torch.allclose(told.float(), expected, atol=1e-6)

    def test_flows_are_known_in_all_their_schedulers(self):
        general = DPMSolverMultistepScheduler(use_flow_sigmas=True, flow_shift=3.0, prediction_type="flow_prediction")
        assert kind_of(FLOW) == kind_of(general) == "flow"
        assert all(torch.equal(one, other) for one, other in zip(tables(FLOW)[1:], tables(general)[1:], strict=True))

    def test_an_unknown_prediction_type_is_refused(self):
        with pytest.raises(UserError, match="prediction type 'score' is not known here; known are epsilon, v_prediction, sample"):
            Schedule.of(DDIMScheduler(prediction_type="score"))


class TestConversion:
    @pytest.mark.parametrize(("own", "frame"), PAIRS)
    def test_who_knows_image_and_noise_is_asked_and_understood(self, own, frame):
        """An expert that answers with the truth in its own kind is told the truth about its noise, and heard as the truth in the frame's."""
        clean, noise = random(4, 4, 4, 6), random(4, 4, 4, 6, seed=1)
        signal, level = over(SCHEDULES[frame].at(TIMES))
        noisy = signal * clean + level * noise
        found = conversion(SCHEDULES[own], SCHEDULES[frame])
        given, times = found.to_expert(noisy, TIMES)
        own_signal, own_level = over(SCHEDULES[own].at(times))
        assert torch.allclose(given, own_signal * clean + own_level * noise)
        said = prediction_of(SCHEDULES[own].kind, clean, given, own_signal, own_level)
        heard = found.to_frame(said, noisy, TIMES)
        assert torch.allclose(clean_of(SCHEDULES[frame].kind, heard, noisy, signal, level), clean)
        assert torch.allclose(noise_of(SCHEDULES[frame].kind, heard, noisy, signal, level), noise)

    @pytest.mark.parametrize("name", SCHEDULES)
    def test_one_kind_needs_none(self, name):
        assert conversion(SCHEDULES[name], SCHEDULES[name]) is None

    def test_the_shift_of_a_flow_is_about_steps_and_not_about_noise(self):
        assert conversion(Schedule.of(FlowMatchEulerDiscreteScheduler(shift=1.0)), SCHEDULES["flow"]) is None

    def test_pure_noise_is_asked_about_at_the_experts_own_end(self):
        """A flow begins without any signal, a diffusion schedule with a little: the expert is asked at its last time, with noise of its size."""
        noise = random(1, 4, 64, 64)
        given, times = conversion(SCHEDULES["epsilon"], SCHEDULES["flow"]).to_expert(noise, torch.tensor(1000.0))
        assert times == 999 and given.std() == pytest.approx(noise.std().item()) and torch.isfinite(given).all()

    def test_half_precision_is_converted_in_single(self):
        found, noisy, said = conversion(SCHEDULES["v_prediction"], SCHEDULES["epsilon"]), random(2, 4, 4, 4), random(2, 4, 4, 4, seed=1)
        half = found.to_frame(said.bfloat16(), noisy.bfloat16(), torch.tensor(980))
        exact = found.to_frame(said.bfloat16().float(), noisy.bfloat16().float(), torch.tensor(980))
        assert half.dtype == torch.bfloat16 and torch.equal(half, exact.bfloat16())


@functools.cache
def expert(name, seed):
    """Frozen, so that several ensembles may have it."""
    return MODELS[name].make(seed)


def made(name, kinds):
    """Whatever the family; its tiny models do not know what kind they are."""
    frame = SCHEDULES[kinds[0]]
    experts = [expert(name, seed) for seed in range(len(kinds))]
    return MODELS[name].ensemble(experts, placement="out", conversions=[conversion(SCHEDULES[kind], frame) for kind in kinds]).eval()


# Every family with each kind as an expert's and as the frame's; over the families, which differ in the form of latents and times, all pairs.
KINDS = list(SCHEDULES)
CASES = [(name, own, KINDS[(place + 1 + index % 4) % 5]) for index, name in enumerate(MODELS) for place, own in enumerate(KINDS)]


def test_all_pairs_are_tried():
    assert {(own, frame) for _, own, frame in CASES} == set(PAIRS)


@pytest.mark.parametrize(("name", "own", "frame"), CASES)
def test_a_converted_expert_claims_what_it_would_alone(name, own, frame):
    model, mine, theirs = made(name, [frame, own]), SCHEDULES[own], SCHEDULES[frame]
    call, interface = MODELS[name].call(), model.interface
    noisy, times = interface.latents(call), torch.as_tensor(interface.timestep_from_model(call[interface.timestep_input])).double()
    handed, own_times = conversion(mine, theirs).to_expert(noisy, times)
    size, first = noisy.shape[-2:], interface.latents_input
    given = list(handed[:, :, None]) if isinstance(call[first], list) else interface.from_latents(handed) if call[first].ndim == 3 else handed
    stock = {**call, first: given, interface.timestep_input: interface.timestep_to_model(own_times.float())}
    with torch.no_grad(), only_expert(model, "expert_1"):
        heard = interface.to_latents(model(**call).sample, size)
        said = interface.to_latents(model.experts[1](**stock).sample, size)
    levels, own_levels = ([level.view(-1, 1, 1, 1) for level in schedule.at(at)] for schedule, at in ((theirs, times), (mine, own_times)))
    expected = clean_of(mine.kind, said.double(), handed.double(), *own_levels)
    claimed = clean_of(theirs.kind, heard.double(), noisy.double(), *levels)
    assert torch.allclose(claimed, expected, atol=1e-5 * max(1, expected.abs().max()))


@pytest.mark.parametrize("name", MODELS)
class TestDenoiser:
    def test_experts_of_the_frames_kind_stay_themselves_bit_for_bit(self, name):
        model, call = made(name, ["epsilon", "v_prediction", "epsilon"]), MODELS[name].call()
        with torch.no_grad(), only_expert(model, "expert_2"):
            assert torch.equal(sample_of(model(**call)), image_of(model.experts[2](**call), call))

    def test_all_together_are_the_mean_of_what_each_says_alone(self, name):
        model, call = made(name, ["epsilon", "v_prediction", "flow"]), MODELS[name].call()
        alone = []
        with torch.no_grad():
            for expert in model.names:
                with only_expert(model, expert):
                    alone.append(sample_of(model(**call)))
            together = sample_of(model(**call))
        assert torch.allclose(together, torch.stack(alone).mean(0), atol=1e-5 * max(1, together.abs().max()))

    def test_features_of_different_kinds_are_refused(self, name):
        experts = [expert(name, seed) for seed in range(2)]
        converted = [None, conversion(SCHEDULES["v_prediction"], SCHEDULES["epsilon"])]
        with pytest.raises(ValueError, match="expert_1 are of another kind than the frame's.*placement out"):
            MODELS[name].ensemble(experts, placement="layers", conversions=converted)
