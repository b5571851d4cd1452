"""`afa generate --method`: experts combined while sampling, with or without a trained ensemble of them."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin
from rival_experts import UNET, pipelines
from tiny import quiet, sd_pipeline

from afa import Ensemble, UserError
from afa.generation.run import generate
from afa.generation.settings import GenerateSettings
from afa.sampling.registry import make_sampler
from afa.sampling.sample import Request, Sampling


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """Two experts and a saved ensemble of them, which is not the mean."""
    folder = tmp_path_factory.mktemp("methods")
    for name, pipe in zip(("photo", "paint"), pipelines(2), strict=True):
        pipe.save_pretrained(folder / name)
    ensemble = Ensemble.from_experts([str(folder / "photo"), str(folder / "paint")], hidden=8, heads=2, depth=1)
    for aggregator in ensemble.aggregators.values():
        torch.nn.init.normal_(aggregator.conv_out.weight, generator=torch.Generator().manual_seed(0))
    ensemble.save(folder / "ensemble")
    return folder


@pytest.fixture
def settings(places, tmp_path):
    """The saved ensemble."""
    small = {"steps": 2, "guidance": 3.0, "width": 32, "height": 32, "device": "cpu"}
    return GenerateSettings(sources=[str(places / "ensemble")], output=str(tmp_path / "out"), prompt=["a cat"], **small)


def pixels(path):
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


@pytest.fixture
def experts(places, settings):
    """The same experts without a trained ensemble."""
    return replace(settings, sources=[str(places / "photo"), str(places / "paint")], method="noise_average")


@pytest.fixture(scope="module")
def bare(places, tmp_path_factory):
    """What those experts draw."""
    small = {"steps": 2, "guidance": 3.0, "width": 32, "height": 32, "device": "cpu", "prompt": ["a cat"]}
    sources, output = [str(places / "photo"), str(places / "paint")], str(tmp_path_factory.mktemp("bare") / "out")
    return generate(GenerateSettings(sources=sources, output=output, method="noise_average", **small))[0]


def test_a_method_needs_no_trained_ensemble_and_ignores_one(settings, experts, bare, tmp_path):
    saved = generate(replace(settings, method="noise_average", output=str(tmp_path / "saved")))[0]
    assert np.array_equal(pixels(bare), pixels(saved))
    ensemble = Ensemble.from_experts(experts.sources)
    images = make_sampler("noise_average", ensemble)([Request("a cat", 0)], Sampling(2, 3.0, height=32, width=32))
    assert np.array_equal(pixels(bare), images[0].astype(int))


def test_images_of_another_method_or_option_are_not_overwritten(experts):
    asked = replace(experts, method="noise_average", method_option=["weights=1,2"])
    first = generate(asked)[0]
    said = json.loads(Image.open(first).info["afa"])
    assert (said["method"], said["method_options"]) == ("noise_average", {"weights": [1.0, 2.0]}) and said["source"] == ["photo", "paint"]
    made = first.stat().st_mtime_ns
    assert generate(asked) and first.stat().st_mtime_ns == made
    with pytest.raises(UserError, match='was made with method "noise_average", now "feature_mean" is asked'):
        generate(replace(asked, method="feature_mean", method_option=None))
    with pytest.raises(UserError, match=r"was made with method_options .*2\.0.*, now .*3\.0.* is asked"):
        generate(replace(asked, method_option=["weights=1,3"]))


def test_images_made_before_there_were_methods_are_kept(settings):
    first = generate(settings)[0]
    said = {name: value for name, value in json.loads(Image.open(first).info["afa"]).items() if not name.startswith("method")}
    chunk = PngImagePlugin.PngInfo()
    chunk.add_itxt("afa", json.dumps(said))
    Image.open(first).save(first, pnginfo=chunk)
    made = first.stat().st_mtime_ns
    generate(settings)
    assert first.stat().st_mtime_ns == made


def test_a_single_expert_is_its_own_pipeline_or_in_the_ensembles_frame(experts, settings, tmp_path):
    asked = replace(experts, method="single", expert="paint")
    own = generate(asked)[0]
    options = {"num_inference_steps": 2, "guidance_scale": 3.0, "width": 32, "height": 32, "output_type": "np"}
    expected = quiet(sd_pipeline(1, **UNET))("a cat", generator=torch.Generator().manual_seed(0), **options).images[0]
    assert np.array_equal(pixels(own), (expected * 255).round().astype(int))
    framed = generate(replace(asked, method="single_in_ensemble", output=str(tmp_path / "framed")))[0]
    control = generate(replace(settings, expert="paint", output=str(tmp_path / "control")))[0]
    assert np.array_equal(pixels(framed), pixels(control)) and not np.array_equal(pixels(framed), pixels(own))


def test_the_scheduler_reaches_every_method(experts, bare, tmp_path):
    alone = replace(experts, method="single", expert="photo")
    for asked, one in ((experts, bare), (alone, generate(alone)[0])):
        other = generate(replace(asked, scheduler="euler_a", output=str(tmp_path / asked.method)))[0]
        assert np.abs(pixels(one) - pixels(other)).max() > 1


def test_the_masks_of_magicfusion_are_saved_as_weights(experts):
    first = generate(replace(experts, method="magicfusion", method_option=["t0=1000"], weights=True))[0]
    with np.load(first.with_suffix(".weights.npz")) as kept:
        assert kept["OUT03"].shape == (2, 2, 4, 4) and set(np.unique(kept["OUT03"])) == {0, 1} and (kept["OUT03"].sum(1) == 1).all()


def test_a_base_is_read_and_recorded_where_the_method_needs_it(places, experts, settings, tmp_path):
    sd_pipeline(2, **UNET).save_pretrained(tmp_path / "base")
    asked = replace(experts, method="loratorio", method_option=["patch=2", "temperature=0.1"], base=str(tmp_path / "base"), weights=True)
    bare = generate(asked)[0]
    saved = generate(replace(asked, sources=settings.sources, output=str(tmp_path / "saved")))[0]
    assert np.array_equal(pixels(bare), pixels(saved))
    said = json.loads(Image.open(bare).info["afa"])
    assert said["base"] == "base" and "the base" in said["files"] and said["experts"] == ["photo", "paint"]
    with np.load(bare.with_suffix(".weights.npz")) as kept:
        assert kept["OUT03"].shape == (2, 2, 4, 4) and kept["OUT03"].std() > 0
    with pytest.raises(UserError, match='was made with base "base", now "photo" is asked|was made with other files: the base'):
        generate(replace(asked, base=str(places / "photo")))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"method": "loratorio"}, "loratorio needs the model that the experts were tuned from; give it with --base"),
        ({"method": "noise_average", "base": "b"}, "noise_average does not use the model"),
        ({"base": "b"}, "--base b needs a --method that uses it"),
        ({"method": "nois_average"}, "did you mean 'noise_average'"),
        ({"method_option": ["t0=1"]}, "--method-option t0=1 needs a --method"),
        ({"sources": ["a", "b"]}, r"2 sources \(a, b\) must be combined somehow; choose with --method"),
        ({"method": "magicfusion", "guidance": 1.0}, "--guidance 1 adds nothing; give one above 1"),
        ({"method": "superdiff_or", "scheduler": "euler"}, "leave out --scheduler euler"),
        ({"method": "superdiff_and", "weights": True}, "--method superdiff_and has no weight maps"),
        ({"method": "noise_average", "expert": "paint"}, "expert is an option of single, single_in_ensemble, not of noise_average"),
        ({"method": "single", "expert": "paint", "method_option": ["expert=photo"]}, "expert is given twice"),
    ],
)
def test_flags_that_do_not_go_together_are_refused_before_anything_is_loaded(changes, sentence):
    asked = {"sources": ["nowhere"], "output": "nowhere", "prompt": ["x"], **changes}
    with pytest.raises(UserError, match=sentence):
        GenerateSettings(**asked)


def test_bad_options_of_a_method_leave_no_folder(experts, settings):
    for method, option, sentence in (("noise_average", "weights=1,2,3", "3 weights for 2 experts"), ("single", "expert=pant", "did you mean 'paint'")):
        with pytest.raises(UserError, match=sentence):
            generate(replace(experts, method=method, method_option=[option]))
    with pytest.raises(UserError, match="which expert"):
        generate(replace(experts, method="single"))
    with pytest.raises(UserError, match="is a saved ensemble, which has its experts; give it alone"):
        generate(replace(experts, sources=[*experts.sources, *settings.sources], method="noise_average"))
    assert not Path(experts.output).exists()
