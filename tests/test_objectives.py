"""Laws of what may be minimised besides the diffusion loss: rewards through a recovery and through sampling, anchor, sparsity."""

import functools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from test_objective import Oracle, a_pass, noising, rows
from test_training import aggregators, experts, images, interrupt_after, settings, trained  # noqa: F401
from tiny import ONE_LEVEL, quiet, sd_pipeline

from afa import Ensemble, UserError
from afa.denoiser.hooks import record_weights
from afa.latents import latents_of
from afa.lazy import load
from afa.training.conditions import Conditions
from afa.training.noise import Batch, Noising
from afa.training.objective_registry import OBJECTIVES
from afa.training.objective_settings import ObjectiveSettings
from afa.training.objectives import Anchor, Mse, ObjectiveContext, Pass, Sparsity, Term, Total
from afa.training.reward_objectives import Decoder, DirectAlign, Draft
from afa.training.run import train
from afa.training.settings import TrainSettings

RED = 'def reward(images, captions):\n    return images[:, 0].mean((1, 2)) - images[:, 1].mean((1, 2))\n'


def itself(shown, captions):
    """A reward that shows what it is given."""
    return shown.sum((1, 2, 3))


@pytest.fixture(scope="module")
def ensemble():
    made = Ensemble.from_experts([sd_pipeline(0, **ONE_LEVEL), sd_pipeline(1, text_seed=0, **ONE_LEVEL)], hidden=8, heads=2, depth=1)
    torch.manual_seed(5)
    for aggregator in made.aggregators.values():
        torch.nn.init.normal_(aggregator.conv_out.weight, std=0.3)
    return made


@pytest.fixture
def work(ensemble):
    """A pass of two samples, the second without its caption."""
    frame = ensemble.frame
    process = Noising(frame.scheduler, latents_of(frame.vae), torch.device("cpu"))
    rng = torch.Generator().manual_seed(0)
    latents, noise, spare = (torch.randn(shape, generator=rng) for shape in ((2, 4, 4, 4), (2, 4, 4, 4), (2, 2, 4, 4, 4)))
    captions, conditions = ["a cat", "a dog"], Conditions(quiet(ensemble.pipeline()), ensemble.denoiser, torch.device("cpu"))
    encode = functools.partial(conditions, captions, torch.zeros(2, 6))
    batch = Batch(latents, noise, torch.tensor([300, 800]), spare)
    return Pass(ensemble.denoiser, ensemble.denoiser, process, batch, captions, torch.tensor([False, True]), encode)


def gradients(ensemble, loss):
    """Of the aggregators' last layers, as one vector."""
    parameters = [aggregator.conv_out.weight for aggregator in ensemble.aggregators.values()]
    found = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
    return torch.cat([torch.zeros_like(p).flatten() if g is None else g.flatten() for p, g in zip(parameters, found, strict=True)])


# --- Direct-Align -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample", "flow"])
@pytest.mark.parametrize("reach", [0.2, 1.0])
def test_a_perfect_prediction_recovers_the_image_at_any_noise(kind, reach):
    process = noising(kind)
    batch = process.draw(rows(), [0, 1, 2], torch.Generator().manual_seed(0))
    work = a_pass(Oracle(process.target(batch)), process, batch)
    assert torch.allclose(DirectAlign(process, None, itself, reach).recovered(work), batch.latents, atol=1e-4)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "flow"])
def test_the_recovery_is_a_samplers_step_with_the_known_noise_taken_out(kind):
    """Step by step, as it is defined: go to the earlier step with what the model claims, subtract the true noise, rescale."""
    process = noising(kind)
    batch = process.draw(rows(), [0, 1, 2], torch.Generator().manual_seed(1))
    batch.steps = torch.tensor([900, 500, 100])
    work = a_pass(Oracle(torch.randn(3, 4, 4, 4)), process, batch)
    signal, noise = (table[batch.steps].view(-1, 1, 1, 1) for table in (process.signal, process.noise))
    claimed_noise = (work.noisy - signal * work.clean) / noise
    earlier = torch.tensor([450, 250, 50])
    signal, noise = (table[earlier].view(-1, 1, 1, 1) for table in (process.signal, process.noise))
    known = (signal * work.clean + noise * claimed_noise - noise * batch.noise) / signal
    assert torch.allclose(DirectAlign(process, None, itself, 0.5).recovered(work), known, atol=1e-4)


def test_a_reward_moves_aggregators_only_and_spares_what_has_no_caption(ensemble, work):
    decoder = Decoder(ensemble.frame.vae)
    losses = DirectAlign(work.noising, decoder, itself, 1.0).loss(work)
    assert losses[0] != 0 and losses[1] == 0
    assert gradients(ensemble, losses[0]).abs().sum() > 0
    losses.sum().backward()
    assert all(parameter.grad is None for module in (ensemble.frame.vae, ensemble.denoiser.experts) for parameter in module.parameters())
    ensemble.denoiser.zero_grad()


# --- DRaFT ------------------------------------------------------------------------------------------------------------


def draft(work, ensemble, **options):
    decoder = Decoder(ensemble.frame.vae)
    return Draft(work.noising, decoder, itself, **{"steps": 3, "last": 1, "guidance": 4.0, **options})


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_draft_judges_what_the_pipeline_draws(ensemble, work, guidance):
    seen = []
    judge = Draft(work.noising, Decoder(ensemble.frame.vae), lambda shown, captions: seen.append(shown) or itself(shown, captions),
                  steps=3, last=1, guidance=guidance)  # fmt: skip
    with torch.no_grad():
        judge.loss(work)
    pipe = quiet(ensemble.pipeline())
    drawn = pipe(list(work.captions), num_inference_steps=3, guidance_scale=guidance, latents=work.batch.noise, output_type="pt").images
    assert torch.allclose((seen[0] / 2 + 0.5).clamp(0, 1), drawn, atol=1e-5)


def test_only_the_last_steps_of_draft_have_gradients(ensemble, work):
    one, all_steps = (gradients(ensemble, draft(work, ensemble, last=last).loss(work).sum()) for last in (1, 3))
    assert one.abs().sum() > 0 and not torch.allclose(one, all_steps, rtol=1e-2)
    with torch.no_grad():
        values = [draft(work, ensemble, last=last).loss(work) for last in (1, 3)]
    assert torch.equal(*values)


def test_repeating_the_last_step_averages_over_fresh_noise(ensemble, work):
    with torch.no_grad():
        once, twice, thrice = (draft(work, ensemble, again=again).loss(work) for again in (0, 1, 2))
    assert draft(work, ensemble, again=2).extra_noise == 2
    second, third = 2 * twice - once, 3 * thrice - 2 * twice
    assert not torch.allclose(second, once) and not torch.allclose(third, second)


def test_draft_refuses_what_does_not_fit(ensemble, work):
    with pytest.raises(UserError, match="--draft-last 5 must be at most --draft-steps 3"):
        draft(work, ensemble, last=5)
    with pytest.raises(UserError, match="--draft-again 2 repeats the last step, and --draft-last is 2"):
        draft(work, ensemble, last=2, again=2)


# --- every one of the registry ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_sum_is_the_sum_of_its_terms(name, ensemble, work):
    judged = {"reward": "scenes"} if OBJECTIVES[name].rewarded else {}
    asked = ObjectiveSettings(objective=name, draft_steps=2, **judged)
    objective = load(OBJECTIVES[name].make)(ObjectiveContext(asked, work.noising, Decoder(ensemble.frame.vae), itself))
    terms = [Term("first", 1.0, Mse(work.noising)), Term(name, 0.3, objective)]
    with torch.no_grad():
        losses = Total(terms).losses(work)
        assert all(loss.shape == (2,) and loss.dtype == torch.float32 for loss in losses.values())
        assert torch.equal(losses[name], objective.loss(work)) and losses[name].any()
        assert torch.equal(Total(terms).sum(losses), losses["first"] + 0.3 * losses[name])


# --- anchor and sparsity ----------------------------------------------------------------------------------------------


def test_the_anchor_is_the_distance_to_the_first_predictions(ensemble, work):
    parameters = list(ensemble.aggregators.parameters())
    anchor = Anchor(parameters)
    assert anchor.loss(work).abs().max() == 0
    before = work.prediction.detach()
    kept = [parameter.detach().clone() for parameter in parameters]
    with torch.no_grad():
        for parameter in parameters:
            parameter.mul_(1.5)
    again = replace(work, weights={})
    losses = anchor.loss(again)
    assert torch.allclose(losses, (again.prediction - before).square().mean((1, 2, 3)), atol=1e-6) and losses.min() > 0
    with torch.no_grad():
        for parameter, value in zip(parameters, kept, strict=True):
            assert torch.equal(parameter, value * 1.5)  # in place again after the loss
            parameter.copy_(value)


def test_sparsity_is_zero_for_one_expert_and_one_for_all_alike():
    fake = type("Work", (), {})()
    alike, alone = torch.full((2, 4, 3, 3), 0.25), torch.eye(4)[0].view(1, 4, 1, 1).expand(2, 4, 3, 3)
    for weights, entropy, top, top2 in ((alike, 1.0, 0.75, 0.5), (alone, 0.0, 0.0, 0.0)):
        fake.weights = {"M00": weights, "OUT00": weights}
        assert torch.allclose(Sparsity().loss(fake), torch.full((2,), entropy), atol=1e-6)
        assert torch.allclose(Sparsity(1).loss(fake), torch.full((2,), top), atol=1e-6)
        assert torch.allclose(Sparsity(2).loss(fake), torch.full((2,), top2), atol=1e-6)


def test_sparsity_sees_the_weights_of_the_pass_with_their_gradients(ensemble, work):
    total = Total([Term("mse", 1.0, Mse(work.noising)), Term("sparsity", 0.5, Sparsity())])
    with record_weights(ensemble.denoiser) as maps:
        losses = total.losses(work)
    assert set(maps.maps[0]) == set(work.weights) == set(ensemble.denoiser.fused)
    assert all(torch.equal(maps.maps[0][name], weights.detach()) for name, weights in work.weights.items())
    assert gradients(ensemble, losses["sparsity"].sum()).abs().sum() > 0
    assert torch.allclose(total.sum(losses), losses["mse"] + 0.5 * losses["sparsity"])


def test_sparsity_makes_weights_sparser(settings, tmp_path):  # noqa: F811
    runs = [replace(settings, sparsity=price, steps=8, evaluate_every=8, output=str(tmp_path / str(price))) for price in (0.0, 3.0)]
    free, priced = (np.mean(list(read_entropy(run, train(run)).values())) for run in runs)
    assert priced < free


def read_entropy(run, record):
    """Of the last measurement, by stage group."""
    import json

    from afa.training.log import LOG

    last = json.loads((Path(run.output) / LOG).read_text().splitlines()[-1])
    return {group: np.mean(values) for group, values in last["routing"]["entropy"].items()}


# --- training with them -----------------------------------------------------------------------------------------------

CHOICES = {
    "reward": {"objective": "reward", "anchor": 0.5},
    "mse+reward": {"objective": "mse+reward", "reward_weight": 0.5},
    "draft": {"objective": "draft", "draft_steps": 2, "draft_again": 1, "draft_guidance": 2.0},
}
CHOICES |= {name: {"objective": f"mse+{name}"} for name, entry in OBJECTIVES.items() if name not in CHOICES and not entry.diffusion}


@pytest.fixture
def red(tmp_path):
    (tmp_path / "red.py").write_text(RED)
    return str(tmp_path / "red.py")


def resumes_to_the_same_bits(run, monkeypatch, tmp_path):
    whole = replace(run, output=str(tmp_path / "whole"))
    record = train(whole)
    with monkeypatch.context() as patch:
        interrupt_after(patch, 1)
        with pytest.raises(KeyboardInterrupt):
            train(run)
    assert train(run)["history"] == record["history"]
    expected = aggregators(whole)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in aggregators(run).items())


@pytest.mark.parametrize("name", CHOICES)
def test_a_run_with_it_resumes_to_the_same_bits(name, settings, red, monkeypatch, tmp_path):  # noqa: F811
    rewarded = any(OBJECTIVES[term].rewarded for term in CHOICES[name]["objective"].split("+"))
    run = replace(settings, reward=red if rewarded else None, steps=2, **CHOICES[name])
    resumes_to_the_same_bits(run, monkeypatch, tmp_path)


def test_a_reward_rises_and_the_diffusion_loss_is_still_told(settings, red):  # noqa: F811
    history = train(replace(settings, objective="reward", reward=red, steps=30, evaluate_every=30, lr=3e-2))["history"]
    assert history[-1]["terms"]["reward"] < history[0]["terms"]["reward"]
    assert history[-1]["objective"] == pytest.approx(0.1 * history[-1]["terms"]["reward"])
    assert all(entry["held_out_loss"] > 0 for entry in history)


def test_an_anchor_keeps_the_predictions_near(settings, red, tmp_path):  # noqa: F811
    run = replace(settings, objective="reward", reward=red, steps=6, evaluate_every=6, lr=3e-2)
    loose, held = (train(replace(run, anchor=weight, output=str(tmp_path / str(weight)))) for weight in (1e-6, 100.0))
    assert held["history"][-1]["terms"]["anchor"] < loose["history"][-1]["terms"]["anchor"]


def test_a_run_goes_on_from_a_saved_ensemble(trained, red, tmp_path):  # noqa: F811
    begun, first = trained
    small = {name: getattr(begun, name) for name in ("data", "steps", "evaluate_every", "lr", "device", "resolution", "batch_size", "held_out")}
    small["steps"] = 2
    further = TrainSettings(start=begun.output, output=str(tmp_path / "further"), objective="mse+reward", reward=red, **small)
    record = train(further)
    assert record["history"][0]["held_out_loss"] == pytest.approx(first["held_out_loss"]["trained"]["value"], rel=1e-6)
    assert Ensemble.load(further.output).names == Ensemble.load(begun.output).names


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"objective": "rewrd"}, "did you mean 'reward'"),
        ({"objective": "mse+mse"}, "names one objective twice"),
        ({"objective": "reward"}, "needs --reward"),
        ({"reward": "scenes"}, "is not used by --objective mse"),
        ({"objective": "reward", "reward": "scenes", "reward_reach": 0.0}, "--reward-reach 0 is too small"),
        ({"sparsity_top": 1}, "give its weight"),
        ({"anchor": -1.0}, "--anchor -1 is too small"),
        ({"snr_gamma": 5.0, "weighting": "cosmap"}, "give one"),
        ({"start": "x"}, "either --experts A B …, or --start"),
        ({"start": "x", "experts": None, "hidden": 16}, "--hidden 16 cannot be given with --start x"),
        ({"watch": "clip_t"}, "give --sheet-every 2"),
        ({"sheet_every": 3}, "must be a multiple of --evaluate-every 2"),
    ],
)
def test_options_that_do_not_fit_are_refused(settings, changes, sentence):  # noqa: F811
    clean = dict.fromkeys(("hidden", "heads", "depth", "steps", "lr")) if "start" in changes else {}
    with pytest.raises(UserError, match=sentence.replace("+", r"\+")):
        replace(settings, **{**clean, **changes})
