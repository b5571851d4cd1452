"""Numbers that options do not allow: refused by name and value, on the command line, in recipes and in Python alike."""

import dataclasses
import importlib
import typing

import numpy as np
import pytest

from afa.cli.main import COMMANDS, main
from afa.denoiser.hooks import check_strengths
from afa.denoiser.lora import check_weights
from afa.errors import UserError
from afa.merging.registry import check_merge
from afa.sampling.registry import make_options
from afa.settings import check_value, kind_of, option, read_recipe, shares

ALL = [
    (verb, options, field)
    for verb, module in COMMANDS.items()
    for options in [importlib.import_module(module).Options]
    for field in dataclasses.fields(options)
    if kind_of(typing.get_type_hints(options)[field.name])[0] in (int, float)
]
WORKING = {
    "inspect": ["a"],
    "screen": ["a", "b", "--data", "scenes:8"],
    "merge": ["--experts", "a", "b", "--output", "c"],
    "search": ["--experts", "a", "b", "--output", "c", "--prompt", "p"],
    "train": ["--experts", "a", "b", "--data", "scenes:8", "--output", "c"],
    "finetune": ["a", "--data", "scenes:8", "--output", "c"],
    "distill": ["a", "--data", "scenes:8", "--output", "c"],
    "extract": ["a", "--base", "b", "--output", "c"],
    "generate": ["a", "--prompt", "p", "--output", "c"],
    "calibrate": ["a", "--prompt", "p"],
    "explain": ["a", "--prompt", "p", "--output", "c"],
    "evaluate": ["--ensemble", "a", "--output", "c", "--protocol", "scenes"],
    "demo": [],
    "push": ["a", "org/b"],
    "ui": [],
    "comfyui": ["--install", "a"],
}


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
@pytest.mark.parametrize(("verb", "options", "field"), ALL, ids=lambda value: getattr(value, "name", None))
def test_every_option_that_is_a_number_refuses_what_is_none(verb, options, field, value, capsys):
    flag = f"--{field.name.replace('_', '-')}"
    try:
        code = main([verb, *WORKING[verb], f"{flag}={value}"])
    except SystemExit as end:  # of argparse, for whole numbers
        code = end.code
    told = capsys.readouterr().err
    assert code == 2
    assert flag in told
    assert value in told


@pytest.mark.parametrize(("verb", "options", "field"), ALL, ids=lambda value: getattr(value, "name", None))
def test_every_whole_number_has_bounds(verb, options, field):
    if kind_of(typing.get_type_hints(options)[field.name])[0] is int:
        assert "least" in field.metadata["bounds"]
        for value in (-(10**30), 10**30):
            with pytest.raises(UserError, match=f"^--x {value} is too"):
                check_value(options, field, value, "--x")


def test_a_recipe_is_held_to_the_same_bounds_and_named(tmp_path):
    recipe, options = tmp_path / "mine.toml", importlib.import_module(COMMANDS["train"]).Options
    for text, told in (
        ("lr = nan", "mine.toml: lr is NaN .*expected a finite number"),
        ("steps = 0", "mine.toml: steps 0 is too small; the least is 1"),
        ('aggregator = "sabv"', "mine.toml: aggregator: .*did you mean 'sabw'"),
    ):
        recipe.write_text(text)
        with pytest.raises(UserError, match=told):
            read_recipe("train", str(recipe), options)


def test_in_python_a_number_of_another_kind_is_refused():
    options = importlib.import_module(COMMANDS["generate"]).Options
    for change, told in (({"steps": "10"}, "--steps '10'"), ({"seed": 1.5}, "--seed '1.5'"), ({"guidance": True}, "--guidance 'True'")):
        with pytest.raises(UserError, match=told):
            options(sources=["a"], output="c", prompt=["p"], **change)
    assert options(sources=["a"], output="c", prompt=["p"], steps=np.int64(3), guidance=np.float32(2)).steps == 3


def test_bounds_without_the_bound_itself():
    @dataclasses.dataclass
    class Toy:
        share: float = option(0.5, above=0, below=1, help="a share")

    (field,) = dataclasses.fields(Toy)
    check_value(Toy, field, 1e-9, "share")
    for value in (0, 1.0):
        with pytest.raises(UserError, match="it must be"):
            check_value(Toy, field, value, "share")


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_strengths_and_weights_that_are_none_are_refused_before_anything_is_loaded(value, tmp_path, capsys):
    output = ["--output", str(tmp_path / "out")]
    for command, named in (
        (["generate", "x=nowhere+style.safetensors*" + value, "--prompt", "p", *output], "strength"),
        (["generate", "nowhere", "--strength", f"a={value}", "--prompt", "p", *output], "--strength a"),
        (["generate", "nowhere", "--region", f"a={value}", "--prompt", "p", *output], "--region a"),
        (["merge", "--experts", "a", "b", "--weights", "1", value, *output], "--weights"),
        (["merge", "--experts", "a", "b", "--method", "slerp", f"--t={value}", *output], "--t"),
        (["generate", "a", "b", "--method", "noise_average", "--method-option", f"weights=1,{value}", "--prompt", "p", *output], "weights"),
        (["inspect", "--config", "sd15", "--count", "2", "--aggregator", "fixed", "--weights", "1", value], "--weights"),
    ):
        assert main(command) == 2, command
        told = capsys.readouterr().err
        assert named in told
        assert value in told
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("weights", [[float("nan"), 1], [float("inf"), 1], [1e308, 1e308], [-1, 2], [0, 0], [True, 1]])
def test_weights_that_are_no_shares_are_refused_in_python(weights):
    with pytest.raises(UserError, match="weight"):
        shares(weights, 2)
    with pytest.raises(UserError, match="weight"):
        check_merge("weighted", 2, False, {"weights": weights})
    with pytest.raises(UserError, match="weight"):
        make_options("noise_average", {"weights": weights}) and shares(weights, 2)


@pytest.mark.parametrize("strength", [float("nan"), float("inf"), -1, 1e-30, "1", True])
def test_strengths_that_are_none_are_refused_in_python(strength):
    with pytest.raises(UserError, match="strength"):
        check_strengths(("a", "b"), {"a": strength})
    for weights in (strength, [1.0, strength], {"unet": {"down": strength}}):
        if strength not in (-1, 1e-30) or strength is True:
            with pytest.raises(UserError, match="weight of a LoRA"):
                check_weights(weights)
