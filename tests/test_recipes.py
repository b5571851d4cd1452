"""Laws of recipes: keys are flags, flags go first, and what is shipped can be used."""

import pytest

from afa import UserError
from afa.aggregators.registry import Recipe, count_parameters
from afa.cli.flags import read_flags
from afa.cli.main import build_parser, main
from afa.data.registry import open_source
from afa.inspection import Subject
from afa.settings import names, read_recipe
from afa.training.settings import TrainSettings


def parsed(*words):
    return read_flags(TrainSettings, build_parser(["train", *words]).parse_args(["train", *words]))


def test_the_recipes_of_the_help_are_those_that_are_shipped():
    (text,) = (field.metadata["help"] for field in TrainSettings.__dataclass_fields__.values() if field.name == "recipe")
    assert all(name in text for name in names("train")) and len(names("train")) == 5


@pytest.mark.parametrize("name", names("train"))
def test_a_shipped_recipe_is_a_whole_run_once_data_and_experts_are_given(name):
    asked = parsed("--recipe", name, "--experts", "a", "b", "--data", "images", "--output", "out")
    assert asked.recipe == name and asked.data == "images" and asked.experts == ["a", "b"]
    for field, value in read_recipe("train", name, TrainSettings).items():
        assert field in ("data", "experts", "output") or getattr(asked, field) == value


def test_a_flag_goes_before_the_recipe_and_the_recipe_before_the_default():
    asked = parsed("--recipe", "scenes", "--steps", "7")
    assert (asked.steps, asked.lr, asked.clip) == (7, 2e-3, TrainSettings.__dataclass_fields__["clip"].default)
    assert len(asked.experts) == 3 and all(place.endswith(("curves", "angles", "patterns")) for place in asked.experts)


def test_the_paper_is_followed_to_the_letter_where_it_speaks():
    asked = parsed("--recipe", "paper-sd15", "--experts", "a", "b", "--data", "images", "--output", "out")
    assert (asked.lr, asked.weight_decay, asked.batch_size, asked.caption_dropout, asked.resolution) == (1e-4, 0.01, 8, 0.1, 512)
    assert asked.steps * asked.batch_size == 10 * 10_000
    assert (asked.aggregator, asked.placement, asked.hidden, asked.heads, asked.depth, asked.objective) == ("sabw", "layers", 128, 8, 2, "mse")


def test_the_published_form_stays_a_recipe_of_either_name():
    asked = [parsed(flag, "paper", "--experts", "a", "b", "--data", "images", "--output", "out") for flag in ("--recipe", "--preset")]
    assert asked[0] == asked[1] and asked[0].recipe == "paper"
    recipe = Recipe(asked[0].aggregator, asked[0].aggregator_options(), asked[0].attention_up_to)
    for config, parameters in (("sd15", 45_132_416), ("sdxl", 45_750_144)):
        found = Subject.from_config(config, 3, recipe, asked[0].placement).denoiser()
        assert count_parameters(found.aggregators) == parameters
        assert all(aggregator.transformer is not None for aggregator in found.aggregators.values())


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("stpes = 3", "did you mean 'steps'"),
        ("steps = 'three'", r'steps is "three" \(text\), expected a whole number'),
        ("steps = true", "steps is true, expected a whole number"),
        ("lr = 1", None),
        ("experts = 'a'", r'experts is "a" \(text\), expected a list or null'),
        ("steps = ", "is not TOML"),
        ("reward = 'mine.py'", "may not name code"),
        ("recipe = 'scenes'", "there is no flag 'recipe'"),
    ],
)
def test_a_recipe_that_cannot_be_used_is_one_sentence(text, sentence, tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text(text)
    if sentence is None:
        assert read_recipe("train", str(file), TrainSettings) == {"lr": 1.0}
        return
    with pytest.raises(UserError, match=sentence):
        read_recipe("train", str(file), TrainSettings)


def test_a_recipe_that_is_not_there_is_one_sentence(capsys):
    assert main(["train", "--recipe", "scene"]) == 2
    assert "did you mean 'scenes'" in capsys.readouterr().err
    assert main(["train", "--recipe", "nowhere.toml"]) == 2
    assert "nowhere.toml is not there" in capsys.readouterr().err


def test_scenes_as_data_are_those_that_are_drawn(tmp_path):
    from afa.demo.data import TRAINING
    from afa.demo.draw import draw

    draw(tmp_path / "drawn", "mixed", 6, TRAINING)
    files, drawn = open_source(str(tmp_path / "drawn")).samples, open_source("scenes:6").samples
    assert [(one.caption, one.read()) for one in files] == [(one.caption, one.read()) for one in drawn]
    with pytest.raises(UserError, match="scenes:512"):
        open_source("scenes:many")
