"""Laws of rewards: a metric with gradients says what the metric says, and a mistake is one sentence."""

import numpy as np
import pytest
import torch
from test_metrics_images import weights  # noqa: F401

from afa import UserError
from afa.demo.scenes import sample_scenes
from afa.demo.worlds import FAR, load_scorer
from afa.metrics.base import Picture
from afa.metrics.registry import OWN_REWARDS, Resources, make_metric, rewards
from afa.training.reward_objectives import make_reward

CPU = torch.device("cpu")


def smooth(count, height, width):
    """Images without hard edges or clipping, so that rounding to 8 bits is all that differs: (n, H, W, 3) uint8."""
    rng = np.random.default_rng(0)
    grid = np.stack(np.meshgrid(np.linspace(0, 3, width), np.linspace(0, 3, height)), -1)
    waves = [np.sin(grid @ rng.normal(size=(2, 3)) + rng.normal(size=3)) for _ in range(count)]
    return [(127 + 80 * wave).astype(np.uint8) for wave in waves]


@pytest.mark.parametrize("name", [name for name in rewards() if name not in OWN_REWARDS])
@pytest.mark.parametrize(("height", "width"), [(24, 24), (24, 40), (33, 20), (16, 16)])
def test_a_metric_as_a_reward_says_what_the_metric_says(name, height, width, weights):  # noqa: F811
    images, captions = smooth(3, height, width), ["a cat", "two cats", "no cat at all"]
    reward = make_reward(name, CPU, str(weights[name]))
    pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 127.5 - 1
    found = reward(pixels.requires_grad_(), captions)
    metric = make_metric(name, Resources(str(weights[name]), CPU))
    known = metric.score([Picture(image, caption, k) for k, (image, caption) in enumerate(zip(images, captions, strict=True))])[metric.names[0]]
    assert np.allclose(found.detach().numpy(), known, atol=0.05 * max(1e-3, np.abs(known).max()))
    found.sum().backward()
    assert torch.isfinite(pixels.grad).all() and pixels.grad.abs().sum() > 0


def test_the_embedded_reward_knows_the_right_picture():
    scenes = sample_scenes("mixed", 40, 123)
    images = np.stack(list(FAR.render_all(scenes, 123)))
    pixels = (torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1).requires_grad_()
    captions = [scene.caption for scene in scenes]
    right = make_reward("scenes", CPU)(pixels, captions)
    assert right.mean() > -0.05
    assert make_reward("scenes", CPU)(pixels, captions[1:] + captions[:1]).mean() < -1
    right.sum().backward()
    assert pixels.grad.abs().sum() > 0


def test_the_embedded_reward_is_not_the_judge():
    """Another network: no weight in common, and another answer where a picture says nothing."""
    from afa.demo.metric import load

    judge, reward = load_scorer(FAR).net, load(CPU).net
    shapes = {tuple(parameter.shape) for parameter in judge.parameters() if parameter.ndim > 1}
    assert not shapes & {tuple(parameter.shape) for parameter in reward.parameters() if parameter.ndim > 1}


def test_words_for_and_against_are_compared():
    calls = []

    def count(images, captions):
        calls.append(captions)
        return images.sum((1, 2, 3)) * 0 + torch.tensor([float(len(caption)) for caption in captions])

    from afa.training.reward_objectives import relative

    images = torch.zeros(2, 3, 8, 8)
    assert relative(count, "sharp", "blurry and dull")(images, ["a", "bcd"]).tolist() == [-10.0, -10.0]
    assert calls == [["sharp, a", "sharp, bcd"], ["blurry and dull, a", "blurry and dull, bcd"]]
    assert relative(count, "sharp", "")(images, ["a", "bcd"]).tolist() == [7.0, 7.0]


@pytest.mark.parametrize(
    ("code", "sentence"),
    [
        ("def score(images, captions): pass", "has no function reward"),
        ("def reward(images, captions): return images.mean()", r"shape \(\) for 2 images"),
        ("def reward(images, captions): return [1, 2]", "returned list for 2 images"),
        ("def reward(images, captions): return images.detach().mean((1, 2, 3))", "without gradients"),
        ("import nothing_of_that_name", "--reward .* cannot be run"),
    ],
)
def test_a_users_reward_that_cannot_be_used_is_one_sentence(code, sentence, tmp_path):
    (tmp_path / "mine.py").write_text(code)
    with pytest.raises(UserError, match=sentence):
        make_reward(str(tmp_path / "mine.py"), CPU)(torch.zeros(2, 3, 8, 8, requires_grad=True), ["a", "b"])


def test_a_reward_that_is_not_there_is_one_sentence():
    with pytest.raises(UserError, match="did you mean 'imagereward'"):
        make_reward("imagerewrd", CPU)
    with pytest.raises(UserError, match="--reward fid cannot be differentiated"):
        make_reward("fid", CPU)
    with pytest.raises(UserError, match="brings its own weights"):
        make_reward("scenes", CPU, "somewhere")
    with pytest.raises(UserError, match="PickScore.*--reward-weights PATH"):
        make_reward("pickscore", CPU)
    with pytest.raises(UserError, match="scenes of the far world only"):
        make_reward("scenes", CPU)(torch.zeros(1, 3, 64, 64), ["a cat"])
