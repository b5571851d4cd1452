"""The prompt router: it learns from prompts whose loss is lowest, and draws what the chosen expert alone would draw."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_evaluate import small_settings, world  # noqa: F401 (a fixture)

from afa import Ensemble, UserError
from afa.evaluation.run import evaluate
from afa.sampling.registry import make_sampler
from afa.sampling.sample import Request, Sampling
from afa.training.prompt_router import FILE, RECORD, PromptRouter, TextReader, measure_experts
from afa.training.settings import TrainSettings


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_losses_that_follow_the_text_are_learnt():
    states, slopes = random(200, 12), random(12, 3, seed=1)
    losses = 1 + 0.1 * states @ slopes
    router = PromptRouter.fit(states, losses + 0.05 * random(200, 3, seed=2))
    unseen = random(300, 12, seed=3)
    right = np.mean(np.asarray(router.choose(unseen)) == (unseen @ slopes).argmin(1).numpy())
    assert right > 0.9


@pytest.mark.parametrize("width", [12, 400])  # fewer and more text features than captions
def test_where_text_tells_nothing_the_best_expert_is_chosen_for_all(width):
    states, noise = random(200, width), random(200, 3, seed=1)
    router = PromptRouter.fit(states, torch.tensor([1.0, 0.95, 1.05]) + 0.05 * noise)
    assert np.mean(np.asarray(router.choose(random(300, width, seed=2))) == 1) > 0.8


def test_the_unit_of_text_and_a_shift_of_it_change_no_choice():
    states, losses = random(60, 5), 1 + random(60, 2, seed=1).abs()
    plain, other = PromptRouter.fit(states, losses), PromptRouter.fit(1000 * states + 7, losses)
    unseen = random(100, 5, seed=2)
    assert plain.choose(unseen) == other.choose(1000 * unseen + 7)


def test_copies_of_one_expert_are_chosen_as_the_first():
    states, losses = random(30, 4), 1 + random(30, 1, seed=1).abs()
    assert set(PromptRouter.fit(states, losses.repeat(1, 3)).choose(random(50, 4, seed=2))) == {0}


def test_a_prompts_states_do_not_depend_on_its_batch(world):  # noqa: F811
    ensemble = Ensemble.load(world / "afa")
    prompts = ["a cat", "a dog and a bird", "picture 3"]
    assert torch.allclose(TextReader(ensemble, batch_size=1)(prompts), TextReader(ensemble)(prompts), atol=1e-6)


def test_experts_are_measured_on_the_images_and_the_split_of_the_ensembles_training(world):  # noqa: F811
    """Two steps of two images: as many noisy images are measured, so the first four of the eight images once."""
    asked = TrainSettings.current()(**json.loads((world / "afa" / "afa.json").read_text())["training"]["settings"])
    found = measure_experts(asked, Ensemble.load(world / "afa"))
    assert len(found.captions) == 4 and found.noises == 1 and found.relative.shape == (4, 2)
    assert np.allclose(found.relative.mean(1), 1)
    assert not set(found.captions) & set(found.held_captions) and len(found.held_captions) == 2
    cropped = measure_experts(replace(asked, crops=2), Ensemble.load(world / "afa"))  # one row an image all the same
    assert cropped.captions == found.captions and np.array_equal(cropped.relative, found.relative)
    more = measure_experts(replace(asked, steps=13), Ensemble.load(world / "afa"))
    assert len(more.captions) == 8 and more.noises == 3
    other = measure_experts(replace(asked, seed=asked.seed + 1), Ensemble.load(world / "afa"))
    assert not np.array_equal(other.relative, found.relative)


@pytest.fixture(scope="module")
def compared(world, tmp_path_factory):  # noqa: F811
    """A finished comparison of the router with the experts; only to be read."""
    asked = small_settings(world, tmp_path_factory.mktemp("compared") / "out", methods=["prompt_router"], batch_size=4, tuning=0)
    return asked, evaluate(asked)


def test_an_image_is_that_of_the_chosen_expert_alone(world, compared):  # noqa: F811
    asked, results = compared
    row = next(method for method in results.methods if method.name == "prompt_router")
    folder = Path(asked.output) / "trained" / "prompt_router" / "seed-0"
    ensemble = Ensemble.load(world / "afa")
    names = [ensemble.names[place] for place in PromptRouter.read(folder).choose(TextReader(ensemble)([item.caption for item in results.items]))]
    for index, (item, name) in enumerate(zip(results.items, names, strict=True)):
        sampler = make_sampler("single_in_ensemble", ensemble, expert=name)
        alone = sampler([Request(item.caption, item.seed)], Sampling(2, 2.0, height=32, width=32))[0]
        drawn = np.asarray(Image.open(Path(asked.output) / "images" / "prompt_router" / "seed-0" / f"{index:06d}.png"))
        assert np.abs(alone.astype(int) - drawn).max() <= 1
    record = json.loads((folder / RECORD).read_text())
    assert record["chosen"] == {name: names.count(name) for name in ensemble.names}
    assert row.note == f"images by photo {names.count('photo')}, by paint {names.count('paint')}"
    assert (folder / FILE).exists() and set(record["held_out_loss"]) == {"trained", "photo", "paint"}


def test_a_router_of_another_training_is_refused(compared, tmp_path):
    asked = replace(compared[0], output=str(shutil.copytree(compared[0].output, tmp_path / "out")))
    file = Path(asked.output) / "trained" / "prompt_router" / "seed-0" / RECORD
    record = json.loads(file.read_text())
    record["settings"]["held_out"] = 3
    file.write_text(json.dumps(record))
    with pytest.raises(UserError, match="the prompt router in .* was begun with --held-out 3 .now 2."):
        evaluate(asked)
