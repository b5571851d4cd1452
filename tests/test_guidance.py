"""Guidance is told to every family as its own pipeline takes it; what a family cannot do is said in one sentence."""

import functools
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from rival_experts import UNET, differ, together
from tiny import quiet, sd_pipeline, sdxl_pipeline
from tiny_transformers import FLUX_SMALL, SD3_SMALL, flux_pipeline, sd3_pipeline

from afa import Ensemble, UserError
from afa.generation.run import generate
from afa.generation.settings import GenerateSettings
from afa.sampling.sample import Request, Sampling, sample, strength

PIPELINES = {
    "sd": functools.partial(sd_pipeline, **UNET),
    "sdxl": sdxl_pipeline,
    "sd3": functools.partial(sd3_pipeline, **SD3_SMALL),
    "flux": functools.partial(flux_pipeline, **FLUX_SMALL),
    "schnell": functools.partial(flux_pipeline, guidance_embeds=False, **FLUX_SMALL),
}
STRENGTHS = {"sd": 7.5, "sdxl": 5.0, "sd3": 7.0, "flux": 3.5, "schnell": None}
CAT = Request("a red cat", 1)
SMALL = Sampling(2, height=32, width=32)


@functools.cache
def pipe(family):
    return quiet(PIPELINES[family]())


def drawn(family, sampling):
    """By the stock pipeline, and by an ensemble of one in its place."""
    alone = sample(pipe(family), [CAT], sampling)
    assert np.array_equal(sample(quiet(together([pipe(family)]).pipeline()), [CAT], sampling), alone)
    return alone


def stock(family, **options):
    given = {"num_inference_steps": 2, "height": 32, "width": 32, "output_type": "np", **options}
    return (pipe(family)([CAT.prompt], generator=[torch.Generator().manual_seed(1)], **given).images * 255).round().astype(np.uint8)


@pytest.mark.parametrize("family", PIPELINES)
def test_where_nobody_says_how_strong_it_is_as_the_stock_pipeline_has_it(family):
    assert np.array_equal(drawn(family, SMALL), stock(family))
    assert strength(pipe(family), SMALL) == STRENGTHS[family]


@pytest.mark.parametrize("family", ["sd", "sdxl", "sd3", "flux"])
def test_another_strength_reaches_the_model(family):
    images = drawn(family, replace(SMALL, guidance=2.0))
    assert np.array_equal(images, stock(family, guidance_scale=2.0)) and differ(images, stock(family)) > 1


@pytest.mark.parametrize("family", ["sd", "sdxl", "sd3"])
def test_a_negative_prompt_reaches_the_model(family):
    images = drawn(family, replace(SMALL, negative_prompt="a dog"))
    assert np.array_equal(images, stock(family, negative_prompt=["a dog"])) and differ(images, stock(family)) > 1


@pytest.mark.parametrize("family", ["flux", "schnell"])
def test_true_guidance_is_classifier_free_guidance_beside_the_built_in_one(family):
    blurry = drawn(family, replace(SMALL, true_guidance=4.0, negative_prompt="blurry"))
    assert np.array_equal(blurry, stock(family, true_cfg_scale=4.0, negative_prompt=["blurry"]))
    empty = drawn(family, replace(SMALL, true_guidance=4.0))
    assert np.array_equal(empty, stock(family, true_cfg_scale=4.0, negative_prompt=[""]))
    assert min(differ(blurry, empty), differ(empty, stock(family))) > 1


@pytest.mark.parametrize(
    ("family", "asked", "sentence"),
    [
        ("flux", {"negative_prompt": "blurry"}, "a negative prompt needs classifier-free guidance, .*--true-guidance"),
        ("flux", {"true_guidance": 1.0}, "true guidance 1 adds nothing; give one above 1"),
        ("schnell", {"guidance": 3.5}, "guidance 3.5 changes nothing in models that were distilled without one"),
        ("schnell", {"negative_prompt": "blurry"}, "distilled to do without; give that a strength above 1"),
        ("sd3", {"true_guidance": 3.0}, "true guidance 3 is for models whose own guidance is built in"),
        ("sd", {"true_guidance": 3.0}, "that of these models is not; use --guidance"),
        ("sd", {"guidance": 1.0, "negative_prompt": "blurry"}, "guidance 1 turns guidance off, so a negative prompt changes nothing"),
        ("sd", {"height": 38}, "height 38 must be a multiple of 8 pixels for this model; 40 is the nearest"),
        ("sd3", {"width": 40}, "width 40 must be a multiple of 16 pixels"),
        ("flux", {"height": 24}, "height 24 must be a multiple of 16 pixels for this model; 32 is the nearest"),
    ],
)
def test_what_a_family_cannot_do_is_said(family, asked, sentence):
    with pytest.raises(UserError, match=sentence):
        sample(pipe(family), [CAT], replace(SMALL, **asked))


def test_a_negative_prompt_for_guidance_that_is_built_in_is_refused():
    distilled = quiet(sd_pipeline(**UNET, time_cond_proj_dim=8))
    with pytest.raises(UserError, match=r"a negative prompt needs classifier-free guidance, .*\(time_cond_proj_dim\)"):
        sample(distilled, [CAT], replace(SMALL, negative_prompt="blurry"))


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    folder = tmp_path_factory.mktemp("guided")
    for family in ("sd", "flux", "schnell"):
        PIPELINES[family]().save_pretrained(folder / family)
    return folder


class TestGenerate:
    def settings(self, places, family, tmp_path, **changes):
        small = {"steps": 2, "width": 32, "height": 32, "device": "cpu", "prompt": ["a red cat"]}
        return GenerateSettings(sources=[str(places / family)], output=str(tmp_path / family), **{**small, **changes})

    @pytest.mark.parametrize("family", ["sd", "flux", "schnell"])
    def test_an_image_says_how_strong_it_was(self, places, family, tmp_path):
        path = generate(self.settings(places, family, tmp_path, seed=1))[0]
        assert json.loads(Image.open(path).info["afa"])["guidance"] == STRENGTHS[family]
        assert np.array_equal(np.asarray(Image.open(path)), stock(family)[0])

    def test_images_of_the_same_strength_said_or_not_are_kept(self, places, tmp_path):
        path = generate(self.settings(places, "sd", tmp_path))[0]
        made = path.stat().st_mtime_ns
        generate(self.settings(places, "sd", tmp_path, guidance=7.5))
        assert path.stat().st_mtime_ns == made
        with pytest.raises(UserError, match="was made with guidance 7.5, now 5.0 is asked"):
            generate(self.settings(places, "sd", tmp_path, guidance=5.0))

    def test_what_cannot_be_leaves_no_folder(self, places, tmp_path):
        for changes in ({"guidance": 2.0}, {"negative_prompt": "blurry"}, {"scheduler": "ddim"}):
            with pytest.raises(UserError, match=r"distilled|flow models"):
                generate(self.settings(places, "schnell", tmp_path, **changes))
        assert not (tmp_path / "schnell").exists()

    def test_several_experts_are_combined(self, places, tmp_path):
        asked = self.settings(places, "flux", tmp_path, method="noise_average", scheduler="dpm++", true_guidance=2.0, weights=True)
        path = generate(replace(asked, sources=[f"one={places / 'flux'}", f"two={places / 'flux'}"]))[0]
        assert json.loads(Image.open(path).info["afa"])["true_guidance"] == 2.0
        with np.load(path.with_suffix(".weights.npz")) as kept:
            assert len(kept["OUT"]) == 2 and kept["timesteps"].max() > 1  # the pass with the prompt, times as schedulers count them


def test_a_saved_ensemble_of_flux_draws_as_before(tmp_path):
    PIPELINES["flux"]().save_pretrained(tmp_path / "one")
    made = Ensemble.from_experts([str(tmp_path / "one")], aggregator="mean")
    made.save(tmp_path / "both")
    assert np.array_equal(sample(quiet(Ensemble.load(tmp_path / "both").pipeline()), [CAT], SMALL), stock("flux"))
