"""Schedulers by name: of diffusion schedules, and of flows, each with the experts' own noise."""

import functools

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from rival_experts import UNET
from tiny import quiet, scheduler, sd_pipeline
from tiny_krea2 import KREA2_SMALL, krea2_pipeline, krea2_scheduler
from tiny_lumina2 import LUMINA2_SMALL, lumina2_pipeline
from tiny_transformers import (
    FLUX_SMALL,
    QWEN_IMAGE_SMALL,
    SD3_SMALL,
    flux_pipeline,
    qwen_image_pipeline,
    sd3_pipeline,
)

from afa import Ensemble, UserError
from afa.denoiser.schedule import kind_of, tables
from afa.sampling.sample import Request, Sampling, sample
from afa.schedulers import FLOWS, SCHEDULERS, make_scheduler

PIPELINES = {
    "sd3": functools.partial(sd3_pipeline, **SD3_SMALL),
    "flux": functools.partial(flux_pipeline, **FLUX_SMALL),
    "qwen-image": functools.partial(qwen_image_pipeline, **QWEN_IMAGE_SMALL),
    "krea2": functools.partial(krea2_pipeline, **KREA2_SMALL),
    "lumina2": functools.partial(lumina2_pipeline, **LUMINA2_SMALL),
}
CAT = Request("a red cat", 1)
FLOW = FlowMatchEulerDiscreteScheduler(shift=3.0)
DYNAMIC = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, base_shift=0.4, max_shift=1.2)  # by the picture's size


@functools.cache
def diffusion():
    return quiet(sd_pipeline(prediction_type="v_prediction", **UNET))


@functools.cache
def expert(family):
    return Ensemble.from_experts([PIPELINES[family]()], aggregator="mean")


def pipeline(family, own, name):
    """Of an ensemble of one expert, which came with a scheduler of its own and gets another one."""
    ensemble = expert(family)
    ensemble.frame.scheduler = make_scheduler(name, own)
    return quiet(ensemble.pipeline())


@functools.cache
def drawn(family, dynamic, name, steps):
    return sample(pipeline(family, DYNAMIC if dynamic else FLOW, name), [CAT], Sampling(steps, height=32, width=48)).astype(int)


@pytest.mark.parametrize("name", FLOWS)
@pytest.mark.parametrize(("family", "dynamic"), [("sd3", False), ("sd3", True), ("flux", False), ("flux", True)])
def test_solvers_of_a_flow_come_to_one_picture(family, dynamic, name):
    found, exact = drawn(family, dynamic, name, 24), drawn(family, dynamic, "euler", 48)
    assert np.abs(found - exact).mean() < 4 < np.abs(exact - exact.mean()).mean() / 5


@pytest.mark.parametrize("name", FLOWS)
def test_a_picture_of_a_flow_depends_on_its_own_noise_only(name):
    torch.manual_seed(1)
    first = drawn.__wrapped__("flux", False, name, 3)
    torch.manual_seed(2)
    assert np.array_equal(first, drawn.__wrapped__("flux", False, name, 3))


@pytest.mark.parametrize("name", FLOWS)
def test_the_noise_of_a_flow_is_kept_from_scheduler_to_scheduler(name):
    for flow in (FLOW, DYNAMIC):
        made = make_scheduler(name, flow)
        for one in (made, make_scheduler("euler", made), make_scheduler("unipc", made)):
            assert kind_of(one) == "flow"
            assert all(torch.equal(mine, theirs) for mine, theirs in zip(tables(one)[1:], tables(flow)[1:], strict=True))
            assert one.config.get("base_shift", 0.5) == flow.config.base_shift  # read by FLUX's pipeline, with that default


@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers_of_diffusion_schedules_keep_the_kind(name):
    made = make_scheduler(name, scheduler("v_prediction"))
    assert kind_of(made) == "v_prediction"
    pipe = diffusion()
    pipe.scheduler = made
    assert sample(pipe, [CAT], Sampling(4, height=32, width=32)).std() > 0


def test_what_is_not_for_flows_is_refused_and_a_mistyped_name_explained():
    with pytest.raises(UserError, match="'ddim' is for models with a diffusion schedule, and these are flow models; choose one of euler, dpm"):
        make_scheduler("ddim", FLOW)
    for like in (FLOW, scheduler()):
        with pytest.raises(UserError, match="did you mean 'unipc'"):
            make_scheduler("unipcc", like)


@pytest.mark.parametrize(("family", "own"), [("qwen-image", DYNAMIC), ("krea2", krea2_scheduler()), ("lumina2", FLOW)])
def test_pipelines_that_give_their_own_sigmas_get_the_same_ones_from_every_solver(family, own):
    found = []
    for name in FLOWS:
        pipe = pipeline(family, own, name)
        assert sample(pipe, [CAT], Sampling(4, height=32, width=48)).std() > 0
        found.append(pipe.scheduler.sigmas)
    assert all(len(sigmas) == 5 and torch.allclose(sigmas, found[0], atol=2e-3) for sigmas in found)


def test_sigmas_of_ones_own_are_not_silently_ignored():
    pipe = pipeline("krea2", krea2_scheduler(), "unipc")
    with pytest.raises(UserError, match="sigmas of one's own are not taken by UniPCMultistepScheduler"):
        pipe("a cat", sigmas=[1.0, 0.2], num_inference_steps=2, height=32, width=32)
