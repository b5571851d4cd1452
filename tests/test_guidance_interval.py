"""Guidance in an interval of the steps: outside of it, only the prediction with the prompt is made."""

import functools
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from rival_experts import CAT, DOG, differ, pipelines
from test_shared_guidance import ensemble
from tiny import quiet, sdxl_pipeline
from tiny_transformers import SD3_SMALL, flux_pipeline, qwen_image_pipeline, sd3_pipeline

from afa import UserError
from afa.denoiser.reuse import Reuse
from afa.denoiser.schedule import share_of_steps
from afa.generation.run import generate
from afa.generation.settings import GenerateSettings
from afa.models.registry import denoiser_of
from afa.sampling.guidance_interval import guided_within
from afa.sampling.registry import make_sampler
from afa.sampling.sample import Sampling, sample

SAMPLING = Sampling(steps=4, guidance=3.0, height=32, width=32)
STOCK = {
    "sd": lambda: pipelines(1)[0],
    "sdxl": lambda: sdxl_pipeline(0),
    "sd3": lambda: sd3_pipeline(0, **SD3_SMALL),
}


@functools.cache
def stock(family):
    return quiet(STOCK[family]())


def rows(pipeline, sampling, prompts=(CAT, DOG)):
    """The images, and the number of rows that the denoiser predicted in each step."""
    denoiser, counted = denoiser_of(pipeline), []
    inner = denoiser.forward

    def counting(*args, **kwargs):
        counted.append(len(args[0] if args else kwargs["hidden_states"]))
        return inner(*args, **kwargs)

    denoiser.forward = counting
    try:
        return sample(pipeline, list(prompts), sampling), counted
    finally:
        del denoiser.forward


@pytest.mark.parametrize("family", STOCK)
def test_steps_outside_the_interval_predict_half_as_many_rows(family):
    images, counted = rows(stock(family), replace(SAMPLING, guidance_interval=(0.25, 0.75)))
    assert counted == [2, 4, 4, 2]
    assert differ(images, sample(stock(family), [CAT, DOG], SAMPLING)) > 0


@pytest.mark.parametrize("family", STOCK)
def test_the_whole_interval_changes_no_bit(family):
    whole = replace(SAMPLING, guidance_interval=(0.0, 1.0))
    assert np.array_equal(sample(stock(family), [CAT], whole), sample(stock(family), [CAT], SAMPLING))


@pytest.mark.parametrize("family", STOCK)
def test_an_interval_that_holds_no_step_of_the_run_is_no_guidance(family):
    nearly_none = replace(SAMPLING, guidance_interval=(0.9, 1.0))  # the four steps begin at 0, .25, .5 and .75
    without = sample(stock(family), [CAT], replace(SAMPLING, guidance=1.0))
    assert np.abs(sample(stock(family), [CAT], nearly_none).astype(int) - without).max() <= 1


@pytest.mark.parametrize("family", ["sd", "sdxl", "sd3"])
@pytest.mark.parametrize("aggregator", ["sabw", "stitch"])
def test_an_ensemble_draws_the_same_where_images_are_drawn_together_or_alone(family, aggregator):
    pipe = quiet(ensemble(family, aggregator).pipeline())
    some = replace(SAMPLING, guidance_interval=(0.0, 0.5))
    together = sample(pipe, [CAT, DOG], some)
    alone = [sample(pipe, [request], some)[0] for request in (CAT, DOG)]
    assert max(np.abs(together[index].astype(int) - alone[index]).max() for index in range(2)) <= 1


def test_a_pipelines_own_forward_is_back_afterwards_even_after_an_error():
    pipe = quiet(ensemble("sd", "sabw").pipeline())
    before = pipe.unet.__dict__.get("forward")
    with pytest.raises(ZeroDivisionError), guided_within(pipe, (0.0, 0.5)):
        assert pipe.unet.__dict__["forward"] is not before
        raise ZeroDivisionError
    assert pipe.unet.__dict__.get("forward") is before


def test_two_images_of_one_seed_do_not_share_weights_where_no_guidance_makes_them_a_pair():
    made = ensemble("sd", "sabw")
    pipe, some = quiet(made.pipeline()), replace(SAMPLING, guidance_interval=(0.5, 1.0))
    twin = replace(DOG, seed=CAT.seed)
    made.denoiser.share_guidance_weights = True
    try:
        together = sample(pipe, [CAT, twin], some)
        alone = [sample(pipe, [request], some)[0] for request in (CAT, twin)]
        assert made.denoiser.share_guidance_weights
    finally:
        made.denoiser.share_guidance_weights = False
    assert max(np.abs(together[index].astype(int) - alone[index]).max() for index in range(2)) <= 1


def test_it_goes_with_steps_that_are_reused():
    made = ensemble("sd", "stitch")
    pipe, some = quiet(made.pipeline()), replace(SAMPLING, guidance_interval=(0.0, 0.5))
    made.denoiser.reuse = Reuse(2, lead=made.names[0])
    try:
        reused = sample(pipe, [CAT], some)
    finally:
        made.denoiser.reuse = None
    exact = sample(pipe, [CAT], some)
    assert 0 < differ(reused, exact) < differ(sample(pipe, [DOG], some), exact)


def test_sampling_time_methods_take_it_too():
    made = ensemble("sd", "sabw")
    sampler = make_sampler("noise_average", made)
    _, counted = rows(sampler.pipeline, replace(SAMPLING, guidance_interval=(0.0, 0.5)))
    assert counted == [4, 4, 2, 2]


@pytest.mark.parametrize(
    ("pipe", "reason"),
    [(flux_pipeline, "built in"), (qwen_image_pipeline, "one after another")],
)
def test_families_without_two_predictions_in_one_pass_refuse_it(pipe, reason):
    with pytest.raises(UserError, match=reason):
        sample(quiet(pipe()), [CAT], replace(SAMPLING, guidance_interval=(0.0, 0.5)))


@pytest.mark.parametrize("interval", [(0.5, 0.5), (0.6, 0.2), (-0.1, 0.5), (0.0, 1.1), (float("nan"), 1.0)])
def test_what_is_no_interval_is_refused(interval):
    with pytest.raises(UserError, match="guidance interval"):
        replace(SAMPLING, guidance_interval=interval)


def settings(folder, **changes):
    given = {"sources": ["demo:ensemble"], "output": str(folder), "prompt": [CAT.prompt], "steps": 4, "guidance": 3.0}
    return GenerateSettings(**{**given, **changes})


def test_the_command_records_it_and_draws_what_python_draws(tmp_path):
    (path,) = generate(settings(tmp_path / "some", guidance_interval="0,0.5", width=32, height=32))
    with Image.open(path) as image:
        facts = json.loads(image.text["afa"])
    assert facts["guidance_interval"] == [0.0, 0.5]
    (other,) = generate(settings(tmp_path / "all", width=32, height=32))
    with Image.open(other) as image:
        assert "guidance_interval" not in json.loads(image.text["afa"])
    assert not np.array_equal(np.asarray(Image.open(path)), np.asarray(Image.open(other)))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"guidance_interval": "half"}, "START,END"),
        ({"guidance_interval": "0,0.5,1"}, "START,END"),
        ({"guidance_interval": "0.5,0.2"}, "no step"),
        ({"guidance_interval": "0,2"}, "too large"),
        ({"guidance_interval": "0,0.5", "guidance": 1.0}, "makes none"),
        ({"guidance_interval": "0,0.5", "weights": True}, "--weights"),
        ({"guidance_interval": "0,0.5", "method": "magicfusion"}, "magicfusion"),
        ({"guidance_interval": "0,0.5", "method": "superdiff"}, "superdiff"),
    ],
)
def test_a_command_that_cannot_use_it_is_refused_in_one_sentence(tmp_path, changes, named):
    with pytest.raises(UserError, match=named):
        settings(tmp_path, **changes)


def test_an_ensemble_of_models_with_timestep_tensors_on_any_grid_finds_its_step():
    class Scheduler:
        timesteps = torch.tensor([999.0, 999.0, 500.0, 500.0])

    assert [share_of_steps(Scheduler, time) for time in (torch.tensor([999.0, 999.0]), 500.0)] == [0.0, 0.5]
