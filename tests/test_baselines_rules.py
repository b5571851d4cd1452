"""MagicFusion and SuperDiff as published, seen from outside: on whole experts, in stock pipelines."""

import pytest
import torch
from diffusers import EulerDiscreteScheduler
from rival_experts import CAT, DOG, SAMPLING, UNET, differ, joined_inputs, own, pipelines, together
from tiny import quiet, sd_pipeline

from afa import UserError, record_weights
from afa.sampling.registry import make_sampler
from afa.sampling.sample import Request, Sampling
from afa.sampling.superdiff import log_density_change
from afa.schedulers import reschedule


@pytest.fixture(scope="module")
def ensemble():
    return together(pipelines(3))


def naive_saliency(difference):
    """|difference| (C, H, W), mean over channels, 4×4 mean, bilinear back: written out position by position."""
    strength = difference.abs().mean(0)
    height, width = strength.shape
    padded = torch.zeros(height + 2, width + 2)
    padded[1:-1, 1:-1] = strength
    pooled = torch.tensor([[padded[y : y + 4, x : x + 4].sum() / 16 for x in range(width - 1)] for y in range(height - 1)])
    place = lambda index, size: min(max((index + 0.5) * (size - 1) / size - 0.5, 0), size - 2)  # noqa: E731
    smooth = torch.zeros(height, width)
    for y in range(height):
        for x in range(width):
            top, left = place(y, height), place(x, width)
            for row, column in [(int(top), int(left)), (int(top), int(left) + 1), (int(top) + 1, int(left)), (int(top) + 1, int(left) + 1)]:
                share = max(0, 1 - abs(top - row)) * max(0, 1 - abs(left - column))
                if share > 0:
                    smooth[y, x] += share * pooled[row, column]
    return smooth


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_loratorio_weighs_by_the_prompted_noise_and_takes_half_of_the_base_without_a_prompt(kind):
    *pipes, base = pipelines(3, prediction_type=kind)
    denoiser = make_sampler("loratorio", together(pipes), base=base, patch=2, temperature=0.05).denoiser
    denoiser.guidance = 4.0
    call = joined_inputs(3)
    call["sample"] = call["sample"][:1].repeat(2, 1, 1, 1)  # the batch doubled by guidance
    with torch.no_grad(), record_weights(denoiser) as maps:
        u, c = denoiser(**call).sample.chunk(2)
        each = [pipe.unet(**own(call, index)).sample.chunk(2) for index, pipe in enumerate((*pipes, base))]
    alpha = together(pipes).frame.scheduler.alphas_cumprod[500]
    noise = [alpha.sqrt() * p[1] + (1 - alpha).sqrt() * call["sample"][:1] if kind == "v_prediction" else p[1] for p in each]
    for row in range(0, 4, 2):
        for column in range(0, 6, 2):
            patch = (slice(None), slice(None), slice(row, row + 2), slice(column, column + 2))
            cosines = torch.stack([torch.cosine_similarity(n[patch].flatten(), noise[2][patch].flatten(), dim=0) for n in noise[:2]])
            first, second = (-cosines / 0.05).softmax(0)
            assert torch.allclose(c[patch], first * each[0][1][patch] + second * each[1][1][patch], atol=1e-5)
            blended = first * each[0][0][patch] + second * each[1][0][patch]
            assert torch.allclose(u[patch], (blended + each[2][0][patch]) / 2, atol=1e-5)
    (weights,) = maps.maps[0].values()
    assert maps.experts == ("expert_0", "expert_1") and torch.equal(*weights.chunk(2)) and weights.std() > 0.01


@pytest.mark.parametrize("scheduler", ["ddim", "euler", "heun", "dpm++_karras", "unipc"])
def test_experts_switch_every_step_with_any_scheduler(scheduler):
    """Heun evaluates a step twice, the second time at the next timestep, which belongs to the next step."""
    ensemble = together(pipelines(3))
    reschedule(ensemble, scheduler)
    sampler = make_sampler("expert_switch", ensemble)
    with record_weights(sampler.denoiser) as maps:
        sampler([CAT], Sampling(5, 3.0, height=32, width=32))
    turns = maps.stage(ensemble.denoiser.stages[-1].name).mean((1, 3, 4)).argmax(-1).tolist()
    assert turns == ([0, 1, 1, 2, 2, 0, 0, 1, 1] if scheduler == "heun" else [0, 1, 2, 0, 1])


def test_an_order_of_experts_names_experts(ensemble):
    with pytest.raises(UserError, match="did you mean 'expert_1'"):
        make_sampler("expert_switch", ensemble, order=["expert_0", "expert1"])


def test_a_base_is_given_to_the_methods_that_need_one_and_to_no_other(ensemble):
    with pytest.raises(UserError, match=r"loratorio needs the model that the experts were tuned from; give it with --base"):
        make_sampler("loratorio", ensemble)
    with pytest.raises(UserError, match="noise_average does not use the model"):
        make_sampler("noise_average", ensemble, base=pipelines(1)[0])
    with pytest.raises(UserError, match="'model-2'.*32"):
        make_sampler("loratorio", ensemble, base=sd_pipeline(0, **{**UNET, "block_out_channels": (16, 32)}))


@pytest.mark.parametrize("reference", ["general", "own"])
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_guidance_of_the_blend_is_the_winners_guided_prediction(reference, kind):
    """The published rule, position by position, on the epsilon of experts of either type."""
    pair = together(pipelines(2, prediction_type=kind))
    denoiser = make_sampler("magicfusion", pair, mode=2, t0=0, k_general=40, k_expert=50, saliency_reference=reference).denoiser
    denoiser.guidance = s = 4.0
    call = joined_inputs(2)
    call["sample"] = call["sample"][:1].repeat(2, 1, 1, 1)  # the batch doubled by guidance
    with torch.no_grad():
        u, c = denoiser(**call).sample.chunk(2)
        predicted = [expert.model(**own(call, index)).sample.chunk(2) for index, expert in enumerate(pair.experts)]
    alpha = pair.frame.scheduler.alphas_cumprod[500]
    noise = [[alpha.sqrt() * p + (1 - alpha).sqrt() * call["sample"][:1] if kind == "v_prediction" else p for p in both] for both in predicted]
    shares = []
    for index, k in enumerate((40, 50)):
        against = noise[0 if reference == "general" else index][0]
        shares.append((k * naive_saliency(s * (noise[index][1] - against)[0])).flatten().softmax(0).view(4, 6))
    first_wins = shares[0] >= shares[1]
    assert 0 < first_wins.sum() < 24  # both win somewhere
    guided = [un + s * (co - un) for un, co in predicted]
    assert torch.equal(u + s * (c - u), torch.where(first_wins, *guided))


@pytest.mark.parametrize(("mode", "blended"), [(1, [False, True, True]), (2, [True, False, False])])
def test_magicfusion_blends_on_one_side_of_t0(mode, blended, ensemble):
    """Timesteps 667, 334 and 1."""
    sampler = make_sampler("magicfusion", ensemble, mode=mode, t0=500, general="expert_2")
    with record_weights(sampler.denoiser) as maps:
        sampler([CAT], SAMPLING)
    alone = [bool((weights[:, 2] == 1).all()) for weights in maps.stage(ensemble.denoiser.stages[-1].name)]
    assert [not general for general in alone] == blended


def test_magicfusion_without_guidance_is_refused(ensemble):
    with pytest.raises(UserError, match="guidance 1 adds nothing"):
        make_sampler("magicfusion", ensemble)([CAT], Sampling(2, 1.0))
    with pytest.raises(UserError, match=r"set denoiser\.guidance"), torch.no_grad():
        make_sampler("magicfusion", ensemble, t0=1000).denoiser(**joined_inputs())


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_superdiff_of_one_expert_is_the_sde_written_out(kind, guidance):
    """dx = 2 dsigma ε + √(2 |dsigma| sigma) z from the image's own generator, to 1e-5."""
    pipe = quiet(sd_pipeline(prediction_type=kind, **UNET))
    generator, unet = torch.Generator().manual_seed(5), pipe.unet
    euler = EulerDiscreteScheduler.from_config(pipe.scheduler.config, timestep_spacing="linspace")
    euler.set_timesteps(4)
    x = torch.randn(1, 4, 4, 4, generator=generator) * euler.init_noise_sigma
    with torch.no_grad():
        text, empty = pipe.encode_prompt("a cat", "cpu", 1, True)
        for index, t in enumerate(euler.timesteps):
            sigma, dsigma = euler.sigmas[index], euler.sigmas[index + 1] - euler.sigmas[index]
            noisy = x / (sigma**2 + 1).sqrt()
            u, c = (unet(noisy, t, encoder_hidden_states=states).sample for states in (empty, text))
            prediction = u + guidance * (c - u)
            epsilon = (prediction + sigma * noisy) / (sigma**2 + 1).sqrt() if kind == "v_prediction" else prediction
            x = x + 2 * dsigma * epsilon + (2 * dsigma.abs() * sigma).sqrt() * torch.randn(x.shape, generator=generator)
    for method in ("superdiff_or", "superdiff_and"):
        sampler = make_sampler(method, together([pipe]))
        sampler([Request("a cat", 5)], Sampling(1, guidance, height=32, width=32))  # what an earlier call left is forgotten
        options = {"num_inference_steps": 4, "guidance_scale": guidance, "height": 32, "width": 32, "output_type": "latent"}
        got = sampler.pipeline("a cat", generator=[torch.Generator().manual_seed(5)], **options).images
        assert torch.allclose(got, x, atol=1e-5 * x.abs().max())


def test_superdiff_and_makes_the_increment_equally_likely_to_all_experts(ensemble, monkeypatch):
    """Seen where the steps are made, with the pipeline's own noise and guidance."""
    sampler = make_sampler("superdiff_and", ensemble)
    rule, spreads = sampler.pipeline.scheduler.rule, []
    made = rule.increment

    def watched(step):
        increment = made(step)
        change = log_density_change(step.conditional.double(), increment.double(), step.sigma, step.dsigma)
        spreads.append(float((change.max(1).values - change.min(1).values).max() / change.abs().max()))
        return increment

    monkeypatch.setattr(rule, "increment", watched)
    sampler([CAT, DOG], SAMPLING)
    assert len(spreads) == 3 and max(spreads) < 1e-4


def test_superdiff_or_carries_densities_from_step_to_step(ensemble):
    by_prior = make_sampler("superdiff_or", ensemble, temperature=0.0)([CAT], SAMPLING)  # shares stay equal
    by_density = [make_sampler("superdiff_or", ensemble, density=density)([CAT], SAMPLING) for density in ("code", "theorem")]
    assert min(differ(by_prior, images) for images in by_density) > 1
    assert differ(*by_density) > 0


def test_superdiff_or_begins_anew_with_every_image(ensemble):
    sampler = make_sampler("superdiff_or", ensemble)
    first, _, again = (sampler([request], SAMPLING) for request in (CAT, DOG, CAT))
    assert differ(first, again) == 0


def test_experts_whose_guidance_is_built_in_are_refused():
    pair = together([sd_pipeline(seed, **UNET, time_cond_proj_dim=8) for seed in range(2)])
    for method in ("magicfusion", "superdiff_or", "superdiff_and"):
        with pytest.raises(UserError, match="guidance, and these experts have theirs built in"):
            make_sampler(method, pair)
