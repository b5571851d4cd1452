"""One set of weights for both predictions of guidance: those of the one with the prompt."""

import functools
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from rival_experts import CAT, DOG, differ, joined_inputs, pipelines
from test_evaluate import settings, world  # noqa: F401 (fixtures)
from tiny import ONE_LEVEL, quiet, sd_pipeline, sdxl_pipeline
from tiny_transformers import FLUX_SMALL, SD3_SMALL, flux_pipeline, sd3_pipeline

from afa import Ensemble, UserError, record_weights
from afa.checkpoint.manifest import MANIFEST, read_manifest
from afa.denoiser.hooks import scale_weights
from afa.evaluation.plan import plan
from afa.evaluation.run import evaluate
from afa.generation.run import generate
from afa.generation.settings import GenerateSettings
from afa.sampling.sample import Sampling, sample
from afa.training.plan import step_bytes

SAMPLING = Sampling(steps=2, guidance=3.0, height=32, width=32)
PIPELINES = {
    "sd": lambda: pipelines(2),
    "sdxl": lambda: [sdxl_pipeline(seed) for seed in range(2)],
    "sd3": lambda: [sd3_pipeline(seed, **SD3_SMALL) for seed in range(2)],
}


def trained(pipes, aggregator):
    """An ensemble whose weights depend on place, time and text."""
    made = Ensemble.from_experts(pipes, aggregator=aggregator, hidden=8, heads=2, depth=1)
    rng = torch.Generator().manual_seed(0)
    for module in made.aggregators.values():
        for name, parameter in module.named_parameters():
            if name != "kept":
                torch.nn.init.normal_(parameter, std=0.5, generator=rng)
    return made


@functools.cache
def ensemble(family, aggregator):
    return trained(PIPELINES[family](), aggregator)


@pytest.fixture(params=["sabw", "stitch"])
def aggregator(request):
    return request.param


def drawn(made, share, prompts=(CAT, DOG), **changes):
    """The images, and the weight maps of all passes."""
    made.denoiser.share_guidance_weights = share
    try:
        with record_weights(made.denoiser) as maps:
            return sample(quiet(made.pipeline()), list(prompts), replace(SAMPLING, **changes)), maps
    finally:
        made.denoiser.share_guidance_weights = False


@pytest.mark.parametrize("family", PIPELINES)
def test_the_unconditional_half_has_the_conditional_maps(family, aggregator):
    made = ensemble(family, aggregator)
    apart, before = drawn(made, False)
    images, maps = drawn(made, True)
    first = next(iter(maps.maps[0]))  # its features do not depend on weights yet
    assert torch.equal(maps.maps[0][first].chunk(2)[1], before.maps[0][first].chunk(2)[1])
    assert not torch.equal(*before.maps[0][first].chunk(2))
    assert all(torch.equal(*weights.chunk(2)) for one in maps.maps for weights in one.values())
    assert differ(images, apart) > 1


def test_the_conditional_prediction_is_the_same_to_the_bit(aggregator):
    made, call = ensemble("sd", aggregator), joined_inputs(2, batch=4)
    call["sample"] = call["sample"][:2].repeat(2, 1, 1, 1)
    with torch.no_grad():
        apart = made.denoiser(**call).sample
        made.denoiser.share_guidance_weights = True
        shared = made.denoiser(**call).sample
        made.denoiser.share_guidance_weights = False
    assert torch.equal(shared[2:], apart[2:]) and not torch.allclose(shared[:2], apart[:2], atol=1e-4)


def test_with_one_prompt_in_both_halves_nothing_changes_to_the_bit(aggregator):
    made = ensemble("sd", aggregator)
    (apart, _), (shared, _) = (drawn(made, share, prompts=[CAT], negative_prompt=CAT.prompt) for share in (False, True))
    assert np.array_equal(apart, shared)


def test_passes_that_are_not_guidances_are_as_ever(aggregator):
    made = ensemble("sd", aggregator)
    (apart, _), (shared, _) = (drawn(made, share, guidance=1.0) for share in (False, True))
    assert np.array_equal(apart, shared)
    for batch in (1, 3, 4):  # other latents in every sample, as in training
        call = joined_inputs(2, batch=batch)
        with torch.no_grad():
            found = []
            for share in (False, True):
                made.denoiser.share_guidance_weights = share
                found.append(made.denoiser(**call).sample)
        made.denoiser.share_guidance_weights = False
        assert torch.equal(*found)


def test_without_guidance_two_images_of_one_seed_are_not_taken_for_its_two_predictions(aggregator):
    """Their latents are the two equal halves that guidance makes."""
    made = ensemble("sd", aggregator)
    alike = [CAT, replace(DOG, seed=CAT.seed)]
    (apart, _), (shared, _) = (drawn(made, share, prompts=alike, guidance=1.0) for share in (False, True))
    assert np.array_equal(apart, shared)


def test_strengths_scale_the_shared_weights(aggregator):
    made = ensemble("sd", aggregator)
    with scale_weights(made.denoiser, {"expert_0": 0.0}):
        _, maps = drawn(made, True)
    assert all(weights[:, 0].max() == 0 and torch.equal(*weights.chunk(2)) for one in maps.maps for weights in one.values())


def test_it_is_saved_and_loaded_and_written_only_where_it_is_on(tmp_path):
    made = trained([sd_pipeline(seed, **ONE_LEVEL) for seed in range(2)], "sabw")
    made.save(tmp_path / "plain", bundle=True)
    made.denoiser.share_guidance_weights = True
    made.save(tmp_path / "shared", bundle=True)
    assert "shared_guidance" not in (tmp_path / "plain" / MANIFEST).read_text()
    assert read_manifest(tmp_path / "shared").aggregator["shared_guidance"] is True
    loaded = Ensemble.load(tmp_path / "shared")
    assert loaded.denoiser.share_guidance_weights and not Ensemble.load(tmp_path / "plain").denoiser.share_guidance_weights
    assert Ensemble.load(tmp_path / "plain").sharing(aggregators=tmp_path / "shared").denoiser.share_guidance_weights
    assert np.array_equal(*(sample(quiet(one.pipeline()), [CAT], SAMPLING) for one in (made, loaded)))
    assert step_bytes(loaded.denoiser, 2, 4, torch.float32, checkpointing=False) > 0  # of tensors without values


def test_families_without_a_pass_of_both_halves_refuse_it(tmp_path):
    made = Ensemble.from_experts([flux_pipeline(seed, **FLUX_SMALL) for seed in range(2)], hidden=8, heads=2, depth=1)
    with pytest.raises(UserError, match="only where one pass makes both, and these experts have theirs built in"):
        made.denoiser.share_guidance_weights = True
    made.save(tmp_path / "flux", bundle=True)
    manifest = json.loads((tmp_path / "flux" / MANIFEST).read_text())
    manifest["aggregator"]["shared_guidance"] = True
    (tmp_path / "flux" / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="only where one pass makes both"):
        Ensemble.load(tmp_path / "flux")


def test_generate_draws_with_it_and_says_so(tmp_path):
    small = {"steps": 2, "guidance": 3.0, "width": 32, "height": 32, "device": "cpu", "prompt": ["a cat"], "seed": 1}
    made = trained(pipelines(2), "sabw")
    made.save(tmp_path / "afa", bundle=True)
    asked = GenerateSettings([str(tmp_path / "afa")], output=str(tmp_path / "out"), shared_guidance_weights=True, **small)
    first = generate(asked)[0]
    assert np.array_equal(np.asarray(Image.open(first)), drawn(made, True, prompts=[CAT])[0][0])
    assert json.loads(Image.open(first).info["afa"])["shared_guidance_weights"] is True
    with pytest.raises(UserError, match="was made with shared_guidance_weights|shared_guidance_weights null, now true"):
        generate(replace(asked, output=str(generate(replace(asked, shared_guidance_weights=False, output=str(tmp_path / "apart")))[0].parent)))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"guidance": 1.0}, "--guidance 1 makes only one; give one above 1"),
        ({"method": "noise_average"}, "--method noise_average uses none; leave out one of them"),
        ({"expert": "a"}, "--expert a uses none"),
    ],
)
def test_flags_that_do_not_go_with_it_are_refused(changes, sentence):
    with pytest.raises(UserError, match=sentence):
        GenerateSettings(["x"], output="o", prompt=["p"], shared_guidance_weights=True, **changes)


def test_its_row_trains_nothing_and_is_the_ensemble_with_shared_weights(world, settings):  # noqa: F811
    asked = replace(settings, methods=["afa_shared"], tuning=0, images_per_prompt=1)
    assert plan(asked)["training_runs"] == 0
    results = evaluate(asked)
    assert [method.name for method in results.methods] == ["single:photo", "single:paint", "afa", "afa_shared"] and not results.errors
    item, made = results.items[0], Ensemble.load(world / "afa")
    made.denoiser.share_guidance_weights = True
    alone = sample(quiet(made.pipeline()), [replace(CAT, prompt=item.caption, seed=item.seed)], replace(SAMPLING, guidance=2.0))
    found = np.asarray(Image.open(f"{asked.output}/images/afa_shared/seed-0/000000.png"))
    assert np.abs(alone[0].astype(int) - found).max() <= 1
    with pytest.raises(UserError, match="it needs both predictions of guidance in one pass, and guidance 1 makes one"):
        evaluate(replace(asked, guidance=1.0, output=f"{asked.output}-1"))
