"""Strengths in a part of the picture and of the steps: which steps, what PNGs record, and bad input."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from afa.cli.main import main
from afa.demo.data import ENSEMBLE
from afa.denoiser.hooks import record_weights, scale_weights
from afa.denoiser.strengths import Strength, check_regions
from afa.ensemble import Ensemble
from afa.errors import UserError
from afa.images import read_metadata
from afa.sampling.regions import Region, as_strengths, mask_of, parse_region, pixels_of, read_region
from afa.schedulers import reschedule

NAMES = ("curves", "angles", "patterns")
ASKED = ["generate", str(ENSEMBLE), "--prompt", "a red star on a mint background", "--guidance", "3", "--device", "cpu"]


@pytest.fixture(scope="module")
def made():
    return Ensemble.load(ENSEMBLE)


def half(side=64, left=True):
    mask = torch.zeros(1, side, side)
    mask[..., : side // 2] = 1.0
    return mask if left else 1 - mask


def drawn(made, *regions, steps=4, scheduler=None):
    """-> the picture, and the mean weight of the first expert in each pass at its last stage, left and right."""
    if scheduler:
        reschedule(made, scheduler)
    pipeline = made.pipeline()
    pipeline.set_progress_bar_config(disable=True)
    with record_weights(made.denoiser) as maps, scale_weights(made.denoiser, {}, regions, pipeline.scheduler):
        images = pipeline("a red star", num_inference_steps=steps, guidance_scale=3.0, output_type="np", generator=torch.Generator().manual_seed(1)).images
    last = maps.stage(made.denoiser.fused[-1])[:, :, 0]
    middle = last.shape[-1] // 2
    return images[0], last[..., :middle].mean((1, 2, 3)), last[..., middle:].mean((1, 2, 3))


@pytest.mark.parametrize(("scheduler", "begins"), [("ddim", 2), ("euler", 2), ("heun", 5)])
def test_a_strength_holds_in_its_steps_only(made, scheduler, begins):
    """The second half of the steps; of heun's 7 passes at 4 timesteps, those at the last timestep of its half and later."""
    _, left, right = drawn(made, Strength("curves", 0.0, half(), 0.5, 1.0), scheduler=scheduler)
    assert (left[:begins] > 0).all() and (left[begins:] == 0).all() and (right > 0).all()


def test_a_region_that_changes_nothing_leaves_every_bit(made):
    plain, _, _ = drawn(made)
    same, _, _ = drawn(made, Strength("curves", 1.0, half(), 0.2, 0.7), Strength("angles", 0.0, torch.zeros(1, 8, 8)))
    assert np.array_equal(plain, same)


def test_a_mask_of_everything_is_a_strength_everywhere(made):
    masked, _, _ = drawn(made, Strength("curves", 0.3, torch.ones(1, 5, 7)))
    everywhere, _, _ = drawn(made, Strength("curves", 0.3))
    assert np.array_equal(masked, everywhere)


def test_regions_of_two_experts_each_hold_in_their_half(made):
    _, left, right = drawn(made, Strength("curves", 0.0, half()), *(Strength(name, 0.0, half(left=False)) for name in NAMES[1:]))
    assert (left == 0).all() and torch.allclose(right, torch.ones(()), atol=1e-6)


@pytest.mark.parametrize(
    ("regions", "sentence"),
    [
        ([Strength("curve", 1.0)], "did you mean 'curves'"),
        ([Strength("curves", -1.0)], "the strength of expert 'curves' is -1; the least is 0"),
        ([Strength("curves", float("nan"))], "finite"),
        ([Strength("curves", 0.0, None, 0.5, 0.5)], "the steps of expert 'curves' 0.5,0.5 contains no step"),
        ([Strength("curves", 0.0, torch.full((1, 4, 4), 2.0))], "has values from 2 to 2; give 0 to 1"),
        ([Strength("curves", 0.0, torch.full((1, 4, 4), torch.nan))], "has values from nan to nan"),
        ([Strength("curves", 0.0, torch.ones(4, 4))], r"has shape \(4, 4\); give \(pictures, height, width\)"),
        ([Strength(name, 0.0, half()) for name in NAMES], "all experts are off at a place of the picture"),
        ([Strength("curves", 1e6), Strength("curves", 1e6)], "strengths multiply to 1 and 1e.12"),
    ],
)
def test_regions_that_cannot_be_used_are_named(regions, sentence):
    with pytest.raises(UserError, match=sentence):
        check_regions(NAMES, regions)


def test_experts_that_are_off_at_different_times_are_not_off_together():
    check_regions(NAMES, [Strength(name, 0.0, None, place / 3, (place + 1) / 3) for place, name in enumerate(NAMES)])


def test_parts_of_the_steps_need_a_scheduler_and_masks_are_of_one_picture(made):
    with pytest.raises(UserError, match="give the pipeline's scheduler"), scale_weights(made.denoiser, {}, [Strength("curves", 0.0, None, 0.5)]):
        pass
    with pytest.raises(UserError, match="is for 2 pictures"), scale_weights(made.denoiser, {}, [Strength("curves", 0.0, torch.ones(2, 4, 4))]):
        pass
    assert made.denoiser._adjust is None and not made.denoiser._forward_pre_hooks


@pytest.mark.parametrize("shape", [(3, 5), (64, 64), (200, 300), (1, 4000)])
def test_a_mask_is_what_was_painted(shape):
    rows, columns = np.indices(shape)
    painted = (columns >= shape[1] // 2) & (rows < max(1, shape[0] // 2))
    mask = mask_of(painted.astype(np.uint8) * 255)
    again = pixels_of(json.loads(json.dumps(mask)))
    assert max(again.shape) <= 128 and list(again.shape) == mask["size"]
    if max(shape) <= 128:
        assert np.array_equal(again, painted)
    else:
        assert abs(again.mean() - painted.mean()) < 0.02 and again[0, -1] and not again[0, 0]
    assert mask_of(np.zeros(shape, np.uint8)) is None


def test_a_region_comes_back_from_its_record():
    region = Region("curves", 0.5, 0.25, 1.0, mask_of(np.eye(9, dtype=np.uint8) * 255))
    assert read_region(json.loads(json.dumps(region.record())), NAMES) == region


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ([1], "a region must have expert and strength"),
        ({"expert": "curves", "strength": 1, "where": 1}, "a region must have"),
        ({"expert": ["curves"], "strength": 1}, "expert"),
        ({"expert": "curves", "strength": "1"}, "give a number"),
        ({"expert": "curves", "strength": 1, "start": None}, "is no number"),
        ({"expert": "curves", "strength": 1, "start": 0.9, "end": 0.1}, "contains no step"),
        ({"expert": "curves", "strength": 1, "mask": {"size": [2, 2], "counts": [10**9]}}, "counts, whole numbers"),
        ({"expert": "curves", "strength": 1, "mask": {"size": [2, 2], "counts": [1, 2]}}, r"counts sum to 3, and its size 2 × 2 has 4"),
        ({"expert": "curves", "strength": 1, "mask": {"size": [10**6, 2], "counts": [1]}}, "a mask must have a size"),
        ({"expert": "curves", "strength": 1, "mask": "a"}, "a mask must have a size"),
    ],
)
def test_a_strangers_region_is_refused_in_a_sentence(given, sentence):
    with pytest.raises(UserError, match=sentence):
        read_region(given, NAMES)


def test_a_flag_is_read_whatever_its_file_is_called():
    assert parse_region("a=b=0,start=0.5,mask=x,y=1.png") == (Region("a=b", 0.0, 0.5), "x,y=1.png")
    with pytest.raises(UserError, match="holds from 0.1 to 0.12 of the steps, where none of 4 steps begins"):
        as_strengths([Region("curves", 0.0, 0.1, 0.12)], 4, NAMES)


def test_generate_draws_regions_records_them_and_refuses_others(tmp_path, capsys):
    Image.fromarray(half()[0].byte().numpy() * 255).save(tmp_path / "left.png")
    asked = [*ASKED, "--steps", "2", "--output", str(tmp_path / "out")]
    region = f"curves=0,end=0.5,mask={tmp_path / 'left.png'}"
    assert main([*asked, "--region", region, "--weights"]) == 0
    recorded = read_metadata(tmp_path / "out" / "00000-00.png")["regions"]
    assert recorded == [{"expert": "curves", "strength": 0.0, "start": 0.0, "end": 0.5, "mask": {"size": [64, 64], "counts": [0, 2048, 2048]}}]
    weights = np.load(tmp_path / "out" / "00000-00.weights.npz")["M00"]
    assert weights[0, 0, :, :4].max() == 0 and weights[0, 0, :, 4:].min() > 0 and weights[1, 0].min() > 0
    capsys.readouterr()
    assert main(asked) == 2 and "was made with regions" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["--region", "curves"], "--region curves is no NAME=FACTOR[,start=SHARE][,end=SHARE][,mask=PNG], such as"),
        (["--region", "curves=much"], "'much' is no number"),
        (["--region", "curves=1,until=2"], "is no NAME=FACTOR"),
        (["--region", "curves=-1"], "--region curves: the factor is -1"),
        (["--region", "curves=0,start=0.9,end=0.1"], "--region curves: start,end 0.9,0.1 contains no step"),
        (["--region", "curves=0,mask=nowhere.png"], "nowhere.png is not there"),
        (["--region", "curve=0"], "did you mean 'curves'"),
        (["--region", "curves=0", "angles=0", "patterns=0"], "all experts are off"),
        (["--region", "curves=0", "--expert", "curves"], "--expert curves is alone"),
        (["--region", "curves=0", "--reuse", "2"], "uses features of other steps"),
    ],
)
def test_bad_regions_are_one_sentence(more, sentence, tmp_path, capsys):
    assert main([*ASKED, "--steps", "2", "--output", str(tmp_path / "out"), *more]) == 2
    said = capsys.readouterr()
    assert sentence in said.err.splitlines()[-1] and said.out == "" and not (tmp_path / "out").exists()
