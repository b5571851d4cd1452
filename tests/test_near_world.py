"""Laws of the near world's scenes and of what judges them."""

import json
import math

import numpy as np
import pytest
import torch

from afa import UserError
from afa.demo import drawing, near_scenes
from afa.demo.near_scenes import FAMILIES, SHAPES, parse, sample_scenes
from afa.demo.near_scorer import CLASSES, NearScorer, labels
from afa.demo.worlds import NEAR, load_scorer
from afa.ensemble import Ensemble
from afa.places import ASSETS


@pytest.mark.parametrize("domain", ["mixed", "union", "single", *FAMILIES, *(f"{family} diet" for family in FAMILIES)])
def test_a_near_caption_says_everything_about_its_scene(domain):
    for scene in sample_scenes(domain, 60, 3):
        assert parse(scene.caption) == scene


@pytest.mark.parametrize(
    "caption",
    [
        "a red star on a dotted tan background",  # without its size: the far world's kind of thing
        "a big red star and a small red moon above a big blue ring on a plain tan background",  # a colour twice
        "a big red star and a small blue moon on a plain tan background",  # no layout of two things
        "a huge red star on a plain tan background",
        "a big red star on a plain tan background <b>",
    ],
)
def test_other_near_captions_are_refused(caption):
    with pytest.raises(ValueError, match="is not a caption of the near world"):
        parse(caption)


def test_a_domain_that_the_near_world_does_not_have_is_refused():
    for domain in ("rounds", "diet", "mixed diet"):
        with pytest.raises(ValueError, match=f"no domain '{domain}'"):
            sample_scenes(domain, 1, 0)


def test_mixed_near_scenes_show_each_family_once_and_home_scenes_one_family():
    for scene in sample_scenes("mixed", 40, 1):
        assert sorted(next(name for name, family in FAMILIES.items() if thing.shape in family) for thing in scene.things) == sorted(FAMILIES)
    for name, family in FAMILIES.items():
        assert all(thing.shape in family for scene in sample_scenes(name, 20, 1) for thing in scene.things)


def test_an_expert_trains_mostly_but_not_only_on_its_own_family():
    scenes = sample_scenes("round diet", 600, 1)
    own = np.mean([all(thing.shape in FAMILIES["round"] for thing in scene.things) for scene in scenes])
    assert 0.75 < own < 0.87 and {len(scene.things) for scene in scenes} == {1, 2, 3}


def test_things_cover_each_other_in_a_few_near_scenes(monkeypatch):
    covered = []

    def drawn(image, *arguments):
        alone = np.zeros_like(image) - 1000
        drawing.draw_shape(alone, *arguments)
        masks.append(alone[..., 0] > -500)

    monkeypatch.setattr(near_scenes, "draw_shape", drawn)
    for index, scene in enumerate(sample_scenes("mixed", 100, 5)):
        masks = []
        near_scenes.render(scene, np.random.default_rng((5, index)))
        covered.append((np.sum(masks, axis=0) > 1).sum())
    assert 3 <= np.sum(np.array(covered) >= 5) <= 40  # pixels; rarely, see docs/guide.md


def test_near_scores_count_three_attributes_a_thing_and_two_of_the_background():
    """A network that always names one scene, wherever it lies, and gives each of its answers .8."""
    scene = sample_scenes("mixed", 1, 5)[0]
    truth, start = labels([scene])[0], 0

    class Sure(torch.nn.Module):
        def forward(self, images):
            sure = torch.repeat_interleave(torch.tensor([math.log(4 * (len(options) - 1)) for options in CLASSES.values()]), sizes)
            named = torch.nn.functional.one_hot(torch.tensor(columns), len(sure)).sum(0)
            return (sure * named).expand(len(images), -1)

    columns, sizes = [], torch.tensor([len(options) for options in CLASSES.values()])
    for right, options in zip(truth.tolist(), CLASSES.values(), strict=True):
        columns.append(start + right)
        start += len(options)
    scorer, image = NearScorer(Sure()), np.zeros((1, 64, 64, 3), np.uint8)
    scores = {name: float(value[0]) for name, value in scorer.score(image, [scene.caption]).items()}
    colour = 1 - 0.2 / len(SHAPES)  # that anything has it
    assert scores.pop("probability") == pytest.approx((3 * (0.8 + 0.8 + colour) + 2 * 0.8) / 11, abs=1e-6)
    assert scores == dict.fromkeys(NEAR.scores[1:], 1.0)
    thing = scene.things[0]
    other = scene.caption.replace(thing.shape, next(shape for shape in SHAPES if shape not in scene.caption))
    scores = {name: float(value[0]) for name, value in scorer.score(image, [other]).items()}
    assert scores["attributes"] == pytest.approx(10 / 11) and scores["shapes"] == pytest.approx(2 / 3) and scores["all"] == 0
    unseen = next(colour for colour in ("red", "blue", "pink", "green") if colour not in scene.caption)
    scores = {name: float(value[0]) for name, value in scorer.score(image, [scene.caption.replace(thing.colour, unseen)]).items()}
    assert scores["attributes"] == pytest.approx(8 / 11) and scores["colours"] == pytest.approx(2 / 3)


def test_the_near_protocol_judges_its_own_scenes_only():
    from afa.demo.metric import make_near
    from afa.evaluation.protocols import ProtocolOptions, make_protocol
    from afa.metrics.base import Picture
    from afa.metrics.registry import Resources

    protocol = make_protocol("near", ProtocolOptions())
    captions = {item.caption for item in protocol.items}
    assert len(protocol.items) == 320 and protocol.metrics == ("near_probability", "near_attributes", "near_frechet") and protocol.reward == "near"
    assert all(len(parse(caption).things) == 3 for caption in captions) and not captions & set(protocol.tuning)
    with pytest.raises(UserError, match="metric 'near_attributes' judges scenes of the near world only: 'a red star"):
        make_near(Resources(None, torch.device("cpu"))).score([Picture(np.zeros((64, 64, 3), np.uint8), "a red star", 0)])


def test_near_scenes_are_a_source_of_training_images(tmp_path):
    """The two ways to the same images: a folder drawn by hand, and near:COUNT."""
    from afa.data.registry import open_source
    from afa.data.sources import Columns
    from afa.demo.draw import draw
    from afa.images import read_pixels

    draw(tmp_path / "data", "mixed", 3, 600_000, NEAR)
    ours, theirs = (open_source(place, Columns()).samples for place in ("near:3", str(tmp_path / "data")))
    for one, other in zip(ours, theirs, strict=True):
        assert one.caption == other.caption and np.array_equal(read_pixels(one.read(), "a"), read_pixels(other.read(), "b"))
    with pytest.raises(UserError, match="such as near:512"):
        open_source("near:many", Columns())


def test_the_near_experts_are_near_each_other_and_form_an_ensemble():
    """As community fine-tunes: relative distances of weights between .05 and .15."""
    ensemble = Ensemble.from_experts([str(NEAR.folder(name)) for name in ("base", *NEAR.experts)], aggregator="mean")
    flat = [torch.cat([tensor.flatten() for tensor in expert.parameters()]) for expert in ensemble.denoiser.experts]
    for one in range(4):
        for other in range(one):
            assert 0.05 <= float((flat[one] - flat[other]).norm() / flat[0].norm()) <= 0.15
    assert len(ensemble.text_encoders[0].encoders) == 1  # shared


def test_the_near_world_says_how_it_was_made():
    record = json.loads((ASSETS / "near-build.json").read_text())
    assert len({record[name]["steps"] for name in NEAR.experts}) == 1  # equal effort
    assert sum(part["seconds"] for part in record.values()) < 2 * 3600


def test_the_near_scorer_is_exact_on_unseen_renders():
    scenes = sample_scenes("union", 200, 31337)
    images, captions = np.stack(list(NEAR.render_all(scenes, 31337))), [scene.caption for scene in scenes]
    scorer = load_scorer(NEAR)
    assert scorer.score(images, captions)["attributes"].mean() >= 0.97
    assert scorer.features(images[:3]).shape == (3, 144)


def test_the_near_reward_knows_the_right_picture():
    from afa.training.reward_objectives import make_reward

    scenes = sample_scenes("mixed", 40, 123)
    pixels = torch.from_numpy(np.stack(list(NEAR.render_all(scenes, 123)))).permute(0, 3, 1, 2).float() / 127.5 - 1
    captions, reward = [scene.caption for scene in scenes], make_reward("near", torch.device("cpu"))
    right, wrong = reward(pixels.requires_grad_(), captions), reward(pixels, captions[1:] + captions[:1])
    assert right.mean().item() > wrong.mean().item() + 1
    right.sum().backward()
    assert torch.isfinite(pixels.grad).all() and pixels.grad.abs().sum() > 0
