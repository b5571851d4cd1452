"""Experts count as alike only if their whole tables of noise agree; what cannot be converted is refused by name."""

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EDMDPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    LCMScheduler,
    LMSDiscreteScheduler,
    PNDMScheduler,
)
from tiny import sd_unet

from afa import Ensemble, UserError
from afa.denoiser.schedule import Schedule, clean_of, tables
from afa.experts.compatible import mismatches
from afa.experts.expert import Expert
from afa.latents import Latents
from afa.schedulers import SCHEDULERS, make_scheduler
from afa.training.noise import Noising

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "prediction_type": "v_prediction"}
BETAS = torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
USUAL = DDIMScheduler(**SD)
MODEL = sd_unet(0, block_out_channels=(16, 16), down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2)

SAME = {
    "another class": EulerDiscreteScheduler(**SD),
    "its betas as a table": DDIMScheduler(**{**SD, "trained_betas": BETAS.tolist(), "beta_end": 0.5}),
    "another spacing of steps": DDIMScheduler(**SD, timestep_spacing="trailing", steps_offset=1),
    "a setting that its class does not know": PNDMScheduler.from_config({**PNDMScheduler(**SD).config, "rescale_betas_zero_snr": True}),
}
OTHER = {
    "rescale_betas_zero_snr": DDIMScheduler(**SD, rescale_betas_zero_snr=True),
    "trained_betas": DDIMScheduler(**SD, trained_betas=[1e-3 + 1e-5 * i for i in range(1000)]),
    "beta_end": DDIMScheduler(**{**SD, "beta_end": 0.02}),
    "beta_schedule": DDIMScheduler(**{**SD, "beta_schedule": "squaredcos_cap_v2"}),
    "num_train_timesteps": DDIMScheduler(**SD, num_train_timesteps=500),
    "prediction_type": DDIMScheduler(**{**SD, "prediction_type": "epsilon"}),
}
EDM = {
    "EDMEulerScheduler": EDMEulerScheduler(prediction_type="v_prediction"),
    "EDMDPMSolverMultistepScheduler": EDMDPMSolverMultistepScheduler(prediction_type="v_prediction"),
    "EulerDiscreteScheduler": EulerDiscreteScheduler(**SD, timestep_type="continuous", sigma_min=0.002, sigma_max=700.0),
}


def expert(scheduler, name="b"):
    return Expert(name=name, model=MODEL, scheduler=scheduler)


def combined(*schedulers, placement, **options):
    experts = [expert(scheduler, "ab"[index]) for index, scheduler in enumerate(schedulers)]
    return Ensemble.from_experts(experts, aggregator="mean", placement=placement, **options)


@pytest.mark.parametrize("case", SAME)
def test_the_same_noise_in_other_words_is_alike(case):
    assert mismatches([expert(USUAL, "a"), expert(SAME[case])]) == []


@pytest.mark.parametrize("case", OTHER)
def test_another_noise_is_a_mismatch_with_both_values_in_either_order(case):
    for pair in ((USUAL, OTHER[case]), (OTHER[case], USUAL)):
        (reason,) = mismatches([expert(pair[0], "a"), expert(pair[1])])
        assert case in reason and "expected" in reason


def test_tables_that_differ_though_all_settings_agree_are_a_mismatch():
    ignoring = PNDMScheduler.from_config({**PNDMScheduler(**SD).config, "rescale_betas_zero_snr": True})
    (reason,) = mismatches([expert(OTHER["rescale_betas_zero_snr"], "a"), expert(ignoring)])
    assert "noise" in reason or "snr" in reason


def test_one_zero_snr_schedule_is_alike_in_every_class_that_knows_it():
    kinds = (EulerDiscreteScheduler, EulerAncestralDiscreteScheduler, DPMSolverMultistepScheduler, LCMScheduler)
    for kind in kinds:
        other = kind(**SD, rescale_betas_zero_snr=True)
        assert mismatches([expert(OTHER["rescale_betas_zero_snr"], "a"), expert(other)]) == []


@pytest.mark.parametrize("name", EDM)
@pytest.mark.parametrize("features", [True, False])
def test_edm_fits_no_table_of_betas_even_where_only_predictions_are_combined(name, features):
    for pair in ((USUAL, EDM[name]), (EDM[name], USUAL)):
        (reason,) = mismatches([expert(pair[0], "a"), expert(pair[1])], features=features)
        assert name in reason and "placement out" not in reason


def test_edm_schedules_are_compared_with_each_other():
    assert mismatches([expert(EDM["EDMEulerScheduler"], "a"), expert(EDMEulerScheduler(prediction_type="v_prediction"))]) == []
    (reason,) = mismatches([expert(EDM["EDMEulerScheduler"], "a"), expert(EDMEulerScheduler(prediction_type="v_prediction", sigma_max=120.0))])
    assert "sigma_max is 120" in reason


@pytest.mark.parametrize("name", EDM)
def test_edm_is_not_trained_converted_or_sampled_by_others(name):
    with pytest.raises(UserError, match=name):
        tables(EDM[name])
    with pytest.raises(UserError, match=name):
        make_scheduler("ddim", EDM[name])
    with pytest.raises(UserError, match=name):
        combined(USUAL, EDM[name], placement="out")


@pytest.mark.parametrize(
    ("betas", "word"), [([0.1] * 10, "num_train_timesteps"), ([float("nan")] * 1000, "betas"), ([0.0] * 1000, "betas"), ([2.0] * 1000, "betas")]
)
def test_betas_that_are_no_noise_schedule_are_refused(betas, word):
    with pytest.raises(UserError, match=word):
        Schedule.of(DDIMScheduler(**SD, trained_betas=betas))


@pytest.mark.parametrize("name", SCHEDULERS)
def test_another_scheduler_keeps_zero_terminal_snr_or_is_refused(name):
    zero = OTHER["rescale_betas_zero_snr"]
    if name in ("pndm", "heun", "lms"):  # which have no such setting
        with pytest.raises(UserError, match=f"{name}.*zero terminal SNR"):
            make_scheduler(name, zero)
        return
    made = make_scheduler(name, zero)
    assert float(torch.as_tensor(made.alphas_cumprod)[-1]) < 1e-7 and made.config.prediction_type == "v_prediction"


def test_flows_of_another_shift_are_alike_since_they_are_called_with_the_same_noise_at_a_timestep():
    flows = [FlowMatchEulerDiscreteScheduler(shift=shift) for shift in (1.0, 3.0)]
    assert mismatches([expert(flows[0], "a"), expert(flows[1])]) == []


@pytest.mark.parametrize("case", OTHER)
def test_a_frame_that_reads_features_experts_as_something_else_is_refused(case, tmp_path):
    OTHER[case].save_pretrained(tmp_path)
    with pytest.raises(UserError, match=case):
        combined(USUAL, USUAL, placement="layers", scheduler=str(tmp_path))
    assert combined(USUAL, USUAL, placement="out", scheduler=str(tmp_path)).denoiser.conversions[0] is not None


def test_zero_snr_is_converted_and_trained_without_an_infinite_number():
    zero = OTHER["rescale_betas_zero_snr"]
    noisy, prediction = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8)
    for pair in ((USUAL, zero), (zero, DDIMScheduler(**{**SD, "prediction_type": "epsilon"}))):
        conversion = combined(*pair, placement="out").denoiser.conversions[1]
        for time in (0.0, 500.0, 999.0):
            assert conversion.to_frame(prediction, noisy, torch.tensor(time)).isfinite().all()
    noising = Noising(zero, Latents({"latent_channels": 4, "scaling_factor": 1.0, "block_out_channels": (1,)}), torch.device("cpu"))
    last = torch.tensor([999])
    assert noising.ratio(last).isfinite().all() and noising.min_snr(last, 5.0).isfinite().all()
    assert clean_of("epsilon", prediction, noisy, 0.0, 1.0).isfinite().all()


def test_a_scheduler_without_a_table_of_noise_is_refused_by_its_name():
    class ConsistencyScheduler(LMSDiscreteScheduler):
        pass

    strange = ConsistencyScheduler(**SD)
    del strange.alphas_cumprod
    with pytest.raises(UserError, match="ConsistencyScheduler"):
        Schedule.of(strange)
