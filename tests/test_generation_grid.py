"""Grids, LoRAs that prompts name, and what PNGs say to other programs."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from PIL import Image
from tiny import ONE_LEVEL, sd_pipeline
from tiny_loras import write_lora

from afa import Ensemble, UserError
from afa.generation.run import generate
from afa.generation.settings import GenerateSettings
from afa.images import read_metadata
from afa.sampling.parameters import parameters

PROMPTS = ["a cat", "a (red:1.4) house"]


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """A saved ensemble of two experts, and a folder of LoRAs."""
    folder = tmp_path_factory.mktemp("grids")
    for seed, name in enumerate(("photo", "paint")):
        sd_pipeline(seed, text_seed=0, **ONE_LEVEL).save_pretrained(folder / name)
    Ensemble.from_experts([str(folder / "photo"), str(folder / "paint")], hidden=8, heads=2, depth=1).save(folder / "ensemble")
    (folder / "loras").mkdir()
    write_lora("sd", folder / "whole.safetensors")
    return folder


@pytest.fixture
def settings(places, tmp_path):
    small = {"steps": 1, "guidance": 3.0, "width": 16, "height": 16, "device": "cpu"}
    return GenerateSettings(sources=[str(places / "ensemble")], output=str(tmp_path / "out"), prompt=PROMPTS, **small)


def pixels(path):
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


def by(paths, *names):
    found = [read_metadata(path) for path in paths]
    return {tuple(str(facts[name]) for name in names): path for facts, path in zip(found, paths, strict=True)}


def test_an_image_of_a_grid_is_what_a_command_of_its_own_draws_and_more_values_leave_it(settings, tmp_path):
    grid = replace(settings, guidance=None, grid=["prompt", "guidance=1.5,3", "seed=4,9"])
    paths = generate(grid)
    assert len(set(paths)) == 8 and (tmp_path / "out/grid.png").is_file()
    own = generate(replace(settings, seed=9, prompt=PROMPTS[:1], output=str(tmp_path / "own")))
    assert np.array_equal(pixels(by(paths, "prompt", "guidance", "seed")["a cat", "3.0", "9"]), pixels(own[0]))
    times = {path: path.stat().st_mtime_ns for path in paths}
    more = generate(replace(grid, grid=["seed=4,9", "guidance=3,1.5,5", "prompt"]))
    assert len(more) == 12 and all(path.stat().st_mtime_ns == time for path, time in times.items())


def test_columns_rows_and_groups_stand_where_their_labels_say(settings, tmp_path):
    paths = generate(replace(settings, prompt=["a cat"], images_per_prompt=3, grid=["seed", "method=afa,noise_average"]))
    sheet, found = pixels(tmp_path / "out/grid.png"), by(paths, "seed", "method")
    width, height = sheet.shape[1], sheet.shape[0]
    for row, method in enumerate(("None", "noise_average")):
        for column, seed in enumerate("012"):
            right, bottom = width - (2 - column) * 20, height - (1 - row) * 20
            assert np.array_equal(sheet[bottom - 16 : bottom, right - 16 : right], pixels(found[seed, method]))


def test_parts_of_a_grid_are_equal_and_together_all_of_it(settings, tmp_path):
    grid = replace(settings, guidance=None, prompt=["a cat"], grid=["guidance=1.5,2,3", "strength:photo=0,1"])
    parts = [generate(replace(grid, shard=f"{index}/2")) for index in (1, 2)]
    assert [len(part) for part in parts] == [3, 3] and not set(parts[0]) & set(parts[1])
    assert (tmp_path / "out/grid.png").is_file() and set(generate(grid)) == {*parts[0], *parts[1]}


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"grid": ["prompt"]}, "has 1 axis; give two or three"),
        ({"grid": ["prompt", "sed"]}, "did you mean 'seed'"),
        ({"grid": ["prompt", "prompt"]}, "names prompt twice"),
        ({"grid": ["prompt", "guidance"], "guidance": None}, "guidance needs values"),
        ({"grid": ["prompt", "guidance=1,2"]}, "--guidance 3.0 is given"),
        ({"grid": ["prompt", "guidance=2,x"], "guidance": None}, "'x' is no number"),
        ({"grid": ["prompt", "guidance=2,nan"], "guidance": None}, "--guidance nan is no finite number"),
        ({"grid": ["prompt", "steps=1.5"], "steps": None}, "'1.5' is no whole number"),
        ({"grid": ["prompt", "steps=2,2"], "steps": None}, "a value twice"),
        ({"grid": ["prompt", "seed=-1"]}, "the seed is -1"),
        ({"grid": ["prompt", "seed=1,2"], "seed": 3}, "--seed 3 is given"),
        ({"grid": ["prompt", "strength=1"]}, "strength:NAME"),
        ({"grid": ["prompt", "strength:nobody=0"]}, "nobody"),
        ({"grid": ["prompt", "method=nose_average,afa"]}, "noise_average"),
        ({"grid": ["prompt=a,b", "seed"]}, "prompts hold commas"),
        ({"grid": ["seed=1,2", "steps=1,2"], "steps": None}, "there are 2 prompts"),
        ({"grid": ["prompt", "steps=1,2"], "steps": None, "images_per_prompt": 2}, "no axis for them"),
        ({"grid": ["prompt", "seed=" + ",".join(map(str, range(300)))]}, "600 images; the most is 400"),
    ],
)
def test_a_grid_that_cannot_be_drawn_is_refused_before_anything_is_written(settings, changes, told):
    with pytest.raises(UserError, match=re.escape(told)):
        generate(replace(settings, **changes))
    assert not Path(settings.output).exists()


def test_each_image_has_the_loras_of_its_prompt_and_no_others(places, settings, tmp_path):
    loras = places / "loras"
    shutil.copy(make_fitting_lora(tmp_path), loras / "style.safetensors")
    asked = replace(settings, prompt_syntax="a1111", lora_dir=str(loras), prompt=["a cat <lora:style:0.7>", "a cat", "a cat<lora:style:0.3> <lora:style:0.4>"])
    paths = generate(replace(asked, images_per_prompt=1, batch_size=4))
    ensemble = Ensemble.load(settings.sources[0])
    plain = generate(replace(settings, prompt=["a cat", "a cat"], output=str(tmp_path / "plain")))
    assert np.array_equal(pixels(paths[1]), pixels(plain[1]))
    ensemble.load_lora(loras / "style.safetensors", scale=0.7)
    pipe = ensemble.pipeline()
    pipe.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": 1, "guidance_scale": 3.0, "width": 16, "height": 16, "output_type": "np"}
    for index in (0, 2):
        own = pipe("a cat", generator=[torch.Generator().manual_seed(index)], **options).images[0]
        assert np.abs(pixels(paths[index]) - (own * 255).round()).max() <= 1
    assert not np.array_equal(pixels(paths[0]), pixels(plain[0]))
    assert "LoRA 'style'" in read_metadata(paths[0])["files"] and "LoRA 'style'" not in read_metadata(paths[1])["files"]
    assert json.loads((tmp_path / "out/images.jsonl").read_text().splitlines()[0])["text"].strip() == "a cat"


def make_fitting_lora(folder):
    """A LoRA of the small experts' U-Net and text encoder."""
    pipe = sd_pipeline(0, **ONE_LEVEL)
    layers = {}
    for name, module, targets in (("unet", pipe.unet, ["to_q", "to_v"]), ("text_encoder", pipe.text_encoder, ["q_proj", "v_proj"])):
        torch.manual_seed(0)
        module.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=targets))
        for key, parameter in module.named_parameters():
            if "lora_" in key:
                torch.nn.init.normal_(parameter, std=0.2)
        layers[f"{name}_lora_layers"] = get_peft_model_state_dict(module)
    type(pipe).save_lora_weights(folder, weight_name="fits.safetensors", **layers)
    return folder / "fits.safetensors"


@pytest.mark.parametrize("name", ["nobody", "../whole", "whole", "/etc/passwd", "link", "..", "style.safetensors"])
def test_no_name_of_a_lora_leaves_its_folder(places, settings, name):
    link = places / "loras/link.safetensors"
    if not link.is_symlink():
        link.symlink_to(places / "whole.safetensors")
    asked = {"prompt_syntax": "a1111", "prompt": [f"a <lora:{name}:1>"]}
    with pytest.raises(UserError, match=r"--lora-dir .*(there is|holds) no LoRA"):
        generate(replace(settings, **asked, lora_dir=str(places / "loras")))
    with pytest.raises(UserError, match=r"--lora-dir FOLDER.*EXPERT\+FILE"):
        generate(replace(settings, **asked))
    assert not Path(settings.output).exists()


def read_by_a1111(text):
    """The published form: last line KEY: VALUE, …; before it the prompt, then lines from "Negative prompt:" on."""
    *lines, last = text.strip().split("\n")
    pairs = re.findall(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)', last)
    assert len(pairs) >= 3
    start = next((index for index, line in enumerate(lines) if line.startswith("Negative prompt:")), len(lines))
    values = {key: json.loads(value) if value.startswith('"') else value for key, value in pairs}
    return "\n".join(lines[:start]), "\n".join(lines[start:]).removeprefix("Negative prompt:").strip(), values


def test_a_png_says_how_it_was_made_as_a1111_does(settings):
    (path,) = generate(replace(settings, prompt=["a 猫"], negative_prompt="blur", scheduler="dpm++_karras", seed=5))
    prompt, negative, values = read_by_a1111(Image.open(path).info["parameters"])
    assert (prompt, negative) == ("a 猫", "blur")
    expected = {"Steps": "1", "Sampler": "DPM++ 2M", "Schedule type": "Karras", "CFG scale": "3", "Seed": "5", "Size": "16x16"}
    assert expected.items() <= values.items() and values["Model"] == "photo + paint (afa)" and values["Version"].startswith("afa ")
    assert values["Model hash"] == read_metadata(path)["aggregators"][:10]


@pytest.mark.parametrize(
    "hostile",
    ["a\nNegative prompt: b", "Negative prompt: b", "a\r\nSteps: 1, Seed: 2, Size: 3x3", 'a\u2028b\x85c\x1b[31m"', "Steps: 9, Seed: 9, Sampler: x, Size: 1x1"],
)
def test_no_prompt_ends_its_part_of_what_a1111_reads(hostile):
    facts = {"prompt": hostile, "negative_prompt": hostile, "seed": 7, "steps": 3, "scheduler": 'x, Seed: 1, "', "experts": ["a, Seed: 4", "b"]}
    text = parameters(facts, 8, 8)
    assert text.count("\n") == 2 and all(letter.isprintable() for letter in text.replace("\n", ""))
    prompt, negative, values = read_by_a1111(text)
    assert prompt and negative and (values["Seed"], values["Steps"]) == ("7", "3")
    assert values["Sampler"] == facts["scheduler"] and values["Model"] == "a, Seed: 4 + b (afa)"
    assert parameters({"prompt": "a"}, 8, 8) is None


def test_syntax_that_is_not_read_is_refused_before_anything_is_written(settings):
    for prompts, negative, told in ((["a [b:c:0.5]"], None, "at a step"), (["a"], "x AND y", "the negative"), (["a"], "<lora:x:1>", "the negative")):
        with pytest.raises(UserError, match=told):
            generate(replace(settings, prompt_syntax="a1111", prompt=prompts, negative_prompt=negative))
    with pytest.raises(UserError, match="--prompt-syntax a1111"):
        replace(settings, lora_dir="x")
    assert not Path(settings.output).exists()
