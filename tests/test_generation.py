"""Laws of generation: whose noise, which files, what is kept and what is refused."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from processes import in_processes
from safetensors.torch import load_file, save_file
from tiny import ONE_LEVEL, quiet, sd_pipeline

from afa import Ensemble, UserError
from afa.cli.main import main
from afa.files import locked
from afa.generation.run import generate
from afa.generation.settings import GenerateSettings
from afa.prompts import read_prompts
from afa.sampling.image_files import OPTIONAL


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """Two experts and a saved ensemble of them."""
    folder = tmp_path_factory.mktemp("generation")
    for seed, name in enumerate(("photo", "paint")):
        sd_pipeline(seed, **ONE_LEVEL).save_pretrained(folder / name)
    ensemble = Ensemble.from_experts([str(folder / "photo"), str(folder / "paint")], hidden=8, heads=2, depth=1)
    torch.manual_seed(0)
    for aggregator in ensemble.aggregators.values():
        torch.nn.init.normal_(aggregator.conv_out.weight)  # as if trained: not the mean
    ensemble.save(folder / "ensemble")
    return folder


def asking(places, output, **changes):
    small = {"steps": 2, "guidance": 3.0, "width": 32, "height": 32, "device": "cpu"}
    return GenerateSettings(sources=[str(places / "ensemble")], output=str(output), prompt=["a cat", "a dog"], **small | changes)


@pytest.fixture
def settings(places, tmp_path):
    return asking(places, tmp_path / "out")


@pytest.fixture(scope="module")
def four(places, tmp_path_factory):
    """Two images of each prompt, as they are asked for, and the pictures."""
    settings = asking(places, tmp_path_factory.mktemp("four") / "out", images_per_prompt=2, batch_size=4)
    return settings, generate(settings)


@pytest.fixture
def copied(four, tmp_path):
    """The same in a folder that a test may change."""
    return replace(four[0], output=str(shutil.copytree(four[0].output, tmp_path / "copied")))


def pixels(path):
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


def test_an_expert_generates_what_its_stock_pipeline_does(places, settings):
    paths = generate(replace(settings, sources=[str(places / "photo")], seed=5, batch_size=1))
    stock = quiet(sd_pipeline(0, **ONE_LEVEL))
    options = {"num_inference_steps": 2, "guidance_scale": 3.0, "width": 32, "height": 32}
    expected = stock("a dog", generator=torch.Generator().manual_seed(6), output_type="np", **options).images[0]
    assert np.array_equal(pixels(paths[1]), (expected * 255).round().astype(int))


def test_an_image_depends_on_its_seed_and_not_on_its_batch(four, tmp_path):
    settings, together = four
    alone = generate(replace(settings, batch_size=1, output=str(tmp_path / "alone")))
    assert len(together) == 4
    for one, other in zip(together, alone, strict=True):
        assert np.abs(pixels(one) - pixels(other)).max() <= 1  # batched float32 sums may round differently
    assert np.abs(pixels(together[0]) - pixels(together[1])).max() > 1


def test_only_missing_and_broken_images_are_made_again(copied):
    first, missing, broken, last = sorted(Path(copied.output).glob("0*.png"))
    before, expected = [path.stat().st_mtime_ns for path in (first, last)], [pixels(path) for path in (missing, broken)]
    missing.unlink()
    broken.write_bytes(broken.read_bytes()[:20])
    assert generate(copied) == [first, missing, broken, last]
    assert [path.stat().st_mtime_ns for path in (first, last)] == before
    assert all(np.abs(pixels(path) - known).max() <= 1 for path, known in zip((missing, broken), expected, strict=True))


WAYS = {
    "guidance_interval": {"guidance_interval": "0,0.5"},
    "prompt_syntax": {"prompt_syntax": "a1111"},
    "store": {"store": "delta1"},
    "reuse": {"reuse": 2},
    "shared_guidance_weights": {"shared_guidance_weights": True},
    "strengths": {"strength": ["photo=0"]},
    "regions": {"region": ["photo=0,end=0.5"]},
    "scheduler": {"scheduler": "euler"},
    "negative_prompt": {"negative_prompt": "blurry"},
    "expert": {"expert": "photo"},
}


def test_every_option_that_is_recorded_only_where_it_is_given_is_tried():
    assert set(OPTIONAL) <= {*WAYS, "base"}  # a base needs a method, which is compared


@pytest.mark.parametrize("name", WAYS)
def test_images_made_in_some_way_are_refused_by_the_same_command_without_it(name, settings):
    """Else images of another way would be taken for those that are asked."""
    settings = replace(settings, prompt=["a cat"], steps=1)
    generate(replace(settings, **WAYS[name]))
    with pytest.raises(UserError, match=f"was made with {name} .*, now .* is asked"):
        generate(settings)


def test_images_made_otherwise_are_not_overwritten(copied):
    paths = sorted(Path(copied.output).glob("0*.png"))
    before = [path.read_bytes() for path in paths]
    with pytest.raises(UserError, match="was made with guidance 3.0, now 4.0 is asked"):
        generate(replace(copied, guidance=4.0))
    assert [path.read_bytes() for path in paths] == before


def test_a_png_says_how_it_was_made(settings):
    second = generate(replace(settings, seed=11, scheduler="euler"))[1]
    said = json.loads(Image.open(second).info["afa"])
    assert (said["prompt"], said["seed"], said["steps"], said["scheduler"]) == ("a dog", 12, 2, "euler")
    assert said["experts"] == ["photo", "paint"] and len(said["aggregators"]) == 64


def test_weights_are_saved_per_image_and_sum_to_one(settings):
    first = generate(replace(settings, weights=True, prompt=["a cat"], batch_size=2, images_per_prompt=2))[0]
    with np.load(first.with_suffix(".weights.npz")) as kept:
        assert list(kept["experts"]) == ["photo", "paint"] and len(kept["timesteps"]) == 2
        stages = [name for name in kept.files if name not in ("experts", "timesteps")]
        assert len(stages) == 5 and kept["OUT01"].shape == (2, 2, 4, 4)
        assert all(np.allclose(kept[name].astype(np.float32).sum(1), 1, atol=2e-3) for name in stages)
        assert kept["OUT01"].std() > 0
    assert Image.open(first.with_suffix(".weights.png")).size[0] > 128


def test_one_expert_in_the_ensembles_frame_differs_from_the_ensemble(four, settings, tmp_path):
    (alone,) = generate(replace(settings, expert="paint", prompt=["a cat"]))
    assert np.abs(pixels(four[1][0]) - pixels(alone)).max() > 1
    with pytest.raises(UserError, match="did you mean 'paint'"):
        generate(replace(settings, expert="pant", output=str(tmp_path / "x")))


def test_an_expert_of_all_the_strength_is_that_expert_and_the_image_says_so(settings, tmp_path):
    (scaled,) = generate(replace(settings, strength=["paint=0"], prompt=["a cat"]))
    (alone,) = generate(replace(settings, expert="photo", prompt=["a cat"], output=str(tmp_path / "alone")))
    assert np.abs(pixels(scaled) - pixels(alone)).max() <= 1
    assert json.loads(Image.open(scaled).info["afa"])["strengths"] == {"photo": 1.0, "paint": 0.0}


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"strength": ["pant=0"]}, "did you mean 'paint'"),
        ({"strength": ["paint=0", "photo=0"]}, "all experts"),
        ({"strength": ["paint=1"], "method": "noise_average"}, "noise_average has none"),
    ],
)
def test_strengths_that_scale_nothing_are_refused(settings, changes, sentence):
    with pytest.raises(UserError, match=sentence):
        generate(replace(settings, **changes))


@pytest.mark.parametrize(("strength", "sentence"), [("paint", "is no NAME=FACTOR"), ("=2", "names no expert"), ("paint=much", "no NAME=FACTOR")])
def test_strengths_that_are_none_are_refused(strength, sentence):
    with pytest.raises(UserError, match=sentence):
        GenerateSettings(sources=["e"], output="out", prompt=["a"], strength=[strength])


def test_a_grid_and_a_list_are_left(four):
    settings, _ = four
    lines = [json.loads(line) for line in (Path(settings.output) / "images.jsonl").read_text().splitlines()]
    assert [line["text"] for line in lines] == ["a cat", "a cat", "a dog", "a dog"]
    assert Image.open(Path(settings.output) / "grid.png").size == (68, 68)


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("p.txt", "a cat\n\n  a dog  \n", ["a cat", "a dog"]),
        ("p.jsonl", '{"text": "a cat"}\n{"text": "a dog", "seed": 1}\n', ["a cat", "a dog"]),
        ("p.txt", '{"text": "a cat"}\n', ["a cat"]),
    ],
)
def test_prompts_are_lines_or_json_lines(tmp_path, name, content, expected):
    (tmp_path / name).write_text(content)
    assert read_prompts(tmp_path / name) == expected


@pytest.mark.parametrize(
    ("content", "sentence"), [(b"", "holds no prompt"), (b"\xff", "not UTF-8"), (b'{"text": 1}', 'line 1 has no "text"'), (b"{", "line 1 is not JSON")]
)
def test_bad_prompts_are_one_sentence(tmp_path, content, sentence):
    (tmp_path / "p.txt").write_bytes(content)
    with pytest.raises(UserError, match=sentence):
        read_prompts(tmp_path / "p.txt")


def test_nothing_to_say_is_refused():
    with pytest.raises(UserError, match="either --prompt"):
        GenerateSettings(sources=["a"], output="b")
    with pytest.raises(UserError, match="--width 30 must be a multiple of 8"):
        GenerateSettings(sources=["a"], output="b", prompt=["x"], width=30)


def test_weights_of_a_single_expert_are_refused(places, settings):
    with pytest.raises(UserError, match="no weight maps"):
        generate(replace(settings, sources=[str(places / "photo")], weights=True))


def test_experts_that_moved_are_found_where_they_are_now(places, settings, tmp_path):
    shutil.copytree(places / "ensemble", tmp_path / "sub" / "ensemble")
    shutil.copytree(places / "photo", tmp_path / "here")
    shutil.copytree(places / "paint", tmp_path / "sub" / "paint")
    moved = replace(settings, sources=[str(tmp_path / "sub" / "ensemble")])
    with pytest.raises(UserError, match="--experts photo=PLACE"):
        generate(moved)
    assert len(generate(replace(moved, experts=[f"photo={tmp_path / 'here'}"]))) == 2
    with pytest.raises(UserError, match="write NAME="):
        generate(replace(moved, experts=["here"]))
    with pytest.raises(UserError, match="--experts is for a saved ensemble"):
        generate(replace(settings, sources=[str(places / "photo")], experts=["photo=x"]))


def test_a_single_file_of_an_architecture_of_its_own_needs_configs_which_a_merge_carries(tmp_path, capsys):
    """The embedded experts' U-Net is none that is known by its shape. What the error proposes can be done."""
    from afa.demo.data import EXPERTS

    merged, bare = tmp_path / "soup.safetensors", tmp_path / "bare.safetensors"
    assert main(["merge", "--experts", *map(str, EXPERTS.values()), "--output", str(merged)]) == 0
    save_file(load_file(merged), bare)  # without the header, and so without the configs in it
    drawn = ["--prompt", "a cat", "--steps", "1", "--output"]
    assert main(["generate", str(merged), *drawn, str(tmp_path / "carried")]) == 0
    capsys.readouterr()
    assert main(["generate", str(bare), *drawn, str(tmp_path / "refused")]) == 2
    assert "bare.safetensors" in capsys.readouterr().err
    assert main(["generate", str(bare), *drawn, str(tmp_path / "told"), "--config", str(EXPERTS["curves"])]) == 0


def compile_by(monkeypatch, backend):
    """Have torch.compile use a backend that needs no compiler, and count what it compiles."""
    graphs, stock = [], torch.compile

    def counted(graph, inputs):
        graphs.append(graph)
        return backend(graph)

    monkeypatch.setattr(torch, "compile", lambda model, **options: stock(model, backend=counted, **options))
    return graphs


@pytest.fixture
def quick(tmp_path):
    """An ensemble that is soon compiled, which takes as long as there are layers: two resnets an expert, and one aggregator."""
    layers = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",), "mid_block_type": None}
    for seed in range(2):
        sd_pipeline(seed, text_seed=0, **ONE_LEVEL | layers).save_pretrained(tmp_path / f"expert{seed}")
    ensemble = Ensemble.from_experts([str(tmp_path / f"expert{seed}") for seed in range(2)], placement="out", hidden=8, heads=2, depth=1)
    torch.nn.init.normal_(ensemble.aggregators["OUT01"].conv_out.weight)
    ensemble.save(tmp_path / "ensemble")
    return asking(tmp_path, tmp_path / "out")


def test_a_compiled_ensemble_draws_the_same_pictures_from_one_graph(quick, tmp_path, monkeypatch):
    eager = generate(quick)
    graphs = compile_by(monkeypatch, lambda graph: graph.forward)
    compiled = generate(replace(quick, output=str(tmp_path / "compiled"), compile=True))
    assert len(graphs) == 1
    for one, other in zip(eager, compiled, strict=True):
        assert np.array_equal(pixels(one), pixels(other))


def test_where_no_compiler_works_one_sentence_says_so_and_no_image_is_left(quick, monkeypatch):
    def broken(graph):
        raise RuntimeError("no working C++ compiler")

    compile_by(monkeypatch, broken)
    with pytest.raises(UserError, match="--compile does not work here: .*leave it out"):
        generate(replace(quick, compile=True))
    assert not list(Path(quick.output).glob("*.png"))


def test_a_method_is_not_compiled(settings):
    with pytest.raises(UserError, match="--compile is for an ensemble's own denoiser, and --method magicfusion"):
        replace(settings, compile=True, method="magicfusion")


def test_parts_make_the_images_of_one_command_and_the_last_one_lists_them(four, tmp_path):
    settings, whole = four
    shards = replace(settings, output=str(tmp_path / "parts"))
    for part, count in (("2/3", 1), ("3/3", 1), ("1/3", 2)):
        assert not (tmp_path / "parts" / "images.jsonl").exists()
        assert len(generate(replace(shards, shard=part))) == count
    parts = generate(shards)  # nothing is left to draw
    assert [path.name for path in parts] == [path.name for path in whole]
    for one, other in zip(whole, parts, strict=True):
        assert np.abs(pixels(one) - pixels(other)).max() <= 1
    both = [sorted(path.name for path in Path(place).iterdir()) for place in (settings.output, shards.output)]
    assert both[0] == both[1] and "grid.png" in both[0]


def test_parts_are_drawn_at_the_same_time_and_a_whole_run_waits_for_none(settings):
    with locked(Path(settings.output), shared=True):  # as another part holds it
        code, said = in_processes(lambda: said_by(lambda: generate(replace(settings, shard="1/2"))), count=1)[0]
        assert (code, said) == ("done", "")
        code, said = in_processes(lambda: said_by(lambda: generate(settings)), count=1)[0]
        assert code == "refused" and "another process is writing to" in said
    assert not list(Path(settings.output).glob(".*"))
    with locked(Path(settings.output)):
        code, said = in_processes(lambda: said_by(lambda: generate(replace(settings, shard="1/2"))), count=1)[0]
        assert code == "refused" and "another process" in said


def said_by(work):
    """Return whether some work was done, and the sentence if it was refused."""
    try:
        work()
    except UserError as error:
        return "refused", str(error)
    return "done", ""


def test_two_processes_make_the_images_of_one(four, tmp_path, capfd):
    settings, alone = four
    flags = {"--output": tmp_path / "two", "--images-per-prompt": 2, "--steps": 2, "--guidance": 3, "--width": 32, "--height": 32, "--device": "cpu"}
    command = ["generate", *settings.sources, "--prompt", *settings.prompt, *(str(part) for flag in flags.items() for part in flag)]
    capfd.readouterr()
    assert in_processes(lambda: main(command)) == [0, 0]
    assert capfd.readouterr().out == f"4 images in {tmp_path / 'two'}\n"
    for path in alone:
        assert np.abs(pixels(path) - pixels(tmp_path / "two" / path.name)).max() <= 1
    assert (tmp_path / "two" / "images.jsonl").read_text() == (Path(settings.output) / "images.jsonl").read_text()


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"shard": "0/2"}, "--shard 0/2 is no I/N with I from 1 to N"),
        ({"shard": "3/2"}, "--shard 3/2 is no I/N"),
        ({"shard": "1"}, "--shard 1 is no I/N"),
        ({"shard": "a/b"}, "--shard a/b is no I/N"),
        ({"shard": "1/2", "seed": -1}, "--seed -1 draws another seed for every part"),
    ],
)
def test_parts_that_are_none_are_refused(settings, changes, sentence):
    with pytest.raises(UserError, match=sentence):
        replace(settings, **changes)


@pytest.mark.parametrize("store", ["int8", "fp8"])
def test_experts_in_8_bits_draw_nearly_the_same_and_the_picture_records_it(four, tmp_path, store):
    settings, exact = four
    eighth = generate(replace(settings, output=str(tmp_path / store), store=store))
    apart = [np.abs(pixels(one) - pixels(other)).max() for one, other in zip(exact, eighth, strict=True)]
    assert 0 < max(apart) < 40 and f'"store": "{store}"' in Image.open(eighth[0]).text["afa"]
    with pytest.raises(UserError, match="was made with store"):
        generate(replace(settings, output=str(tmp_path / store), store="fp8" if store == "int8" else "int8"))


def test_experts_in_the_cpus_memory_are_refused_where_they_would_run_there(settings):
    with pytest.raises(UserError, match="--store cpu keeps experts beside a GPU"):
        generate(replace(settings, store="cpu"))


def test_processes_draw_one_seed_for_all(settings, tmp_path, capfd):
    command = ["generate", *settings.sources, "--prompt", "a cat", "a dog", "--seed", "-1", "--steps", "1", "--width", "32", "--height", "32"]
    assert in_processes(lambda: main([*command, "--device", "cpu", "--output", str(tmp_path / "two")])) == [0, 0]
    seeds = [json.loads(line)["seed"] for line in (tmp_path / "two" / "images.jsonl").read_text().splitlines()]
    drawn = [json.loads(Image.open(tmp_path / "two" / f"0000{index}-00.png").text["afa"])["seed"] for index in range(2)]
    assert drawn == seeds == [seeds[0], seeds[0] + 1]
