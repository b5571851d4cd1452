"""Laws of options that are not given: chosen by the experts and the images, known before training, and those of a run that was begun."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers.training_utils import EMAModel
from test_training import experts, images, interrupt_after, settings, small_settings  # noqa: F401 (fixtures)

from afa import UserError, defaults
from afa.aggregators.registry import EVERYWHERE, Recipe
from afa.demo.data import EXPERTS
from afa.demo.run import AGGREGATORS
from afa.experts.load import load_experts
from afa.inspection import Subject
from afa.settings import read_recipe
from afa.training.choices import as_begun, chosen, not_given, open_options
from afa.training.run import finished, plan, train
from afa.training.settings import TrainSettings

OPEN = ("aggregator", "hidden", "heads", "depth", "attention_up_to", "steps", "lr")


@pytest.fixture
def bare(settings):  # noqa: F811
    """A run whose open options are not given."""
    return replace(settings, **dict.fromkeys(OPEN))


def made(config, count=2, kind=None, **options):
    return Subject.from_config(config, count, Recipe(), None).sized(kind, options, None).recipe


def test_the_defaults_of_the_embedded_experts_are_those_whose_results_are_shown():
    loaded = load_experts([str(place) for place in EXPERTS.values()])
    asked = TrainSettings(experts=["a", "b"], data="scenes:512", output="out")
    found, recipe = chosen(asked, 464, loaded), read_recipe("train", "scenes", TrainSettings)
    for name in ("aggregator", "hidden", "heads", "depth", "lr"):
        assert getattr(found, name) == recipe[name] == (AGGREGATORS | {"lr": 2e-3})[name]
    assert found.steps == 290 and found.attention_up_to >= 16  # their maps are 16 wide: attention everywhere


def test_large_experts_get_the_published_width_and_attention_where_they_have_it():
    for config in ("sd15", "sdxl"):
        recipe = made(config)
        assert (recipe.kind, recipe.options, recipe.attention_up_to) == ("stitch", {"hidden": 128, "heads": 4, "depth": 1}, 64)
    assert defaults.learning_rate(128) == pytest.approx(5e-4)


@pytest.mark.parametrize("widest", [16, 96, 320, 640, 1280, 5120])
@pytest.mark.parametrize(("hidden", "heads"), [(None, None), (None, 3), (None, 64), (30, None), (48, 16), (7, None)])
def test_widths_go_with_each_other_and_those_that_are_given_stay(widest, hidden, heads):
    found = defaults.widths(widest, hidden, heads)
    assert found["hidden"] % found["heads"] == 0
    assert hidden in (None, found["hidden"]) and heads in (None, found["heads"])


@pytest.mark.parametrize(("images", "a_step", "steps"), [(8, 8, 250), (464, 8, 290), (464, 64, 250), (40_000, 8, 12_500), (10_000, 8, 6250)])
def test_steps_are_passes_over_the_images_within_bounds(images, a_step, steps):  # noqa: F811
    assert defaults.steps(images, a_step) == steps


def test_an_option_that_is_given_wins(bare):
    given = {"aggregator": "sabw", "hidden": 8, "heads": 2, "depth": 0, "attention_up_to": 4, "steps": 3, "lr": 0.5}
    assert set(given) == set(open_options())
    for name, value in given.items():
        planned = plan(replace(bare, **{name: value}))
        assert getattr(planned.settings, name) == value and name not in planned.chosen and len(planned.chosen) == 6


def test_what_is_chosen_is_known_before_training_and_recorded(bare):
    small = replace(bare, steps=2, hidden=8)
    before = plan(small)
    record = train(small)
    assert record["settings"] == json.loads(json.dumps(vars(before.settings)))
    assert record["chosen_by_afa"] == list(before.chosen) == not_given(small) == ["aggregator", "heads", "depth", "attention_up_to", "lr"]
    assert all(record["settings"][name] is not None for name in OPEN)
    assert before.facts()["chosen_by_afa"]["lr"] == {"value": 8e-3, "why": defaults.WHY["lr"]}


def test_a_longer_run_of_more_processes_makes_as_many_passes(bare, monkeypatch):
    few = replace(bare, batch_size=1, accumulate=1)
    monkeypatch.setattr(defaults, "LEAST_STEPS", 1)
    assert plan(few).settings.steps == 40  # five passes over eight images
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert plan(few).settings.steps == 10


# --- a folder that was begun --------------------------------------------------------------------------------------------


def begin(run, monkeypatch):
    with monkeypatch.context() as patch:
        interrupt_after(patch, 1)
        with pytest.raises(KeyboardInterrupt):
            train(run)


def test_a_run_that_was_begun_with_other_defaults_goes_on_with_the_same_command(settings, bare, monkeypatch):  # noqa: F811
    """A state of an earlier version: all options are in it, but not its steps; attention everywhere was None."""
    old = replace(settings, aggregator="sabw", steps=2, lr=1e-4, attention_up_to=EVERYWHERE)
    begin(old, monkeypatch)
    file = Path(settings.output) / ".training" / "state.pt"
    state = torch.load(file, weights_only=True)
    del state["steps"]
    state["settings"] = json.dumps({**json.loads(state["settings"]), "attention_up_to": None})
    torch.save(state, file)
    with pytest.raises(UserError, match=r"was begun with --aggregator sabw \(now stitch\)"):
        train(replace(bare, aggregator="stitch", steps=2))
    assert plan(bare).settings.steps == 1000 and set(plan(bare).chosen.values()) == {"as this run was begun"}
    record = train(replace(bare, steps=2))
    assert {name: record["settings"][name] for name in OPEN} == {name: getattr(old, name) for name in OPEN}


@pytest.fixture(scope="module")
def sabw(experts, images, tmp_path_factory):  # noqa: F811
    """The folder of a complete run with another aggregator than the default; only to be read."""
    run = small_settings(experts, images, tmp_path_factory.mktemp("sabw") / "out")
    train(replace(run, aggregator="sabw", steps=2))
    return Path(run.output)


def test_a_finished_run_of_other_defaults_is_known_by_the_same_command(settings, bare, sabw):  # noqa: F811
    shutil.copytree(sabw, settings.output)
    manifest = Path(settings.output) / "afa.json"
    found = json.loads(manifest.read_text())
    found["training"]["settings"] |= {"attention_up_to": None, "guided_scale": 3.0}  # an option that there is no more
    manifest.write_text(json.dumps(found))
    assert finished(bare)["steps"] == 2
    with pytest.raises(UserError, match=r"--hidden 8 \(now 16\)"):
        finished(replace(bare, hidden=16))


def test_an_ensemble_that_is_trained_further_keeps_its_aggregators(bare, sabw, tmp_path):
    further = replace(bare, experts=None, start=str(sabw), output=str(tmp_path / "further"), steps=2)
    record = train(further)
    assert record["settings"]["aggregator"] is None and record["chosen_by_afa"] == ["lr"] and record["settings"]["lr"] == pytest.approx(8e-3)
    old = {**record["settings"], "aggregator": "sabw", "hidden": 128, "heads": 8, "depth": 2}  # as it was recorded before
    assert TrainSettings(**as_begun(old)) == TrainSettings(**record["settings"]) and finished(further)["steps"] == 2


def test_an_option_that_a_begun_run_does_not_know_is_not_ignored(settings, monkeypatch):  # noqa: F811
    settings = replace(settings, steps=2)
    begin(settings, monkeypatch)
    file = Path(settings.output) / ".training" / "state.pt"
    state = torch.load(file, weights_only=True)
    state["settings"] = json.dumps({name: value for name, value in json.loads(state["settings"]).items() if name != "anchor"})
    torch.save(state, file)
    with pytest.raises(UserError, match=r"begun with --anchor 0.0 \(now 0.5\)"):
        train(replace(settings, anchor=0.5))
    assert train(settings)["steps"] == 2


# --- sentences, and the average -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("images", "held_out", "said"),
    [
        (64, 12, "only 12 of 64 images are held out, .*; give at least 100 images"),
        (500, 4, "only 4 of 500 images are held out, .*; raise --held-out to 20"),
    ],
)
def test_few_images_are_said(images, held_out, said):  # noqa: F811
    import re

    assert re.search(said, defaults.few_images(images, held_out))


def test_enough_images_are_not_talked_about(settings):  # noqa: F811
    assert defaults.few_images(100, 20) is None
    assert "only 2 of 10 images" in plan(settings).facts()["few_images"]


def test_the_average_grows_with_the_run_so_that_its_decay_need_not_know_the_steps():
    """Its window is a ninth of the steps so far: .98 and .999 are the same for the first 440 steps."""
    short, long = (EMAModel([torch.nn.Parameter(torch.zeros(1))], decay=decay) for decay in (0.98, 0.999))
    assert all(short.get_decay(step) == long.get_decay(step) for step in range(441)) and short.get_decay(500) < long.get_decay(500)
    assert all(1 / (1 - long.get_decay(step + 1)) == pytest.approx((step + 10) / 9) for step in (90, 900, 8000))
